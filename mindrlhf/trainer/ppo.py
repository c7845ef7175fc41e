"""PPOTrainer: the online loop with a critic; and the functions of the published PPO program around it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from mindrlhf.advantages import explained_variance
from mindrlhf.config import PPOConfig, load_config
from mindrlhf.data.packing import Packing
from mindrlhf.data.tokenizers import load_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.layout import Layout
from mindrlhf.rewards import Rewards
from mindrlhf.trainer.algorithms import ALGORITHMS
from mindrlhf.trainer.credit import Credit, Scores
from mindrlhf.trainer.critic import OwnCritic, TrunkCritic
from mindrlhf.trainer.layouts import scoring_layout, training_layout
from mindrlhf.trainer.loop import mean, prefixed
from mindrlhf.trainer.online import OnlineTrainer
from mindrlhf.trainer.published import (
    check_same,
    checkpoint_of,
    described_policy,
    described_reference,
    refuse_without_model,
)
from mindrlhf.trainer.reward_model import RewardModel
from mindrlhf.trainer.reward_parts import ModelReward
from mindrlhf.trainer.roles import Policy
from mindrlhf.trainer.updates import Update
from mindrlhf.types import Rollout
from mindrlhf.wrapper.policy_objectives import ActorCriticObjective
from mindrlhf.wrapper.train_step import StepResult, TrainStep


class PPOTrainer(OnlineTrainer):
    """PPO, https://arxiv.org/abs/1707.06347: the online loop, its advantages by GAE over a critic's values.

    Either PPOTrainer(config), where the config names or builds the models, or as the published program has it: model
    configurations of MindFormers (LlamaConfig). Each one's checkpoint_name_or_path may name a Hugging Face checkpoint
    directory; without one its weights are random. The tokenizer is the argument, or else config.model.tokenizer, or
    else the policy's checkpoint's. rm_model_config is the reward, or reward_funcs are; else the config's `rewards`.
    """

    config: PPOConfig

    def __init__(
        self,
        ppo_config: PPOConfig | None = None,
        sft_model_config: Any = None,
        ref_model_config: Any = None,
        critic_model_config: Any = None,
        rm_model_config: Any = None,
        tokenizer: Any = None,
        reward_funcs: Callable | Sequence[Callable] | None = None,
    ):
        config = ppo_config or PPOConfig()
        _check(config)
        policy = self._critic_model = None
        rewards = Rewards.from_functions(reward_funcs) if reward_funcs else None
        if sft_model_config is None:
            refuse_without_model(
                "PPOTrainer", "sft_model_config", ref_model_config=ref_model_config, rm_model_config=rm_model_config,
                critic_model_config=critic_model_config, tokenizer=tokenizer,
            )  # fmt: skip
        else:
            tokenizer = tokenizer or _tokenizer(config, sft_model_config)
            if ref_model_config is not None:
                check_same("sft_model_config", sft_model_config, "ref_model_config", ref_model_config)
            layout = training_layout(config)
            policy = described_policy(sft_model_config, tokenizer, config.seed, "sft_model_config", layout)
            if critic_model_config is not None and (config.critic.shared_trunk or config.critic.model):
                raise UserError("PPOTrainer: critic_model_config: the config's critic section says otherwise; give one")
            if critic_model_config is not None:
                self._critic_model = _scoring(critic_model_config, tokenizer, config, layout, "critic_model_config")
            if rm_model_config is not None and rewards:
                raise UserError("PPOTrainer: rm_model_config and reward_funcs are both a reward; give one of them")
            if rm_model_config is not None:
                scoring = scoring_layout(layout)
                model = RewardModel(_scoring(rm_model_config, tokenizer, config, scoring, "rm_model_config"))
                rewards = Rewards([("reward_model", ModelReward(model, "rm_model_config"), 1.0)])
        super().__init__(config, policy, rewards)
        if policy is not None and self.needs_reference:
            self.scorer = described_reference(ref_model_config, policy, self.algorithm.loss.temperature)

    # -- the critic's half ------------------------------------------------------------------------------------------

    def make_objective(self) -> nn.Cell:
        config, decoder = self.config.critic, self.policy.decoder
        if config.shared_trunk:
            self.critic = TrunkCritic(self.policy)
            objective = ActorCriticObjective(
                decoder, self.critic.head, self.algorithm.loss, config.coef, config.value_clip
            )
        else:
            self.critic = OwnCritic(config, self.policy, self.config.optimizer, self._critic_model)
            objective = super().make_objective()
        self.critic.add_roles(self.memory)
        self.batch_types = (self.critic.policy_batch, self.critic.batch)
        return objective

    def trained_parameters(self) -> list:
        own = [self.critic.head.weight] if isinstance(self.critic, TrunkCritic) else []
        return [*super().trained_parameters(), *own]

    @property
    def first_policy_step(self) -> int:
        return self.config.critic.warmup_steps

    def warmed_up(self) -> None:
        super().warmed_up()
        self.critic.start(self.policy)

    def values(self, packings: Sequence[Packing], rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        with self.memory.phase("score critic", self.critic.role):
            return [found for packing in packings for found in packing.collect(self.critic.values(packing.batches))]

    def describe_scores(self, scores: Scores, credit: Credit) -> dict[str, float]:
        values, returns = (np.concatenate([np.zeros(0), *lists]) for lists in (scores.values, credit.returns))
        return super().describe_scores(scores, credit) | {
            "critic/explained_variance": explained_variance(values, returns),
            "critic/value": mean(values),
            "critic/return": mean(returns),
        }

    def train_once(self, train_step: TrainStep, update: Update, rate: float) -> StepResult | None:
        warm = self.step >= self.config.critic.warmup_steps
        return super().train_once(train_step, update, rate) if warm else None

    def train(self, train_step: TrainStep, dataset: list[Update], epoch: int | None = None) -> dict[str, float]:
        """The critic first, whose values are just computed, then the policy, which the next answers need."""
        updates = [update for update in dataset if update.critic] * self.config.algorithm.epochs_per_rollout
        if not updates:  # on a shared trunk the policy's step trains it
            return super().train(train_step, dataset, epoch)
        rate = self.rate(self.config.critic.learning_rate)
        with self.memory.phase("train critic", "critic", "critic_optimizer", "critic_gradients"):
            results = [self.critic.train(update.critic, rate) for update in updates]
        return super().train(train_step, dataset, epoch) | {
            "critic/skipped_updates": self.critic.train_step.skipped,
            "critic/loss": mean([result.loss for result in results]),
            "critic/gradient_norm": mean([result.gradient_norm for result in results]),
            **value_metrics([result.metrics for result in results]),
        }

    def describe_training(self, results: list[StepResult], rate: float) -> dict[str, float]:
        metrics = super().describe_training(results, rate)
        if isinstance(self.critic, TrunkCritic) and results:
            sums = [result.metrics for result in results]
            metrics |= {"critic/loss": mean([own["value_loss"] for own in sums]), **value_metrics(sums)}
        return metrics

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return super().state() | {"critic": self.critic.counts}

    def write(self, directory: Path) -> None:
        super().write(directory)
        with self.memory.phase("checkpoint", self.critic.role):
            self.critic.write(directory / "critic")

    def load(self, directory: Path) -> None:
        super().load(directory)
        with self.memory.phase("load", self.critic.role):
            self.critic.load(directory / "critic")

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from super().tensors()
        yield from prefixed("critic", self.critic.state())

    def load_tensors(self, read: Callable[[str], np.ndarray], state: dict[str, Any]) -> None:
        super().load_tensors(read, state)
        with self.memory.phase("load", "critic_optimizer"):
            self.critic.load_state(lambda name: read(f"critic.{name}"), *state["critic"])


def value_metrics(sums: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of the sums of a step's updates."""
    clipped, tokens = (sum(own[name] for own in sums) for name in ("value_clip_fraction", "value_tokens"))
    return {"critic/clip_fraction": clipped / max(tokens, 1.0)}


