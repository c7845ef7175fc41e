"""MindFormers' legacy checkpoints and Hugging Face's: the same rows under other names, some of them fused.

MindFormers is not imported. Sources, of 1.9: `models/{llama/llama,glm2/glm2}.py` (convert_name, which goes one way)
and `models/glm2/convert_weight.py` for the names, `utils/convert_utils.py` (qkv_concat_hf2mg, ffn_concat_hf2mg) for
the order of Llama's rows where its qkv_concat is set.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import Source, Weights, stored_tensors

# A part of the decoder's name -> of MindFormers'. No part is in another row's, so the order does not matter.
TABLE = (
    ("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight"),
    (".input_layernorm.", ".attention_norm."),
    (".self_attn.q_proj.", ".attention.wq."),
    (".self_attn.k_proj.", ".attention.wk."),
    (".self_attn.v_proj.", ".attention.wv."),
    (".self_attn.o_proj.", ".attention.wo."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.down_proj.", ".feed_forward.w2."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    ("model.norm.", "model.norm_out."),
)
GLM_TABLE = (
    ("model.embed_tokens.weight", "transformer.embedding.embedding_weight"),
    ("model.layers.", "transformer.encoder.layers."),
    (".self_attn.q_proj.", ".self_attention.wq."),
    (".self_attn.k_proj.", ".self_attention.wk."),
    (".self_attn.v_proj.", ".self_attention.wv."),
    (".self_attn.o_proj.", ".self_attention.dense."),
    (".mlp.gate_proj.", ".mlp.dense_left."),
    (".mlp.up_proj.", ".mlp.dense_right."),
    (".mlp.down_proj.", ".mlp.dense_4h_to_h."),
    ("model.norm.", "transformer.encoder.final_layernorm."),
    ("lm_head.", "transformer.output_layer."),
)
# The fused module -> what its rows come from, in Llama's with qkv_concat, in GLM's with qkv_concat and mlp_concat.
FUSED = {
    ".attention.w_qkv.": (".attention.wq.", ".attention.wk.", ".attention.wv."),
    ".feed_forward.w_gate_hidden.": (".feed_forward.w1.", ".feed_forward.w3."),
}
GLM_FUSED = {
    ".self_attention.query_key_value.": (".self_attention.wq.", ".self_attention.wk.", ".self_attention.wv."),
    ".mlp.dense_h_to_4h.": (".mlp.dense_left.", ".mlp.dense_right."),
}
FAMILIES = {"llama": (TABLE, FUSED), "qwen2": (TABLE, FUSED), "glm": (GLM_TABLE, GLM_FUSED)}
FAMILIES["glm4"] = FAMILIES["glm"]


class Rows(NamedTuple):
    """Consecutive rows of a tensor of a Hugging Face checkpoint."""

    stored: str  # its name there
    rows: slice


class MindFormersTensor(NamedTuple):
    """One of MindFormers' tensors: of each part the first of `groups` equal pieces, then of each the second..."""

    shape: tuple[int, ...]
    parts: tuple[Rows, ...]
    groups: int

    def fuse(self, arrays: list[np.ndarray]) -> np.ndarray:
        if len(arrays) == 1:
            return arrays[0]
        pieces = [array.reshape(self.groups, -1, *self.shape[1:]) for array in arrays]
        return np.concatenate(pieces, 1).reshape(self.shape)

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """The inverse of `fuse`."""
        if len(self.parts) == 1:
            return [array]
        lengths = [(part.rows.stop - part.rows.start) // self.groups for part in self.parts]
        pieces = np.split(array.reshape(self.groups, -1, *self.shape[1:]), np.cumsum(lengths)[:-1], 1)
        return [piece.reshape(-1, *self.shape[1:]) for piece in pieces]


def to_mindformers(name: str, model_type: str = "llama") -> str:
    """model.layers.0.self_attn.q_proj.weight -> model.layers.0.attention.wq.weight. Raises UserError."""
    for ours, theirs in _family(model_type)[0]:
        name = name.replace(ours, theirs)
    return name


def from_mindformers(name: str, model_type: str = "llama") -> str:
    """to_mindformers' inverse, of tensors that are not fused. Raises UserError."""
    for ours, theirs in _family(model_type)[0]:
        name = name.replace(theirs, ours)
    return name


def _family(model_type: str):
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} has no legacy MindFormers checkpoints, only {', '.join(FAMILIES)} have; the "
            "mcore networks (Qwen3, Qwen3-MoE, DeepSeek-V3) read Hugging Face's"
        )
    return FAMILIES[model_type]


def mindformers_tensors(config: DecoderConfig, fused: bool = False) -> dict[str, MindFormersTensor]:
    """Every tensor of a MindFormers checkpoint by its name. fused: of a network with qkv_concat. Raises UserError."""
    _, modules = _family(config.model_type)
    found: dict[str, MindFormersTensor] = {}
    for stored, (shape, parts) in stored_tensors(config).items():
        for part in parts:
            name, groups = to_mindformers(part.name, config.model_type), 1
            for whole, members in modules.items() if fused else ():
                for member in members:
                    if member in name:
                        name, groups = name.replace(member, whole), _groups(config, whole)
            before = found.get(name, MindFormersTensor((0,), (), groups))
            rows = before.shape[0] + part.rows.stop - part.rows.start
            found[name] = MindFormersTensor((rows, *shape[1:]), (*before.parts, Rows(stored, part.rows)), groups)
    return found


def _groups(config: DecoderConfig, fused: str) -> int:
    """Llama's fused rows belong together: a key head's to its queries' and its value's, a gate's to what it opens."""
    return {".attention.w_qkv.": config.num_kv_heads, ".feed_forward.w_gate_hidden.": config.intermediate_size}.get(
        fused, 1
    )


def stored_from_mindformers(config: DecoderConfig, tensors: Weights, fused: bool = False) -> Weights:
    """tensors: MindFormers' name -> array. Returns the same by Hugging Face's names, read when they are asked for."""
    sources: dict[str, list[tuple[str, int]]] = {}
    listed = mindformers_tensors(config, fused)
    for name, tensor in listed.items():
        for number, part in enumerate(tensor.parts):
            sources.setdefault(part.stored, []).append((name, number))

    def weights(stored: str) -> np.ndarray:
        pieces = [listed[name].split(tensors(name))[number] for name, number in sources[stored]]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return weights


def mindformers_from_stored(config: DecoderConfig, weights: Weights, fused: bool = False) -> Iterator[Source]:
    """The inverse: (MindFormers' name, shape, getter) of every tensor. weights: by Hugging Face's names."""
    for name, tensor in mindformers_tensors(config, fused).items():
        yield name, tensor.shape, lambda tensor=tensor: tensor.fuse([weights(p.stored)[p.rows] for p in tensor.parts])
