"""The table of online algorithms. An algorithm is an advantage function, a policy loss and some numbers: one row.

What the YAML's `algorithm` section leaves at None takes the row's value.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mindrlhf.advantages import (
    AGGREGATIONS,
    best_of_group,
    group_centered,
    group_normalized,
    leave_one_out,
    optimal_baseline,
)
from mindrlhf.config import AlgorithmConfig, MismatchConfig, RolloutConfig
from mindrlhf.errors import UserError
from mindrlhf.losses import POLICY_LOSSES
from mindrlhf.wrapper.policy_objectives import PolicyLoss


class Outcomes(NamedTuple):
    """What a step's n answers came to."""

    rewards: np.ndarray  # [n] float64
    groups: np.ndarray  # [n] int
    lengths: np.ndarray  # [n] int, sampled tokens
    greedy_rewards: np.ndarray  # [n] float64, of the greedy answer to the same prompt, where the algorithm needs it


Advantage = Callable[[Outcomes, float], np.ndarray]  # outcomes, advantage_epsilon -> [n] float64


@dataclass(frozen=True)
class Algorithm:
    paper: str
    advantage: Advantage
    needs: Literal["nothing", "group", "greedy", "critic"] = "nothing"  # what its baseline is made of
    policy_loss: str = "ppo"  # of losses.POLICY_LOSSES
    aggregation: str = "token_mean"
    whiten: bool = False
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_in_reward: bool = False
    dynamic_sampling: bool = False
    overlong_share: float = 0.0  # of max_tokens: where the length penalty begins, counted from the end


def _rewards(outcomes: Outcomes, epsilon: float) -> np.ndarray:
    return outcomes.rewards


def _normalized(outcomes: Outcomes, epsilon: float) -> np.ndarray:
    return group_normalized(outcomes.rewards, outcomes.groups, epsilon)


def _centered(outcomes: Outcomes, epsilon: float) -> np.ndarray:
    return group_centered(outcomes.rewards, outcomes.groups)


def _leave_one_out(outcomes: Outcomes, epsilon: float) -> np.ndarray:
    return leave_one_out(outcomes.rewards, outcomes.groups)


def _optimal(outcomes: Outcomes, epsilon: float) -> np.ndarray:
    return optimal_baseline(outcomes.rewards, outcomes.groups, outcomes.lengths)


def _above_greedy(outcomes: Outcomes, epsilon: float) -> np.ndarray:
    return outcomes.rewards - outcomes.greedy_rewards


def _best(outcomes: Outcomes, epsilon: float) -> np.ndarray:
    return best_of_group(outcomes.rewards, outcomes.groups, epsilon)