def init_configs(args: Any = None) -> tuple[PPOConfig, Any, Any, Any, Any]:
    """(ppo_config, sft_model_config, ref_model_config, critic_model_config, rm_model_config) of the published program.

    args: an object with `config`, this suite's YAML of a PPOConfig (may be missing or empty: the defaults), and
    sft_model_path, critic_model_path and reward_model_path, MindFormers YAMLs of the models. The reference is the
    policy as it starts. Raises UserError.
    """
    from mindformers import LlamaConfig, MindFormerConfig

    def model(option: str):
        path = getattr(args, option, None)
        if not path:
            raise UserError(f"{option}: no file is named; it is the YAML of a model in MindFormers' schema")
        if not Path(path).is_file():
            raise UserError(f"{option}: {path}: no such file")
        return LlamaConfig(**MindFormerConfig(str(path)).model.model_config)

    config = load_config(PPOConfig, getattr(args, "config", None) or None, [])
    names = ("sft_model_path", "sft_model_path", "critic_model_path", "reward_model_path")
    return config, *(model(name) for name in names)


def init_network_and_optimizer(trainer: PPOTrainer) -> TrainStep:
    """The compiled policy network with loss and optimizer that `trainer.train` takes; the critic's is beside it."""
    return trainer.train_step


def init_ppo_dataset(trainer: PPOTrainer) -> list[Update]:
    """The experience that `trainer.make_experience` made, packed for training."""
    return trainer.make_dataset()


def _check(config: PPOConfig) -> None:
    row, critic = ALGORITHMS.get(config.algorithm.name), config.critic
    if row and row.needs != "critic":
        raise UserError(f"algorithm.name: {config.algorithm.name} has no critic; take `mindrlhf grpo` or GRPOTrainer")
    for name, good, range_ in (
        ("learning_rate", critic.learning_rate > 0, "over 0"),
        ("coef", critic.coef > 0, "over 0"),
        ("value_clip", critic.value_clip >= 0, "0 (off) or more"),
        ("warmup_steps", critic.warmup_steps >= 0, "0 (none) or more"),
    ):
        if not good:
            raise UserError(f"critic.{name}: {getattr(critic, name)} must be {range_}")
    if critic.shared_trunk and critic.model:
        raise UserError("critic.model: a shared trunk is the policy's; remove it, or set critic.shared_trunk: false")
    if critic.shared_trunk and critic.warmup_steps:
        raise UserError("critic.warmup_steps: on a shared trunk it would move the policy; set it to 0")


def _tokenizer(config: PPOConfig, sft_model_config: Any) -> Any:
    directory = config.model.tokenizer or checkpoint_of(sft_model_config)
    if not directory:
        raise UserError(
            "PPOTrainer: no tokenizer; pass tokenizer=, set ppo_config.model.tokenizer to its directory, or name a "
            "checkpoint in sft_model_config"
        )
    return load_tokenizer(directory)


def _scoring(model_config: Any, tokenizer: Any, config: PPOConfig, layout: Layout, name: str) -> Policy:
    return described_policy(model_config, tokenizer, config.seed, name, layout, head="score")
