"""From logits to the next token, inside the decode graph.

One uniform number a token decides, by inversion of the cumulative distribution. The number is a hash of
(seed, prompt, sample, position), so an answer is the same in any batch, slot and order.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from mindrlhf.config import SamplingConfig
from mindrlhf.errors import UserError
from mindrlhf.models import cpu_kernels
from mindrlhf.models.kernels import MASKED

_own = cpu_kernels.PRIMITIVES
_has_own = _own is not None


def check_sampling(sampling: SamplingConfig) -> None:
    """Raises UserError for what has no meaning."""
    checks = (
        ("temperature", sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "over 0 and at most 1"),
        ("min_p", 0 <= sampling.min_p < 1, "0 (off) or more and under 1"),
        ("repetition_penalty", sampling.repetition_penalty > 0, "over 0; 1 is off"),
        ("max_tokens", sampling.max_tokens > 0, "1 or more"),
    )
    for name, holds, expected in checks:
        if not holds:
            raise UserError(f"sampling.{name}: {getattr(sampling, name)} must be {expected}")


def mix(*words) -> np.ndarray:
    """Hash of integers or integer arrays that broadcast -> uint64 (splitmix64, Steele et al. 2014, in a chain)."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(word) for word in words)), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = state + np.asarray(word).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniforms(keys: np.ndarray) -> np.ndarray:
    """uint64 hashes -> float32 in [0, 1 - 2^-23]: times a total it stays below it in float32, see `next_token`."""
    return (keys >> np.uint64(41)).astype(np.float32) * np.float32(2**-23)


def next_token(logits, uniform, temperature, top_k, top_p, min_p, features: tuple[str, ...]):
    """logits [S, V] -> (token [S] int32, log-prob of it [S] float32).

    The log-prob is that of the sampling temperature before top-k, top-p and min-p (at 1 where greedy). `features`
    says at compile time which of "greedy", "top_k", "top_p" and "min_p" are on; uniform [S] float32; the rest
    float32 or int32 scalars. Filters act in the order top-k, top-p, min-p, each on what the one before left.
    """
    if "greedy" in features:
        token = ops.cast(ops.argmax(logits, 1), ms.int32)
        return token, _picked(logits, token)
    if _has_own and not features:
        return _own.sample(logits, uniform, temperature)
    scaled = logits / temperature
    kept = scaled
    if "top_k" in features or "top_p" in features:
        kept = _filter_sorted(scaled, top_k, top_p, features)
    probabilities = ops.softmax(kept, -1)
    if "min_p" in features:
        most = ops.ReduceMax(keep_dims=True)(probabilities, -1)
        probabilities = probabilities * ops.cast(probabilities >= most * min_p, ms.float32)
    cumulative = ops.cumsum(probabilities, -1)
    threshold = uniform.expand_dims(1) * cumulative[:, logits.shape[1] - 1 :]
    # The first token whose cumulative probability is over the threshold: it always exists, and its own is over 0.
    token = ops.cast(ops.cast(cumulative <= threshold, ms.float32).sum(-1), ms.int32)
    return token, _picked(scaled, token)


def _picked(logits, token):
    """Log-softmax of logits [S, V] at token [S]."""
    return ops.gather_elements(logits, 1, token.expand_dims(1)).reshape(-1) - ops.logsumexp(logits, -1)


def _filter_sorted(scaled, top_k, top_p, features):
    """Logits outside top-k and top-p at MASKED. What ties with the last one kept is kept."""
    ordered, _ = ops.sort(scaled, -1, True)
    rank = ops.cast(ops.arange(scaled.shape[1]), ms.float32).expand_dims(0)
    if "top_k" in features:
        ordered = ops.masked_fill(ordered, rank >= top_k, MASKED)
    inside = ordered > 0.5 * MASKED
    if "top_p" in features:
        probabilities = ops.softmax(ordered, -1)
        before = ops.cumsum(probabilities, -1) - probabilities
        inside = ops.logical_and(inside, before < top_p)
    last = ops.cast(ops.cast(inside, ms.float32).sum(-1), ms.int32) - 1
    threshold = ops.gather_elements(ordered, 1, last.expand_dims(1))
    return ops.masked_fill(scaled, scaled < threshold, MASKED)
