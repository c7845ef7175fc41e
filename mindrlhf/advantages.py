"""What NumPy computes between the rewards and the graph: baselines, returns, KL in the reward, corrections, weights.

All pure functions; float64 inside, whatever comes in. n is the number of answers of the step, R the tokens of one
answer. `sampled` [R] bool is False at gap tokens, which an environment wrote: nothing is trained there. None: no gaps.
"""

from collections.abc import Sequence

import numpy as np

from mindrlhf.errors import UserError

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant", "token_sum")
KL_ESTIMATORS = ("k1", "k2", "k3")
MISMATCH_CORRECTIONS = ("none", "truncated", "icepop", "sequence_mask")

Tokens = Sequence[np.ndarray]  # one array [R] an answer


def group_normalized(rewards: np.ndarray, groups: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """GRPO's advantage, (r - mean) / (std + epsilon) within each group, std with ddof 1.

    https://arxiv.org/abs/2402.03300. rewards [n] float; groups [n] int, in any order, groups of any size. A group
    whose rewards are all equal, and so a group of one, gets exactly 0. Returns [n] float64.
    """
    return group_centered(rewards, groups) / _group_scale(rewards, groups, epsilon)


def group_centered(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Dr. GRPO's advantage, r - mean within each group. https://arxiv.org/abs/2503.20783.

    rewards [n] float; groups [n] int, in any order. An all-equal group gets exactly 0. Returns [n] float64.
    """
    return optimal_baseline(rewards, groups, np.ones(len(rewards)))


def optimal_baseline(rewards: np.ndarray, groups: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """OPO's advantage, r - sum(l r) / sum(l) within each group. https://arxiv.org/abs/2505.23585.

    rewards [n] float; groups [n] int, in any order; lengths [n], the sampled tokens l of each answer. An all-equal
    group gets exactly 0. Returns [n] float64.
    """
    rewards, lengths = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if not rewards.shape == lengths.shape == group.shape:
        raise ValueError(f"{rewards.shape} rewards and {lengths.shape} lengths for {group.shape} groups")
    # The mean of three times 0.1 is not 0.1: subtracting one member first makes the all-equal group exact zeros.
    first = np.zeros(len(sizes))
    first[group] = rewards
    shifted = rewards - first[group]
    total = np.bincount(group, weights=lengths, minlength=len(sizes))
    # A group without tokens trains nothing, whatever its baseline.
    baseline = np.bincount(group, weights=lengths * shifted, minlength=len(sizes)) / np.where(total > 0, total, 1.0)
    return shifted - baseline[group]


def leave_one_out(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """RLOO's advantage, r - mean of the other answers of the group. https://arxiv.org/abs/2402.14740.

    rewards [n] float; groups [n] int, in any order. An all-equal group, and a group of one, get exactly 0. Returns [n]
    float64.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return group_centered(rewards, groups) * (sizes / np.maximum(sizes - 1, 1))[group]


def best_of_group(rewards: np.ndarray, groups: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """The pass@k advantage: (largest - second largest) / (std + epsilon) for the best answer, 0 for the others.

    https://arxiv.org/abs/2503.19595, in the form of verl's grpo_passk; std with ddof 1. rewards [n] float; groups [n]
    int, in any order. Where the best two are equal, and in a group of one, all get exactly 0. Returns [n] float64.
    """
    rewards = np.asarray(rewards, np.float64)
    scale = _group_scale(rewards, groups, epsilon)
    _, sizes = np.unique(groups, return_counts=True)
    ascending = np.lexsort((rewards, groups))  # within each group
    last = np.cumsum(sizes) - 1
    best, second = ascending[last], ascending[last - (sizes > 1)]
    advantages = np.zeros(len(rewards))
    advantages[best] = (rewards[best] - rewards[second]) / scale[best]
    return advantages


def _group_scale(rewards, groups, epsilon):
    """[n] float64: standard deviation, ddof 1, plus epsilon of each answer's group; 1 where that is 0."""
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    squares = np.bincount(group, weights=group_centered(rewards, groups) ** 2, minlength=len(sizes))
    scale = np.sqrt(squares / np.maximum(sizes - 1, 1)) + epsilon
    return np.where(scale > 0, scale, 1.0)[group]


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


def gae(rewards: Tokens, values: Tokens, gamma: float, lam: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Generalised advantages and the returns they imply. https://arxiv.org/abs/1506.02438.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V; V and A are 0 behind the
    end. rewards and values: an array [R] an answer, over its sampled tokens only, so that t steps over what an
    environment wrote. Returns (advantages, returns), [R] float64 each.

    With values 0 and lam 1, A is the discounted return-to-go of REINFORCE++, https://arxiv.org/abs/2501.03262.
    """
    lengths = [len(r) for r in rewards]
    # [tokens, n], with a row of zeros behind the longest answer: one step of the loop serves all answers.
    reward, value = np.zeros((2, max(lengths, default=0) + 1, len(lengths)))
    for i, (r, v) in enumerate(zip(rewards, values, strict=True)):
        if len(r) != len(v):
            raise ValueError(f"answer {i}: {len(r)} rewards and {len(v)} values")
        reward[: len(r), i], value[: len(r), i] = r, v
    advantage = np.zeros_like(value)
    advantage[:-1] = reward[:-1] + gamma * value[1:] - value[:-1]
    for t in range(len(advantage) - 2, -1, -1):
        advantage[t] += gamma * lam * advantage[t + 1]
    returns = advantage + value
    return [advantage[:n, i] for i, n in enumerate(lengths)], [returns[:n, i] for i, n in enumerate(lengths)]


def whiten(advantages: Tokens, ddof: int = 0) -> list[np.ndarray]:
    """(A - mean) / sqrt(max(variance, 1e-8)) over the tokens of all answers given: those of the whole step.

    advantages: an array [R] an answer; ddof 1 is the variance of a sample. Returns [R] float64 each.
    """
    tokens = np.concatenate([np.zeros(0), *advantages]).astype(np.float64)
    if not len(tokens):
        return [np.zeros(0) for _ in advantages]
    mean = tokens.mean()
    variance = ((tokens - mean) ** 2).sum() / max(len(tokens) - ddof, 1)
    scale = 1.0 / np.sqrt(max(variance, 1e-8))
    return [(np.asarray(a, np.float64) - mean) * scale for a in advantages]


def mismatch_weights(
    old_logprobs: Tokens, sampled_logprobs: Tokens, correction: str, low: float, high: float
) -> list[np.ndarray]:
    """What to multiply the advantages with where generation and training disagree: w = exp(old - sampled log-prob).

    truncated: w clipped to [low, high] (https://fengyao.notion.site/off-policy-rl); icepop: w inside [low, high], 0
    outside (https://arxiv.org/abs/2510.18855); sequence_mask: w in the answers whose geometric mean of w is inside,
    0 in the others; none: 1. Log-ratios are clipped to [-20, 20] before exp. An array [R] an answer in, [R] float64
    out. low must not be over 1, nor high under it.
    """
    if correction not in MISMATCH_CORRECTIONS:
        raise UserError(
            f"algorithm.mismatch.correction: {correction!r} is not one of {', '.join(MISMATCH_CORRECTIONS)}"
        )
    weights = []
    for old, sampled in zip(old_logprobs, sampled_logprobs, strict=True):
        log_ratio = np.asarray(old, np.float64) - np.asarray(sampled, np.float64)
        weight = np.exp(np.clip(log_ratio, -20.0, 20.0))
        if correction == "none":
            weight = np.ones_like(weight)
        elif correction == "truncated":
            weight = np.clip(weight, low, high)
        elif correction == "icepop":
            weight = np.where((low <= weight) & (weight <= high), weight, 0.0)
        else:
            mean = np.exp(np.clip(log_ratio.sum() / max(len(log_ratio), 1), -20.0, 20.0))
            weight = weight if low <= mean <= high else np.zeros_like(weight)
        weights.append(weight)
    return weights


def adaptive_kl_coef(coef: float, kl: float, target: float, horizon: float, n_steps: float) -> float:
    """The next KL coefficient: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n_steps / horizon).

    https://arxiv.org/abs/1909.08593. kl and target in nats an answer; n_steps: answers since the last call; horizon in
    answers too.
    """
    return coef * (1.0 + float(np.clip(kl / target - 1.0, -0.2, 0.2)) * n_steps / horizon)


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 - var(returns - values) / var(returns): 1 for a perfect critic, 0 for a constant one. Both flat.

    Where all returns are equal there is nothing to explain: 0.
    """
    values, returns = np.asarray(values, np.float64), np.asarray(returns, np.float64)
    # Not var == 0: the variance of three times 0.1 is not exactly 0.
    if not len(returns) or returns.min() == returns.max():
        return 0.0
    return float(1.0 - np.var(returns - values) / np.var(returns))


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
