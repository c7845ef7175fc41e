"""mindrlhf/trainer/evaluation.py against values by hand."""

import itertools

import pytest

from mindrlhf.errors import UserError
from mindrlhf.trainer.evaluation import pass_at_k


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
