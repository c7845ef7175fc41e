"""config.json in both directions: its keys to the fields of DecoderConfig, and back.

What this package cannot compute (another activation, a sliding window, quantised weights, other rope types) is refused
by name, because a decoder that ignored such a key would load the weights and be silently wrong.

Source: transformers 4.57 `models/*/configuration_*.py` for names and defaults.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mindrlhf.errors import UserError
from mindrlhf.models.families import FAMILIES, Family
from mindrlhf.models.fields import REQUIRED, flag, integer, integers, number, token_id
from mindrlhf.models.rope_settings import read_rope

if TYPE_CHECKING:
    from mindrlhf.models.config import DecoderConfig


class Latent(NamedTuple):
    """Sizes of multi-head latent attention (arXiv 2405.04434): keys and values come from one narrow vector a token."""

    query_rank: int  # 0: queries are projected directly
    kv_rank: int
    nope: int  # width of a head's part that is not rotated
    rope: int  # of the rotated part, whose key all heads share
    value: int


class Router(NamedTuple):
    """How a token's experts are chosen and weighted."""

    score: str = "softmax"  # over all experts; or sigmoid, each for itself, and a bias that only the choice sees
    renormalise: bool = True  # the chosen experts' weights sum to 1
    scale: float = 1.0  # of their weights in the end
    groups: int = 1  # of experts, of which a token chooses from
    top_groups: int = 1  # the best ones only


# head -> what ends the name of transformers' class, where it is not the family's language_model
HEADS = {"logits": "", "score": "ForSequenceClassification"}

_SWIGLU, _GELU = ("silu", "swish"), ("gelu_new", "gelu_pytorch_tanh")
# field -> its key, of numbers that are read and written as they stand
_COUNTS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "max_positions": "max_position_embeddings",
}  # fmt: skip
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

# What a YAML build.decoder may hold; the same names and meanings as in config.json.
YAML_KEYS = tuple(dict.fromkeys((
    "model_type", *_COUNTS.values(), "intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "attention_bias", "tie_word_embeddings",
    "initializer_range", "hidden_act", "bos_token_id", "eos_token_id", *_LATENT, "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "router_aux_loss_coef",
    "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor",
    *(name for family in FAMILIES.values() for name in family.keys.values()),
)))  # fmt: skip


class _Reader:
    """The values of a config.json, asked by Llama's names of the keys."""

    def __init__(self, values: Mapping[str, Any], family: Family, where: str):
        self.values, self.family, self.where = values, family, where

    def __call__(self, read, key: str, default: Any = REQUIRED) -> Any:
        """read: of fields.py. The family's own default stands before the given one."""
        name = self.family.keys.get(key, key)
        return read(self.values, name, self.where, self.family.defaults.get(key, default))


