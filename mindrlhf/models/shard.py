"""This rank's part of a decoder under a layout: slices of tensors on the host, and the collectives of its cells."""

from collections.abc import Sequence

import numpy as np
from mindspore import nn

from mindrlhf.layout import Layout, expert_of, split_axis
from mindrlhf.models.collectives import Copy, GatherColumns, Group, Sum, unchanged
from mindrlhf.models.lora import Weights
from mindrlhf.utils.parallel import gather_objects


class Shard:
    """What a rank of the layout holds of every tensor. Ranks outside of the layout have none."""

    def __init__(self, layout: Layout, num_experts: int = 0):
        self.layout, self.num_experts = layout, num_experts
        self.tensor, self.sequence = Group.of(layout, "tensor"), Group.of(layout, "sequence")

    def holds(self, prefix: str) -> bool:
        """Whether this rank has a part of the expert whose tensors' names begin so."""
        return (
            self.layout.box(f"{prefix}w1.weight", (self.tensor.size, 1), self.tensor.index, self.num_experts)
            is not None
        )

    def cut(self, weights: Weights) -> Weights:
        """Whole tensors by name -> this rank's slices of them; None where it holds nothing."""

        def slices(name: str) -> np.ndarray | None:
            array = weights(name)
            box = self.layout.box(name, array.shape, self.tensor.index, self.num_experts)
            return None if box is None else array[box]

        return slices

    def whole(self, name: str, part: np.ndarray | None) -> np.ndarray:
        """The inverse of `cut` for one tensor; part: None where this rank holds nothing of it.

        All tensor ranks have to call it.
        """
        axis = split_axis(name)
        if self.tensor.size == 1 or (axis is None and expert_of(name) is None):
            return part
        pieces = [piece for piece in gather_objects(part, self.tensor.ranks) if piece is not None]
        return pieces[0] if axis is None or len(pieces) == 1 else np.concatenate(pieces, axis)

    def every_name(self, names: Sequence[str]) -> list[str]:
        """Those names and the other tensor ranks', in one order: of an expert not every rank has tensors."""
        every: dict[str, None] = {}
        for own in gather_objects(list(names), self.tensor.ranks):
            every |= dict.fromkeys(own)
        return list(every)

    def copy(self) -> nn.Cell:
        """Before a matrix whose outputs are split."""
        return Copy(self.tensor) if self.tensor.size > 1 else unchanged

    def sum(self) -> nn.Cell:
        """Behind a matrix whose inputs are split."""
        return Sum(self.tensor) if self.tensor.size > 1 else unchanged

    def gather_columns(self) -> nn.Cell:
        """Behind one whose outputs are needed whole."""
        return GatherColumns(self.tensor) if self.tensor.size > 1 else unchanged
