"""What a decoder is: its sizes and flags, read from and written to a Hugging Face config.json.

One dataclass for every family; what a `model_type` implies is a row of families.FAMILIES.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mindrlhf.config.reading import read_json
from mindrlhf.errors import UserError
from mindrlhf.models.compute import Compute
from mindrlhf.models.families import FAMILIES, Family
from mindrlhf.models.fields import refuse_unknown
from mindrlhf.models.hf_config import HEADS, YAML_KEYS, Latent, Router, read_fields, written_values
from mindrlhf.models.rope_settings import ROPE_TYPES, rope_type
from mindrlhf.models.shapes import expected_shapes


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and flags of one decoder. Raises UserError where they contradict each other."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the MLP
    num_layers: int
    num_heads: int
    num_kv_heads: int  # divides num_heads; fewer means grouped-query attention
    head_dim: int  # of queries and keys, even; num_heads * head_dim need not be hidden_size
    max_positions: int  # rows of the tables of positions
    norm_epsilon: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)  # rope_type and its numbers; None: default
    rotary_dim: int = 0  # first numbers of a head that are rotated; 0: all
    qkv_bias: bool = False  # q_proj, k_proj and v_proj have a bias
    output_bias: bool = False  # o_proj has one: Llama's attention_bias means all four, Qwen2 has the three
    latent: Latent | None = None  # sizes of multi-head latent attention, with num_kv_heads = num_heads
    num_experts: int = 0  # of a layer; 0: one MLP
    experts_per_token: int = 0
    expert_width: int = 0  # of an expert's MLP
    shared_width: int = 0  # of the MLP that every token passes beside its experts; 0: none
    dense_layers: tuple[int, ...] = ()  # numbers of the layers with one MLP, where the others have experts
    router: Router = Router()
    auxiliary_coef: float = 0.0  # weight of the loss that balances the experts, router_aux_loss_coef
    tie_embeddings: bool = False  # the head is the embedding; there is no lm_head.weight
    model_type: str = "llama"  # a row of FAMILIES
    initializer_range: float = 0.02  # standard deviation of fresh matrices and embeddings
    bos_token_id: int | tuple[int, ...] | None = None
    eos_token_id: int | tuple[int, ...] | None = None  # several where any of them ends an answer
    head: str = "logits"  # a row of HEADS; "score": one number a token, a reward model
    score_mean: float = 0.0  # of the scores on held-out data, for who normalises them
    score_std: float = 1.0  # over 0
    compute: Compute = Compute()  # no checkpoint says how

    def __post_init__(self):
        if self.model_type not in FAMILIES:
            raise UserError(f"model_type {self.model_type!r} is not supported; known: {', '.join(FAMILIES)}")
        for name, value in (
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_layers),
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_positions),
            *(zip(Latent._fields[1:], self.latent[1:], strict=True) if self.latent else ()),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_key_value_heads {self.num_kv_heads} does not divide num_attention_heads {self.num_heads}; "
                "choose a divisor"
            )
        if self.head_dim % 2 or self.rotated % 2 or not 0 < self.rotated <= self.head_dim:
            raise UserError(
                f"head_dim is {self.head_dim} with {self.rotated} rotated; rotary embeddings need even numbers, and "
                "no more of them than there are"
            )
        if self.norm_epsilon <= 0 or self.initializer_range < 0:
            raise UserError("rms_norm_eps must be over 0 and initializer_range must not be negative")
        if self.rope_theta <= 1:
            raise UserError(f"rope_theta is {self.rope_theta}; it must be over 1 (10000 is usual)")
        if self.head not in HEADS or not self.score_std > 0:
            raise UserError(f"head {self.head!r} must be logits or score, and score_std {self.score_std} over 0")
        if (self.qkv_bias, self.output_bias) not in self.family.biases.values():
            raise UserError(
                f"model_type {self.model_type} cannot have qkv_bias {self.qkv_bias} with output_bias "
                f"{self.output_bias}; it has {' or '.join(map(str, self.family.biases.values()))}"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        if bool(self.num_experts) != self.family.has_experts or bool(self.latent) != self.family.latent:
            raise UserError(
                f"model_type {self.model_type} cannot have num_experts {self.num_experts} with latent {self.latent}"
            )
        if not self.num_experts:
            return
        groups, top_groups = self.router.groups, self.router.top_groups
        if self.expert_width < 1:
            raise UserError(f"moe_intermediate_size is {self.expert_width}; it must be at least 1")
        if groups < 1 or self.num_experts % groups or not 0 < top_groups <= groups:
            raise UserError(
                f"n_group {groups} with topk_group {top_groups}: groups must divide the {self.num_experts} experts, "
                "and topk_group must be 1 to n_group"
            )
        if not 0 < self.experts_per_token <= self.num_experts // groups * top_groups:
            raise UserError(
                f"num_experts_per_tok is {self.experts_per_token}; it must be 1 to "
                f"{self.num_experts // groups * top_groups}, the experts that a token can choose from"
            )
        if groups > 1 and self.num_experts // groups < 2:
            raise UserError(f"n_group {groups}: a group is known by its two best experts; use fewer groups")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def rotated(self) -> int:
        """Numbers of a head that rotary positions turn."""
        return self.latent.rope if self.latent else self.rotary_dim or self.head_dim

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers

    @cached_property
    def num_parameters(self) -> int:
        """Numbers of the weights; tied embeddings count once."""
        return sum(math.prod(shape) for shape in expected_shapes(self).values())

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
        fields = read_fields(values, where)
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
    def read(cls, directory: str | Path) -> "DecoderConfig":
        """The config.json of a checkpoint directory. Raises UserError."""
        path = Path(directory) / "config.json"
        return cls.from_hf(read_json(path), str(path))

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that transformers 4 and 5 load, weights being float32; from_hf's inverse."""
        return written_values(self)
