"""The decoder's arithmetic, one function a kernel.

Each has a form composed of MindSpore's primitives, which runs anywhere, and on a CPU most have a kernel of our own
(cpu_kernels.py) behind the same function and the same test. So have MindSpore's fused kernels on Ascend
(ascend_kernels.py).

What goes in and comes out is float32. dtype is what matrices are multiplied in, float32 or a 16-bit type, their
products cast back: norms, softmax and sums over tokens stay float32.
"""

import mindspore as ms
from mindspore import Tensor, ops

from mindrlhf.models import ascend_kernels, cpu_kernels

_fused = ascend_kernels.in_use()
_own = cpu_kernels.PRIMITIVES
_has_own = _own is not None
_matmul = ops.MatMul()
_matmul_nt = ops.MatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()
_batch_matmul_nt = ops.BatchMatMul(transpose_b=True)
_bias_add = ops.BiasAdd()
_mean = ops.ReduceMean(keep_dims=True)
_softmax = ops.Softmax(-1)
_scatter_update = ops.ScatterUpdate()

MASKED = -1e9  # added to the scores that must not be seen; exp of it is exactly 0 in float32


# Rows between which our product is faster than MatMul: fewer wait for the memory, more do not fit the kernel.
FEW_ROWS = (8, 64)


def few(rows: int) -> bool:
    return FEW_ROWS[0] <= rows <= FEW_ROWS[1]


def _has_thin(x, transposed: bool, dtype) -> bool:
    """Whether our product of few rows serves: it is float32 and wants weights [K, N]."""
    return _has_own and transposed and few(x.shape[0]) and dtype == ms.float32


def product(matmul, a, b, dtype):
    """matmul(a, b), computed in dtype and returned in float32."""
    return ops.cast(matmul(ops.cast(a, dtype), ops.cast(b, dtype)), ms.float32)


def linear(x, weight, bias, transposed: bool, dtype=ms.float32):
    """x [M, K] float32; weight [N, K], or [K, N] where transposed; bias [N] or None -> [M, N]."""
    if _has_thin(x, transposed, dtype):
        return _own.projection(x, weight) if bias is None else _own.projection(x, weight, bias)
    out = product(_matmul if transposed else _matmul_nt, x, weight, dtype)
    if bias is None:
        return out
    return _own.add_bias(out, bias) if _has_own else _bias_add(out, bias)


def three_linears(x, weights, biases, transposed: bool, dtype=ms.float32):
    """The same x by three weights, one kernel where it is small; biases: a tuple of three, or of three None."""
    a, b, c = weights
    if _has_thin(x, transposed, dtype):
        if biases[0] is None:
            return _own.three_projections(x, a, b, c)
        return _own.three_projections(x, a, biases[0], b, biases[1], c, biases[2])
    return (
        linear(x, a, biases[0], transposed, dtype),
        linear(x, b, biases[1], transposed, dtype),
        linear(x, c, biases[2], transposed, dtype),
    )


def gated_linear(x, gate, up, transposed: bool, dtype=ms.float32):
    """swiglu of x by two weights [K, N] where transposed, [N, K] elsewhere -> [M, N]."""
    if _has_thin(x, transposed, dtype):
        return _own.gated_projection(x, gate, up)
    return swiglu(linear(x, gate, None, transposed, dtype), linear(x, up, None, transposed, dtype))


def residual_linear(residual, x, weight, bias, transposed: bool, dtype=ms.float32):
    """residual [M, N] + linear(x, weight, bias)."""
    if _has_thin(x, transposed, dtype):
        if bias is None:
            return _own.residual_projection(x, weight, residual)
        return _own.residual_projection(x, weight, residual, bias)
    return residual + linear(x, weight, bias, transposed, dtype)


