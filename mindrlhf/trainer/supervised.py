"""Training per token: SFT and process reward models; distillation is in distillation.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from mindrlhf.advantages import loss_weights
from mindrlhf.config import ModelConfig, OnlineConfig, PRMConfig, SFTConfig, SourceConfig, TrainerConfig, TrainingConfig
from mindrlhf.data.conversations import read_conversations
from mindrlhf.data.examples import Examples
from mindrlhf.data.judged_steps import read_judged_steps, step_token_ids
from mindrlhf.data.packing import Packing
from mindrlhf.errors import UserError
from mindrlhf.trainer.offline import OfflineTrainer
from mindrlhf.trainer.roles import Policy
from mindrlhf.types import Conversation, JudgedSteps, StepRewardBatch, SupervisedBatch
from mindrlhf.wrapper.objectives import StepRewardObjective, SupervisedObjective


class SupervisedTrainer(OfflineTrainer):
    """A loss at every target token, as the token mean over each optimizer step."""

    shift = 1  # 1: a token is predicted at the one before it; 0: judged where it stands
    batch_type: type = SupervisedBatch

    def sequences(self, example: Any) -> list[Conversation]:
        return [example]

    def batches(self, split: str, numbers: Sequence[int]) -> list[tuple]:
        return self.supervised_batches([self.examples[split].items[number] for number in numbers])

    def supervised_batches(self, examples: Sequence[Any]) -> list[tuple]:
        sequences = [sequence for example in examples for sequence in self.sequences(example)]
        packing = self.pack(sequences, shift=self.shift)
        counts = [int(sequence.trained.sum()) for sequence in sequences]
        weights = loss_weights(counts, "token_mean", max(counts))
        spread = packing.spread([np.full(n, w, np.float32) for n, w in zip(counts, weights, strict=True)])
        targets = self.targets(packing, examples)
        return [
            self.batch_type(*rows, weight, *target)
            for rows, weight, target in zip(packing.batches, spread, targets, strict=True)
        ]

    def targets(self, packing: Packing, examples: Sequence[Any]) -> list[tuple[np.ndarray, ...]]:
        """What the batch type has beside labels and weights, a tuple a micro-batch."""
        return [()] * len(packing.batches)


class SFTTrainer(SupervisedTrainer):
    """Supervised fine-tuning: the answers' negative log-likelihood.

    SFTTrainer(load_config(SFTConfig, "job.yaml")).fit()
    """

    config: SFTConfig

    def read(self, sources: list[SourceConfig]) -> Examples[Conversation]:
        return read_conversations(sources, self.config.data, self.policy.tokenizer, self.max_tokens, Path())

    def make_objective(self) -> nn.Cell:
        return SupervisedObjective(self.policy.decoder)


class PRMTrainer(SupervisedTrainer):
    """A process reward model: which of the reward tokens follows each step. Math-Shepherd, arXiv 2312.08935."""

    config: PRMConfig
    shift, unit, batch_type = 0, "steps", StepRewardBatch

    def read(self, sources: list[SourceConfig]) -> Examples[JudgedSteps]:
        config, tokenizer = self.config, self.policy.tokenizer
        return read_judged_steps(sources, config.data, tokenizer, self.max_tokens, Path(), config.steps)

    def sequences(self, example: JudgedSteps) -> list[Conversation]:
        return [Conversation(example.ids, example.judged)]

    def make_objective(self) -> nn.Cell:
        _, reward_tokens = step_token_ids(self.policy.tokenizer, self.config.steps)
        return StepRewardObjective(self.policy.decoder, reward_tokens)

    def targets(self, packing: Packing, examples: Sequence[JudgedSteps]) -> list[tuple[np.ndarray, ...]]:
        kinds = [packing.spread(list(column)) for column in zip(*(e.probabilities.T for e in examples), strict=True)]
        return [(np.stack(arrays, axis=1),) for arrays in zip(*kinds, strict=True)]


def pretraining_stage(config: OnlineConfig, policy: Policy) -> SFTTrainer | None:
    """What an online job mixes in: its batches and its objective. None where it mixes in nothing."""
    if not config.pretraining.coef:
        return None
    if not config.pretraining.train:
        raise UserError("pretraining.train: no file is named; set it, or pretraining.coef=0")
    training = TrainingConfig(config.pretraining.batch_size)
    return stage_on(config, policy, config.pretraining.train, training, TrainerConfig())


def stage_on(
    config: OnlineConfig, policy: Policy, train: list[SourceConfig], training: TrainingConfig, trainer: TrainerConfig
) -> SFTTrainer:
    """Supervised training inside an online job, on its policy."""
    data = replace(config.data, train=train, test=[])
    trainer = replace(trainer, rows=config.trainer.rows)
    model = ModelConfig(balance=config.model.balance)  # of the rest nothing is read: the policy is there
    common = dict(seed=config.seed, model=model, data=data, optimizer=config.optimizer, trainer=trainer)
    return SFTTrainer(SFTConfig(training=training, **common), policy)
