"""The sizes of a model by its config.json alone: also of families that the decoder does not run.

Sources: transformers 4.57, models/{llama,qwen2,qwen3,mixtral,glm,glm4,deepseek_v3}, for keys, defaults and tensors;
DeepSeek-V3's latent attention and its experts: arXiv 2412.19437.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf.errors import UserError
from mindrlhf.layout import Layout, expert_of, split_axis
from mindrlhf.models.fields import flag, integer, read_json

# model_type -> (biases of q, k and v, bias of o) where config.json does not say by attention_bias
BIASES = {
    "llama": (False, False), "qwen2": (True, False), "qwen3": (False, False), "mixtral": (False, False),
    "glm": (True, False), "glm4": (True, False), "deepseek_v3": (False, False),
}  # fmt: skip
WITH_OUTPUT_BIAS = ("llama", "qwen3")  # where attention_bias true means o_proj too
LATENT_COLUMN = ("q_b_proj", "kv_b_proj")  # latent attention's projections to heads; mindrlhf.layout has none of it yet


class Weight(NamedTuple):
    """A tensor, and how many there are of its shape."""

    name: str  # Hugging Face's, of the first of them
    shape: tuple[int, ...]
    copies: int = 1

    @property
    def numbers(self) -> int:
        return math.prod(self.shape) * self.copies

    @property
    def is_routed(self) -> bool:
        """A routed expert's."""
        return _is_routed(self.name)

    @property
    def is_split(self) -> bool:
        """Over the tensor ranks: in slices, or in whole experts and slices of them; either way evenly."""
        return _is_split(self.name)


@cache
def _is_routed(name: str) -> bool:
    return expert_of(name) is not None


@cache
def _is_split(name: str) -> bool:
    return split_axis(name) is not None or any(f".{module}." in name for module in LATENT_COLUMN)


class Latent(NamedTuple):
    """Multi-head latent attention: keys and values come from one narrow vector a token, which is what is cached."""

    query_rank: int  # 0: queries are projected directly
    kv_rank: int
    rope: int  # width of a head's rotated part, whose key all heads share
    nope: int  # of the rest
    value: int


@dataclass(frozen=True)
class Architecture:
    """Sizes and tensors. The names that mindrlhf.layout.Layout.check reads are DecoderConfig's."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of an expert where every layer has experts
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    tie_embeddings: bool = False
    head: str = "logits"  # or score, one number a token
    latent: Latent | None = None
    num_experts: int = 0  # routed ones
    experts_per_token: int = 0
    skips_experts: bool = False  # a token is computed by the experts that it chose; the decoder computes all of them
    expert_width: int = 0
    shared_width: int = 0  # of the MLP that every token passes beside its experts
    dense_layers: int = 0  # first layers without experts, where there are experts
    qkv_bias: bool = False
    output_bias: bool = False
    extra_layer_norms: tuple[int, ...] = ()  # widths of norms in a layer besides the two of hidden_size

    @property
    def expert_layers(self) -> int:
        return self.num_layers - self.dense_layers if self.num_experts else 0

    @cached_property
    def num_parameters(self) -> int:
        """Numbers of the weights, tied embeddings once. Multi-token prediction layers are left out."""
        return sum(weight.numbers for weight in self.weights)

    @cached_property
    def active_parameters(self) -> int:
        """Of the matrices that a token goes through, the embedding's row left out, the head counted."""
        active = 0
        for weight in self.weights:
            if len(weight.shape) > 1 and "embed_tokens" not in weight.name:
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

    @cached_property
    def computed_parameters(self) -> int:
        """The same, of the matrices that the decoder multiplies a token with."""
        if self.skips_experts or not self.num_experts:
            return self.active_parameters
        routed = sum(weight.numbers for weight in self.weights if weight.is_routed)
        return int(self.active_parameters + routed * (1 - self.experts_per_token / self.num_experts))

    def scoring(self) -> "Architecture":
        """The same with a score head: a critic or a reward model."""
        return replace(self, head="score")

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every kind of tensor."""
        hidden, layers = self.hidden_size, self.num_layers
        listed = [
            Weight("model.embed_tokens.weight", (self.vocab_size, hidden)),
            Weight("model.norm.weight", (hidden,)),
        ]
        if self.head == "score":
            listed.append(Weight("score.weight", (1, hidden)))
        elif not self.tie_embeddings:
            listed.append(Weight("lm_head.weight", (self.vocab_size, hidden)))
        layer = "model.layers.0."
        listed += [Weight(f"{layer}norm_{i}.weight", (width,), layers) for i, width in
                   enumerate((hidden, hidden, *self.extra_layer_norms))]  # fmt: skip
        listed += [Weight(f"{layer}self_attn.{name}", shape, layers) for name, shape in self._attention()]
        dense = layers - self.expert_layers
        if dense:
            listed += _gated(f"{layer}mlp", hidden, self.intermediate_size, dense)
        if self.expert_layers:
            listed.append(Weight(f"{layer}mlp.gate.weight", (self.num_experts, hidden), self.expert_layers))
            if self.model_type == "deepseek_v3":  # what balances the experts without a loss
                bias = "mlp.gate.e_score_correction_bias"
                listed.append(Weight(f"{layer}{bias}", (self.num_experts,), self.expert_layers))
            copies = self.expert_layers * self.num_experts
            listed += _gated(f"{layer}mlp.experts.0", hidden, self.expert_width, copies)
            if self.shared_width:
                listed += _gated(f"{layer}mlp.shared_experts", hidden, self.shared_width, self.expert_layers)
        return tuple(listed)

    def _attention(self) -> list[tuple[str, tuple[int, ...]]]:
        hidden, heads, latent = self.hidden_size, self.num_heads, self.latent
        if latent:
            query = heads * (latent.nope + latent.rope)
            if latent.query_rank:
                queries = [("q_a_proj.weight", (latent.query_rank, hidden)),
                           ("q_a_layernorm.weight", (latent.query_rank,)),
                           ("q_b_proj.weight", (query, latent.query_rank))]  # fmt: skip
            else:
                queries = [("q_proj.weight", (query, hidden))]
            return [
                *queries,
                ("kv_a_proj_with_mqa.weight", (latent.kv_rank + latent.rope, hidden)),
                ("kv_a_layernorm.weight", (latent.kv_rank,)),
                ("kv_b_proj.weight", (heads * (latent.nope + latent.value), latent.kv_rank)),
                ("o_proj.weight", (hidden, heads * latent.value)),
            ]
        query, key = heads * self.head_dim, self.num_kv_heads * self.head_dim
        listed = []
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            listed.append((f"{name}.weight", (rows, hidden)))
            if self.qkv_bias:
                listed.append((f"{name}.bias", (rows,)))
        listed.append(("o_proj.weight", (hidden, query)))
        return listed + ([("o_proj.bias", (hidden,))] if self.output_bias else [])

    def check(self, layout: Layout, where: str) -> None:
        """Raises UserError where the layout does not divide the model."""
        layout.check(self, where)
        if self.num_experts:
            counts = [("moe_intermediate_size", self.expert_width, layout.tensor // layout.expert)]
            if self.dense_layers:
                counts.append(("intermediate_size", self.intermediate_size, layout.tensor))
            if self.shared_width:
                counts.append(("the shared experts' width", self.shared_width, layout.tensor))
            for name, count, parts in counts:
                if count % parts:
                    raise UserError(f"{where}.tensor: the model's {name}, {count}, does not divide by {parts}")


def read_architecture(path: str | Path) -> Architecture:
    """Of a config.json, or of the checkpoint directory that holds one. Raises UserError."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix in (".yaml", ".yml"):
        raise UserError(f"{file}: is not a config.json; give that of the checkpoint, or its directory")
    return architecture_of(read_json(file), str(file))


