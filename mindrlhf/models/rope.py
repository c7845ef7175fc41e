"""Rotary position embeddings: the cosine and sine tables, computed once on the host.

Su et al. 2021 (RoFormer, https://arxiv.org/abs/2104.09864); Llama 3.1's frequency scaling as Meta published it; YaRN,
Peng et al. 2023 (https://arxiv.org/abs/2309.00071). The operations and their float32 precision are those of
transformers' `modeling_rope_utils.py`: an angle is position * frequency in float32, and at position 100000 that
rounding moves it by up to 0.004, so a more exact table would be a different model from the trained one.
"""

import math

import numpy as np

from mindrlhf.models.config import DecoderConfig


def rope_tables(config: DecoderConfig, positions: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every position's angles, times YaRN's attention factor.

    Returns (cos, sin), each [P, D] float32, P being `positions` or config.max_positions, D the head's width, or that of
    its rotated part in latent attention. Layout: two halves, table[p, i] == table[p, i + D / 2], to be used as
    x * cos + cat(-x2, x1) * sin. Numbers that are not rotated, at the end of either half (see
    conversion.rotary_order), and all of a model with learned positions, have cosine 1 and sine 0.
    """
    rows = config.max_positions if positions is None else positions
    if config.family.learned_positions:
        return np.ones((rows, config.head_dim), np.float32), np.zeros((rows, config.head_dim), np.float32)
    frequencies, attention_factor = _frequencies(config)
    angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies  # [P, head_dim / 2] float32
    factor = np.float32(attention_factor)
    cos, sin = (function(angles, dtype=np.float64).astype(np.float32) * factor for function in (np.cos, np.sin))
    still = 0 if config.latent else (config.head_dim - config.rotated) // 2
    cos, sin = np.pad(cos, ((0, 0), (0, still)), constant_values=1), np.pad(sin, ((0, 0), (0, still)))
    return np.concatenate([cos, cos], axis=1), np.concatenate([sin, sin], axis=1)


def _frequencies(config: DecoderConfig) -> tuple[np.ndarray, float]:
    """(radians a position [rotated / 2] float32, factor of cosines and sines)."""
    exponents = np.arange(0, config.rotated, 2, dtype=np.float32) / np.float32(config.rotated)
    # The power in float64, rounded: libraries differ in the last bit of a float32 power.
    periods = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / periods
    scaling = config.rope_scaling or {"rope_type": "default"}
    kind = scaling["rope_type"]
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / np.float32(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    assert kind == "yarn", f"DecoderConfig let rope_type {kind!r} through"
    return _yarn(periods, config), _yarn_attention_factor(scaling)


def _llama3(frequencies: np.ndarray, scaling: dict) -> np.ndarray:
    """Long wavelengths are divided by factor, short ones kept, those between interpolated. [D / 2] float32."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained, factor = scaling["original_max_position_embeddings"], np.float32(scaling["factor"])
    one = np.float32(1)
    wavelengths = one / frequencies * np.float32(2 * math.pi)  # torch divides a number so: by the reciprocal
    scaled = np.where(wavelengths > trained / low, frequencies / factor, frequencies)
    smooth = (one / wavelengths * np.float32(trained) - np.float32(low)) / np.float32(high - low)
    between = (wavelengths >= trained / high) & (wavelengths <= trained / low)
    return np.where(between, (one - smooth) * scaled / factor + smooth * scaled, scaled).astype(np.float32)


def _yarn(periods: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Dimensions that turn often in the trained window are kept, those that turn rarely divided by factor, with a
    linear ramp between the two. [D / 2] float32."""
    scaling = config.rope_scaling
    trained = scaling.get("original_max_position_embeddings") or config.max_positions

    def dimension(rotations: float) -> float:
        """The dimension that makes this many turns in the trained window."""
        return config.rotated * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotated - 1)
    if low == high:
        high += 0.001  # no division by 0
    ramp = (np.arange(config.rotated // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, np.float32(0), np.float32(1))
    stretched = np.float32(1) / (np.float32(scaling["factor"]) * periods)
    return (stretched * (1 - kept) + np.float32(1) / periods * kept).astype(np.float32)


def _yarn_attention_factor(scaling: dict) -> float:
    """What multiplies cosines and sines, and so (squared) the attention scores."""

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
    return grown(1.0)
