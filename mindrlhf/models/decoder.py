"""The one decoder: training, scoring, prefill and decoding from the same parameters.

Parameter names are those of shapes.expected_shapes for every family; a family is flags of DecoderConfig.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.layout import ONE_PROCESS, Box, Layout
from mindrlhf.models import kernels
from mindrlhf.models.adapters import Adapters
from mindrlhf.models.collectives import SumOfParts
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.experts import Experts
from mindrlhf.models.latent import LatentAttention
from mindrlhf.models.layers import Attention, FeedForward, Layer, Make, Norm, parameter_of
from mindrlhf.models.lora import Lora, check_layers, merged
from mindrlhf.models.rope import rope_tables
from mindrlhf.models.shapes import EMBEDDING, HEAD, POSITIONS, SCORE, Weights, expected_shapes
from mindrlhf.models.shard import Shard
from mindrlhf.models.vocabulary import ChunkedLogprobs, SplitVocabulary


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


class Decoder(nn.Cell):
    """Tokens to hidden states, and those to logits or, where config.head says so, to scores.

    transposed: projection weights are held [in, out] instead of [out, in]. On a CPU few rows
    (decoding) are twice as fast that way and many rows (training) are slower, so a generator has its own decoder and
    gets the policy's weights by `sync_weights`.
    lora, adapter: low-rank adapters and their values. Then these and a score head are trained, nothing else.
    layout: how the processes share it; this one holds its slices of weights and adapter, which are given whole.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        transposed: bool = False,
        lora: Lora | None = None,
        adapter: Weights | None = None,
        layout: Layout = ONE_PROCESS,
    ):
        super().__init__(auto_prefix=False)
        assert (lora is None) == (adapter is None), "lora and adapter belong together"
        self.config, self.layout, self.shard = config, layout, Shard(layout)
        weights = self.shard.cut(weights)
        self.transposed = transposed
        self.lora = lora
        self.dtype = getattr(ms, config.compute.dtype)
        self.adapters = None
        if lora:
            self.adapters = Adapters(lora, lora.shapes(config), self.shard.cut(adapter), self.shard, self.dtype)
        self.tied = config.tie_embeddings and config.head == "logits" and not transposed
        self._make_cells(Make(weights, self.shard, transposed, self.adapters or _no_adapter, self.dtype))
        if self.adapters:
            self.adapters.weights = None  # where the first values came from
        self.copy, self.sum = self.shard.copy(), self.shard.sum()
        self.gather_columns = self.shard.gather_columns()
        self.is_split = self.shard.tensor.size > 1
        self.first_token = self.shard.tensor.index * self.embedding.shape[0]  # of this rank's part of the vocabulary
        self.vocabulary = SplitVocabulary(self.shard.tensor, self.first_token) if self.is_split else None
        targets = config.compute.targets_at_once(self.embedding.shape[0])
        self.chunked = ChunkedLogprobs(targets, self.vocabulary, self.dtype)
        self.parts, self.part = self.shard.sequence.size, self.shard.sequence.index  # of every row's tokens
        self.sum_of_parts = SumOfParts(self.shard.sequence) if self.parts > 1 else None
        every = {parameter.name: parameter for parameter in self.get_parameters()}
        self.adapter_by_name = {name: every.pop(name) for name in self.adapters.shapes} if lora else {}
        named = (*expected_shapes(config), HEAD)  # a tied head that is held apart is one more
        self.by_name = {name: every[name] for name in named if name in every}
        if lora:
            for name, parameter in self.by_name.items():
                parameter.requires_grad = name == SCORE

    def _make_cells(self, make: Make) -> None:
        """All that has parameters."""
        config, embedding = self.config, make.weights(EMBEDDING)
        self.embedding = parameter_of(embedding, EMBEDDING)
        self.position_embedding = None
        if config.family.learned_positions:
            self.position_embedding = parameter_of(make.weights(POSITIONS), POSITIONS)
        attention = LatentAttention if config.latent else Attention
        self.layers = nn.CellList(
            [
                Layer(config, f"model.layers.{i}", make, attention, Experts if config.has_experts(i) else FeedForward)
                for i in range(config.num_layers)
            ],
            auto_prefix=False,
        )
        if config.compute.recompute:
            for layer in self.layers:
                layer.recompute()
        self.norm = Norm("model.norm", make, config.norm_epsilon, config.family.layer_norm)
        if config.head == "score":
            self.score = parameter_of(make.weights(SCORE), SCORE)
        elif not self.tied:
            head = embedding if config.tie_embeddings else make.weights(HEAD)
            self.head = parameter_of(np.ascontiguousarray(head.T) if make.transposed else head, HEAD)
        cos, sin = rope_tables(config)
        self.cos, self.sin = Tensor(cos), Tensor(sin)

    def _rope(self, positions):
        flat = positions.reshape(-1)
        return ops.gather(self.cos, flat, 0).expand_dims(1), ops.gather(self.sin, flat, 0).expand_dims(1)

    def _embed(self, tokens, positions):
        """tokens, positions [M] int32 -> [M, H]."""
        x = self._embed_tokens(tokens)
        return x if self.position_embedding is None else x + ops.gather(self.position_embedding, positions, 0)

    def _embed_tokens(self, tokens):
        if not self.is_split:
            return ops.gather(self.embedding, tokens, 0)
        here, rows = tokens - self.first_token, self.embedding.shape[0]
        inside = ops.logical_and(here >= 0, here < rows)
        found = ops.gather(self.embedding, ops.select(inside, here, ops.zeros_like(here)), 0)
        return self.sum(found * ops.cast(inside, ms.float32).expand_dims(1))

    def construct(self, tokens, positions, segments):
        """tokens, positions, segments [B, T] int32 (see PackedRows) -> normalised hidden states float32 [B*T, H].

        Where sequence ranks split the rows: of this one's columns, [B*T/S, H].
        """
        if self.parts == 1:
            mask = kernels.visible(positions, segments)
        else:
            width = tokens.shape[1] // self.parts
            columns = slice(self.part * width, (self.part + 1) * width)
            seen_positions, seen_segments = positions, segments
            tokens, positions, segments = tokens[:, columns], positions[:, columns], segments[:, columns]
            mask = kernels.visible(seen_positions, seen_segments, positions, segments)
        cos, sin = self._rope(positions)
        x = self._embed(tokens.reshape(-1), positions.reshape(-1))
        real = ops.cast(segments.reshape(-1) > 0, ms.float32)
        for layer in self.layers:
            x, _ = layer(x, positions, segments, cos, sin, mask, real)
        return self.norm(x)

    def targets(self, tokens, positions, segments, index):
        """Hidden states [N, H] at the places index [N] int32 of the flattened rows, on every sequence rank."""
        hidden = self.construct(tokens, positions, segments)
        if self.parts == 1:
            return ops.gather(hidden, index, 0)
        length, width = tokens.shape[1], tokens.shape[1] // self.parts
        row = ops.floor_divide(index, length)
        column = index - row * length - self.part * width
        inside = ops.logical_and(column >= 0, column < width)
        here = ops.select(inside, row * width + column, ops.zeros_like(index))
        found = ops.gather(hidden, here, 0) * ops.cast(inside, ms.float32).expand_dims(1)
        return self.sum_of_parts(found)

    def prefill(self, tokens, positions, segments):
        """The same rows -> what every layer caches, [B, heads, T, width] each: key, value, key, value...; in latent
        attention one of each layer."""
        cos, sin = self._rope(positions)
        mask = kernels.visible(positions, segments)
        x = self._embed(tokens.reshape(-1), positions.reshape(-1))
        cached = ()
        for layer in self.layers:
            x, parts = layer(x, positions, segments, cos, sin, mask, None)
            for part in parts:
                cached = cached + (kernels.by_head(part, tokens.shape[0]),)
        return cached

    def decode(self, tokens, positions, rows, mask, key_caches, value_caches):
        """One token a slot: tokens, positions [S] int32, rows and mask as in kernels.decode_attention -> [S, H]."""
        cos, sin = self._rope(positions)
        x = self._embed(tokens, positions)
        for i in range(len(self.layers)):
            x = self.layers[i].decode(x, positions, cos, sin, mask, rows, key_caches[i], value_caches[i])
        return self.norm(x)

    def logits(self, hidden):
        """hidden [M, H] -> [M, vocabulary] float32, of a language model."""
        return self.gather_columns(self.own_logits(hidden))

    def own_logits(self, hidden):
        """Of this rank's part of the vocabulary, [M, vocabulary / T]."""
        hidden = self.copy(hidden)
        if self.tied:
            return kernels.linear(hidden, self.embedding, None, False, self.dtype)
        logits = kernels.linear(hidden, self.head, None, self.transposed, self.dtype)
        if self.config.family.normalized_head:
            logits = logits * self._inverse_lengths(self.head, 0 if self.transposed else 1).expand_dims(0)
        return logits

    def _inverse_lengths(self, head, axis: int):
        """1 / the length of each token's row of the head, [vocabulary / T]; axis: that of the hidden size."""
        return ops.rsqrt(ops.maximum((head * head).sum(axis), 1e-24))

    def is_chunked(self, targets: int) -> bool:
        """Whether the log-probs of so many are computed in chunks. A generator's decoder, transposed, has few."""
        return not self.transposed and 0 < self.chunked.rows < targets

    def own_head(self):
        """What own_logits multiplies by, [vocabulary / T, H]; not of a transposed decoder."""
        head = self.embedding if self.tied else self.head
        if self.config.family.normalized_head:
            return head * self._inverse_lengths(head, 1).expand_dims(1)
        return head.reshape(head.shape)  # a parameter itself cannot be an argument of a cell with its own gradient

    def scores(self, hidden):
        """hidden [M, H] -> [M] float32, of a reward model."""
        return kernels.linear(hidden, self.score, None, False).reshape(-1)

    @property
    def cache_widths(self) -> dict[str, int]:
        """What a layer caches of a token: kind -> numbers a head."""
        latent, width = self.config.latent, self.config.head_dim
        return {"latent": latent.kv_rank + latent.rope} if latent else {"key": width, "value": width}

    @property
    def cache_heads(self) -> int:
        """Heads of this rank's caches; the latent vector belongs to all."""
        return 1 if self.config.latent else self.config.num_kv_heads // self.layout.tensor

    # -- parameters -------------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and float32 array, in the order of expected_shapes; views of the parameters where possible."""
        for name in expected_shapes(self.config):
            yield name, self.weights(name)

    def weights(self, name: str) -> np.ndarray:
        """What the parameter of that name comes to, whole, adapters merged: what another decoder can be built from.

        All tensor ranks have to call it.
        """
        return self.shard.whole(name, self.own_weights(name))

    def expert(self, name: str, number: int) -> np.ndarray:
        """One expert's matrix of a stacked tensor, whole. All tensor ranks have to call it."""
        return self.shard.whole_expert(name, number, self.own_weights(name))

    def own_weights(self, name: str) -> np.ndarray:
        """This rank's slice of it."""
        scale = float(self.adapters.scale.asnumpy()) if self.lora else 0.0
        if scale == 0:
            return self._as_stored(self.by_name[name])
        adapter = {key: parameter.asnumpy() for key, parameter in self.adapter_by_name.items() if _beside(key, name)}
        return merged(lambda name: self._as_stored(self.by_name[name]), scale, adapter)(name)

    def load(self, weights: Weights) -> None:
        """New values for every parameter but the adapters'. Compiled cells see them without recompiling.

        Whole tensors; every rank asks for all of them, in one order.
        """
        own = self.shard.cut(weights)
        for name in expected_shapes(self.config):
            self.write(name, (...,), own(name))

    def write(self, name: str, box: Box, array: np.ndarray) -> None:
        """A part of the parameter of that name, in place: box is relative to this rank's slice, matrices [out, in]."""
        names = [name, HEAD] if name == EMBEDDING and self._is_tied_head(HEAD) and not self.tied else [name]
        for parameter in (self.by_name[own] for own in names if own in self.by_name):
            view = self._as_stored(parameter)
            view[box] = array
            if parameter.asnumpy().ctypes.data != parameter.data_ptr():  # a device's: the view was a copy
                parameter.set_data(Tensor(np.ascontiguousarray(self._turned(parameter.name, view))))

    def adapter_tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and whole array of what an adapter's file holds: every A and B, and the score head."""
        for name, parameter in self._adapted().items():
            yield name, self.shard.whole(name, parameter.asnumpy())

    def load_adapter(self, weights: Weights) -> None:
        """New values for what `adapter_tensors` has, in place."""
        weights = self.shard.cut(weights)
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
        return [
            parameter
            for name, parameter in self.by_name.items()
            if parameter.requires_grad and (not layers or name.startswith(prefixes))
        ]

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

    def _turned(self, name: str, array: np.ndarray) -> np.ndarray:
        """From [out, in] to how it is held, or back: a view."""
        is_held_as_it_is = name in (EMBEDDING, POSITIONS, SCORE) or ".kv_b_proj." in name or array.ndim < 2
        return array if is_held_as_it_is or not self.transposed else array.swapaxes(-1, -2)

    def _as_stored(self, parameter: Parameter) -> np.ndarray:
        return self._turned(parameter.name, parameter.asnumpy())


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
