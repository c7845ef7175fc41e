"""MindSpore's fused kernels for Ascend, with the signatures of kernels.py. Never run: docs/devices.md says how to.

Their signatures and limits are those of the documentation in MindSpore 2.9. There is none for decoding: it says of
PagedAttention and ReshapeAndCache that MindSpore has no backend for them.
"""

import mindspore as ms
from mindspore import ops

from mindrlhf.utils.parallel import device_target


def in_use() -> bool:
    """Whether the device is Ascend, now and when MindSpore was told."""
    return device_target() == "Ascend" and ms.get_context("device_target") == "Ascend"


def rms_norm(x, weight, epsilon: float):
    out, _ = ops.rms_norm(x, weight, epsilon)
    return out


def swiglu(gate, up):
    return ops.swiglu(ops.concat((gate, up), -1))


def rotate(x, cos, sin):
    """x [M, heads, D] is the layout BSND with one row: [1, M, heads, D] by [1, M, 1, D]; mode 0 is by halves."""
    turned = ops.rotary_position_embedding(x.expand_dims(0), cos.expand_dims(0), sin.expand_dims(0), 0)
    return turned.reshape(x.shape)


def attention(query, key, value, mask, scale: float, dtype):
    """As kernels.composed_attention, in a 16-bit dtype, which is all that the kernel has."""
    batch, length, keys = mask.shape[0], mask.shape[2], mask.shape[3]
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[2]
    out = ops.flash_attention_score(
        ops.cast(query, dtype).reshape(batch, length, heads, width),
        ops.cast(key, dtype).reshape(batch, keys, kv_heads, width),
        ops.cast(value, dtype).reshape(batch, keys, kv_heads, width),
        heads,
        attn_mask=mask < 0,  # True is what is not seen
        scalar_value=scale,
        input_layout="BSND",
    )
    return ops.cast(out, ms.float32).reshape(batch * length, heads * width)