ALGORITHMS = {
    "ppo": Algorithm(
        "arXiv 1707.06347, PPO, with GAE, arXiv 1506.02438; KL in the reward as in arXiv 1909.08593",
        _rewards, "critic", whiten=True, kl_coef=0.05, kl_estimator="k1", kl_in_reward=True,
    ),
    "reinforce": Algorithm(
        "Williams 1992, doi 10.1007/BF00992696: no baseline",
        _rewards, policy_loss="reinforce", aggregation="sequence_sum", kl_estimator="k1", kl_in_reward=True,
    ),
    "reinforce++": Algorithm(
        "arXiv 2501.03262: returns with the KL in them, whitened over the step",
        _rewards, whiten=True, kl_coef=0.01, kl_estimator="k1", kl_in_reward=True,
    ),
    "reinforce++-baseline": Algorithm(
        "arXiv 2501.03262: the group's mean as baseline, whitened over the step",
        _centered, "group", whiten=True, kl_coef=0.01, kl_estimator="k2",
    ),
    "rloo": Algorithm(
        "arXiv 2402.14740: the mean of the group's other answers as baseline",
        _leave_one_out, "group", "reinforce", "sequence_sum", kl_coef=0.01, kl_estimator="k1", kl_in_reward=True,
    ),
    "grpo": Algorithm(
        "arXiv 2402.03300, DeepSeekMath",
        _normalized, "group", aggregation="sequence_mean", kl_coef=0.04,
    ),
    "dr_grpo": Algorithm(
        "arXiv 2503.20783, Understanding R1-Zero-like training",
        _centered, "group", aggregation="constant",
    ),
    "dapo": Algorithm(
        "arXiv 2503.14476, DAPO: clip-higher, dynamic sampling, token mean, overlong penalty",
        _normalized, "group", eps_high=0.28, dynamic_sampling=True, overlong_share=0.2,
    ),
    "gspo": Algorithm(
        "arXiv 2507.18071: the ratio of whole answers, in a narrow range",
        _normalized, "group", "gspo", "sequence_mean", eps_low=3e-4, eps_high=4e-4,
    ),
    "cispo": Algorithm(
        "arXiv 2506.13585, MiniMax-M1: clipped importance weights, no token without gradient",
        _normalized, "group", "cispo", eps_low=1.0, eps_high=0.28,
    ),
    "remax": Algorithm(
        "arXiv 2310.10505: the reward of the greedy answer as baseline",
        _above_greedy, "greedy", "reinforce", "sequence_sum", kl_coef=0.01, kl_estimator="k1", kl_in_reward=True,
    ),
    "opo": Algorithm(
        "arXiv 2505.23585: the length-weighted mean of the group as baseline, which has the least variance",
        _optimal, "group", "reinforce", "sequence_sum",
    ),
    "dual_clip": Algorithm(
        "arXiv 1912.09729: GRPO whose loss is bounded where the advantage is negative",
        _normalized, "group", aggregation="sequence_mean", dual_clip=3.0, kl_coef=0.04,
    ),
    "pass_at_k": Algorithm(
        "arXiv 2503.19595: only the best answer of a group is paid, by its lead over the second",
        _best, "group", aggregation="sequence_mean",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """A row with the config's choices on top: what the trainer runs."""

    row: Algorithm
    aggregation: str
    whiten: bool
    gamma: float
    gae_lambda: float
    kl_coef: float
    kl_estimator: str
    kl_in_reward: bool
    dynamic_sampling: bool
    overlong_buffer: int  # tokens
    correction: str
    rescore: bool  # old log-probs come from a forward pass before training
    loss: PolicyLoss


def resolve(config: AlgorithmConfig, rollout: RolloutConfig) -> Resolved:
    """Raises UserError for an unknown name and for choices that contradict each other."""
    row = _known("algorithm.name", config.name, ALGORITHMS)

    def chosen(name: str):
        value = getattr(config, name)
        return getattr(row, name) if value is None else value

    aggregation = chosen("aggregation")
    _known("algorithm.aggregation", aggregation, dict.fromkeys(AGGREGATIONS))
    _known("algorithm.policy_loss", chosen("policy_loss"), POLICY_LOSSES)
    if row.needs == "group" and rollout.num_generations < 2:
        raise UserError(
            f"rollout.num_generations: {rollout.num_generations}; the baseline of {config.name} is the other answers "
            "of the group, so 2 or more are needed"
        )
    buffer = config.overlong_buffer
    if buffer is None:
        buffer = int(row.overlong_share * rollout.sampling.max_tokens)
    if not 0 <= buffer <= rollout.sampling.max_tokens:
        raise UserError(f"algorithm.overlong_buffer: {buffer} is not between 0 and max_tokens")
    kl_coef, kl_in_reward, estimator = chosen("kl_coef"), chosen("kl_in_reward"), chosen("kl_estimator")
    _check_kl(config, kl_coef, kl_in_reward, estimator)
    for name, good, range_ in (
        ("eps_low", chosen("eps_low") >= 0, "0 or more"),
        ("eps_high", chosen("eps_high") >= 0, "0 or more"),
        ("dual_clip", chosen("dual_clip") == 0 or chosen("dual_clip") > 1, "0 (off) or over 1"),
    ):
        if not good:
            raise UserError(f"algorithm.{name}: {chosen(name)} must be {range_}")
    loss = PolicyLoss(
        kind=chosen("policy_loss"),
        # Greedy answers have no distribution to train on; temperature 0 is refused by the trainer.
        temperature=rollout.sampling.temperature,
        eps_low=chosen("eps_low"),
        eps_high=chosen("eps_high"),
        dual_clip=chosen("dual_clip"),
        kl_coef=0.0 if kl_in_reward else kl_coef,
        kl_estimator=estimator,
        entropy_coef=config.entropy_coef,
    )
    correction, rescore = _mismatch(config.mismatch, rollout)
    return Resolved(
        row, aggregation, chosen("whiten"), config.gamma, config.gae_lambda, kl_coef, estimator, kl_in_reward,
        chosen("dynamic_sampling"), buffer, correction, rescore, loss,
    )  # fmt: skip


def _known(option: str, name: str, table: dict):
    if name not in table:
        raise UserError(f"{option}: {name!r} is unknown; there are {', '.join(table)}")
    return table[name]


def _check_kl(config: AlgorithmConfig, kl_coef: float, kl_in_reward: bool, estimator: str) -> None:
    if kl_coef < 0:
        raise UserError(f"algorithm.kl_coef: {kl_coef} must be 0 (off) or more: it is what leaving the reference costs")
    if config.kl_target and not (kl_in_reward and kl_coef):
        raise UserError(
            "algorithm.kl_target: the controller steers a KL in the reward; set kl_in_reward: true and kl_coef over 0"
        )
    if kl_coef and not kl_in_reward and estimator == "k1":
        problem = "k1 as a loss has gradient 1 whatever the reference says; take k2 or k3"
        warnings.warn(f"algorithm.kl_estimator: {problem}", stacklevel=3)


def _mismatch(mismatch: MismatchConfig, rollout: RolloutConfig) -> tuple[str, bool]:
    """(correction, rescore): answers of older weights are corrected where nothing else is said."""
    stale = rollout.asynchronous or rollout.partial_tokens > 0
    correction = mismatch.correction
    if correction == "auto":
        correction = "truncated" if stale else "none"
    if not 0 <= mismatch.low <= 1 <= mismatch.high:
        raise UserError(f"algorithm.mismatch: low {mismatch.low} and high {mismatch.high} must have 1 between them")
    return correction, mismatch.rescore or stale or correction != "none"
