"""mindrlhf/trainer/evaluation.py against values by hand."""

import itertools

import numpy as np
import pytest

from mindrlhf.errors import UserError
from mindrlhf.trainer.evaluation import evaluation_metrics, majority_at_k, pass_at_k


@pytest.mark.parametrize(
    ("correct", "samples", "k", "expected"),
    [
        ([1], 4, 1, 1 / 4),  # with one answer it is the accuracy
        ([0, 4], 4, 1, 1 / 2),
        ([1], 4, 2, 1 / 2),  # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
        ([2], 4, 2, 5 / 6),  # 1 - C(2, 2) / C(4, 2) = 1 - 1 / 6
        ([3], 4, 2, 1.0),  # two wrong answers cannot be drawn of one
        ([0], 4, 3, 0.0),
        ([2], 5, 3, 9 / 10),  # 1 - C(3, 3) / C(5, 3) = 1 - 1 / 10
        ([0, 1, 2, 4], 4, 2, (0 + 1 / 2 + 5 / 6 + 1) / 4),  # the mean over problems
        ([1], 1, 1, 1.0),
        ([100], 200, 200, 1.0),
    ],
)
def test_by_hand(correct, samples, k, expected):
    assert pass_at_k(correct, samples, k) == pytest.approx(expected, abs=1e-12)


def test_it_is_the_share_of_draws_with_a_right_answer():
    answers = [True, True, False, False, False, False]
    for k in range(1, 7):
        draws = list(itertools.combinations(answers, k))
        assert pass_at_k([2], 6, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_samples(k):
    with pytest.raises(UserError, match=rf"^pass@{k}: k must be between 1 and the 4 answers a problem"):
        pass_at_k([1], 4, k)


@pytest.mark.parametrize(
    ("keys", "k", "expected"),  # the answer "r" is right
    [
        (["rrw"], 3, 1.0),
        (["rww"], 3, 0.0),
        (["rwx"], 3, 1 / 3),  # all three are tied
        (["rrww"], 4, 1 / 2),
        (["rrwwxx", "rrwwww"], 6, (1 / 3 + 0) / 2),  # the mean over problems
        (["rwww"], 1, 1 / 4),  # the vote of one: the accuracy
        (["rrxwwx"], 3, (1 + 0) / 2),  # groups rrx and wwx
        (["rrxwwxw"], 3, (1 + 0) / 2),  # the seventh is left over
        (["rwrw"], 2, 1 / 2),
        (["r"], 1, 1.0),
    ],
)
def test_majority_by_hand(keys, k, expected):
    correct = [[letter == "r" for letter in letters] for letters in keys]
    assert majority_at_k([list(letters) for letters in keys], correct, k) == pytest.approx(expected, abs=1e-12)


def test_a_key_that_is_right_only_sometimes():
    assert majority_at_k([["a", "a", "a", "b"]], [[True, False, True, False]], 4) == pytest.approx(2 / 3)


def test_groups_are_without_bias():
    """Over many problems the disjoint groups give the vote of k independent answers: P(2 or 3 right of 3)."""
    right = np.random.default_rng(0).random((20000, 8)) < 0.6
    expected = 0.6**3 + 3 * 0.6**2 * 0.4
    value = majority_at_k(right.tolist(), right.tolist(), 3)
    assert value == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 40000))


@pytest.mark.parametrize("k", [0, 4])
def test_majority_of_k_outside_the_samples(k):
    with pytest.raises(UserError, match=rf"^maj@{k}: k must be between 1 and the 3 answers a problem"):
        majority_at_k(["abc"], [[True, False, False]], k)


def test_metrics_of_answers():
    """Answers in another form vote together, and partly right ones (under 1) are wrong."""
    texts = ["0.5", r"so \boxed{\frac{1}{2}}", "3", "4", "7", "8", "8", "9"]
    rewards = np.array([1, 1.0, 0.5, 0, 2.0, 0, 0, 0], np.float32)
    assert evaluation_metrics(rewards, texts, 4, [1, 2, 4]) == pytest.approx(
        {
            "pass@1": (2 / 4 + 1 / 4) / 2,
            "pass@2": (5 / 6 + 1 / 2) / 2,
            "pass@4": 1.0,
            "maj@2": ((1 + 0) / 2 + (1 / 2 + 0) / 2) / 2,  # 8 and 9 tie, both wrong
            "maj@4": (1 + 0) / 2,
        }
    )
