"""Rewards for how an answer is written, not for what it says: its length and its repetitions."""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

from mindrlhf.errors import UserError
from mindrlhf.rewards.rules import accuracy_reward


def length_reward(
    completions: list[str],
    *,
    maximum: float,
    minimum: float = 0,
    buffer: float | None = None,
    unit: str = "characters",
    **columns: Any,
) -> list[float]:
    """0 for lengths n in [minimum, maximum], from there down to -1 in a straight line. Returns [n] in [-1, 0].

        reward = -min(1, max(n - maximum, minimum - n, 0) / buffer)

    The shape of DAPO's soft overlong punishment (arXiv 2503.14476), which is `algorithm.overlong_buffer` in tokens.
    buffer: by how much a length may be off until the reward is -1; default `maximum`.
    unit: of all the lengths, "characters" or "words" (what stands between white space).
    """
    buffer = maximum if buffer is None else buffer
    for name, value in (("maximum", maximum), ("buffer", buffer)):
        _check(name, value, lambda x: x > 0, "a number over 0")
    _check("minimum", minimum, lambda x: 0 <= x <= maximum, f"a number from 0 to maximum = {maximum}")
    lengths = [len(_pieces(text, unit)) for text in completions]
    return [-min(1.0, max(n - maximum, minimum - n, 0) / buffer) for n in lengths]


def cosine_length_reward(
    completions: list[str],
    label: list[Any],
    *,
    max_len: float = 1000,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    unit: str = "characters",
    correct: str = "accuracy",
    **columns: Any,
) -> list[float]:
    """Correct answers are worth more the shorter they are, wrong ones less: thinking on pays off where it is needed.

        reward = end + (start - end) (1 + cos(pi min(1, n / max_len))) / 2

    The cosine reward of arXiv 2502.03373; names and defaults are open-r1's. start, at length n = 0, is
    max_value_correct of a correct answer and min_value_wrong of a wrong one; end, at max_len and beyond, is
    min_value_correct and max_value_wrong.
    unit: of n and max_len, "characters" or "words". correct: who judges, "accuracy" or "math".
    """
    _check("max_len", max_len, lambda x: x > 0, "a number over 0")
    rewards = []
    for text, right in zip(completions, _judge(correct)(completions, label), strict=True):
        start, end = (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
        progress = min(1.0, len(_pieces(text, unit)) / max_len)
        rewards.append(end + (start - end) * (1 + math.cos(math.pi * progress)) / 2)
    return rewards


def repetition_reward(
    completions: list[str], *, ngram_size: int = 3, max_penalty: float = -1.0, unit: str = "words", **columns: Any
) -> list[float]:
    """max_penalty times the share of the n-grams that were there before. Returns [n] in [max_penalty, 0].

        reward = max_penalty (1 - distinct n-grams / n-grams), 0 where the answer is too short to have one

    The repetition penalty of arXiv 2502.03373, appendix C.2, in the form of open-r1. Case does not count.
    ngram_size: units an n-gram. max_penalty: at most 0. unit: "words", or "characters" for text without spaces.
    """
    _check("ngram_size", ngram_size, lambda x: isinstance(x, int) and x > 0, "a whole number over 0")
    _check("max_penalty", max_penalty, lambda x: x <= 0, "a number of at most 0")
    rewards = []
    for text in completions:
        pieces = _pieces(text.lower(), unit)
        total = max(len(pieces) - ngram_size + 1, 0)
        distinct = len(set(zip(*(islice(pieces, i, None) for i in range(ngram_size)), strict=False)))
        rewards.append(max_penalty * (1 - distinct / total) if total else 0.0)
    return rewards


def _pieces(text: str, unit: str) -> str | list[str]:
    if unit not in ("characters", "words"):
        raise UserError(f"unit: {unit!r} is neither 'characters' nor 'words'")
    return text if unit == "characters" else text.split()


def _judge(correct: str) -> Callable[[list[str], list[Any]], list[float]]:
    if correct == "accuracy":
        return accuracy_reward
    if correct == "math":
        from mindrlhf.rewards.math_equality import math_reward

        return lambda completions, label: math_reward(completions, label)["rewards"]
    raise UserError(f"correct: {correct!r} is neither 'accuracy' nor 'math'")


def _check(name: str, value: Any, holds: Callable[[float], bool], wanted: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not holds(value):
        raise UserError(f"{name}: {value!r} is not {wanted}")
