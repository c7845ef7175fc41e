"""The weighted sum of several reward functions, and the check of everything that they return."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mindrlhf.errors import UserError
from mindrlhf.rewards.remote import LARGEST_REWARD, Background
from mindrlhf.rewards.user import call_reward_function, exception_line, source_code
from mindrlhf.types import Prompt

RESERVED = ("total", "overlong", "missing_stop", "environment")  # what trainers log beside the parts


class Rewards:
    """reward_i = sum over the parts of weight * function_i.

    A part is (name, function, weight); what functions may look like says user.call_reward_function. They return a
    list, an array or anything with .tolist() of n numbers, or OpenRLHF's {"rewards": ..., "scores": ...,
    "extra_logs": {...}}. None in a list is TRL's "does not apply to this answer" and counts as 0.

    A function may have three attributes: `concurrent`, true where it only waits for others and so may run beside the
    rest; `shared`, true where several processes are one model and all of them have to call it; and `place`, what an
    error message calls it by instead of its file.

    once, asks: where several processes compute the same rewards, `once` runs a function in one of them and gives all of
    them what it returned, and `asks` is true in that one.
    """

    once: Callable[[Callable[[], Any]], Any] = staticmethod(lambda run: run())
    asks = True

    def __init__(self, parts: Sequence[tuple[str, Callable, float]]):
        if not parts:
            raise UserError("rewards: at least one reward function is needed")
        self.parts: list[tuple[str, Callable, float]] = []
        for name, function, weight in parts:
            if not callable(function):
                raise UserError(f"reward {name!r} is a {type(function).__name__}, not a function")
            if name in RESERVED:
                raise UserError(f"reward {name!r}: the metrics have another one of that name; give it another `name`")
            if not np.isfinite(weight):
                raise UserError(f"reward {name!r}: its weight {weight} is not a finite number")
            self.parts.append((_unique(name, [part[0] for part in self.parts]), function, float(weight)))

    @classmethod
    def from_functions(
        cls, functions: Callable | Sequence[Callable], weights: Sequence[float] | None = None
    ) -> "Rewards":
        """Functions as TRL's reward_funcs, with weights as its reward_weights (default 1 each)."""
        functions = [functions] if callable(functions) else list(functions)
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise UserError(f"{len(weights)} reward weights for {len(functions)} reward functions")
        return cls([(_name(function), function, weight) for function, weight in zip(functions, weights, strict=True)])

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The rewards of n completions, each to the prompt at its index.

        Returns the weighted sums [n] float32 and every part before its weight, [n] float32 under its name. A function
        that returns "scores" or "extra_logs" adds those as "name/scores" and "name/key": they are no part of the sum.
        """
        total = np.zeros(len(completions), np.float64)
        parts: dict[str, np.ndarray] = {}
        waiting = {
            name: Background(_call, name, function, prompts, completions)
            for name, function, _ in self.parts
            if self.asks and getattr(function, "concurrent", False)
        }
        results = {}
        for name, function, _ in sorted(self.parts, key=lambda part: getattr(part[1], "concurrent", False)):
            if getattr(function, "shared", False):
                results[name] = _call(name, function, prompts, completions)
            elif getattr(function, "concurrent", False):
                results[name] = self.once(lambda name=name: waiting[name].result())
            else:
                results[name] = self.once(partial(_call, name, function, prompts, completions))
        for name, function, weight in self.parts:
            values = _columns(name, function, results[name], completions)
            total += weight * values[name]
            parts |= {key: value.astype(np.float32) for key, value in values.items()}
        return total.astype(np.float32), parts


def _call(name: str, function: Callable, prompts: Sequence[Prompt], completions: Sequence[str]) -> Any:
    try:
        return call_reward_function(function, prompts, completions)
    except UserError as error:
        raise UserError(f"reward {name!r}: {error}") from error
    except Exception as error:
        code = source_code(function)
        raise UserError(f"reward {name!r}: {exception_line(error, code and code.co_filename)}") from error


def _columns(name: str, function: Callable, returned: Any, completions: Sequence[str]) -> dict[str, np.ndarray]:
    """What a function returned as arrays [n] float64: its rewards under `name`, then what it only wants logged."""
    if not isinstance(returned, dict):
        return {name: _numbers(name, function, returned, completions)}
    if "rewards" not in returned:
        keys = ", ".join(map(str, returned)) or "nothing"
        raise UserError(f"{_where(name, function)} returned a dict without 'rewards'; it has {keys}")
    logs = dict(returned.get("extra_logs") or {})
    if returned.get("scores") is not None:
        logs["scores"] = returned["scores"]
    columns = {name: _numbers(name, function, returned["rewards"], completions)}
    for key, value in logs.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        value = [value] * len(completions) if isinstance(value, (int, float)) else value
        columns[f"{name}/{key}"] = _numbers(f"{name}/{key}", function, value, completions)
    return columns


def _numbers(name: str, function: Callable, returned: Any, completions: Sequence[str]) -> np.ndarray:
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{_where(name, function)} returned a {type(returned).__name__} instead of a list of numbers")
    if len(values) != len(completions):
        raise UserError(f"{_where(name, function)} returned {len(values)} numbers for {len(completions)} completions")
    result = np.zeros(len(values), np.float64)
    for i, value in enumerate(values):
        value = value.tolist() if hasattr(value, "tolist") else value
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)):
            problem = f"{value!r:.60}, which is not a number"
        elif not abs(value) <= LARGEST_REWARD:
            problem = f"{value!r:.60}, which is not a finite number"
        else:
            result[i] = value
            continue
        raise UserError(
            f"{_where(name, function)} returned {problem}, at index {i}, for the completion that begins "
            f"{completions[i][:60]!r}"
        )
    return result


def _where(name: str, function: Callable) -> str:
    code = source_code(function)
    place = getattr(function, "place", None) or (code and f"{code.co_filename}:{code.co_firstlineno}")
    return f"reward {name!r} ({place})" if place else f"reward {name!r}"


def _name(function: Callable) -> str:
    function = getattr(function, "func", function)  # of a partial
    return getattr(function, "__name__", type(function).__name__)


def _unique(name: str, taken: Sequence[str]) -> str:
    """name, or name_2, name_3... where it is taken."""
    number, result = 1, name
    while result in taken:
        number += 1
        result = f"{name}_{number}"
    return result
