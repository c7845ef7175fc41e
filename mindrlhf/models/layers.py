"""The cells that a decoder is made of."""

from collections.abc import Callable
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.models import kernels
from mindrlhf.models.adapters import Adapter
from mindrlhf.models.collectives import GatherTokens
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.shapes import Weights
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
    dtype: ms.Type = ms.float32  # that matrices are multiplied in


class Linear(nn.Cell):
    """A projection. Its outputs may be split over the tensor ranks, or its inputs, by its name."""

    def __init__(self, name: str, make: Make, bias: bool):
        super().__init__(auto_prefix=False)
        weight = make.weights(f"{name}.weight")
        self.weight = parameter_of(np.ascontiguousarray(weight.T) if make.transposed else weight, f"{name}.weight")
        self.bias = parameter_of(make.weights(f"{name}.bias"), f"{name}.bias") if bias else None
        self.transposed, self.dtype = make.transposed, make.dtype
        self.adapter = make.adapter(name)
        self.is_split = make.shard.tensor.size > 1
        self.sum = make.shard.sum()

    def construct(self, x):
        return self.adapted(kernels.linear(x, self.weight, self.bias, self.transposed, self.dtype), x)

    def added_to(self, residual, x, norm):
        """residual + norm(W x), of a projection whose inputs are split: one sum over the ranks, the adapter's share
        in it. norm: None where there is none."""
        if self.is_split or norm is not None:
            out = self.sum(self.adapted(kernels.linear(x, self.weight, None, self.transposed, self.dtype), x))
            out = out if self.bias is None else out + self.bias
            return residual + (out if norm is None else norm(out))
        out = kernels.residual_linear(residual, x, self.weight, self.bias, self.transposed, self.dtype)
        return self.adapted(out, x)

    def adapted(self, out, x):
        """out, which W x went into, and the adapter's share."""
        return out if self.adapter is None else out + self.adapter(x)


class Norm(nn.Cell):
    """By the root mean square, or with mean and bias, over the last axis."""

    def __init__(self, name: str, make: Make, epsilon: float, with_mean: bool = False):
        super().__init__(auto_prefix=False)
        self.weight = parameter_of(make.weights(f"{name}.weight"), f"{name}.weight")
        self.bias = parameter_of(make.weights(f"{name}.bias"), f"{name}.bias") if with_mean else None
        self.epsilon = epsilon

    def construct(self, x):
        if self.bias is None:
            return kernels.rms_norm(x, self.weight, self.epsilon)
        return kernels.layer_norm(x, self.weight, self.bias, self.epsilon)


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
        self.q_norm = self.k_norm = None
        if config.family.qk_norm:
            self.q_norm = Norm(f"{name}.q_norm", make, config.norm_epsilon)
            self.k_norm = Norm(f"{name}.k_norm", make, config.norm_epsilon)
        self.o_proj = Linear(f"{name}.o_proj", make, config.output_bias)
        self.rotation, self.dtype = rotation(config.head_dim), make.dtype

    def _projected(self, x):
        x = self.copy(x)
        weights = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        biases = self.q_proj.bias, self.k_proj.bias, self.v_proj.bias
        query, key, value = kernels.three_linears(x, weights, biases, self.q_proj.transposed, self.dtype)
        query, key = self.q_proj.adapted(query, x), self.k_proj.adapted(key, x)
        if self.q_norm is not None:
            query = self.q_norm(query.reshape(-1, self.width)).reshape(-1, self.heads * self.width)
            key = self.k_norm(key.reshape(-1, self.width)).reshape(-1, self.kv_heads * self.width)
        return query, key, self.v_proj.adapted(value, x)

    def construct(self, x, positions, segments, cos, sin, mask):
        """x [B*T, H] -> (attended [B*T, Hq*D], what is cached: key and value [B*T, Hkv, D])."""
        query, key, value = self._projected(x)
        query = query.reshape(-1, self.heads, self.width)
        key = key.reshape(-1, self.kv_heads, self.width)
        value = value.reshape(-1, self.kv_heads, self.width)
        query = kernels.rotate(query, cos, sin, self.rotation)
        key = kernels.rotate(key, cos, sin, self.rotation)
        if self.gather_tokens is None:
            attended = kernels.attention(query, key, value, positions, segments, mask, self.scale, self.dtype)
            return attended, (key, value)
        # Queries of this rank's tokens, keys and values of whole rows.
        both = ops.concat((key, value), 1).reshape(mask.shape[0], -1, 2 * self.kv_heads, self.width)
        both = self.gather_tokens(both).reshape(-1, 2 * self.kv_heads, self.width)
        key, value = both[:, : self.kv_heads], both[:, self.kv_heads :]
        return kernels.composed_attention(query, key, value, mask, self.scale, self.dtype), (key, value)

    def decode(self, x, positions, cos, sin, mask, rows, key_cache, value_cache):
        query, key, value = self._projected(x)
        return kernels.decode_attention(
            query, key, value, positions, cos, sin, key_cache, value_cache, rows, mask, self.scale, self.rotation,
            self.dtype,
        )  # fmt: skip


