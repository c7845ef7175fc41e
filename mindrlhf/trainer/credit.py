"""Credit assignment: from the rewards of a step's answers to an advantage for each sampled token.

Every array [S] below is over the S sampled tokens of an answer. What an environment wrote is no target of training, so
values, KL and returns step over it as if it took no time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mindrlhf.advantages import gae, mismatch_weights, token_rewards, whiten
from mindrlhf.config import AlgorithmConfig
from mindrlhf.trainer.algorithms import Outcomes, Resolved
from mindrlhf.trainer.loop import mean
from mindrlhf.types import Rollout


class Scores(NamedTuple):
    """Of a step's answers, a list of [S] float32 each."""

    sampled: list[np.ndarray]  # log-probs that generation saw
    old: list[np.ndarray]  # log-probs of the policy before this step's first update
    ref: list[np.ndarray]  # log-probs of the reference policy
    values: list[np.ndarray]  # of the critic, zeros without one


class Credit(NamedTuple):
    advantages: list[np.ndarray]  # [S] float32 an answer
    returns: list[np.ndarray]  # [S] float32 an answer: what the critic's values should have been


def assign(
    rollouts: Sequence[Rollout], scores: Scores, algorithm: Resolved, config: AlgorithmConfig, kl_coef: float
) -> Credit:
    """The whole step at once: baselines are over groups and whitening is over all tokens of it.

    An answer's advantage before whitening: its reward, clipped, less its baseline, stands at its last token (an
    environment's rewards where they were earned, if there is no baseline); the KL penalty, where it is in the reward,
    at every token; GAE over these with the critic's values, which without a critic is the discounted sum of what
    follows. Then whitening, then the correction of the mismatch.
    """
    rewards = np.clip([rollout.reward for rollout in rollouts], -config.reward_clip, config.reward_clip)
    outcomes = Outcomes(
        rewards,
        np.array([rollout.group for rollout in rollouts]),
        np.array([len(old) for old in scores.old]),
        np.clip([rollout.greedy_reward for rollout in rollouts], -config.reward_clip, config.reward_clip),
    )
    totals = algorithm.row.advantage(outcomes, config.advantage_epsilon)
    coef = kl_coef if algorithm.kl_in_reward else 0.0
    per_token = []
    for total, rollout, old, ref in zip(totals, rollouts, scores.old, scores.ref, strict=True):
        earned = np.zeros(len(old))
        if algorithm.row.needs in ("nothing", "critic"):
            # Where the clip acts it shrinks what was earned too, else the last token would pay for the difference.
            earned = _earned(rollout, len(old)) * min(1.0, config.reward_clip / max(abs(rollout.reward), 1e-12))
        rest = total - earned.sum()
        per_token.append(earned + token_rewards(rest, old, ref, coef, algorithm.kl_estimator, clip=np.inf))
    lam = algorithm.gae_lambda if algorithm.row.needs == "critic" else 1.0
    advantages, returns = gae(per_token, scores.values, algorithm.gamma, lam)
    if algorithm.whiten:
        advantages = whiten(advantages, config.whiten_ddof)
    mismatch = config.mismatch
    weights = mismatch_weights(scores.old, scores.sampled, algorithm.correction, mismatch.low, mismatch.high)
    advantages = [a * weight for a, weight in zip(advantages, weights, strict=True)]
    return Credit(*([array.astype(np.float32) for array in arrays] for arrays in (advantages, returns)))


def mismatch_metrics(scores: Scores) -> dict[str, float]:
    """Mean and largest |old - sampled|, over all sampled tokens of the step."""
    pairs = zip(scores.old, scores.sampled, strict=True)
    differences = np.abs(np.concatenate([np.zeros(0), *(old - sampled for old, sampled in pairs)]))
    return {"mismatch_mean": mean(differences), "mismatch_max": float(differences.max(initial=0.0))}


def _earned(rollout: Rollout, tokens: int) -> np.ndarray:
    """[S] what an environment gave at single tokens, all of which were sampled."""
    if rollout.token_rewards is None:
        return np.zeros(tokens)
    return rollout.token_rewards[rollout.is_sampled].astype(np.float64)
