"""The rope settings of a config.json in one form.

Source: transformers 4.57 `modeling_rope_utils.py`, for the names and both spellings.
"""

from collections.abc import Mapping
from typing import Any

from mindrlhf.errors import UserError
from mindrlhf.models.fields import flag, integer, number

# rope_type -> (keys it needs, keys it may have)
ROPE_TYPES = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        + ("truncate",),
    ),
}


def rope_type(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type", "default"))


def read_rope(values: Mapping[str, Any], where: str, theta: float = 10000.0) -> tuple[float, dict[str, Any] | None]:
    """rope_theta, by default `theta`, and the scaling, from `rope_theta` + `rope_scaling` (transformers 4) or
    `rope_parameters` (5)."""
    thetas, scalings = [], []
    if values.get("rope_theta") is not None:
        thetas.append(number(values, "rope_theta", where))
    for name in ("rope_parameters", "rope_scaling"):
        if values.get(name) is None:
            continue
        scalings.append(_rope_scaling(values[name], f"{where}: {name}"))
        if values[name].get("rope_theta") is not None:
            thetas.append(number(values[name], "rope_theta", f"{where}: {name}"))
    if any(theta != thetas[0] for theta in thetas) or any(scaling != scalings[0] for scaling in scalings):
        raise UserError(f"{where}: rope_parameters and rope_theta or rope_scaling disagree; keep one of the spellings")
    return (thetas or [theta])[0], (scalings or [None])[0]


def _rope_scaling(scaling: Any, where: str) -> dict[str, Any] | None:
    """One spelling's settings as `rope_type` and the numbers that this type reads; None for the default."""
    if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
        raise UserError(f"{where}: must be one mapping with rope_type and its numbers, for all layers alike")
    kind = rope_type(scaling)
    if kind not in tuple(ROPE_TYPES):
        raise UserError(f"{where}: rope_type {kind!r} is not supported; known: {', '.join(ROPE_TYPES)}")
    needed, optional = ROPE_TYPES[kind]
    result: dict[str, Any] = {"rope_type": kind}
    for key in needed + optional:
        if scaling.get(key) is None:
            if key in needed:
                raise UserError(f"{where}: {key} is missing; rope_type {kind} needs {', '.join(needed)}")
        elif key == "original_max_position_embeddings":
            result[key] = integer(scaling, key, where)
        elif key == "truncate":
            result[key] = flag(scaling, key, where)
        else:
            result[key] = number(scaling, key, where)
    if result.get("factor", 1.0) < 1 or result.get("original_max_position_embeddings", 1) < 1:
        raise UserError(f"{where}: factor and original_max_position_embeddings must be at least 1")
    if min(result.get("beta_fast", 1), result.get("beta_slow", 1)) < 0:
        raise UserError(f"{where}: beta_fast and beta_slow must not be negative")
    if kind == "llama3" and not 0 < result["low_freq_factor"] < result["high_freq_factor"]:
        raise UserError(f"{where}: high_freq_factor must be over low_freq_factor, and both over 0")
    return None if kind == "default" else result
