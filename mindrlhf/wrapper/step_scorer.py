"""A process reward model's judgement of steps, for whoever rewards with it."""

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mindrlhf.models.decoder import Decoder
from mindrlhf.types import PackedRows
from mindrlhf.wrapper.graph import Graph
from mindrlhf.wrapper.scorer import POSITION_FIELDS, over


def step_logits(decoder, tokens, positions, segments, index, reward_tokens):
    """The logits [N, R] of the R reward tokens at the placeholders, which is all that a judgement is made of."""
    hidden = decoder.targets(tokens, positions, segments, index)
    return ops.gather(decoder.logits(hidden), reward_tokens, 1)


class StepScorer(Graph):
    """The judgement [N] in [0, 1] at the target positions of a micro-batch of packed rows.

    sum_i p_i (1 - i / (R - 1)) over the R reward tokens, best first, p = softmax over their logits alone, as they are
    trained: 1 where the best is certain, 0 where the worst is; of two tokens the probability of the first.
    """

    def __init__(self, decoder: Decoder, reward_tokens: Sequence[int]):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.reward_tokens = Tensor(list(reward_tokens), ms.int32)
        self.values = Tensor(np.linspace(1.0, 0.0, len(reward_tokens), dtype=np.float32))

    def construct(self, tokens, positions, segments, index):
        logits = step_logits(self.decoder, tokens, positions, segments, index, self.reward_tokens)
        return (ops.softmax(ops.cast(logits, ms.float32), -1) * self.values).sum(-1)

    def score(self, batches: Sequence[PackedRows]) -> list[np.ndarray]:
        """Judgements [N] float32 of each micro-batch; 0 on padding."""
        return over(batches, POSITION_FIELDS, self, self.decoder)