def rotation(width: int) -> Tensor:
    """[D, D], see kernels.rotate."""
    eye = np.eye(width // 2, dtype=np.float32)
    return Tensor(np.block([[np.zeros_like(eye), eye], [-eye, np.zeros_like(eye)]]))


class FeedForward(nn.Cell):
    """SwiGLU, or two matrices with GELU between them."""

    def __init__(self, config: DecoderConfig, name: str, make: Make):
        super().__init__(auto_prefix=False)
        is_gelu = config.family.gelu
        self.gate_proj = None if is_gelu else Linear(f"{name}.gate_proj", make, False)
        self.up_proj = Linear(f"{name}.up_proj", make, is_gelu)
        self.down_proj = Linear(f"{name}.down_proj", make, is_gelu)
        self.copy = make.shard.copy()

    def construct(self, residual, x, norm, real):
        """residual + norm(MLP of x [M, H]); real is for experts."""
        return self.down_proj.added_to(residual, self.inner(self.copy(x)), norm)

    def inner(self, x):
        """What the last projection is applied to."""
        if self.gate_proj is None:
            return kernels.gelu(self.up_proj(x))
        if self.gate_proj.adapter is None and self.up_proj.adapter is None:
            gate = self.gate_proj
            return kernels.gated_linear(x, gate.weight, self.up_proj.weight, gate.transposed, gate.dtype)
        return kernels.swiglu(self.gate_proj(x), self.up_proj(x))


class Layer(nn.Cell):
    """Attention and feed-forward, each normalised before and added to what came in."""

    def __init__(self, config: DecoderConfig, name: str, make: Make, attention: type, feed_forward: type):
        """attention: Attention or LatentAttention; feed_forward: FeedForward or Experts."""
        super().__init__(auto_prefix=False)

        def norm(kind: str) -> Norm:
            return Norm(f"{name}.{kind}", make, config.norm_epsilon, config.family.layer_norm)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = attention(config, f"{name}.self_attn", make)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = feed_forward(config, f"{name}.mlp", make)
        self.post_self_attn_layernorm = self.post_mlp_layernorm = None
        if config.family.sandwich_norms:
            self.post_self_attn_layernorm = norm("post_self_attn_layernorm")
            self.post_mlp_layernorm = norm("post_mlp_layernorm")

    def construct(self, x, positions, segments, cos, sin, mask, real):
        """x [M, H] -> (the same, what is cached). real [M] float32 is 0 at padding."""
        attended, cached = self.self_attn(self.input_layernorm(x), positions, segments, cos, sin, mask)
        x = self.self_attn.o_proj.added_to(x, attended, self.post_self_attn_layernorm)
        return self.mlp(x, self.post_attention_layernorm(x), self.post_mlp_layernorm, real), cached

    def decode(self, x, positions, cos, sin, mask, rows, key_cache, value_cache):
        normed = self.input_layernorm(x)
        attended = self.self_attn.decode(normed, positions, cos, sin, mask, rows, key_cache, value_cache)
        x = self.self_attn.o_proj.added_to(x, attended, self.post_self_attn_layernorm)
        return self.mlp(x, self.post_attention_layernorm(x), self.post_mlp_layernorm, None)
