"""The sizes of a model by its config.json alone: what a plan counts of a decoder's configuration."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf.config.reading import read_json
from mindrlhf.layout import Layout, is_stacked, split_axis
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.mindformers_config import read_mindformers
from mindrlhf.models.shapes import Shapes, expected_shapes


class Weight(NamedTuple):
    """A tensor, and how many there are of its shape that are split alike."""

    name: str  # the decoder's, of the first of them
    shape: tuple[int, ...]
    copies: int = 1

    @property
    def numbers(self) -> int:
        return math.prod(self.shape) * self.copies

    @property
    def is_routed(self) -> bool:
        """Of routed experts."""
        return is_stacked(self.name)

    @property
    def is_split(self) -> bool:
        """Over the tensor ranks: in slices, or in whole experts and slices of them; either way evenly."""
        return split_axis(self.name) is not None


@dataclass(frozen=True)
class Architecture(DecoderConfig):
    """A decoder's configuration, counted."""

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every kind of tensor. Layers that predict several tokens (DeepSeek-V3's last) are left out."""
        return _kinds(expected_shapes(self))

    def weights_of(self, layers: Sequence[int]) -> tuple[Weight, ...]:
        """Those of the layers of these numbers."""
        prefixes = tuple(f"model.layers.{layer}." for layer in layers)
        return _kinds({name: shape for name, shape in expected_shapes(self).items() if name.startswith(prefixes)})

    @property
    def expert_layers(self) -> int:
        return self.num_layers - len(self.dense_layers) if self.num_experts else 0

    @cached_property
    def active_parameters(self) -> int:
        """Of the matrices that a token goes through, the embedding's row left out, the head counted."""
        active = 0
        for weight in self.weights:
            if len(weight.shape) > 1 and ".embed_" not in weight.name:
                share = self.experts_per_token / self.num_experts if weight.is_routed else 1
                active += weight.numbers * share
        if self.tie_embeddings and self.head == "logits":
            active += self.vocab_size * self.hidden_size
        return int(active)

    @property
    def cache_width(self) -> int:
        """Numbers that the KV cache holds for a token and layer."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rope
        return 2 * self.num_kv_heads * self.head_dim

    def cache_ranks(self, layout: Layout) -> int:
        """Over how many ranks a token's entry of the cache is split: the latent vector belongs to all heads."""
        return 1 if self.latent else layout.tensor

    def scoring(self) -> "Architecture":
        """The same with a score head: a critic or a reward model."""
        return replace(self, head="score")


def _kinds(shapes: Shapes) -> tuple[Weight, ...]:
    firsts, copies = {}, Counter()
    for name, shape in shapes.items():
        kind = shape, split_axis(name), is_stacked(name), ".layers." in name, ".embed_" in name
        firsts.setdefault(kind, name)
        copies[kind] += 1
    return tuple(Weight(name, kind[0], copies[kind]) for kind, name in firsts.items())


def read_architecture(path: str | Path) -> Architecture:
    """Of a config.json, of the checkpoint directory that holds one, or of a MindFormers YAML. Raises UserError."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix in (".yaml", ".yml"):
        return Architecture(**vars(read_mindformers(file).config))
    return architecture_of(read_json(file), str(file))


def architecture_of(values: Mapping[str, Any], where: str) -> Architecture:
    """values: the content of a config.json; quantised weights are planned as if they were not. Raises UserError with
    `where`, the key and the fix."""
    return Architecture.from_hf({**values, "quantization_config": None}, where)
