"""Typed reading of one key of a JSON or YAML mapping: the value, or a UserError naming file, key and fix."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from mindrlhf.errors import UserError

REQUIRED: Any = object()  # the default of a key that must be there


def refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raises UserError for the first key that is not known, naming the nearest one that is."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(known)
            raise UserError(f"{where}: unknown key {key!r}; {hint}")


def integer(values: Mapping[str, Any], key: str, where: str, default: Any = REQUIRED) -> Any:
    """A whole number, or `default` as it is where the key is absent or null. Raises UserError."""
    value = _present(values, key, where, default)
    if value is default:
        return default
    if type(value) is not int:
        raise UserError(f"{where}: {key} is {value!r}; it must be a whole number")
    return value


def number(values: Mapping[str, Any], key: str, where: str, default: Any = REQUIRED) -> Any:
    """A finite number as float, or `default` as it is where the key is absent or null. Raises UserError."""
    value = _present(values, key, where, default)
    if value is default:
        return default
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} is {value!r}; it must be a number")
    return float(value)


def flag(values: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    """True or False. Raises UserError for anything else, 0 and 1 among it."""
    value = _present(values, key, where, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}; it must be true or false")
    return value


def integers(values: Mapping[str, Any], key: str, where: str, default: Any = REQUIRED) -> Any:
    """A tuple of whole numbers, or `default` as it is where the key is absent or null. Raises UserError."""
    value = _present(values, key, where, default)
    if value is default:
        return default
    if not isinstance(value, (list, tuple)) or any(type(number) is not int for number in value):
        raise UserError(f"{where}: {key} is {value!r}; it must be a list of whole numbers")
    return tuple(value)


def _present(values: Mapping[str, Any], key: str, where: str, default: Any) -> Any:
    """The value, or the default where the key is absent or null: Hugging Face writes null for 'not set'."""
    value = values.get(key)
    if value is None and default is REQUIRED:
        raise UserError(f"{where}: {key} is missing; add it")
    return default if value is None else value


def token_id(values: Mapping[str, Any], key: str, where: str) -> int | tuple[int, ...] | None:
    """A token id, several as a tuple, or None where the key is absent or null. Raises UserError."""
    value = values.get(key)
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if any(type(number) is not int for number in ids):
        raise UserError(f"{where}: {key} is {value!r}; it must be a token id or a list of them")
    return tuple(ids) if isinstance(value, (list, tuple)) else value