def read_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of DecoderConfig. Raises UserError."""
    model_type = values.get("model_type")
    if model_type not in tuple(FAMILIES):
        raise UserError(f"{where}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    read = _Reader(values, family, where)
    _refuse_unsupported(read)
    fields = {name: read(integer, key) for name, key in _COUNTS.items()}
    fields["num_kv_heads"] = read(integer, "num_key_value_heads", fields["num_heads"])
    wide = 4 * fields["hidden_size"] if family.gelu else REQUIRED
    fields["intermediate_size"] = read(integer, "intermediate_size", wide)
    fields["qkv_bias"], fields["output_bias"] = _biases(read)
    fields |= _latent(read) if family.latent else _head_sizes(read, fields)
    fields |= _experts(read, fields) if family.has_experts else {}
    if not family.learned_positions:
        fields["rope_theta"], fields["rope_scaling"] = read_rope(
            values, where, family.defaults.get("rope_theta", 10000.0)
        )
    return fields | dict(
        norm_epsilon=read(number, "rms_norm_eps", 1e-6),
        tie_embeddings=read(flag, "tie_word_embeddings", False),
        model_type=model_type,
        initializer_range=read(number, "initializer_range", 0.02),
        bos_token_id=token_id(values, "bos_token_id", where),
        eos_token_id=token_id(values, "eos_token_id", where),
        head=_head(values, where),
        score_mean=read(number, "score_mean", 0.0),
        score_std=read(number, "score_std", 1.0),
    )


def _head_sizes(read: _Reader, fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden_size, num_heads = fields["hidden_size"], fields["num_heads"]
    head_dim = read(integer, "head_dim", None)
    if head_dim is None:
        if num_heads < 1 or hidden_size % num_heads:
            raise UserError(
                f"{read.where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}; "
                "change one, or set head_dim"
            )
        head_dim = hidden_size // num_heads
    part = read(number, "partial_rotary_factor", 1.0)
    for name in ("rope_parameters", "rope_scaling"):
        scaling = read.values.get(name)
        if isinstance(scaling, Mapping):
            part = number(scaling, "partial_rotary_factor", f"{read.where}: {name}", part)
    if part != 1 and "partial_rotary_factor" not in read.family.defaults:
        raise UserError(f"{read.where}: partial_rotary_factor other than 1 is not supported; use another model")
    rotated = int(head_dim * part)
    if not 0 < rotated <= head_dim:
        raise UserError(f"{read.where}: partial_rotary_factor is {part}; it must leave 1 to {head_dim} rotated numbers")
    return {"head_dim": head_dim, "rotary_dim": 0 if part == 1 else rotated}


def _latent(read: _Reader) -> dict[str, Any]:
    # Null means something else than an absent key here: no narrow vector for the queries.
    rank = 0 if read.values.get("q_lora_rank", 0) is None else read(integer, "q_lora_rank")
    latent = Latent(rank, *(read(integer, key) for key in _LATENT[1:]))
    return {"latent": latent, "head_dim": latent.nope + latent.rope}


def _experts(read: _Reader, fields: Mapping[str, Any]) -> dict[str, Any]:
    width = read(integer, "moe_intermediate_size", fields["intermediate_size"])
    layers = fields["num_layers"]
    if read.family.latent:  # DeepSeek's keys
        dense = range(min(read(integer, "first_k_dense_replace"), layers))
        router = Router(
            "sigmoid", read(flag, "norm_topk_prob"), read(number, "routed_scaling_factor"), read(integer, "n_group"),
            read(integer, "topk_group"),
        )  # fmt: skip
    else:
        step, without = read(integer, "decoder_sparse_step", 1), read(integers, "mlp_only_layers", ())
        dense = [layer for layer in range(layers) if layer in without or (layer + 1) % max(step, 1)]
        router = Router(renormalise=read(flag, "norm_topk_prob", False))
    return dict(
        num_experts=read(integer, "num_experts"),
        experts_per_token=read(integer, "num_experts_per_tok"),
        expert_width=width,
        shared_width=width * read(integer, "n_shared_experts", 0),
        dense_layers=tuple(dense),
        router=router,
        auxiliary_coef=read(number, "router_aux_loss_coef", 0.0 if read.family.latent else 0.001),
    )


def _refuse_unsupported(read: _Reader) -> None:
    values, where, family = read.values, read.where, read.family
    name = family.keys.get("hidden_act", "hidden_act")
    activations = _GELU if family.gelu else _SWIGLU
    if values.get(name) not in (None, *activations):
        raise UserError(f"{where}: {name} {values[name]!r} is not supported; only {activations[0]!r} is")
    for key, value in family.constant.items():
        if values.get(key) not in (None, value):
            raise UserError(f"{where}: {key} {values[key]!r} is not supported; only {value!r} is")
    for key, value, why in family.excluded:
        if values.get(key) == value:
            raise UserError(f"{where}: {key} {value} is not supported: {why}")
    if values.get("quantization_config") is not None:
        raise UserError(f"{where}: quantization_config is not supported; use the float32, float16 or bfloat16 weights")
    kinds = values.get("layer_types") or []
    if values.get("use_sliding_window") and values.get("sliding_window", 4096) is not None and not kinds:
        # Qwen2's rule: the layers from max_window_layers on slide, by default from 28. Qwen3-MoE slides all.
        first = 0 if family.has_experts else integer(values, "max_window_layers", where, 28)
        kinds = ["sliding_attention"] if first < read(integer, "num_hidden_layers") else []
    if any(kind != "full_attention" for kind in kinds):
        raise UserError(
            f"{where}: sliding-window attention (use_sliding_window, layer_types) is not supported; "
            "set use_sliding_window false if the model was trained without it"
        )


def _head(values: Mapping[str, Any], where: str) -> str:
    """By the class that config.json names; a classifier of one label is a reward model."""
    architecture = str((values.get("architectures") or [""])[0])
    if not architecture.endswith(HEADS["score"]):
        return "logits"
    # transformers writes id2label instead of num_labels, and neither where there are two labels.
    names = values.get("id2label")
    labels = integer(values, "num_labels", where, len(names) if isinstance(names, Mapping) else 2)
    if labels != 1:
        raise UserError(f"{where}: {architecture} with {labels} labels is not supported; a reward model has one label")
    return "score"


def _biases(read: _Reader) -> tuple[bool, bool]:
    family = read.family
    biased = read(flag, "attention_bias", family.attention_bias)
    if biased not in family.biases:
        raise UserError(
            f"{read.where}: attention_bias {str(biased).lower()} is not supported in model_type "
            f"{read.values['model_type']}; only {str(not biased).lower()} is"
        )
    return family.biases[biased]


def written_values(config: "DecoderConfig") -> dict[str, Any]:
    """The content of a config.json that transformers 4 and 5 load, weights being float32."""
    family = config.family
    values = {key: getattr(config, name) for name, key in _COUNTS.items()} | {
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": (_GELU if family.gelu else _SWIGLU)[0],
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": _plain(config.bos_token_id),
        "eos_token_id": _plain(config.eos_token_id),
        "pad_token_id": None,  # a family's default may lie outside of a small vocabulary
    }
    if not family.learned_positions:
        values |= {
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.rotated if config.latent else config.head_dim,
            "rope_theta": config.rope_theta,
            "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        }
    if "partial_rotary_factor" in family.defaults:
        values["partial_rotary_factor"] = config.rotated / config.head_dim
    if len(family.biases) > 1:  # elsewhere the key means nothing
        values["attention_bias"] = config.qkv_bias
    if config.latent:
        values |= dict(zip(_LATENT, (config.latent.query_rank or None, *config.latent[1:]), strict=True))
    if config.num_experts:
        values |= _written_experts(config)
    if config.head == "score":
        # transformers reads the score at the last token that is not padding. Where padding is the stop token that
        # would be one token early; without padding it is the last token, and a batch of one row.
        values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        values |= {"score_mean": config.score_mean, "score_std": config.score_std}
    return {
        "architectures": [family.architecture + (HEADS[config.head] or family.language_model)],
        "model_type": config.model_type,
        **{family.keys.get(key, key): value for key, value in values.items()},
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _written_experts(config: "DecoderConfig") -> dict[str, Any]:
    values = {"num_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    if config.model_type == "mixtral":
        return values | {"router_aux_loss_coef": config.auxiliary_coef}
    values |= {"moe_intermediate_size": config.expert_width, "norm_topk_prob": config.router.renormalise}
    if not config.latent:
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
        return values | {"router_aux_loss_coef": config.auxiliary_coef}
    return values | {
        "n_shared_experts": config.shared_width // config.expert_width,
        "first_k_dense_replace": len(config.dense_layers),
        "n_group": config.router.groups,
        "topk_group": config.router.top_groups,
        "routed_scaling_factor": config.router.scale,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
