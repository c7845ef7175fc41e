"""Low-rank adapters: what they are, their first values, and what they come to when merged. On the host, in NumPy.

Hu et al. 2021 (LoRA, arXiv 2106.09685) in PEFT's terms: a projection W [out, in] becomes W + scale B A with
A [rank, in], B [out, rank] and scale = alpha / rank, or alpha / sqrt(rank) where an adapter is rank-stabilised
(Kalajdzievski 2023, arXiv 2312.03732).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mindrlhf.config import LoraConfig
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import is_stored_as_it_is
from mindrlhf.models.shapes import Weights, expected_shapes

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """The settings of a decoder's adapters."""

    rank: int
    alpha: float
    dropout: float = 0.0  # share of an adapter's inputs that a training step leaves out
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")  # of MODULES, in their order
    layers: tuple[int, ...] = ()  # numbers of the adapted layers, rising; empty: all
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @classmethod
    def of(cls, config: LoraConfig, decoder: DecoderConfig) -> "Lora | None":
        """What a job asks for; None where rank is 0. Raises UserError."""
        for name, value, holds, expected in (
            ("rank", config.rank, config.rank >= 0, "0 (off) or more"),
            ("alpha", config.alpha, config.alpha > 0, "over 0"),
            ("dropout", config.dropout, 0 <= config.dropout < 1, "at least 0 and under 1"),
            ("target_modules", config.target_modules, bool(config.target_modules), f"one or more, or [{ALL_LINEAR}]"),
        ):
            if not holds:
                raise UserError(f"model.lora.{name}: {value} must be {expected}")
        if not config.rank:
            return None
        # An adapter of another projection could not be written in PEFT's names.
        there = tuple(name for name in MODULES if is_stored_as_it_is(decoder, name))
        wanted = there if config.target_modules == [ALL_LINEAR] else config.target_modules
        if not there:
            raise UserError(
                f"model.lora.rank: model_type {decoder.model_type} has no projections that adapters can be on; set it "
                "to 0"
            )
        for name in wanted:
            if name not in there:
                known = f"{', '.join(there)}; or {ALL_LINEAR} alone"
                raise UserError(
                    f"model.lora.target_modules: no module {name!r} that can be adapted in model_type "
                    f"{decoder.model_type}; there are {known}"
                )
        check_layers(config.layers, decoder, "model.lora.layers")
        modules = tuple(name for name in MODULES if name in wanted)
        return cls(config.rank, config.alpha, config.dropout, modules, tuple(sorted(set(config.layers))))

    def shapes(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every A and B, such as model.layers.0.self_attn.q_proj.lora_A.weight, in forward order."""
        layers = self.layers or range(config.num_layers)
        prefixes = tuple(f"model.layers.{layer}." for layer in layers)
        suffixes = tuple(f".{module}.weight" for module in self.target_modules)
        shapes = {}
        for name, shape in expected_shapes(config).items():
            if name.startswith(prefixes) and name.endswith(suffixes):
                module = name.removesuffix("weight")
                shapes[module + A], shapes[module + B] = (self.rank, shape[1]), (shape[0], self.rank)
        return shapes


def check_layers(layers: list[int] | tuple[int, ...], config: DecoderConfig, where: str) -> None:
    """Raises UserError for a layer that the decoder does not have."""
    for layer in layers:
        if not 0 <= layer < config.num_layers:
            raise UserError(f"{where}: there is no layer {layer}; the model has 0 to {config.num_layers - 1}")


def random_adapter(lora: Lora, config: DecoderConfig, seed: int) -> Weights:
    """As PEFT begins: A uniform within 1 / sqrt(in) (He's initialisation with a = sqrt(5)), B 0, so nothing changes.

    Each tensor is keyed by (seed, its place in the list), and apart from those of decoder.random_weights.
    """
    shapes = lora.shapes(config)
    place = {name: i for i, name in enumerate(shapes)}

    def weights(name: str) -> np.ndarray:
        shape = shapes[name]
        if name.endswith(B):
            return np.zeros(shape, np.float32)
        draw = np.random.default_rng((seed, place[name], 1)).random(shape, dtype=np.float32)
        return (2 * draw - 1) / np.float32(math.sqrt(shape[1]))

    return weights


def merged(weights: Weights, scale: float, adapter: Mapping[str, np.ndarray]) -> Weights:
    """The effective weights: W + scale B A where there is an adapter, and what else it replaces (a score head)."""

    def effective(name: str) -> np.ndarray:
        if name in adapter:
            return adapter[name]
        module = name.removesuffix("weight")
        if module + A not in adapter:
            return weights(name)
        return weights(name) + np.float32(scale) * (adapter[module + B] @ adapter[module + A])

    return effective
