"""The cells that a decoder is made of."""

from collections.abc import Callable
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.models import kernels
from mindrlhf.models.adapters import Adapter
from mindrlhf.models.collectives import GatherTokens
from mindrlhf.models.config import FAMILIES, DecoderConfig
from mindrlhf.models.lora import Weights
from mindrlhf.models.shard import Shard


def parameter_of(array: np.ndarray, name: str) -> Parameter:
    """A float32 parameter with a copy of those values, contiguous."""
    return Parameter(Tensor(np.ascontiguousarray(array, dtype=np.float32), ms.float32), name=name)


class Make(NamedTuple):
    """What the cells are made from."""

    weights: Weights  # this rank's slices
    shard: Shard
    transposed: bool
    adapter: Callable[[str], Adapter | None]  # by the projection's name


class Linear(nn.Cell):
    """A projection. Its outputs may be split over the tensor ranks, or its inputs, by its name."""

    def __init__(self, name: str, make: Make, bias: bool):
        super().__init__(auto_prefix=False)
        weight = make.weights(f"{name}.weight")
        self.weight = parameter_of(np.ascontiguousarray(weight.T) if make.transposed else weight, f"{name}.weight")
        self.bias = parameter_of(make.weights(f"{name}.bias"), f"{name}.bias") if bias else None
        self.transposed = make.transposed
        self.adapter = make.adapter(name)
        self.is_split = make.shard.tensor.size > 1
        self.sum = make.shard.sum()

    def construct(self, x):
        return self.adapted(kernels.linear(x, self.weight, self.bias, self.transposed), x)

    def added_to(self, residual, x):
        """Of a projection whose inputs are split: one sum over the ranks, the adapter's share in it."""
        if self.is_split:
            out = self.sum(self.adapted(kernels.linear(x, self.weight, None, self.transposed), x))
            return residual + (out if self.bias is None else out + self.bias)
        return self.adapted(kernels.residual_linear(residual, x, self.weight, self.bias, self.transposed), x)

    def adapted(self, out, x):
        """out, which W x went into, and the adapter's share."""
        return out if self.adapter is None else out + self.adapter(x)


class Norm(nn.Cell):
    """Root-mean-square normalisation."""

    def __init__(self, name: str, make: Make, epsilon: float):
        super().__init__(auto_prefix=False)
        self.weight = parameter_of(make.weights(f"{name}.weight"), f"{name}.weight")
        self.epsilon = epsilon

    def construct(self, x):
        return kernels.rms_norm(x, self.weight, self.epsilon)


class Attention(nn.Cell):
    """Of this rank's heads; grouped-query, with rotary positions."""

    def __init__(self, config: DecoderConfig, name: str, make: Make):
        super().__init__(auto_prefix=False)
        tensor, sequence = make.shard.tensor, make.shard.sequence
        self.heads, self.kv_heads = config.num_heads // tensor.size, config.num_kv_heads // tensor.size
        self.width = config.head_dim
        self.copy = make.shard.copy()
        self.gather_tokens = GatherTokens(sequence) if sequence.size > 1 else None
        self.scale = config.head_dim**-0.5
        self.q_proj = Linear(f"{name}.q_proj", make, config.qkv_bias)
        self.k_proj = Linear(f"{name}.k_proj", make, config.qkv_bias)
        self.v_proj = Linear(f"{name}.v_proj", make, config.qkv_bias)
        self.o_proj = Linear(f"{name}.o_proj", make, config.output_bias)
        half = config.head_dim // 2
        eye = np.eye(half, dtype=np.float32)
        self.rotation = Tensor(np.block([[np.zeros_like(eye), eye], [-eye, np.zeros_like(eye)]]))

    def _projected(self, x):
        x = self.copy(x)
        weights = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        biases = self.q_proj.bias, self.k_proj.bias, self.v_proj.bias
        query, key, value = kernels.three_linears(x, weights, biases, self.q_proj.transposed)
        return self.q_proj.adapted(query, x), self.k_proj.adapted(key, x), self.v_proj.adapted(value, x)

    def construct(self, residual, x, positions, segments, cos, sin, mask):
        """residual, x [B*T, H] -> (residual + attention [B*T, H], key and value [B*T, Hkv, D])."""
        query, key, value = self._projected(x)
        query = query.reshape(-1, self.heads, self.width)
        key = key.reshape(-1, self.kv_heads, self.width)
        value = value.reshape(-1, self.kv_heads, self.width)
        query = kernels.rotate(query, cos, sin, self.rotation)
        key = kernels.rotate(key, cos, sin, self.rotation)
        if self.gather_tokens is None:
            attended = kernels.attention(query, key, value, positions, segments, mask, self.scale)
        else:  # queries of this rank's tokens, keys and values of whole rows
            rows = mask.shape[0]
            both = ops.concat((key, value), 1).reshape(rows, -1, 2 * self.kv_heads, self.width)
            both = self.gather_tokens(both).reshape(-1, 2 * self.kv_heads, self.width)
            key, value = both[:, : self.kv_heads], both[:, self.kv_heads :]
            attended = kernels.composed_attention(query, key, value, mask, self.scale)
        return self.o_proj.added_to(residual, attended), key, value

    def decode(self, residual, x, positions, cos, sin, mask, rows, key_cache, value_cache):
        query, key, value = self._projected(x)
        out = kernels.decode_attention(
            query, key, value, positions, cos, sin, key_cache, value_cache, rows, mask, self.scale, self.rotation
        )
        return self.o_proj.added_to(residual, out)


class FeedForward(nn.Cell):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig, name: str, make: Make):
        super().__init__(auto_prefix=False)
        self.gate_proj = Linear(f"{name}.gate_proj", make, False)
        self.up_proj = Linear(f"{name}.up_proj", make, False)
        self.down_proj = Linear(f"{name}.down_proj", make, False)
        self.copy = make.shard.copy()

    def construct(self, residual, x):
        x = self.copy(x)
        if self.gate_proj.adapter is None and self.up_proj.adapter is None:
            gated = kernels.gated_linear(x, self.gate_proj.weight, self.up_proj.weight, self.gate_proj.transposed)
        else:
            gated = kernels.swiglu(self.gate_proj(x), self.up_proj(x))
        return self.down_proj.added_to(residual, gated)


class Layer(nn.Cell):
    """Attention and feed-forward, each normalised before and added to what came in."""

    def __init__(self, config: DecoderConfig, name: str, make: Make, feed_forward: type):
        """feed_forward: FeedForward or Experts."""
        super().__init__(auto_prefix=False)
        self.input_layernorm = Norm(f"{name}.input_layernorm", make, config.norm_epsilon)
        self.self_attn = Attention(config, f"{name}.self_attn", make)
        self.post_attention_layernorm = Norm(f"{name}.post_attention_layernorm", make, config.norm_epsilon)
        self.mlp = feed_forward(config, f"{name}.{FAMILIES[config.model_type].feed_forward}", make)

    def construct(self, x, positions, segments, cos, sin, mask):
        x, key, value = self.self_attn(x, self.input_layernorm(x), positions, segments, cos, sin, mask)
        return self.mlp(x, self.post_attention_layernorm(x)), key, value

    def decode(self, x, positions, cos, sin, mask, rows, key_cache, value_cache):
        normed = self.input_layernorm(x)
        x = self.self_attn.decode(x, normed, positions, cos, sin, mask, rows, key_cache, value_cache)
        return self.mlp(x, self.post_attention_layernorm(x))
