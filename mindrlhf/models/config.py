"""What a decoder is: its sizes and flags, read from and written to a Hugging Face config.json.

One dataclass for every family. What a `model_type` implies is a row of FAMILIES; what this package cannot compute
(another activation, a sliding window, partial rotary embeddings, quantised weights, other rope types) is refused by
name, because a decoder that ignored such a key would load the weights and be silently wrong.

Sources: transformers 4.57 `models/{llama,qwen2}/configuration_*.py` for names and defaults; MindFormers 1.9
`models/llama` for `from_mindformers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf.errors import UserError
from mindrlhf.models.fields import flag, integer, number, read_json, refuse_unknown, token_id
from mindrlhf.models.rope_settings import ROPE_TYPES, mindformers_rope, read_rope, rope_type


class Family(NamedTuple):
    """What a model_type of config.json implies."""

    architecture: str  # of the classes that transformers loads, without what names the head
    biases: dict[bool, tuple[bool, bool]]  # attention_bias -> (q, k and v have a bias, o has a bias)
    attention_bias: bool  # where config.json does not say
    feed_forward: str = "mlp"  # the name of a layer's second half
    has_experts: bool = False


FAMILIES = {
    "llama": Family("Llama", {False: (False, False), True: (True, True)}, False),
    "qwen2": Family("Qwen2", {True: (True, False)}, True),
    "mixtral": Family("Mixtral", {False: (False, False)}, False, "block_sparse_moe", True),
}

# head -> what ends the name of transformers' class
HEADS = {"logits": "ForCausalLM", "score": "ForSequenceClassification"}

# What a YAML build.decoder may hold; the same names and meanings as in config.json.
YAML_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "num_local_experts", "num_experts_per_tok", "attention_bias", "tie_word_embeddings",
    "initializer_range", "hidden_act", "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and flags of one decoder. Raises UserError where they contradict each other."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the gated MLP
    num_layers: int
    num_heads: int
    num_kv_heads: int  # divides num_heads; fewer means grouped-query attention
    head_dim: int  # even; num_heads * head_dim need not be hidden_size
    max_positions: int  # rows of the rope tables
    norm_epsilon: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)  # rope_type and its numbers; None: default
    qkv_bias: bool = False  # q_proj, k_proj and v_proj have a bias
    output_bias: bool = False  # o_proj has one: Llama's attention_bias means all four, Qwen2 has the three
    num_experts: int = 0  # in every layer, each with an MLP of intermediate_size; 0: one MLP
    experts_per_token: int = 0
    tie_embeddings: bool = False  # the head is the embedding; there is no lm_head.weight
    model_type: str = "llama"  # a row of FAMILIES
    initializer_range: float = 0.02  # standard deviation of fresh matrices and embeddings
    bos_token_id: int | tuple[int, ...] | None = None
    eos_token_id: int | tuple[int, ...] | None = None  # several where any of them ends an answer
    head: str = "logits"  # a row of HEADS; "score": one number a token, a reward model
    score_mean: float = 0.0  # of the scores on held-out data, for who normalises them
    score_std: float = 1.0  # over 0

    def __post_init__(self):
        for name, value in (
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_layers),
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_positions),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_key_value_heads {self.num_kv_heads} does not divide num_attention_heads {self.num_heads}; "
                "choose a divisor"
            )
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            raise UserError(
                f"num_experts_per_tok is {self.experts_per_token}; it must be 1 to num_local_experts {self.num_experts}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")
        if self.norm_epsilon <= 0 or self.initializer_range < 0:
            raise UserError("rms_norm_eps must be over 0 and initializer_range must not be negative")
        if self.rope_theta <= 1:
            raise UserError(f"rope_theta is {self.rope_theta}; it must be over 1 (10000 is usual)")
        if self.head not in HEADS or not self.score_std > 0:
            raise UserError(f"head {self.head!r} must be logits or score, and score_std {self.score_std} over 0")
        if self.model_type not in FAMILIES:
            raise UserError(f"model_type {self.model_type!r} is not supported; known: {', '.join(FAMILIES)}")
        if (self.qkv_bias, self.output_bias) not in FAMILIES[self.model_type].biases.values():
            raise UserError(
                f"model_type {self.model_type} cannot have qkv_bias {self.qkv_bias} with output_bias "
                f"{self.output_bias}; qwen2 has (True, False), llama (False, False) or (True, True)"
            )

    @property
    def num_parameters(self) -> int:
        """Numbers of the weights; tied embeddings count once."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key)
        attention += self.qkv_bias * (query + 2 * key) + self.output_bias * self.hidden_size
        mlps, routers = max(self.num_experts, 1), self.num_experts * self.hidden_size
        layer = attention + mlps * 3 * self.hidden_size * self.intermediate_size + routers + 2 * self.hidden_size
        vocabulary = self.vocab_size * self.hidden_size
        head = self.hidden_size if self.head == "score" else (not self.tie_embeddings) * vocabulary
        return vocabulary + self.num_layers * layer + self.hidden_size + head

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """eos_token_id as a tuple, empty where there is none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str = "config.json") -> "DecoderConfig":
        """The content of a config.json, of transformers 4 or 5. Keys that do not change the numbers are ignored.

        Raises UserError with `where`, the key and the fix: missing keys, wrong types, and all that is not supported.
        """
        model_type = values.get("model_type")
        if model_type not in tuple(FAMILIES):
            raise UserError(f"{where}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
        _refuse_unsupported(values, where)
        qkv_bias, output_bias = _biases(values, where)
        hidden_size = integer(values, "hidden_size", where)
        num_heads = integer(values, "num_attention_heads", where)
        head_dim = integer(values, "head_dim", where, None)
        if head_dim is None:
            if num_heads < 1 or hidden_size % num_heads:
                raise UserError(
                    f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}; "
                    "change one, or set head_dim"
                )
            head_dim = hidden_size // num_heads
        rope_theta, rope_scaling = read_rope(values, where)
        has_experts = FAMILIES[model_type].has_experts
        fields = dict(
            vocab_size=integer(values, "vocab_size", where),
            hidden_size=hidden_size,
            intermediate_size=integer(values, "intermediate_size", where),
            num_layers=integer(values, "num_hidden_layers", where),
            num_heads=num_heads,
            num_kv_heads=integer(values, "num_key_value_heads", where, num_heads),
            head_dim=head_dim,
            max_positions=integer(values, "max_position_embeddings", where),
            norm_epsilon=number(values, "rms_norm_eps", where, 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            num_experts=integer(values, "num_local_experts", where, 8) if has_experts else 0,
            experts_per_token=integer(values, "num_experts_per_tok", where, 2) if has_experts else 0,
            tie_embeddings=flag(values, "tie_word_embeddings", where),
            model_type=model_type,
            initializer_range=number(values, "initializer_range", where, 0.02),
            bos_token_id=token_id(values, "bos_token_id", where),
            eos_token_id=token_id(values, "eos_token_id", where),
            head=_head(values, where),
            score_mean=number(values, "score_mean", where, 0.0),
            score_std=number(values, "score_std", where, 1.0),
        )
        try:
            return cls(**fields)
        except UserError as error:  # __post_init__ does not know the file
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def from_yaml(
        cls, values: Mapping[str, Any], vocab_size: int, where: str = "model.build.decoder"
    ) -> "DecoderConfig":
        """The `build.decoder` mapping of a job's YAML: config.json's keys, read strictly; `vocab_size` is its own key.

        Raises UserError: as `from_hf`, and for every key that nothing reads.
        """
        if "vocab_size" in values:
            raise UserError(f"{where}: vocab_size stands beside decoder, not in it; move it to build.vocab_size")
        refuse_unknown(values, YAML_KEYS, where)
        for name in ("rope_scaling", "rope_parameters"):
            rope = values.get(name)
            if isinstance(rope, Mapping):
                needed, optional = ROPE_TYPES.get(str(rope_type(rope)), ((), ()))
                extra = ("rope_type", "type") + (("rope_theta",) if name == "rope_parameters" else ())
                refuse_unknown(rope, needed + optional + extra, f"{where}.{name}")
        return cls.from_hf({**values, "vocab_size": vocab_size}, where)

    @classmethod
    def from_mindformers(cls, config: Any, where: str = "LlamaConfig") -> "DecoderConfig":
        """A MindFormers LlamaConfig, by its attributes: MindFormers itself is not imported.

        Llama with biases on q, k and v alone is what Hugging Face calls qwen2. The MLP's width without
        intermediate_size is `llama_layer.LlamaFeedForward`'s: 4 * hidden, times ffn_dim_multiplier + 0.01, two thirds
        of it, rounded up to multiple_of. The rope tables are as long as `FreqsMgr` makes them.
        Raises UserError for experts, dynamic rope and biases that Hugging Face has no name for.
        """
        if getattr(getattr(config, "moe_config", None), "expert_num", 1) > 1:
            raise UserError(f"{where}: moe_config.expert_num is over 1; experts are not supported, use a dense model")
        qkv_bias, output_bias = bool(config.qkv_has_bias), bool(getattr(config, "attn_proj_has_bias", False))
        width = config.intermediate_size
        if width is None:
            width = 4 * config.hidden_size
            if config.ffn_dim_multiplier is not None:
                width = int((config.ffn_dim_multiplier + 0.01) * width)
            width = int(2 * width / 3)
            width = config.multiple_of * ((width + config.multiple_of - 1) // config.multiple_of)
        theta, scaling = mindformers_rope(config, where)
        values = {
            "model_type": "qwen2" if qkv_bias and not output_bias else "llama",
            "attention_bias": qkv_bias,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.n_kv_heads,
            "max_position_embeddings": max(config.max_position_embedding or 0, config.seq_length),
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": bool(config.tie_word_embeddings),
            "initializer_range": getattr(config, "init_method_std", None),
            "bos_token_id": getattr(config, "bos_token_id", None),
            "eos_token_id": getattr(config, "eos_token_id", None),
        }
        if output_bias and not qkv_bias:
            raise UserError(f"{where}: attn_proj_has_bias without qkv_has_bias has no Hugging Face form; set both")
        return cls.from_hf(values, where)

    @classmethod
    def read(cls, directory: str | Path) -> "DecoderConfig":
        """The config.json of a checkpoint directory. Raises UserError."""
        path = Path(directory) / "config.json"
        return cls.from_hf(read_json(path), str(path))

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that transformers 4 and 5 load, weights being float32; from_hf's inverse."""
        values = {
            "architectures": [FAMILIES[self.model_type].architecture + HEADS[self.head]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rope_theta,
            "rope_scaling": dict(self.rope_scaling) if self.rope_scaling else None,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": _plain(self.bos_token_id),
            "eos_token_id": _plain(self.eos_token_id),
            "torch_dtype": "float32",
            "use_cache": True,
        }
        if self.num_experts:
            values |= {"num_local_experts": self.num_experts, "num_experts_per_tok": self.experts_per_token}
        if len(FAMILIES[self.model_type].biases) > 1:  # elsewhere the key means nothing
            values["attention_bias"] = self.qkv_bias
        if self.head == "score":
            # transformers reads the score at the last token that is not padding. Where padding is the stop token that
            # would be one token early; without padding it is the last token, and a batch of one row.
            values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": None}
            values |= {"score_mean": self.score_mean, "score_std": self.score_std}
        return values


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    activation = values.get("hidden_act")
    if activation not in (None, "silu", "swish"):
        raise UserError(f"{where}: hidden_act {activation!r} is not supported; only 'silu' is")
    if values.get("mlp_bias"):
        raise UserError(f"{where}: mlp_bias true is not supported; use a model without biases in the MLP")
    if values.get("quantization_config") is not None:
        raise UserError(f"{where}: quantization_config is not supported; use the float32, float16 or bfloat16 weights")
    if values.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor other than 1 is not supported; use another model")
    if FAMILIES[values["model_type"]].has_experts and values.get("sliding_window") is not None:
        raise UserError(f"{where}: sliding_window is not supported; set it to null if the model was trained without it")
    kinds = values.get("layer_types") or []
    if values.get("use_sliding_window") and values.get("sliding_window", 4096) is not None and not kinds:
        # Qwen2's rule: the layers from max_window_layers on slide. Its default in transformers is 28.
        first = integer(values, "max_window_layers", where, 28)
        kinds = ["sliding_attention"] if first < integer(values, "num_hidden_layers", where) else []
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


def _biases(values: Mapping[str, Any], where: str) -> tuple[bool, bool]:
    family = FAMILIES[values["model_type"]]
    biased = flag(values, "attention_bias", where, family.attention_bias)
    if biased not in family.biases:
        raise UserError(
            f"{where}: attention_bias {str(biased).lower()} does not exist in model_type {values['model_type']}; "
            "remove the key"
        )
    return family.biases[biased]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
