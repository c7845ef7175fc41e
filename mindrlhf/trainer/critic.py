"""PPO's critic: the value of the state before each sampled token. Its own decoder, or a head on the policy's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mindrlhf.config import CriticConfig, OptimizerConfig
from mindrlhf.errors import UserError
from mindrlhf.models.decoder import Decoder
from mindrlhf.models.hf import read_tensor_file, write_tensor_file
from mindrlhf.models.shapes import SCORE, expected_shapes
from mindrlhf.trainer.roles import Policy, check_same_tokens, check_vocabulary, open_checkpoint
from mindrlhf.types import ActorCriticBatch, PackedRows, PolicyBatch, ValueBatch
from mindrlhf.utils.parallel import is_main
from mindrlhf.utils.swap import Memory
from mindrlhf.wrapper.loss_scale import LossScale
from mindrlhf.wrapper.policy_objectives import TrunkValues, ValueHead, ValueObjective
from mindrlhf.wrapper.scorer import POSITION_FIELDS, ScoreHead, over
from mindrlhf.wrapper.train_step import StepResult, TrainStep


class OwnCritic:
    """A decoder with a score head, its own optimizer, and a checkpoint like a reward model's."""

    policy_batch, batch = PolicyBatch, ValueBatch
    role = "critic"  # where its weights are

    def __init__(self, config: CriticConfig, policy: Policy, optimizer: OptimizerConfig, model: Policy | None = None):
        """model: the critic where the program has made it; else config.model, else a copy of the policy. UserError."""
        if model is None and config.model:
            make = policy.decoder.config.compute.applied_to(Decoder)
            model = open_checkpoint(config.model, head="score", layout=policy.decoder.layout, make=make)
            check_vocabulary(policy.tokenizer, model.decoder.config, f"critic.model: {config.model}")
            check_same_tokens(policy.tokenizer, model.tokenizer, f"critic.model: {config.model}")
            theirs, ours = model.decoder.config.max_positions, policy.decoder.config.max_positions
            if theirs < ours:
                raise UserError(f"critic.model: {config.model} has {theirs} positions, the policy {ours}; take another")
        self._copies_policy = model is None
        self.model = model or Policy(_with_score_head(policy.decoder), policy.tokenizer, policy.generation_config)
        self._head = ScoreHead(self.model.decoder)
        objective = ValueObjective(self.model.decoder, config.value_clip)
        decoder = self.model.decoder
        scale = LossScale.of(decoder)
        self.train_step = TrainStep(objective, self.model.trainable, optimizer, shard=decoder.shard, loss_scale=scale)

    def add_roles(self, memory: Memory) -> None:
        memory.add("critic_optimizer", self.train_step.moments)
        memory.add("critic_gradients", self.train_step.gradients, release=self.train_step.release)
        memory.add("critic", list(self.model.decoder.get_parameters()), changing=self.model.trainable)

    def start(self, policy: Policy) -> None:
        """Called as online training begins: a warm-up may have moved what this is a copy of."""
        if self._copies_policy:
            own = self.model.decoder
            own.load(lambda name: own.weights(name) if name == SCORE else policy.decoder.weights(name))

    def values(self, batches: Sequence[PackedRows]) -> list[np.ndarray]:
        """[N] float32 of each micro-batch; 0 on padding."""
        return self._head.score(batches)

    def train(self, batches: Sequence[ValueBatch], learning_rate: float) -> StepResult:
        """One optimizer step."""
        return self.train_step(batches, learning_rate)

    def write(self, directory: Path) -> None:
        self.model.write(directory)

    def load(self, directory: Path) -> None:
        self.model.load(directory)

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """Optimizer tensors by name."""
        return self.train_step.state()

    def load_state(self, read: Callable[[str], np.ndarray], updates: int, skipped: int) -> None:
        self.train_step.load_state(read, updates, skipped)

    @property
    def counts(self) -> tuple[int, int]:
        """Optimizer steps taken and skipped."""
        return self.train_step.updates, self.train_step.skipped


class TrunkCritic:
    """A value head on the policy's hidden states, trained in the policy's graph and by its optimizer."""

    policy_batch, batch = ActorCriticBatch, None
    role = "policy"  # whose train step has its head
    counts = (0, 0)  # of an optimizer of its own, which it has not
    FILE = "value_head.safetensors"

    def __init__(self, policy: Policy):
        self.head = ValueHead(policy.decoder.config.hidden_size)
        self._decoder = policy.decoder
        self._values = TrunkValues(policy.decoder, self.head)

    def add_roles(self, memory: Memory) -> None:
        """It has none of its own."""

    def start(self, policy: Policy) -> None:
        """The head is 0 whatever the policy is."""

    def values(self, batches: Sequence[PackedRows]) -> list[np.ndarray]:
        return over(batches, POSITION_FIELDS, self._values, self._decoder)

    def write(self, directory: Path) -> None:
        weight = self.head.weight.asnumpy()
        if is_main():
            directory.mkdir(parents=True)
        write_tensor_file(directory / self.FILE, [(self.head.weight.name, weight.shape, lambda: weight)])

    def load(self, directory: Path) -> None:
        self.head.weight.set_data(Tensor(np.array(read_tensor_file(directory / self.FILE)[self.head.weight.name])))

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        return iter(())

    def load_state(self, read: Callable[[str], np.ndarray], updates: int, skipped: int) -> None:
        """Its moments are the policy's."""


def _with_score_head(decoder: Decoder) -> Decoder:
    """A copy, adapters merged, with a score head of zeros instead of the logits."""
    config = replace(decoder.config, head="score")
    score = np.zeros(expected_shapes(config)[SCORE], np.float32)
    return Decoder(config, lambda name: score if name == SCORE else decoder.weights(name), layout=decoder.layout)
