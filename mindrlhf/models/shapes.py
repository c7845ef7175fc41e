"""The tensors of a decoder: names, shapes and order. Names are Llama's Hugging Face names for every family.

What a family's checkpoint calls them, and how it lays them out, is conversion.py's.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mindrlhf.models.config import DecoderConfig

EMBEDDING = "model.embed_tokens.weight"
POSITIONS = "model.embed_positions.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"
CORRECTION = "mlp.gate.e_score_correction_bias"  # of a layer; balances the experts, and is not trained by gradients

Shapes = dict[str, tuple[int, ...]]
Weights = Callable[[str], np.ndarray]  # a tensor's name -> float32 array of its expected shape


def expected_shapes(config: "DecoderConfig") -> Shapes:
    """Name -> shape of every tensor, in the order of the forward pass; matrices are [out, in].

    Experts of a layer are one tensor a projection, [experts, out, in].
    """
    hidden, family = config.hidden_size, config.family
    shapes: Shapes = {EMBEDDING: (config.vocab_size, hidden)}
    if family.learned_positions:
        shapes[POSITIONS] = (config.max_positions, hidden)
    for number in range(config.num_layers):
        layer = f"model.layers.{number}"
        shapes |= _norm(config, f"{layer}.input_layernorm")
        shapes |= (_latent_attention if config.latent else _attention)(config, f"{layer}.self_attn")
        if family.sandwich_norms:
            shapes |= _norm(config, f"{layer}.post_self_attn_layernorm")
        shapes |= _norm(config, f"{layer}.post_attention_layernorm")
        shapes |= (_experts if config.has_experts(number) else _mlp)(config, f"{layer}.mlp")
        if family.sandwich_norms:
            shapes |= _norm(config, f"{layer}.post_mlp_layernorm")
    shapes |= _norm(config, "model.norm")
    if config.head == "score":
        shapes[SCORE] = (1, hidden)
    elif not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def _norm(config: "DecoderConfig", name: str) -> Shapes:
    kinds = ("weight", "bias") if config.family.layer_norm else ("weight",)
    return {f"{name}.{kind}": (config.hidden_size,) for kind in kinds}


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _attention(config: "DecoderConfig", name: str) -> Shapes:
    hidden = config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Shapes = {}
    for module, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        shapes |= _linear(f"{name}.{module}", rows, hidden, config.qkv_bias)
    if config.family.qk_norm:
        shapes |= {f"{name}.{module}.weight": (config.head_dim,) for module in ("q_norm", "k_norm")}
    return shapes | _linear(f"{name}.o_proj", hidden, query, config.output_bias)


def _latent_attention(config: "DecoderConfig", name: str) -> Shapes:
    hidden, heads, latent = config.hidden_size, config.num_heads, config.latent
    query = heads * config.head_dim
    if latent.query_rank:
        shapes = {
            f"{name}.q_a_proj.weight": (latent.query_rank, hidden),
            f"{name}.q_a_layernorm.weight": (latent.query_rank,),
            f"{name}.q_b_proj.weight": (query, latent.query_rank),
        }
    else:
        shapes = {f"{name}.q_proj.weight": (query, hidden)}
    return shapes | {
        f"{name}.kv_a_proj_with_mqa.weight": (latent.kv_rank + latent.rope, hidden),
        f"{name}.kv_a_layernorm.weight": (latent.kv_rank,),
        f"{name}.kv_b_proj.weight": (heads * (latent.nope + latent.value), latent.kv_rank),
        f"{name}.o_proj.weight": (hidden, heads * latent.value),
    }


def _mlp(config: "DecoderConfig", name: str) -> Shapes:
    width, hidden = config.intermediate_size, config.hidden_size
    if config.family.gelu:
        return _linear(f"{name}.up_proj", width, hidden, True) | _linear(f"{name}.down_proj", hidden, width, True)
    return _gated(name, width, hidden)


def _gated(name: str, width: int, hidden: int) -> Shapes:
    shapes = {f"{name}.{kind}_proj.weight": (width, hidden) for kind in ("gate", "up")}
    return shapes | {f"{name}.down_proj.weight": (hidden, width)}


def _experts(config: "DecoderConfig", name: str) -> Shapes:
    count, hidden = config.num_experts, config.hidden_size
    shapes = {f"{name}.gate.weight": (count, hidden)}
    if config.router.score == "sigmoid":
        shapes[f"{name}.gate.e_score_correction_bias"] = (count,)
    stacked = _gated(f"{name}.experts", config.expert_width, hidden)
    shapes |= {tensor: (count, *shape) for tensor, shape in stacked.items()}
    return shapes | (_gated(f"{name}.shared_experts", config.shared_width, hidden) if config.shared_width else {})
