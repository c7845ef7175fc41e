"""This rank's part of a decoder under a layout: slices of tensors on the host, and the collectives of its cells."""

import numpy as np
from mindspore import nn

from mindrlhf.layout import Layout, is_stacked, split_axis
from mindrlhf.models.collectives import Copy, GatherColumns, Group, Sum, unchanged
from mindrlhf.models.shapes import Weights
from mindrlhf.utils.parallel import gather_objects


class Shard:
    """What a rank of the layout holds of every tensor. Ranks outside of the layout have none."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.tensor, self.sequence = Group.of(layout, "tensor"), Group.of(layout, "sequence")

    def first_expert(self, num_experts: int) -> int:
        """Number of the first expert that this rank holds, wholly or a slice of it."""
        owner = self.tensor.index // (self.tensor.size // self.layout.expert)
        return owner * (num_experts // self.layout.expert)

    def cut(self, weights: Weights) -> Weights:
        """Whole tensors by name -> this rank's slices of them."""

        def slices(name: str) -> np.ndarray:
            array = weights(name)
            return array[self.layout.box(name, array.shape, self.tensor.index)]

        return slices

    def whole(self, name: str, part: np.ndarray) -> np.ndarray:
        """The inverse of `cut` for one tensor. All tensor ranks have to call it."""
        axis = split_axis(name)
        if self.tensor.size == 1 or axis is None:
            return part
        pieces = gather_objects(part, self.tensor.ranks)
        if not is_stacked(name):
            return np.concatenate(pieces, axis)
        parts = self.tensor.size // self.layout.expert  # ranks that split the same experts
        owners = range(0, len(pieces), parts)
        return np.concatenate([np.concatenate(pieces[owner : owner + parts], axis) for owner in owners])

    def whole_expert(self, name: str, number: int, part: np.ndarray) -> np.ndarray:
        """One expert's matrix of a stacked tensor, of which `part` is this rank's; all tensor ranks have to call it."""
        if self.tensor.size == 1:
            return part[number]
        own, parts = number % part.shape[0], self.tensor.size // self.layout.expert
        pieces = gather_objects(part[own], self.tensor.ranks)
        owner = number // part.shape[0] * parts
        return np.concatenate(pieces[owner : owner + parts], split_axis(name) - 1)

    def copy(self) -> nn.Cell:
        """Before a matrix whose outputs are split."""
        return Copy(self.tensor) if self.tensor.size > 1 else unchanged

    def sum(self) -> nn.Cell:
        """Behind a matrix whose inputs are split."""
        return Sum(self.tensor) if self.tensor.size > 1 else unchanged

    def gather_columns(self) -> nn.Cell:
        """Behind one whose outputs are needed whole."""
        return GatherColumns(self.tensor) if self.tensor.size > 1 else unchanged
