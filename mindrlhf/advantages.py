"""What NumPy computes between the rewards and the graph: baselines, KL in the reward, penalties, loss weights.

All pure functions; float64 inside, whatever comes in. n is the number of answers of the optimizer step, R the tokens
of one answer.
"""

from collections.abc import Sequence

import numpy as np

from mindrlhf.errors import UserError

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant", "token_sum")
KL_ESTIMATORS = ("k1", "k2", "k3")


def group_normalized(rewards: np.ndarray, groups: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """GRPO's advantage, (r - mean) / (std + epsilon) within each group, std with ddof 1.

    https://arxiv.org/abs/2402.03300. rewards [n] float; groups [n] int, in any order, groups of any size. A group
    whose rewards are all equal, and so a group of one, gets exactly 0. Returns [n] float64.
    """
    centered = group_centered(rewards, groups)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    squares = np.bincount(group, weights=centered**2, minlength=len(sizes))
    deviation = np.sqrt(squares / np.maximum(sizes - 1, 1))
    # A group of zeros with epsilon 0 must not become 0 / 0.
    scale = deviation + epsilon
    return centered / np.where(scale > 0, scale, 1.0)[group]


def group_centered(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Dr. GRPO's advantage, r - mean within each group. https://arxiv.org/abs/2503.20783.

    rewards [n] float; groups [n] int, in any order. An all-equal group gets exactly 0. Returns [n] float64.
    """
    rewards = np.asarray(rewards, np.float64)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if rewards.shape != group.shape:
        raise ValueError(f"{rewards.shape} rewards for {group.shape} groups")
    # The mean of three times 0.1 is not 0.1: subtracting one member first makes the all-equal group exact zeros.
    first = np.zeros(len(sizes))
    first[group] = rewards
    shifted = rewards - first[group]
    return shifted - (np.bincount(group, weights=shifted, minlength=len(sizes)) / np.maximum(sizes, 1))[group]


def kl(policy_logprobs: np.ndarray, ref_logprobs: np.ndarray, estimator: str = "k3", clamp: bool = True) -> np.ndarray:
    """Estimates of KL(policy || ref) at sampled tokens; d = policy - ref. http://joschu.net/blog/kl-approx.html.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. With clamp, the default, d is clipped to [-20, 20] first and k3 to
    [-10, 10] after: biased there, finite everywhere. Any shape; returns float64. The same as losses.kl_penalty.
    """
    difference = np.asarray(policy_logprobs, np.float64) - np.asarray(ref_logprobs, np.float64)
    if clamp:
        difference = np.clip(difference, -20.0, 20.0)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        value = np.expm1(-difference) + difference
        return np.clip(value, -10.0, 10.0) if clamp else value
    raise UserError(f"kl_estimator {estimator!r} is not one of {', '.join(KL_ESTIMATORS)}")


def token_rewards(
    reward: float,
    policy_logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    coefficient: float,
    estimator: str = "k1",
    clip: float = 10.0,
) -> np.ndarray:
    """KL in the reward: -coefficient * kl_t at every token, and clip(reward, -clip, clip) added at the last.

    https://arxiv.org/abs/1909.08593; the numbers are OpenRLHF's compute_reward, whose clip is 10. reward: of the whole
    answer; both log-probs [R]. Returns [R] float64; an answer without tokens has no place for its reward.
    """
    rewards = -coefficient * kl(policy_logprobs, ref_logprobs, estimator)
    rewards[-1:] += np.clip(reward, -clip, clip)
    return rewards


def kl_shaped_advantages(
    advantage: float,
    policy_logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    coefficient: float,
    estimator: str = "k1",
) -> np.ndarray:
    """The group algorithms with KL in the reward: A_t = advantage - coefficient * sum of kl_s over s >= t.

    advantage: group_normalized or group_centered of the plain rewards, so the KL has no part in the baseline or the
    standard deviation; both log-probs [R]. Returns [R] float64. This is OpenRLHF's order with use_kl_loss off
    (baseline, token rewards, return-to-go at gamma 1), except that the reward is clipped before the baseline, by the
    caller, and not after it. The other reading, reward - coefficient * sum(kl) before the baseline, is not offered.
    """
    rewards = token_rewards(advantage, policy_logprobs, ref_logprobs, coefficient, estimator, clip=np.inf)
    return np.cumsum(rewards[::-1])[::-1]


def loss_weights(counts: Sequence[int] | np.ndarray, mode: str, max_tokens: int) -> np.ndarray:
    """The weight of each token of a sequence in the loss, which is sum(per_token_loss * weight).

    counts [n]: trained tokens n_i of every sequence of the WHOLE optimizer step, over all ranks and micro-batches;
    max_tokens: the longest response possible. N = sum n_i, B = n, B' = sequences with n_i > 0.

    token_mean 1/N (DAPO, https://arxiv.org/abs/2503.14476), sequence_mean 1/(n_i B') (GRPO), sequence_sum 1/B',
    constant 1/(B max_tokens) (Dr. GRPO, https://arxiv.org/abs/2503.20783), token_sum 1.

    Returns [n] float64; a sequence without trained tokens has 0, so a fully masked step has loss 0 and not NaN.
    """
    counts = np.asarray(counts, np.float64)
    trained = counts > 0
    sequences = max(int(trained.sum()), 1)
    if mode == "token_mean":
        weight = 1.0 / max(counts.sum(), 1.0)
    elif mode == "sequence_mean":
        weight = 1.0 / (np.maximum(counts, 1.0) * sequences)
    elif mode == "sequence_sum":
        weight = 1.0 / sequences
    elif mode == "constant":
        weight = 1.0 / max(len(counts) * max_tokens, 1)
    elif mode == "token_sum":
        weight = 1.0
    else:
        raise UserError(f"aggregation {mode!r} is not one of {', '.join(AGGREGATIONS)}")
    return np.where(trained, weight, 0.0)


def overlong_penalty(length: int, max_tokens: int, buffer: int, factor: float = 1.0) -> float:
    """DAPO's soft overlong punishment, to be added to the reward: at most 0, at least -factor.

    e = length - (max_tokens - buffer); -min(e, buffer) / buffer * factor where e > 0, else 0. Lengths in tokens of the
    response; a buffer of 0 turns it off. https://arxiv.org/abs/2503.14476, equation 13.
    """
    excess = length - (max_tokens - buffer)
    if buffer <= 0 or excess <= 0:
        return 0.0
    return -min(excess, buffer) / buffer * factor


def keep_group(scores: np.ndarray, low: float = 0.0, high: float = 1.0) -> bool:
    """DAPO's dynamic sampling: train on a group only where low < mean(scores) < high, both strictly.

    scores [g]: of the answers to one prompt, before penalties. At the defaults and scores of 0 and 1 that drops the
    groups that are all right or all wrong. https://arxiv.org/abs/2503.14476, equation 11.
    """
    return bool(low < np.mean(np.asarray(scores, np.float64)) < high)
