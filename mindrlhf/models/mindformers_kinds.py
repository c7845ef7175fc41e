"""MindFormers' configuration classes, each as the content of a config.json. MindFormers is not imported.

Sources, of 1.9: `models/*/configuration_*.py`, `models/{llama,glm2}/*_config.py` for keys and defaults,
`models/llama/llama_layer.py` for the width of the MLP, `modules/layers.py` FreqsMgr for rope,
`modules/transformer/moe.py` and the YAMLs of `research/deepseek3` for legacy DeepSeek-V3.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mindrlhf.errors import UserError
from mindrlhf.models.fields import integer, number
from mindrlhf.models.hf_config import YAML_KEYS

Values = Mapping[str, Any]


class Kind(NamedTuple):
    """One of MindFormers' configuration classes."""

    convert: Callable[[Values, str], dict[str, Any]]  # its values, defaults among them -> config.json's content
    keys: tuple[str, ...]  # that `convert` reads
    defaults: Values  # of those that may be left out
    only: Mapping[str, tuple]  # keys that change the numbers -> the values that mean what the decoder does


_OFF = (None, False, 0, "None")


def _llama(values: Values, where: str) -> dict[str, Any]:
    """Llama with biases on q, k and v alone is what Hugging Face calls qwen2."""
    qkv_bias, output_bias = bool(values["qkv_has_bias"]), bool(values["attn_proj_has_bias"])
    if output_bias and not qkv_bias:
        raise UserError(f"{where}: attn_proj_has_bias without qkv_has_bias has no Hugging Face form; set both")
    width = values["intermediate_size"]
    if width is None:  # llama_layer.LlamaFeedForward's
        width, multiple = 4 * integer(values, "hidden_size", where), integer(values, "multiple_of", where)
        if values["ffn_dim_multiplier"] is not None:
            width = int((number(values, "ffn_dim_multiplier", where) + 0.01) * width)
        width = multiple * ((int(2 * width / 3) + multiple - 1) // multiple)
    lengths = integer(values, "max_position_embedding", where, 0), integer(values, "seq_length", where)
    theta, scaling = _rope(values, where)
    return {
        "model_type": "qwen2" if qkv_bias and not output_bias else "llama",
        "attention_bias": qkv_bias,
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": width,
        "num_hidden_layers": values["num_layers"],
        "num_attention_heads": values["num_heads"],
        "num_key_value_heads": values["n_kv_heads"],
        "max_position_embeddings": max(lengths),  # as FreqsMgr
        "rms_norm_eps": values["rms_norm_eps"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": bool(values["tie_word_embeddings"]),
        "initializer_range": values["init_method_std"],
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
    }


def _rope(values: Values, where: str) -> tuple[float, dict[str, Any] | None]:
    """theta, extend_method and scaling_factor, as rope_theta and rope_scaling."""
    theta, method, scaling = number(values, "theta", where), values["extend_method"], values["scaling_factor"]
    if method in (None, "None"):
        return theta, None
    if method == "NTK":
        return theta * number(values, "scaling_factor", where), None
    if method == "PI":
        return theta, {"rope_type": "linear", "factor": scaling}
    if method not in ("linear", "LLAMA3", "YARN"):
        known = "None, NTK, PI, linear, LLAMA3, YARN"
        raise UserError(f"{where}: extend_method {method!r} is not supported; known: {known}")
    if not isinstance(scaling, Mapping):
        raise UserError(f"{where}: scaling_factor is {scaling!r}; extend_method {method} needs a mapping")
    if method != "YARN":
        return theta, {**scaling, "rope_type": method.lower()}
    # MindFormers' attention factor is always the quotient; Hugging Face's is so only if neither mscale is 0.
    factor = number(scaling, "factor", where)
    parts = [
        0.1 * number(scaling, key, where) * math.log(factor) + 1 if factor > 1 else 1.0
        for key in ("mscale", "mscale_all_dim")
    ]
    kept = {key: value for key, value in scaling.items() if not key.startswith("mscale")}
    return theta, {**kept, "rope_type": "yarn", "attention_factor": parts[0] / parts[1]}


def _glm(values: Values, where: str) -> dict[str, Any]:
    """ChatGLM2Config: GLM-4, and with both further norms GLM-4-0414."""
    norms = [bool(values[name]) for name in ("post_self_attn_layernorm", "post_mlp_layernorm")]
    if norms[0] != norms[1]:
        raise UserError(f"{where}: post_self_attn_layernorm and post_mlp_layernorm have no form alone; set both")
    grouped = values["multi_query_attention"]
    return {
        "model_type": "glm4" if norms[0] else "glm",
        "attention_bias": bool(values["add_qkv_bias"]),
        "vocab_size": values["padded_vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["ffn_hidden_size"],
        "num_hidden_layers": values["num_layers"],
        "num_attention_heads": values["num_attention_heads"],
        "num_key_value_heads": values["multi_query_group_num"] if grouped else values["num_attention_heads"],
        "head_dim": values["kv_channels"],
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": values["seq_length"],
        "rms_norm_eps": values["layernorm_epsilon"],
        "rope_theta": 10000.0 * number(values, "rope_ratio", where),
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
    }


# Megatron's names, which the mcore networks know beside Hugging Face's -> Hugging Face's.
_MCORE_NAMES = {
    "num_layers": "num_hidden_layers", "num_query_groups": "num_key_value_heads", "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size", "layernorm_epsilon": "rms_norm_eps", "rotary_base": "rope_theta",
    "init_method_std": "initializer_range", "add_qkv_bias": "attention_bias", "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim", "moe_ffn_hidden_size": "moe_intermediate_size",
    "shared_expert_num": "n_shared_experts", "moe_router_topk": "num_experts_per_tok",
    "moe_router_num_groups": "n_group", "moe_router_group_topk": "topk_group",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
}  # fmt: skip


def _mcore(model_type: str) -> Callable[[Values, str], dict[str, Any]]:
    """Of a configuration class that has Hugging Face's keys."""
    names = {**_MCORE_NAMES, "num_moe_experts": "n_routed_experts" if model_type == "deepseek_v3" else "num_experts"}

    def convert(values: Values, where: str) -> dict[str, Any]:
        found = {names.get(key, key): value for key, value in values.items()}
        if "num_key_value_heads" not in found:
            raise UserError(f"{where}: num_key_value_heads is missing; add it")
        if found.get("position_embedding_type") == "yarn" and not found.get("rope_scaling"):
            raise UserError(f"{where}: position_embedding_type yarn without rope_scaling; add it as config.json has it")
        if isinstance(found.get("rope_scaling"), Mapping) and found["rope_scaling"].get("type") == "none":
            found["rope_scaling"] = None
        return {**{key: found[key] for key in _HF_KEYS if key in found}, "model_type": model_type}

    return convert


def _deepseek(values: Values, where: str) -> dict[str, Any]:
    """DeepseekV3Config of the mcore networks, or with num_heads of the legacy one, whose experts are a moe_config."""
    if "num_heads" not in values:
        return _mcore("deepseek_v3")(values, where)
    given = values.get("moe_config") or {}
    refuse_other(given, _EXPERTS_ONLY, f"{where}: moe_config")
    experts = {**_LEGACY_EXPERTS, **given}
    method = values.get("extend_method", "None")
    if method not in (None, "None", "YARN"):
        raise UserError(f"{where}: extend_method {method!r} is not supported; known: None, YARN")
    scaling = values.get("scaling_factor")
    if method == "YARN" and not isinstance(scaling, Mapping):
        raise UserError(f"{where}: scaling_factor is {scaling!r}; extend_method YARN needs a mapping")
    lengths = integer(values, "max_position_embeddings", where, 0), integer(values, "seq_length", where, 0)
    has_groups = experts["n_group"] and experts["topk_method"] == "noaux_tc"
    return {
        **{key: values[key] for key in (*_LATENT_KEYS, *_ALIKE) if key in values},
        "model_type": "deepseek_v3",
        "num_hidden_layers": values.get("num_layers"),
        "num_attention_heads": values["num_heads"],
        "max_position_embeddings": max(lengths),
        "rope_theta": values.get("theta", 10000.0),
        "rope_scaling": {**scaling, "rope_type": "yarn"} if method == "YARN" else None,
        "initializer_range": values.get("init_method_std"),
        "n_routed_experts": experts["expert_num"],
        "num_experts_per_tok": experts["num_experts_chosen"],
        "n_shared_experts": experts["shared_expert_num"],
        "n_group": experts["n_group"] if has_groups else 1,
        "topk_group": experts["topk_group"] if has_groups else 1,
        **{key: experts[key] for key in _EXPERTS_ALIKE},
    }


_HF_KEYS = (
    *YAML_KEYS, "quantization_config", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
)  # fmt: skip
_LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_ALIKE = (
    "vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "quantization_config",
)  # fmt: skip
_EXPERTS_ALIKE = ("routed_scaling_factor", "norm_topk_prob", "first_k_dense_replace", "moe_intermediate_size")
_LEGACY_EXPERTS = {  # MoEConfig's defaults, but its inference network has groups wherever n_group is set
    "expert_num": 1, "num_experts_chosen": 1, "shared_expert_num": 0, "routed_scaling_factor": 1.0,
    "norm_topk_prob": True, "first_k_dense_replace": 1, "moe_intermediate_size": 1407, "n_group": None,
    "topk_group": None, "topk_method": "noaux_tc",
}  # fmt: skip

_EXPERTS_ONLY = {
    "use_gating_sigmoid": (True,), "routing_policy": ("TopkRouterV2",), "topk_method": ("noaux_tc", "greedy"),
    "use_shared_expert_gating": _OFF, "enable_sdrop": _OFF,
}  # fmt: skip
EXPERT_KEYS = (*_LEGACY_EXPERTS, *_EXPERTS_ONLY)  # of a moe_config, that are read

_NO_DROPOUT = {name: _OFF for name in ("hidden_dropout", "attention_dropout", "emb_dropout_prob")}
_MCORE_ONLY = {
    **_NO_DROPOUT,
    "normalization": ("RMSNorm",), "add_bias_linear": _OFF, "add_mlp_fc1_bias_linear": _OFF,
    "add_mlp_fc2_bias_linear": _OFF, "gated_linear_unit": (True,), "position_embedding_type": ("rope", "yarn"),
    "apply_residual_connection_post_layernorm": _OFF, "softmax_scale": _OFF, "window_size": _OFF,
    "nope_layer_interval": _OFF, "experimental_attention_variant": _OFF, "use_alibi_mask": _OFF,
    "untie_embeddings_and_output_weights": (None,), "use_shared_expert_gating": _OFF,
    "moe_apply_probs_on_input": _OFF, "moe_router_pre_softmax": _OFF, "moe_router_force_expert_balance": _OFF,
}  # fmt: skip
_DEEPSEEK_ONLY = {
    **_MCORE_ONLY,
    "moe_layer_freq": (1, None), "scoring_func": ("sigmoid",), "moe_router_score_function": ("sigmoid",),
    "topk_method": ("noaux_tc",), "multi_latent_attention": (True,), "qk_layernorm": (True,),
    "moe_router_enable_expert_bias": (True,), "attention_bias": _OFF, "qkv_has_bias": _OFF, "add_qkv_bias": _OFF,
}  # fmt: skip
_LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": None, "ffn_dim_multiplier": None,
    "multiple_of": 256, "num_layers": 32, "num_heads": 32, "n_kv_heads": None, "seq_length": 2048,
    "max_position_embedding": None, "rms_norm_eps": 1e-5, "theta": 10000.0, "extend_method": "None",
    "scaling_factor": 1.0, "qkv_has_bias": False, "attn_proj_has_bias": False, "tie_word_embeddings": False,
    "init_method_std": 0.01, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GLM_DEFAULTS = {
    "num_layers": 28, "padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696, "kv_channels": 128,
    "num_attention_heads": 32, "seq_length": 2048, "layernorm_epsilon": 1e-5, "rope_ratio": 1, "add_qkv_bias": True,
    "multi_query_attention": True, "multi_query_group_num": 2, "post_self_attn_layernorm": False,
    "post_mlp_layernorm": False, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
_GLM_ONLY = {
    **_NO_DROPOUT,
    "rmsnorm": (True,), "post_layer_norm": (True,), "apply_residual_connection_post_layernorm": _OFF,
    "add_bias_linear": _OFF, "quantization_bit": _OFF, "pre_seq_len": _OFF,
}  # fmt: skip
_MCORE_KEYS = (*_HF_KEYS, *_MCORE_NAMES, "num_moe_experts")
_LEGACY_DEEPSEEK = (
    *_LATENT_KEYS, *_ALIKE, "num_heads", "n_kv_heads", "max_position_embeddings", "seq_length", "theta",
    "extend_method", "scaling_factor", "init_method_std", "moe_config",
)  # fmt: skip

KINDS = {
    "LlamaConfig": Kind(_llama, tuple(_LLAMA_DEFAULTS), _LLAMA_DEFAULTS, {**_NO_DROPOUT, "quant_config": _OFF}),
    "ChatGLM2Config": Kind(_glm, tuple(_GLM_DEFAULTS), _GLM_DEFAULTS, _GLM_ONLY),
    "DeepseekV3Config": Kind(_deepseek, (*_MCORE_KEYS, *_LEGACY_DEEPSEEK), {}, _DEEPSEEK_ONLY),
    "Qwen2Config": Kind(_mcore("qwen2"), _MCORE_KEYS, {}, _MCORE_ONLY),
    "Qwen3Config": Kind(_mcore("qwen3"), _MCORE_KEYS, {}, {**_MCORE_ONLY, "qk_layernorm": (True,)}),
    "Qwen3MoeConfig": Kind(_mcore("qwen3_moe"), _MCORE_KEYS, {}, {**_MCORE_ONLY, "qk_layernorm": (True,)}),
    "Glm4Config": Kind(
        _mcore("glm4"), _MCORE_KEYS, {},
        {**_MCORE_ONLY, "position_embedding_type": ("partial_rope",), "sandwich_norm": (True,)},
    ),
}  # fmt: skip
BY_MODEL_TYPE = {  # of YAMLs without a type: the mcore networks know a class by config.json's model_type
    "deepseek_v3": "DeepseekV3Config", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "qwen3_moe": "Qwen3MoeConfig",
    "glm4": "Glm4Config",
}  # fmt: skip


def refuse_other(values: Values, only: Mapping[str, tuple], where: str) -> None:
    """Raises UserError for the first key whose value means what the decoder does not do."""
    for key, accepted in only.items():
        if key in values and values[key] not in accepted:
            raise UserError(f"{where}: {key} {values[key]!r} is not supported; only {accepted[0]!r} is")
