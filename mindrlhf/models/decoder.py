"""The one decoder: training, scoring, prefill and decoding from the same parameters.

Parameter names and shapes are Hugging Face's, so a checkpoint is a list of names. A family is flags of DecoderConfig.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.models import kernels
from mindrlhf.models.adapters import Adapter, Adapters
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.hf import HEAD, SCORE, expected_shapes
from mindrlhf.models.lora import Lora, Weights, check_layers, merged
from mindrlhf.models.rope import rope_tables


def random_weights(config: DecoderConfig, seed: int) -> Weights:
    """Normal matrices of config.initializer_range, norms of 1, biases of 0, as Hugging Face initialises.

    The score head is 0: a reward model starts undecided.
    Each tensor is keyed by (seed, its place in the list), so any subset can be made alone.
    """
    shapes = expected_shapes(config)
    place = {name: i for i, name in enumerate(shapes)}

    def weights(name: str) -> np.ndarray:
        shape = shapes[name]
        if name == SCORE:
            return np.zeros(shape, np.float32)
        if len(shape) == 1:
            return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        draw = np.random.default_rng((seed, place[name])).standard_normal(shape, dtype=np.float32)
        return draw * np.float32(config.initializer_range)

    return weights


class _Make(NamedTuple):
    """What the cells are made from."""

    weights: Weights
    transposed: bool
    adapter: Callable[[str], Adapter | None]  # by the projection's name


class _Linear(nn.Cell):
    def __init__(self, name: str, make: _Make, bias: bool):
        super().__init__(auto_prefix=False)
        weight = make.weights(f"{name}.weight")
        self.weight = _parameter(np.ascontiguousarray(weight.T) if make.transposed else weight, f"{name}.weight")
        self.bias = _parameter(make.weights(f"{name}.bias"), f"{name}.bias") if bias else None
        self.transposed = make.transposed
        self.adapter = make.adapter(name)

    def construct(self, x):
        return self.adapted(kernels.linear(x, self.weight, self.bias, self.transposed), x)

    def added_to(self, residual, x):
        return self.adapted(kernels.residual_linear(residual, x, self.weight, self.bias, self.transposed), x)

    def adapted(self, out, x):
        """out, which W x went into, and the adapter's share."""
        return out if self.adapter is None else out + self.adapter(x)


class _Norm(nn.Cell):
    def __init__(self, name: str, make: _Make, epsilon: float):
        super().__init__(auto_prefix=False)
        self.weight = _parameter(make.weights(f"{name}.weight"), f"{name}.weight")
        self.epsilon = epsilon

    def construct(self, x):
        return kernels.rms_norm(x, self.weight, self.epsilon)


class _Attention(nn.Cell):
    def __init__(self, config: DecoderConfig, name: str, make: _Make):
        super().__init__(auto_prefix=False)
        self.heads, self.kv_heads, self.width = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.q_proj = _Linear(f"{name}.q_proj", make, config.qkv_bias)
        self.k_proj = _Linear(f"{name}.k_proj", make, config.qkv_bias)
        self.v_proj = _Linear(f"{name}.v_proj", make, config.qkv_bias)
        self.o_proj = _Linear(f"{name}.o_proj", make, config.output_bias)
        half = config.head_dim // 2
        eye = np.eye(half, dtype=np.float32)
        self.rotation = Tensor(np.block([[np.zeros_like(eye), eye], [-eye, np.zeros_like(eye)]]))

    def _projected(self, x):
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
        attended = kernels.attention(query, key, value, positions, segments, mask, self.scale)
        return self.o_proj.added_to(residual, attended), key, value

    def decode(self, residual, x, positions, cos, sin, mask, rows, key_cache, value_cache):
        query, key, value = self._projected(x)
        out = kernels.decode_attention(
            query, key, value, positions, cos, sin, key_cache, value_cache, rows, mask, self.scale, self.rotation
        )
        return self.o_proj.added_to(residual, out)


class _FeedForward(nn.Cell):
    def __init__(self, config: DecoderConfig, name: str, make: _Make):
        super().__init__(auto_prefix=False)
        self.gate_proj = _Linear(f"{name}.gate_proj", make, False)
        self.up_proj = _Linear(f"{name}.up_proj", make, False)
        self.down_proj = _Linear(f"{name}.down_proj", make, False)

    def construct(self, residual, x):
        if self.gate_proj.adapter is None and self.up_proj.adapter is None:
            gated = kernels.gated_linear(x, self.gate_proj.weight, self.up_proj.weight, self.gate_proj.transposed)
        else:
            gated = kernels.swiglu(self.gate_proj(x), self.up_proj(x))
        return self.down_proj.added_to(residual, gated)


