"""How a model lies on several processes: which slice of each tensor a rank holds, and which ranks form a group.

Pure Python, no communication. A layout has three axes of ranks: `tensor` ranks hold slices of one copy of the weights
(Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053), `sequence` ranks hold slices of the same rows, `data` ranks have
rows of their own. Tensor ranks are neighbours, so that they share a host where there are several.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from mindrlhf.config import ParallelConfig
from mindrlhf.errors import UserError

# Projections whose outputs are split over the tensor ranks, and those whose inputs are.
COLUMN = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")
HEADS = ("q_norm", "k_norm")  # held whole, used for a rank's own heads

Box = tuple[slice, ...]  # one slice for each axis of a tensor, with start and stop


class Place(NamedTuple):
    """Where a rank stands in a layout."""

    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """data x sequence x tensor ranks, numbered from 0 with tensor as the fastest axis.

    expert: whole experts are spread over so many of the tensor ranks, and the other tensor ranks split each one.
    zero: optimizer states are split over the data ranks (Rajbhandari et al. 2020, ZeRO stage 1, arXiv 1910.02054).
    Ranks from `size` on have no part in it.
    """

    data: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1
    zero: bool = False

    @classmethod
    def of(cls, config: ParallelConfig, world: int, where: str) -> "Layout":
        """Of a config's section named `where`, in a world of so many processes. Raises UserError."""
        for name in ("data", "tensor", "expert", "sequence"):
            value, least = getattr(config, name), 0 if name == "data" else 1
            if value < least:
                raise UserError(f"{where}.{name}: {value} must be {least} or more")
        together = config.tensor * config.sequence
        data = config.data or world // together
        if data * together > world or not data:
            started = "1 was" if world == 1 else f"{world} were"
            raise UserError(
                f"{where}: tensor {config.tensor} x sequence {config.sequence} x data {max(data, 1)} is "
                f"{max(data, 1) * together} processes, and {started} started; change one of them, or start "
                f"with `python -m mindrlhf.launch --workers {max(data, 1) * together}`"
            )
        if not config.data and data * together != world:
            raise UserError(
                f"{where}: {world} processes do not divide by tensor {config.tensor} x sequence {config.sequence}; "
                "change one of them, or start another number"
            )
        if config.tensor % config.expert:
            raise UserError(
                f"{where}.expert: {config.expert} does not divide tensor {config.tensor}: whole experts are spread "
                "over tensor ranks"
            )
        return cls(data, config.tensor, config.expert, config.sequence, config.zero)

    @property
    def size(self) -> int:
        """Ranks that take part."""
        return self.data * self.sequence * self.tensor

    def place(self, rank: int) -> Place | None:
        """None for a rank that has no part."""
        if rank >= self.size:
            return None
        rest, tensor = divmod(rank, self.tensor)
        data, sequence = divmod(rest, self.sequence)
        return Place(data, sequence, tensor)

    def rank(self, place: Place) -> int:
        return (place.data * self.sequence + place.sequence) * self.tensor + place.tensor

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` in those axes only, rising, itself among them."""
        place = self.place(rank)
        assert place is not None, f"rank {rank} has no part in {self}"
        ranges = [range(getattr(self, axis)) if axis in axes else [getattr(place, axis)] for axis in Place._fields]
        return tuple(
            self.rank(Place(data, sequence, tensor))
            for data in ranges[0]
            for sequence in ranges[1]
            for tensor in ranges[2]
        )

    def box(self, name: str, shape: tuple[int, ...], tensor: int) -> Box:
        """What the tensor rank of that number holds of the decoder's, or an adapter's, tensor of that name."""
        number, parts, axis = tensor, self.tensor, split_axis(name)
        box = [slice(0, length) for length in shape]
        if is_stacked(name):
            parts = self.tensor // self.expert
            owner, number = divmod(tensor, parts)
            box[0] = _part(shape[0], owner, self.expert)
        if axis is not None:
            box[axis] = _part(shape[axis], number, parts)
        return tuple(box)

    def check(self, decoder: Any, where: str) -> None:
        """decoder: a DecoderConfig. Raises UserError where it cannot be split like this."""
        counts = [
            ("num_attention_heads", decoder.num_heads, self.tensor),
            ("num_key_value_heads", decoder.num_kv_heads, self.tensor),
            ("vocab_size", decoder.vocab_size, self.tensor),
        ]
        if decoder.num_experts:
            counts += [
                ("num_experts", decoder.num_experts, self.expert),
                ("moe_intermediate_size", decoder.expert_width, self.tensor // self.expert),
                ("shared experts' width", decoder.shared_width, self.tensor),
            ]
        elif self.expert > 1:
            raise UserError(f"{where}.expert: {self.expert}, but the model has no experts; set it to 1")
        if not decoder.num_experts or decoder.dense_layers:
            counts.append(("intermediate_size", decoder.intermediate_size, self.tensor))
        for name, count, parts in counts:
            if count % parts:
                key = "expert" if name == "num_experts" else "tensor"
                raise UserError(f"{where}.{key}: the model's {name}, {count}, does not divide by {parts}")

    def describe(self) -> str:
        """Such as "data 2, tensor 2, zero"."""
        axes = ("data", "tensor", "expert", "sequence")
        parts = [f"{axis} {getattr(self, axis)}" for axis in axes if getattr(self, axis) > 1]
        return ", ".join(parts + ["zero"] * self.zero) or "one process"


ONE_PROCESS = Layout()


def split_axis(name: str) -> int | None:
    """The axis of the named tensor (matrices are [out, in]) that tensor ranks split; None: each holds all."""
    module, kind = _module_and_kind(name)
    if kind.startswith("lora_"):  # adapters: x A^T B^T
        column, row = module in COLUMN, module in ROW
        return 0 if column and kind == "lora_B" else 1 if row and kind == "lora_A" else None
    first = int(is_stacked(name))  # behind the axis of the experts
    if module in VOCABULARY or module in COLUMN:
        return first
    return first + 1 if module in ROW and kind == "weight" else None


def sees_a_part(name: str) -> bool:
    """Whether each tensor rank holds the named tensor whole but has only a share of its gradient."""
    module, kind = _module_and_kind(name)
    return module in HEADS or (kind.startswith("lora_") and split_axis(name) is None)


def is_stacked(name: str) -> bool:
    """Whether the named tensor holds a matrix of every expert of its layer, [experts, out, in]."""
    return ".experts." in name


def _part(length: int, number: int, parts: int) -> slice:
    width = length // parts
    return slice(number * width, (number + 1) * width)


def _module_and_kind(name: str) -> tuple[str, str]:
    """q_proj and weight, or q_proj and lora_A for ...q_proj.lora_A.weight."""
    parts = name.removesuffix(".weight") if ".lora_" in name else name
    *_, module, kind = ["", *parts.split(".")]
    return module, kind
