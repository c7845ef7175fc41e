"""The cells that test_kernels.py compiles: each with our kernel (own) or the composed form of the same."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindrlhf.losses import logprobs_and_entropy
from mindrlhf.models import cpu_kernels, kernels

PRIMITIVES = cpu_kernels.PRIMITIVES


def rotation(width):
    eye = np.eye(width // 2, dtype=np.float32)
    return Tensor(np.block([[np.zeros_like(eye), eye], [-eye, np.zeros_like(eye)]]))


class Gradients(nn.Cell):
    """Gradients of sum(weight * output) over all outputs, at the inputs of these places."""

    def __init__(self, cell, places):
        super().__init__()
        self.cell = cell
        self.gradient = ms.grad(self.weighted, tuple(place + 1 for place in places))

    def weighted(self, weights, *inputs):
        outputs = self.cell(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = 0.0
        for i in range(len(weights)):
            total = total + (outputs[i] * weights[i]).sum()
        return total

    def construct(self, weights, *inputs):
        gradients = self.gradient(weights, *inputs)
        return gradients if isinstance(gradients, tuple) else (gradients,)


class Call(nn.Cell):
    def __init__(self, primitive):
        super().__init__()
        self.primitive = primitive

    def construct(self, *inputs):
        return self.primitive(*inputs)


class OnParameters(nn.Cell):
    def __init__(self, primitive, parameters):
        super().__init__()
        self.primitive, self.parameters = primitive, ms.ParameterTuple(parameters)

    def construct(self, *inputs):
        first, second, third, fourth = self.parameters
        return self.primitive(first, second, third, fourth, *inputs)


class _Either(nn.Cell):
    def __init__(self, own):
        super().__init__()
        self.own = own


class RmsNorm(_Either):
    def construct(self, x, weight):
        if self.own:
            return PRIMITIVES.rms_norm(x, weight, Tensor(1e-6, ms.float32))
        return kernels.composed_rms_norm(x, weight, 1e-6)


class Swiglu(_Either):
    def construct(self, gate, up):
        return PRIMITIVES.swiglu(gate, up) if self.own else kernels.composed_swiglu(gate, up)


class Bias(_Either):
    def construct(self, x, bias):
        return PRIMITIVES.add_bias(x, bias) if self.own else x + bias


class Rotate(_Either):
    def __init__(self, own, cos, sin):
        super().__init__(own)
        self.cos, self.sin, self.rotation = cos, sin, rotation(cos.shape[2])

    def construct(self, x):
        if self.own:
            return PRIMITIVES.rotate(x, self.cos, self.sin)
        return kernels.composed_rotate(x, self.cos, self.sin, self.rotation)


class Attention(_Either):
    def __init__(self, own, positions, segments, scale):
        super().__init__(own)
        self.positions, self.segments, self.scale = positions, segments, scale

    def construct(self, query, key, value):
        if self.own:
            scale = Tensor(self.scale, ms.float32)
            out, _ = PRIMITIVES.attention(query, key, value, self.positions, self.segments, scale)
            return out.reshape(query.shape[0], query.shape[1] * query.shape[2])
        mask = kernels.visible(self.positions, self.segments)
        return kernels.composed_attention(query, key, value, mask, self.scale)


class DecodeAttention(_Either):
    def __init__(self, own, caches, positions, length, kv_heads, cos, sin):
        super().__init__(own)
        self.key_cache, self.value_cache = caches
        self.positions, self.cos, self.sin, self.scale = Tensor(positions), cos, sin, cos.shape[2] ** -0.5
        heads = np.arange(len(positions) * kv_heads).reshape(len(positions), kv_heads)
        self.rows = Tensor((heads * length + positions[:, None]).reshape(-1).astype(np.int32))
        hidden = np.arange(length)[None, None] > positions[:, None, None]
        self.mask = Tensor(hidden.astype(np.float32) * kernels.MASKED)
        self.rotation = rotation(cos.shape[2])

    def construct(self, query, key, value):
        caches = self.key_cache, self.value_cache
        if self.own:
            scale = Tensor(self.scale, ms.float32)
            return PRIMITIVES.decode_attention(query, key, value, self.positions, self.cos, self.sin, *caches, scale)
        return kernels.composed_decode_attention(
            query, key, value, self.cos, self.sin, *caches, self.rows, self.mask, self.scale, self.rotation
        )


class TargetLogprobs(_Either):
    def __init__(self, own, temperature):
        super().__init__(own)
        self.temperature = temperature

    def construct(self, logits, labels):
        if self.own:
            logprobs, entropy, _ = PRIMITIVES.target_logprobs(logits, labels, Tensor(self.temperature, ms.float32))
            return logprobs, entropy
        return logprobs_and_entropy(logits, labels, self.temperature, entropy_gradient=True)


class Apply(nn.Cell):
    """function(*inputs, *constants)."""

    def __init__(self, function, *constants):
        super().__init__()
        self.function, self.constants = function, constants

    def construct(self, *inputs):
        return self.function(*inputs, *self.constants)
