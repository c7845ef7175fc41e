"""Supervised training on conversations."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mindrlhf.advantages import loss_weights
from mindrlhf.config import OptimizerConfig
from mindrlhf.data.packing import Packing
from mindrlhf.data.prompts import PromptOrder
from mindrlhf.models.decoder import Decoder
from mindrlhf.schedules import learning_rate
from mindrlhf.types import Conversation, SupervisedBatch
from mindrlhf.wrapper.objectives import SupervisedObjective
from mindrlhf.wrapper.train_step import TrainStep


def supervised_batches(conversations: Sequence[Conversation], rows: int, row_tokens: int) -> list[SupervisedBatch]:
    """One optimizer step: packed, with the token mean over all of it as weights."""
    packing = Packing.of([c.ids for c in conversations], [c.trained for c in conversations], rows, row_tokens)
    counts = [int(conversation.trained.sum()) for conversation in conversations]
    weights = loss_weights(counts, "token_mean", max(counts))
    spread = packing.spread([np.full(n, w, np.float32) for n, w in zip(counts, weights, strict=True)])
    return [SupervisedBatch(*rows, loss_weight=w) for rows, w in zip(packing.batches, spread, strict=True)]


class SupervisedTrainer:
    """Minimises the negative log-likelihood of the trained tokens, a token mean over each optimizer step."""

    def __init__(self, decoder: Decoder, conversations: Sequence[Conversation], optimizer: OptimizerConfig, seed: int):
        self.conversations = conversations
        self.train_step = TrainStep(SupervisedObjective(decoder), decoder.trainable_params(), optimizer)
        self.order = PromptOrder([len(conversations)], [1.0], seed)

    def train(
        self, steps: int, batch_size: int, peak: float, warmup_steps: int, rows: int, row_tokens: int
    ) -> Iterator[dict[str, float]]:
        """`steps` optimizer steps, yielding the metrics of each; cosine schedule to a tenth of the peak."""
        longest = max(len(conversation.ids) for conversation in self.conversations)
        row_tokens = max(row_tokens, math.ceil(longest / 8) * 8)
        for step in range(steps):
            chosen = [self.conversations[i] for i in self.order.take(batch_size)]
            rate = learning_rate(step, steps, peak, "cosine", warmup_steps, 0.1)
            result = self.train_step(supervised_batches(chosen, rows, row_tokens), rate)
            yield {"loss": result.loss, "learning_rate": rate, "gradient_norm": result.gradient_norm}