def rms_norm(x, weight, epsilon: float):
    """x [M, H] / root mean square over H, times weight [H] (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    if _has_own:
        return _own.rms_norm(x, weight, Tensor(epsilon, ms.float32))
    if _fused:
        return ascend_kernels.rms_norm(x, weight, epsilon)
    return composed_rms_norm(x, weight, epsilon)


def composed_rms_norm(x, weight, epsilon: float):
    return x * ops.rsqrt(_mean(x * x, -1) + epsilon) * weight


def layer_norm(x, weight, bias, epsilon: float):
    """(x - mean) / standard deviation over H of x [M, H], times weight [H], plus bias [H] (arXiv 1607.06450)."""
    centred = x - _mean(x, -1)
    return centred * ops.rsqrt(_mean(centred * centred, -1) + epsilon) * weight + bias


def gelu(x):
    """x Phi(x) by its tanh approximation (arXiv 1606.08415), as GPT-2 has it: 0.5 (1 + tanh(u)) is sigmoid(2 u)."""
    return x * ops.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def swiglu(gate, up):
    """silu(gate) * up, both [M, I] (Shazeer 2020, arXiv 2002.05202)."""
    if _has_own:
        return _own.swiglu(gate, up)
    return ascend_kernels.swiglu(gate, up) if _fused else composed_swiglu(gate, up)


def composed_swiglu(gate, up):
    return ops.silu(gate) * up


def rotate(x, cos, sin, rotation):
    """Rotary position embedding of x [M, heads, D] by cos, sin [M, 1, D] (Su et al. 2021, arXiv 2104.09864).

    rotation [D, D] is the signed permutation (x1, x2) -> (-x2, x1) of the two halves.
    """
    if _has_own:
        return _own.rotate(x, cos, sin)
    return ascend_kernels.rotate(x, cos, sin) if _fused else composed_rotate(x, cos, sin, rotation)


def composed_rotate(x, cos, sin, rotation):
    # As a matmul the permutation costs less than the slices and the padding of their gradient.
    heads, width = x.shape[1], x.shape[2]
    turned = _matmul(x.reshape(-1, width), rotation).reshape(-1, heads, width)
    return x * cos + turned * sin


def attention(query, key, value, positions, segments, mask, scale: float, dtype=ms.float32):
    """Grouped-query attention over whole rows (Ainslie et al. 2023, arXiv 2305.13245).

    query [B*T, Hq, D]; key, value [B*T, Hkv, D]; positions, segments [B, T] int32 say who sees whom, and so does mask,
    `visible` of them. Returns [B*T, Hq*D].
    """
    if _has_own and dtype == ms.float32:  # needs no mask
        out, _ = _own.attention(query, key, value, positions, segments, Tensor(scale, ms.float32))
        return out.reshape(query.shape[0], query.shape[1] * query.shape[2])
    if _fused and dtype != ms.float32:
        return ascend_kernels.attention(query, key, value, mask, scale, dtype)
    return composed_attention(query, key, value, mask, scale, dtype)


def composed_attention(query, key, value, mask, scale: float, dtype=ms.float32):
    """mask [B, 1, T, K]; the keys may be of longer rows than the queries, [B*K, Hkv, D]."""
    batch, length, keys = mask.shape[0], mask.shape[2], mask.shape[3]
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[2]
    group = heads // kv_heads
    flat = (batch * kv_heads, group * length, width)
    query = query.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4).reshape(flat)
    key, value = by_head(key, batch), by_head(value, batch)
    scores = product(_batch_matmul_nt, query * scale, key.reshape(batch * kv_heads, keys, width), dtype)
    scores = scores.reshape(batch, heads, length, keys) + mask
    weights = _softmax(scores).reshape(batch * kv_heads, group * length, keys)
    out = product(_batch_matmul, weights, value.reshape(batch * kv_heads, keys, width), dtype)
    out = out.reshape(batch, kv_heads, group, length, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch * length, heads * width)


def by_head(x, batch: int):
    """Keys or values [B*T, Hkv, D] -> [B, Hkv, T, D]."""
    return x.reshape(batch, -1, x.shape[1], x.shape[2]).transpose(0, 2, 1, 3)


def decode_attention(
    query, key, value, positions, cos, sin, key_cache, value_cache, rows, mask, scale: float, rotation,
    dtype=ms.float32,
):  # fmt: skip
    """One new token a slot against everything that the slot has cached.

    query [S, Hq*D]; key, value [S, Hkv*D]: of the new tokens, before the rotation by cos, sin [S, 1, D]; positions [S]
    int32. Keys and values are written in place to the caches [S*Hkv*L, D], at rows [S*Hkv] int32; mask [S, 1, L] hides
    what is after a slot's position. Returns [S, Hq*D].
    """
    if _has_own and dtype == ms.float32:  # needs neither rows nor mask, and reads only what a slot holds
        scale = Tensor(scale, ms.float32)
        return _own.decode_attention(query, key, value, positions, cos, sin, key_cache, value_cache, scale)
    return composed_decode_attention(
        query, key, value, cos, sin, key_cache, value_cache, rows, mask, scale, rotation, dtype
    )


def composed_decode_attention(
    query, key, value, cos, sin, key_cache, value_cache, rows, mask, scale, rotation, dtype=ms.float32
):
    slots, length, width = mask.shape[0], mask.shape[2], cos.shape[2]
    heads, kv_heads = query.shape[1] // width, key.shape[1] // width
    group = heads // kv_heads
    query = composed_rotate(query.reshape(slots, heads, width), cos, sin, rotation)
    key = composed_rotate(key.reshape(slots, kv_heads, width), cos, sin, rotation)
    key_cache = _scatter_update(key_cache, rows, key.reshape(slots * kv_heads, width))
    value_cache = _scatter_update(value_cache, rows, value.reshape(slots * kv_heads, width))
    query = (query * scale).reshape(slots * kv_heads, group, width)
    scores = product(_batch_matmul_nt, query, key_cache.reshape(slots * kv_heads, length, width), dtype)
    weights = _softmax(scores.reshape(slots, heads, length) + mask).reshape(slots * kv_heads, group, length)
    out = product(_batch_matmul, weights, value_cache.reshape(slots * kv_heads, length, width), dtype)
    return out.reshape(slots, heads * width)


def visible(positions, segments, own_positions=None, own_segments=None):
    """Additive mask [B, 1, T, K] of packed rows: a token sees itself and what is before it in its own segment.

    positions, segments [B, K] int32 of what is seen; own_... [B, T] of who sees, where that is a part of the rows.
    """
    own_positions = positions if own_positions is None else own_positions
    own_segments = segments if own_segments is None else own_segments
    same = ops.equal(own_segments.expand_dims(2), segments.expand_dims(1))
    past = ops.less_equal(positions.expand_dims(1), own_positions.expand_dims(2))
    hidden = 1.0 - ops.cast(ops.logical_and(same, past), ms.float32)
    return (hidden * MASKED).expand_dims(1)
