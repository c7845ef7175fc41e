"""The table of online algorithms. An algorithm is an advantage function and some numbers: one row.

What the YAML's `algorithm` section leaves at None takes the row's value.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mindrlhf.advantages import AGGREGATIONS, group_centered, group_normalized
from mindrlhf.config import AlgorithmConfig, RolloutConfig
from mindrlhf.errors import UserError
from mindrlhf.wrapper.objectives import PolicyLoss


@dataclass(frozen=True)
class Algorithm:
    paper: str
    advantage: Callable[[np.ndarray, np.ndarray, float], np.ndarray]  # rewards [n], groups [n], epsilon -> [n]
    aggregation: str
    eps_high: float = 0.2
    kl_coef: float = 0.0
    dynamic_sampling: bool = False
    overlong_share: float = 0.0  # of max_tokens: where the length penalty begins, counted from the end


def _centered(rewards: np.ndarray, groups: np.ndarray, epsilon: float) -> np.ndarray:
    return group_centered(rewards, groups)


ALGORITHMS = {
    "grpo": Algorithm("arXiv 2402.03300, DeepSeekMath", group_normalized, "sequence_mean", kl_coef=0.04),
    "dr_grpo": Algorithm("arXiv 2503.20783, Understanding R1-Zero-like training", _centered, "constant"),
    "dapo": Algorithm(
        "arXiv 2503.14476, DAPO: clip-higher, dynamic sampling, token mean, overlong penalty",
        group_normalized,
        "token_mean",
        eps_high=0.28,
        dynamic_sampling=True,
        overlong_share=0.2,
    ),
}


@dataclass(frozen=True)
class Resolved:
    """A row with the config's choices on top: what the trainer runs."""

    advantage: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    aggregation: str
    kl_coef: float
    kl_in_reward: bool
    dynamic_sampling: bool
    overlong_buffer: int  # tokens
    loss: PolicyLoss


def resolve(config: AlgorithmConfig, rollout: RolloutConfig) -> Resolved:
    """Raises UserError for an unknown name and for choices that contradict each other."""
    row = ALGORITHMS.get(config.name)
    if row is None:
        raise UserError(f"algorithm.name: {config.name!r} is unknown; there are {', '.join(ALGORITHMS)}")
    aggregation = row.aggregation if config.aggregation is None else config.aggregation
    if aggregation not in AGGREGATIONS:
        raise UserError(f"algorithm.aggregation: {aggregation!r} is unknown; there are {', '.join(AGGREGATIONS)}")
    if rollout.num_generations < 2:
        raise UserError(
            f"rollout.num_generations: {rollout.num_generations}; the baseline of {config.name} is the other answers "
            "of the group, so 2 or more are needed"
        )
    kl_coef = row.kl_coef if config.kl_coef is None else config.kl_coef
    buffer = config.overlong_buffer
    if buffer is None:
        buffer = int(row.overlong_share * rollout.sampling.max_tokens)
    if not 0 <= buffer <= rollout.sampling.max_tokens:
        raise UserError(f"algorithm.overlong_buffer: {buffer} is not between 0 and max_tokens")
    loss = PolicyLoss(
        # Greedy answers have no distribution to train on; temperature 0 is refused by the trainer.
        temperature=rollout.sampling.temperature,
        eps_low=config.eps_low,
        eps_high=row.eps_high if config.eps_high is None else config.eps_high,
        dual_clip=config.dual_clip,
        kl_coef=0.0 if config.kl_in_reward else kl_coef,
        kl_estimator=config.kl_estimator,
        entropy_coef=config.entropy_coef,
    )
    dynamic = row.dynamic_sampling if config.dynamic_sampling is None else config.dynamic_sampling
    return Resolved(row.advantage, aggregation, kl_coef, config.kl_in_reward, dynamic, buffer, loss)