class _Layer(nn.Cell):
    def __init__(self, config: DecoderConfig, name: str, make: _Make):
        super().__init__(auto_prefix=False)
        self.input_layernorm = _Norm(f"{name}.input_layernorm", make, config.norm_epsilon)
        self.self_attn = _Attention(config, f"{name}.self_attn", make)
        self.post_attention_layernorm = _Norm(f"{name}.post_attention_layernorm", make, config.norm_epsilon)
        self.mlp = _FeedForward(config, f"{name}.mlp", make)

    def construct(self, x, positions, segments, cos, sin, mask):
        x, key, value = self.self_attn(x, self.input_layernorm(x), positions, segments, cos, sin, mask)
        return self.mlp(x, self.post_attention_layernorm(x)), key, value

    def decode(self, x, positions, cos, sin, mask, rows, key_cache, value_cache):
        normed = self.input_layernorm(x)
        x = self.self_attn.decode(x, normed, positions, cos, sin, mask, rows, key_cache, value_cache)
        return self.mlp(x, self.post_attention_layernorm(x))


class Decoder(nn.Cell):
    """Tokens to hidden states, and those to logits or, where config.head says so, to scores.

    transposed: projection weights are stored [in, out] instead of Hugging Face's [out, in]. On a CPU few rows
    (decoding) are twice as fast that way and many rows (training) are slower, so a generator has its own decoder and
    gets the policy's weights by `sync_weights`.
    lora, adapter: low-rank adapters and their values. Then these and a score head are trained, nothing else.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        transposed: bool = False,
        lora: Lora | None = None,
        adapter: Weights | None = None,
    ):
        super().__init__(auto_prefix=False)
        assert (lora is None) == (adapter is None), "lora and adapter belong together"
        self.config = config
        self.transposed = transposed
        self.lora = lora
        self.adapters = Adapters(lora, lora.shapes(config), adapter) if lora else None
        make = _Make(weights, transposed, self.adapters or _no_adapter)
        embedding = weights("model.embed_tokens.weight")
        self.embedding = _parameter(embedding, "model.embed_tokens.weight")
        self.layers = nn.CellList(
            [_Layer(config, f"model.layers.{i}", make) for i in range(config.num_layers)],
            auto_prefix=False,
        )
        self.norm = _Norm("model.norm", make, config.norm_epsilon)
        self.tied = config.tie_embeddings and config.head == "logits" and not transposed
        if config.head == "score":
            self.score = _parameter(weights(SCORE), SCORE)
        elif not self.tied:
            head = embedding if config.tie_embeddings else weights(HEAD)
            self.head = _parameter(np.ascontiguousarray(head.T) if transposed else head, HEAD)
        cos, sin = rope_tables(config)
        self.cos, self.sin = Tensor(cos), Tensor(sin)
        every = {parameter.name: parameter for parameter in self.get_parameters()}
        self.adapter_by_name = {name: every.pop(name) for name in self.adapters.shapes} if lora else {}
        self.by_name = {name: parameter for name, parameter in every.items() if not name.startswith("lora.")}
        if lora:
            for name, parameter in self.by_name.items():
                parameter.requires_grad = name == SCORE

    def _rope(self, positions):
        flat = positions.reshape(-1)
        return ops.gather(self.cos, flat, 0).expand_dims(1), ops.gather(self.sin, flat, 0).expand_dims(1)

    def construct(self, tokens, positions, segments):
        """tokens, positions, segments [B, T] int32 (see PackedRows) -> normalised hidden states [B*T, H] float32."""
        cos, sin = self._rope(positions)
        mask = kernels.visible(positions, segments)
        x = ops.gather(self.embedding, tokens.reshape(-1), 0)
        for layer in self.layers:
            x, _, _ = layer(x, positions, segments, cos, sin, mask)
        return self.norm(x)

    def prefill(self, tokens, positions, segments):
        """The same rows -> key and value [B, Hkv, T, D] of every layer, in the order key, value, key, value..."""
        cos, sin = self._rope(positions)
        mask = kernels.visible(positions, segments)
        x = ops.gather(self.embedding, tokens.reshape(-1), 0)
        cached = ()
        for layer in self.layers:
            x, key, value = layer(x, positions, segments, cos, sin, mask)
            cached = cached + (kernels.by_head(key, tokens.shape[0]), kernels.by_head(value, tokens.shape[0]))
        return cached

    def decode(self, tokens, positions, rows, mask, key_caches, value_caches):
        """One token a slot: tokens, positions [S] int32, rows and mask as in kernels.decode_attention -> [S, H]."""
        cos, sin = self._rope(positions)
        x = ops.gather(self.embedding, tokens, 0)
        for i in range(len(self.layers)):
            x = self.layers[i].decode(x, positions, cos, sin, mask, rows, key_caches[i], value_caches[i])
        return self.norm(x)

    def logits(self, hidden):
        """hidden [M, H] -> [M, vocabulary] float32, of a language model."""
        if self.tied:
            return kernels.linear(hidden, self.embedding, None, False)
        return kernels.linear(hidden, self.head, None, self.transposed)

    def scores(self, hidden):
        """hidden [M, H] -> [M] float32, of a reward model."""
        return kernels.linear(hidden, self.score, None, False).reshape(-1)

    # -- parameters -------------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and float32 array, Hugging Face's names, shapes and order; views of the parameters where possible."""
        for name in expected_shapes(self.config):
            yield name, self.weights(name)

    def weights(self, name: str) -> np.ndarray:
        """What the parameter of that name comes to, adapters merged: a decoder can be built from another one's."""
        scale = float(self.adapters.scale.asnumpy()) if self.lora else 0.0
        if scale == 0:
            return self._as_stored(self.by_name[name])
        adapter = {key: parameter.asnumpy() for key, parameter in self.adapter_by_name.items() if _beside(key, name)}
        return merged(lambda name: self._as_stored(self.by_name[name]), scale, adapter)(name)

    def load(self, weights: Weights) -> None:
        """New values for every parameter but the adapters'. Compiled cells see them without recompiling."""
        for parameter in self.by_name.values():
            name = "model.embed_tokens.weight" if self._is_tied_head(parameter.name) else parameter.name
            array = weights(name)
            _set(parameter, array.T if self._is_transposed(parameter.name) else array)

    def adapter_tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and array of what an adapter's file holds: every A and B, and the score head."""
        for name, parameter in self._adapted().items():
            yield name, parameter.asnumpy()

    def load_adapter(self, weights: Weights) -> None:
        """New values for what `adapter_tensors` has, in place."""
        for name, parameter in self._adapted().items():
            _set(parameter, weights(name))

    def _adapted(self) -> dict[str, Parameter]:
        score = {SCORE: self.by_name[SCORE]} if self.config.head == "score" else {}
        return self.adapter_by_name | score

    def trainable(self, layers: Sequence[int] = ()) -> list[Parameter]:
        """What is trained: the adapters where there are any, else those layers, else all; a score head always.

        Raises UserError for a layer that is not there.
        """
        if self.lora:
            return list(self._adapted().values())
        check_layers(layers, self.config, "model.train_layers")
        prefixes = tuple(f"model.layers.{layer}." for layer in layers) + (SCORE,)
        return [parameter for name, parameter in self.by_name.items() if not layers or name.startswith(prefixes)]

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside it the decoder is the base model, in cells that are compiled already too."""
        assert self.lora, "adapters_off needs a decoder with adapters"
        self.adapters.scale.set_data(Tensor(0.0, ms.float32))
        try:
            yield
        finally:
            self.adapters.scale.set_data(Tensor(self.lora.scale, ms.float32))

    def set_dropout(self, seed: int) -> None:
        """Which of their inputs the adapters leave out, by a seed in [1, 2^31); 0: none."""
        if self.lora and self.lora.dropout:
            self.adapters.seed.set_data(Tensor(seed, ms.int32))

    def _is_tied_head(self, name: str) -> bool:
        return self.config.tie_embeddings and name == HEAD

    def _is_transposed(self, name: str) -> bool:
        return self.transposed and (name.endswith("_proj.weight") or name == HEAD)

    def _as_stored(self, parameter: Parameter) -> np.ndarray:
        array = parameter.asnumpy()
        return array.T if self._is_transposed(parameter.name) else array


def _no_adapter(name: str) -> None:
    return None


def _beside(adapter: str, weight: str) -> bool:
    return adapter.startswith(weight.removesuffix("weight"))


def _set(parameter: Parameter, array: np.ndarray) -> None:
    """In place where possible: set_data would hold the old and the new for a while."""
    view = parameter.asnumpy()
    if view.ctypes.data == parameter.data_ptr():
        np.copyto(view, array)
    else:
        parameter.set_data(Tensor.from_numpy(np.array(array, np.float32, order="C")))


def _parameter(array: np.ndarray, name: str) -> Parameter:
    return Parameter(Tensor(np.ascontiguousarray(array, dtype=np.float32), ms.float32), name=name)
