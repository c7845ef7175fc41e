import math

import pytest

from mindrlhf.errors import UserError
from mindrlhf.schedules import learning_rate


def rates(steps, *arguments, **options):
    return [learning_rate(step, *arguments, **options) for step in steps]


def test_constant():
    assert rates([0, 5, 99], 10, 2.0) == [2.0, 2.0, 2.0]


def test_warmup_reaches_the_peak_at_its_last_step():
    for schedule in ("constant", "linear", "cosine"):
        assert rates(range(5), 12, 2.0, schedule, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear():
    assert rates([0, 1, 3, 4, 9], 4, 8.0, "linear") == [8.0, 6.0, 2.0, 0.0, 0.0]
    assert rates([2, 3, 5, 6], 6, 8.0, "linear", warmup_steps=2, min_ratio=0.5) == [8.0, 7.0, 5.0, 4.0]


def test_cosine():
    half = math.sqrt(0.5)
    assert rates(range(5), 4, 2.0, "cosine") == pytest.approx([2, 1 + half, 1, 1 - half, 0], abs=1e-15)
    assert rates([0, 2, 4], 4, 2.0, "cosine", min_ratio=0.1) == pytest.approx([2, 1.1, 0.2], abs=1e-15)


def test_a_warmup_as_long_as_the_run():
    assert rates([0, 3, 4], 4, 1.0, "cosine", warmup_steps=4) == [0.25, 1.0, 1.0]
    assert learning_rate(9, 4, 1.0, "cosine", warmup_steps=20) == 0.5


def test_unknown_schedule():
    with pytest.raises(UserError, match="'exp' is not one of constant, linear, cosine"):
        learning_rate(0, 4, 1.0, "exp")