def architecture_of(values: Mapping[str, Any], where: str) -> Architecture:
    """values: the content of a config.json. Raises UserError with `where`, the key and the fix."""
    kind = values.get("model_type")
    if kind not in BIASES:
        raise UserError(
            f"{where}: model_type {json.dumps(kind)} is not known to the planner; it knows {', '.join(BIASES)}"
        )

    def whole(key: str, default: int | None = None) -> int:
        value = integer(values, key, where) if default is None else integer(values, key, where, default)
        if value < (1 if default is None else 0):
            raise UserError(f"{where}: {key} is {value}; it must be 1 or more")
        return value

    heads, hidden = whole("num_attention_heads"), whole("hidden_size")
    biased = flag(values, "attention_bias", where, BIASES[kind][0]) and kind not in ("mixtral", "deepseek_v3")
    sizes = dict(
        model_type=kind,
        vocab_size=whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole("intermediate_size"),
        num_layers=whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=whole("num_key_value_heads", heads),
        head_dim=whole("head_dim", hidden // heads),
        max_positions=whole("max_position_embeddings"),
        tie_embeddings=flag(values, "tie_word_embeddings", where, False),
        head="score" if str(values.get("architectures")).endswith("ForSequenceClassification']") else "logits",
        qkv_bias=biased,
        output_bias=biased and kind in WITH_OUTPUT_BIAS,
    )
    if kind == "qwen3":
        sizes["extra_layer_norms"] = (sizes["head_dim"],) * 2  # of q and of k
    elif kind == "glm4":
        sizes["extra_layer_norms"] = (hidden,) * 2  # behind attention and MLP
    elif kind == "mixtral":
        width = sizes["intermediate_size"]
        sizes |= dict(num_experts=whole("num_local_experts"), experts_per_token=whole("num_experts_per_tok"))
        sizes |= dict(expert_width=width)
    elif kind == "deepseek_v3":
        sizes |= _deepseek(whole)
    return Architecture(**sizes)


def _deepseek(whole) -> dict[str, Any]:
    width = whole("moe_intermediate_size")
    latent = Latent(
        whole("q_lora_rank", 0), whole("kv_lora_rank"), whole("qk_rope_head_dim"), whole("qk_nope_head_dim"),
        whole("v_head_dim"),
    )  # fmt: skip
    return dict(
        latent=latent,
        num_experts=whole("n_routed_experts"),
        experts_per_token=whole("num_experts_per_tok"),
        expert_width=width,
        shared_width=width * whole("n_shared_experts", 0),
        dense_layers=whole("first_k_dense_replace", 0),
    )


def _gated(name: str, hidden: int, width: int, copies: int) -> list[Weight]:
    shapes = (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width)))
    return [Weight(f"{name}.{module}.weight", shape, copies) for module, shape in shapes]
