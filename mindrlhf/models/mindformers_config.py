"""A MindFormers YAML or configuration object as a DecoderConfig, by way of config.json's keys, without MindFormers.

What a YAML says and this suite decides otherwise is named, key by key; where that would change the model's numbers it
is an error.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mindrlhf.config import ParallelConfig
from mindrlhf.config.reading import not_yaml, read_json
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.fields import integer
from mindrlhf.models.mindformers_kinds import BY_MODEL_TYPE, EXPERT_KEYS, KINDS, Values, refuse_other

_ARCHITECTURE = ("model_type",) + tuple(
    field.name
    for field in dataclasses.fields(DecoderConfig)
    if field.name not in (
        "model_type", "max_positions", "initializer_range", "auxiliary_coef", "bos_token_id", "eos_token_id", "head",
        "score_mean", "score_std", "compute",
    )
)  # fmt: skip


class MindFormersModel(NamedTuple):
    """What a YAML describes."""

    config: DecoderConfig
    kind: str  # the name of its configuration class
    values: dict[str, Any]  # model.model_config
    is_legacy: bool  # use_legacy; else a network of Megatron's form, mcore
    training: ParallelConfig  # parallel_config
    generation: ParallelConfig  # generation_parallel_config
    notes: tuple[str, ...]  # lines: keys that are not read, and what decides instead


# -- what is not read --------------------------------------------------------------------------------------------------

_BALANCE = "model.balance decides, and no token is dropped"
_PARALLEL = "parallel and rollout.parallel decide; there are no pipeline stages"
_REASONS = (
    ("rollout.sampling and the generator's own cache decide", (
        "use_past", "repetition_penalty", "max_decode_length", "min_decode_length", "max_new_tokens", "temperature",
        "top_k", "top_p", "do_sample", "block_size", "num_blocks", "is_dynamic", "is_sample_acceleration",
        "use_prompt_flash_attention", "use_incre_flash_attention", "use_past_shard", "chunk_prefill",
    )),
    ("model.compute_dtype and the device decide", (
        "compute_dtype", "param_init_type", "params_dtype", "embedding_init_type", "residual_dtype", "rotary_dtype",
        "layernorm_compute_type", "softmax_compute_type", "layernorm_compute_dtype", "softmax_compute_dtype",
        "router_dense_type", "moe_router_dtype", "fp32_residual_connection", "attention_softmax_in_fp32",
        "apply_query_key_layer_scaling", "use_flash_attention", "use_ring_attention", "use_attn_mask_compression",
        "use_eod_attn_mask_compression", "fused_rms_norm", "fused_norm", "use_rope_slice", "rmsnorm_compute_2d",
        "bias_dropout_fusion", "bias_swiglu_fusion", "apply_rope_fusion", "enable_high_performance", "torch_dtype",
        "moe_grouped_gemm", "moe_router_fusion", "moe_permute_fusion", "use_fused_ops_topkrouter", "use_fused_mla",
        "rotary_cos_format", "use_cache", "use_pad_tokens", "mask_generate", "input_sliced_sig",
    )),
    ("the job's rows and prompts decide", ("seq_length",)),
    ("only the order of rows in a checkpoint", (
        "qkv_concat", "mlp_concat", "ffn_concat", "mla_qkv_concat", "use_rearrange_rope",
        "use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp",
    )),
    (_PARALLEL, (
        "offset", "pp_interleave_num", "fine_grain_interleave", "parallel_optimizer", "parallel_config",
        "pipeline_stage", "start_stage", "stage_num", "moe_token_dispatcher_type",
    )),
    (_BALANCE, (
        "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate",
        "moe_token_drop_policy", "moe_expert_capacity_factor", "aux_loss_alpha", "seq_aux", "return_extra_loss",
    )),
    ("the layer that predicts a second token is not built", (
        "num_nextn_predict_layers", "mtp_depth", "mtp_loss_factor", "mtp_num_layers", "mtp_loss_scaling_factor",
    )),
    ("model.path and model.tokenizer decide", (
        "checkpoint_name_or_path", "pretrained_model_dir", "pad_token_id", "ignore_token_id", "gmask_token_id",
        "auto_map", "auto_register", "name_or_path", "batch_size",
    )),
)  # fmt: skip
_LAYOUTS = {"parallel_config": "parallel", "generation_parallel_config": "rollout.parallel"}
_READ_SECTIONS = ("model", "use_legacy", "pretrained_model_dir", "parallel", "parallel_config", "moe_config",
                  "generation_parallel_config", "run_mode", "use_parallel")  # fmt: skip


def _notes(content: Values, name: str, layouts: dict[str, ParallelConfig], path: Path) -> tuple[str, ...]:
    kind, found = KINDS[name], {}
    known = {*kind.keys, *kind.only, "type", "model_type", "architectures", "moe_config"}
    for key in content["model"]["model_config"]:
        if key not in known:
            reason = next((why for why, keys in _REASONS if key in keys), "not known")
            near = difflib.get_close_matches(str(key), kind.keys, n=1, cutoff=0.85)
            if reason == "not known" and near:  # else the default of what was meant would be trained
                raise UserError(f"{path}: model.model_config: unknown key {key!r}; did you mean {near[0]!r}?")
            found.setdefault(reason, []).append(key)
    if "moe_config" in kind.keys:
        rest = [f"moe_config.{key}" for key in content["moe_config"] if key not in EXPERT_KEYS]
        found.setdefault(_BALANCE, []).extend(rest)
    stages = content["parallel_config"].get("pipeline_stage")
    found.setdefault(_PARALLEL, []).extend(["parallel_config.pipeline_stage"] * (stages not in (None, 1)))
    found["the job's own YAML decides"] = [key for key in content if key not in _READ_SECTIONS]
    notes = [f"{', '.join(keys)}: {why}" for why, keys in found.items() if keys]
    for section, layout in layouts.items():
        name = _LAYOUTS[section]
        said = [f"{name}.{key}={str(value).lower()}" for key, value in vars(layout).items() if value > (key != "zero")]
        notes += [f"{section}: is not taken from here; a job says {' '.join(said)}"] if said else []
    return tuple(notes)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_mindformers(path: str | Path) -> MindFormersModel:
    """A YAML of MindFormers, legacy or mcore. Raises UserError: what it lacks, and what the decoder does otherwise."""
    path = Path(path)
    content = _content(path)
    values = content["model"].get("model_config")
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: model.model_config is missing; give a MindFormers YAML of a model")
    is_legacy, directory = content.get("use_legacy", True), content.get("pretrained_model_dir")
    if directory and not is_legacy:  # config.json's keys, and what the YAML has instead
        values = read_json(path.parent / directory / "config.json") | values
    name = values.get("type") or BY_MODEL_TYPE.get(values.get("model_type"))
    if name not in KINDS:
        shown = name or values.get("model_type")
        raise UserError(f"{path}: model.model_config.type {shown!r} is not known; known: {', '.join(KINDS)}")
    values = {"moe_config": content["moe_config"], **values}
    config = _decoder_config(values, name, f"{path}: model.model_config")
    layouts = {section: _layout(content, section, f"{path}: {section}") for section in _LAYOUTS}
    return MindFormersModel(config, name, values, is_legacy, *layouts.values(), _notes(content, name, layouts, path))


def decoder_config(config: Any, where: str = "LlamaConfig") -> DecoderConfig:
    """A configuration object of MindFormers, by its attributes. Raises UserError."""
    name = type(config).__name__
    name = name if name in KINDS else "LlamaConfig"
    keys = (*KINDS[name].keys, *KINDS[name].only)
    values = {key: getattr(config, key) for key in keys if hasattr(config, key)}
    experts = getattr(config, "moe_config", None)
    return _decoder_config({**values, "moe_config": vars(experts) if experts else None}, name, where)


def difference(ours: DecoderConfig, theirs: DecoderConfig) -> str | None:
    """The first field by which two are not of one model; tables of positions, first values and token ids may differ."""
    return next((name for name in _ARCHITECTURE if getattr(ours, name) != getattr(theirs, name)), None)


def _decoder_config(values: Values, name: str, where: str) -> DecoderConfig:
    kind, experts = KINDS[name], values.get("moe_config") or {}
    refuse_other(values, kind.only, where)
    if "moe_config" not in kind.keys and (experts.get("expert_num") or 1) > 1:
        raise UserError(f"{where}: moe_config.expert_num is over 1; {name} with experts is not supported")
    return DecoderConfig.from_hf(kind.convert({**kind.defaults, **values}, where), where)


def _content(path: Path) -> dict[str, Any]:
    """The sections that are read are mappings, empty where they are not there."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a MindFormers YAML")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise not_yaml(path, error) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no mapping; give a MindFormers YAML")
    if "base_config" in content:
        raise UserError(f"{path}: base_config is not followed; merge the files")
    for name in ("model", "moe_config", "parallel", *_LAYOUTS):  # null is how YAML writes an empty section
        content[name] = content.get(name) or {}
        if not isinstance(content[name], dict):
            raise UserError(f"{path}: {name}: {content[name]!r} is not a mapping of keys to values")
    return content


def _layout(content: Values, section: str, where: str) -> ParallelConfig:
    found, is_training = content[section], section == "parallel_config"
    default = 1 if is_training else 0  # 0: as in training
    return ParallelConfig(
        data=integer(found, "data_parallel", where, default),
        tensor=integer(found, "model_parallel", where, default),
        expert=integer(found, "expert_parallel", where, default),
        sequence=integer(found, "context_parallel", where, 1),
        zero=is_training and bool(content["parallel"].get("enable_parallel_optimizer")),
    )
