"""Environments of multi-turn rollouts: the class that users write, loading it, and calls that check what it returns."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindrlhf.errors import UserError
from mindrlhf.rewards.remote import LARGEST_REWARD
from mindrlhf.rewards.user import exception_line, load_from_file
from mindrlhf.types import Prompt


class Environment:
    """What a model talks to, turn by turn. One instance an answer, made without arguments.

    A turn ends at the tokenizer's stop tokens and at those of `stop`. Any class with reset and step will do.
    """

    stop: Sequence[str] = ()  # token strings that end a turn besides the tokenizer's own, each exactly one token

    def reset(self, prompt: Prompt) -> str:
        """Called once, first. Returns text that is appended to the prompt and not trained on; "" for none."""
        return ""

    def step(self, text: str) -> tuple[str, float, bool]:
        """Called with the text of each turn that came to its end; returns (observation, reward, done).

        text: decoded without special tokens; a stop token that is none of these, an ordinary word, is at its end.
        observation: what the model reads next, not trained on. The last one, where done, is not read by anybody.
        """
        raise NotImplementedError("an environment needs step(self, text) -> (observation, reward, done)")


def load_environment(spec: str, base: Path) -> type:
    """The class of "path.py:Class", path relative to base. Raises UserError for what is not an environment."""
    file, _, name = spec.rpartition(":")
    if not file or not name:
        raise UserError(f"environment {spec!r}: write it as path.py:Class (rollout.environment)")
    found = load_from_file(spec, base, "environment class", inspect.isclass)
    if not inspect.isclass(found):
        raise UserError(f"environment class {spec!r}: {name} is a {type(found).__name__}, not a class")
    missing = [method for method in ("reset", "step") if not callable(getattr(found, method, None))]
    if missing:
        raise UserError(f"environment class {spec!r} has no method {missing[0]}; see docs/agents.md")
    stop = stop_texts(found)
    if not (isinstance(stop, list | tuple) and all(isinstance(text, str) for text in stop)):
        raise UserError(f"environment class {spec!r}: stop is {stop!r:.60}, not a list of token strings")
    return found


def stop_texts(environment: type) -> Sequence[str]:
    """Of a class that need not say any."""
    return getattr(environment, "stop", ())


def open_environment(make: Callable[[], Any], prompt: Prompt) -> tuple[Any, str]:
    """A new environment and the text of its reset. Raises UserError."""
    environment = _call(make, getattr(make, "__name__", "environment"), make)
    text = _call(make, "reset", environment.reset, prompt)
    if not isinstance(text, str):
        raise UserError(f"{_where(environment, 'reset')} returned a {type(text).__name__} instead of a text")
    return environment, text


def take_turn(environment: Any, text: str) -> tuple[str, float, bool]:
    """What `step` says to a turn's text. Raises UserError for an exception in it and a wrong return."""
    returned = _call(type(environment), "step", environment.step, text)
    where = _where(environment, "step")
    if not (isinstance(returned, tuple) and len(returned) == 3):
        raise UserError(f"{where} returned {returned!r:.60} instead of (observation, reward, done)")
    observation, reward, done = (value.item() if hasattr(value, "item") else value for value in returned)
    if not isinstance(observation, str):
        problem = f"a {type(observation).__name__} as observation instead of a text"
    elif not (isinstance(reward, int | float) and abs(reward) <= LARGEST_REWARD):
        problem = f"{reward!r:.60} as reward, which is not a finite number"
    elif not isinstance(done, bool):
        problem = f"{done!r:.60} as done instead of True or False"
    else:
        return observation, float(reward), done
    raise UserError(f"{where} returned {problem}")


def _call(owner: Any, name: str, function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"environment: {name}: {exception_line(error, _file(owner))}") from error


def _where(environment: Any, method: str) -> str:
    return f"environment {type(environment).__name__}.{method} ({_file(type(environment))})"


def _file(owner: Any) -> str | None:
    """Where a class or function was written; None for what Python has no source of."""
    try:
        return inspect.getsourcefile(owner)
    except (TypeError, OSError):
        return None
