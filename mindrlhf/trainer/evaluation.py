"""How good a checkpoint is: pass@k and maj@k of sampled answers to held-out problems."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from mindrlhf.errors import UserError
from mindrlhf.rewards.rules import answer_key


def evaluation_metrics(
    rewards: Sequence[float], texts: Sequence[str], samples: int, ks: Sequence[int]
) -> dict[str, float]:
    """pass@k for each k and maj@k for each k over 1, where there is a vote.

    rewards, texts: [problems * samples], the answers to one problem next to each other; a reward of 1 or more says
    that the answer is right, and answers with the same `answer_key` vote together.

    Raises UserError for a k outside of 1 to samples.
    """
    right = (np.asarray(rewards, np.float64) >= 1).reshape(-1, samples)
    keys = [[answer_key(text) for text in texts[i : i + samples]] for i in range(0, len(texts), samples)]
    counts = right.sum(axis=1).tolist()
    return {
        **{f"pass@{k}": pass_at_k(counts, samples, k) for k in ks},
        **{f"maj@{k}": majority_at_k(keys, right.tolist(), k) for k in ks if k > 1},
    }


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Mean over problems of 1 - C(n - c, k) / C(n, k): the chance that one of k answers is right, without bias.

    correct: right answers c of each problem out of n = samples. Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    _check(f"pass@{k}", samples, k)
    return float(np.mean([1 - math.comb(samples - c, k) / math.comb(samples, k) for c in correct]))


def majority_at_k(keys: Sequence[Sequence[Hashable]], correct: Sequence[Sequence[bool]], k: int) -> float:
    """Mean over problems of the chance that the most frequent of k answers is right (self-consistency, arXiv
    2203.11171).

    keys, correct: [problems][n], what each answer says and whether it is right. The n answers are taken in disjoint
    groups of k, in their order, what is left over is dropped, and the groups' mean is taken: without bias, as the
    answers are independent, where all C(n, k) groups would be too many. A tie is broken at random, in expectation.

    Raises UserError for a k outside of 1 to n.
    """
    problems = []
    for own_keys, own_correct in zip(keys, correct, strict=True):
        _check(f"maj@{k}", len(own_keys), k)
        starts = range(0, len(own_keys) - k + 1, k)
        problems.append(np.mean([_majority(own_keys[i : i + k], own_correct[i : i + k]) for i in starts]))
    return float(np.mean(problems))


def _majority(keys: Sequence[Hashable], correct: Sequence[bool]) -> float:
    votes = Counter(keys)
    most = max(votes.values())
    # One key can be judged both right and wrong where the reward looks at more than the answer.
    winners = [right for key, right in zip(keys, correct, strict=True) if votes[key] == most]
    return sum(winners) / len(winners)


def _check(name: str, samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise UserError(f"{name}: k must be between 1 and the {samples} answers a problem (num_generations)")
