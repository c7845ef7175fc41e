"""The decoder's arithmetic, one function a kernel, composed of primitives that a CPU has.

A device with a fused kernel gets it here, behind the same function and the same test.
"""

import mindspore as ms
from mindspore import ops

_matmul = ops.MatMul()
_matmul_nt = ops.MatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()
_batch_matmul_nt = ops.BatchMatMul(transpose_b=True)
_bias_add = ops.BiasAdd()
_mean = ops.ReduceMean(keep_dims=True)
_softmax = ops.Softmax(-1)
_scatter_update = ops.ScatterUpdate()

MASKED = -1e9  # added to the scores that must not be seen; exp of it is exactly 0 in float32


def linear(x, weight, bias, transposed: bool):
    """x [M, K] float32; weight [N, K], or [K, N] where transposed; bias [N] or None -> [M, N]."""
    out = _matmul(x, weight) if transposed else _matmul_nt(x, weight)
    return out if bias is None else _bias_add(out, bias)


def rms_norm(x, weight, epsilon: float):
    """x [M, H] / root mean square over H, times weight [H] (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return x * ops.rsqrt(_mean(x * x, -1) + epsilon) * weight


def swiglu(gate, up):
    """silu(gate) * up, both [M, I] (Shazeer 2020, arXiv 2002.05202)."""
    return ops.silu(gate) * up


def rotate(x, cos, sin, rotation):
    """Rotary position embedding of x [M, heads, D] by cos, sin [M, 1, D] (Su et al. 2021, arXiv 2104.09864).

    rotation [D, D] is the signed permutation (x1, x2) -> (-x2, x1) of the two halves: as a matmul it costs less than
    the slices and the padding of their gradient.
    """
    heads, width = x.shape[1], x.shape[2]
    turned = _matmul(x.reshape(-1, width), rotation).reshape(-1, heads, width)
    return x * cos + turned * sin


def attention(query, key, value, mask, scale: float):
    """Grouped-query attention over whole rows (Ainslie et al. 2023, arXiv 2305.13245).

    query [B, T, Hq, D]; key, value [B, Hkv, T, D]; mask [B, 1, T, T], 0 where seen, MASKED elsewhere.
    Returns [B*T, Hq*D].
    """
    batch, length, heads, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    flat = (batch * kv_heads, group * length, width)
    query = query.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4).reshape(flat)
    scores = _batch_matmul_nt(query * scale, key.reshape(batch * kv_heads, length, width))
    scores = scores.reshape(batch, heads, length, length) + mask
    weights = _softmax(scores).reshape(batch * kv_heads, group * length, length)
    out = _batch_matmul(weights, value.reshape(batch * kv_heads, length, width))
    out = out.reshape(batch, kv_heads, group, length, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch * length, heads * width)


def cached_attention(query, key, value, key_cache, value_cache, rows, mask, scale: float):
    """One new token a slot against everything that the slot has cached.

    query [S, Hq, D]; key, value [S, Hkv, D]: of the new token, written in place at rows [S*Hkv] int32 of the caches
    [S*Hkv*L, D]; mask [S, 1, L]. Returns [S, Hq*D].
    """
    slots, heads, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    length = mask.shape[2]
    key_cache = _scatter_update(key_cache, rows, key.reshape(slots * kv_heads, width))
    value_cache = _scatter_update(value_cache, rows, value.reshape(slots * kv_heads, width))
    query = (query * scale).reshape(slots * kv_heads, group, width)
    scores = _batch_matmul_nt(query, key_cache.reshape(slots * kv_heads, length, width))
    weights = _softmax(scores.reshape(slots, heads, length) + mask).reshape(slots * kv_heads, group, length)
    out = _batch_matmul(weights, value_cache.reshape(slots * kv_heads, length, width))
    return out.reshape(slots, heads * width)


def visible(positions, segments):
    """Additive mask [B, 1, T, T] of packed rows: a token sees itself and what is before it in its own segment."""
    same = ops.equal(segments.expand_dims(2), segments.expand_dims(1))
    past = ops.less_equal(positions.expand_dims(1), positions.expand_dims(2))
    hidden = 1.0 - ops.cast(ops.logical_and(same, past), ms.float32)
    return (hidden * MASKED).expand_dims(1)
