"""Training on a fixed data set: the loop of SFT, reward models, the DPO family, KTO and distillation."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from mindspore import nn

from mindrlhf.config import OfflineConfig, SourceConfig
from mindrlhf.data.examples import Examples
from mindrlhf.data.packing import Packing, row_width
from mindrlhf.data.prompts import PromptOrder
from mindrlhf.errors import UserError
from mindrlhf.schedules import learning_rate
from mindrlhf.trainer.layouts import row_multiple, training_layout
from mindrlhf.trainer.loop import Trainer, check_numbers
from mindrlhf.trainer.roles import Policy, open_policy
from mindrlhf.types import Conversation
from mindrlhf.utils.logging import RunLog
from mindrlhf.wrapper.balance import Balancer
from mindrlhf.wrapper.loss_scale import LossScale
from mindrlhf.wrapper.train_step import TrainStep

TRAIN, TEST = "train", "test"


class OfflineTrainer(Trainer):
    """A policy and examples. A stage says how to read them, what an objective is and which numbers a batch carries."""

    head = "logits"  # what the model needs on top: "logits" or "score"
    unit = "tokens"  # the metric sum that counts what the other sums are means over
    needs_reference = False
    has_margins = False

    config: OfflineConfig

    def __init__(self, config: OfflineConfig, policy: Policy | None = None):
        self.config = config
        expected = get_type_hints(type(self))["config"]
        if not isinstance(config, expected):
            raise UserError(f"{type(self).__name__} takes a {expected.__name__}, not a {type(config).__name__}")
        self.check()
        if config.model.reference and not self.needs_reference:
            raise UserError("model.reference: this job has no reference policy; remove it")
        if config.data.margin_key and not self.has_margins:
            raise UserError("data.margin_key: only reward models have a margin; remove it")
        self.policy = policy or open_policy(config.model, config.seed, self.head, training_layout(config))
        self.balancer = Balancer.of(self.policy.decoder, config.model.balance)
        window = self.policy.decoder.config.max_positions
        self.max_tokens = config.training.max_tokens or window
        if self.max_tokens > window:
            raise UserError(f"training.max_tokens: {self.max_tokens} is more than the model's window, {window}")
        if not config.data.train:
            raise UserError("data.train: no file is named; list at least one")
        self.examples = {TRAIN: self.read(config.data.train), TEST: self.read(config.data.test)}
        trained = self.examples[TRAIN]
        self.policy.add_stop_ids(trained.stop_ids)
        self.order = PromptOrder(trained.sizes, trained.probabilities, config.seed)
        self.objective = self.make_objective()

    @cached_property
    def train_step(self) -> TrainStep:
        """Made at its first use: who only wants the stage's batches and objective does not pay for an optimizer."""
        dropout = self.policy.decoder.set_dropout
        return TrainStep(
            self.objective, self.policy.trainable, self.config.optimizer, dropout, self.config.seed,
            shard=self.policy.decoder.shard, balancer=self.balancer, loss_scale=LossScale.of(self.policy.decoder),
        )  # fmt: skip

    def check(self) -> None:
        """What no single field of the config shows. Raises UserError."""
        training = self.config.training
        checks = (
            ("training.batch_size", training.batch_size, training.batch_size > 0, "1 or more"),
            ("training.learning_rate", training.learning_rate, training.learning_rate > 0, "over 0"),
            ("training.warmup_steps", training.warmup_steps, training.warmup_steps >= 0, "0 (none) or more"),
            ("training.max_tokens", training.max_tokens, training.max_tokens >= 0, "0 (the model's window) or more"),
        )
        check_numbers(self.config, checks)

    @abstractmethod
    def read(self, sources: list[SourceConfig]) -> Examples: ...

    @abstractmethod
    def sequences(self, example: Any) -> list[Conversation]:
        """What an example puts into its row; `trained` marks what the objective reads."""

    @abstractmethod
    def make_objective(self) -> nn.Cell:
        """From the fields of a batch to (loss sum, metric sums)."""

    @abstractmethod
    def batches(self, split: str, numbers: Sequence[int]) -> list[NamedTuple]:
        """Those examples as micro-batches whose weights make the loss a mean over all of them."""

    def pack(self, sequences: Sequence[Conversation], together: int = 1, shift: int = 1) -> Packing:
        """`together` consecutive sequences share a row; see Packing."""
        ids, trained = [s.ids for s in sequences], [s.trained for s in sequences]
        return Packing.of(ids, trained, self.config.trainer.rows, self.row_tokens, together, shift)

    @cached_property
    def longest(self) -> int:
        """Tokens that one example can need in a row."""
        examples = [example for examples in self.examples.values() for example in examples.items]
        return max(sum(len(sequence.ids) for sequence in self.sequences(example)) for example in examples)

    @cached_property
    def row_tokens(self) -> int:
        """trainer.row_tokens, or what is needed."""
        asked = self.config.trainer.row_tokens
        if asked and self.longest > asked:
            raise UserError(
                f"trainer.row_tokens: {asked}, but one example can need {self.longest} tokens; raise it, or "
                "set it to 0: as needed"
            )
        return row_multiple(asked or row_width(self.longest), self.policy.decoder.layout)

    # -- the run ----------------------------------------------------------------------------------------------------

    def total_steps(self) -> int:
        trainer = self.config.trainer
        return trainer.steps or max(trainer.epochs * len(self.examples[TRAIN]) // self.config.training.batch_size, 1)

    def prepare(self, log: RunLog) -> None:
        """Nothing: the policy is what it is."""

    def run_step(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        clock = time.time()
        training = self.config.training
        batches = self.batches(TRAIN, self.order.take(training.batch_size))
        rate = learning_rate(
            self.step, self.total_steps(), training.learning_rate, training.schedule, training.warmup_steps,
            training.min_learning_rate_ratio,
        )  # fmt: skip
        result = self.train_step(batches, rate)
        self.step += 1
        tokens = sum(int(np.count_nonzero(batch.segments)) for batch in batches)
        metrics = {
            "loss": result.loss,
            **self.means(result.metrics),
            **result.routing,
            "learning_rate": rate,
            "gradient_norm": result.gradient_norm,
            "skipped_updates": self.train_step.skipped,
            "tokens_per_second": tokens / (time.time() - clock),
        }
        if result.skipped:
            metrics["skipped_tensor"] = result.skipped
        return metrics, []

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Metric sums as means over the stage's unit."""
        count = max(sums[self.unit], 1.0)
        return {name: value / count for name, value in sums.items() if name != self.unit}

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the held-out examples, as in training."""
        count = len(self.examples[TEST])
        numbers = range(min(self.config.trainer.evaluate_rows or count, count))
        if not numbers:
            return {}
        loss, sums = self.train_step.evaluate(self.batches(TEST, numbers))
        return {"loss": loss, **self.means(sums)}

    def state(self) -> dict[str, Any]:
        return {"order": self.order.state(), "seed": self.config.seed}

    def load_state(self, state: dict[str, Any]) -> None:
        self.order.load_state(state["order"])

    def close(self, log: RunLog) -> dict[str, Any]:
        skipped = {split: examples.skipped for split, examples in self.examples.items() if examples.skipped}
        return {"skipped_rows": skipped} if skipped else {}
