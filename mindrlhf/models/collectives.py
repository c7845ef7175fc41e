"""What the processes of a layout exchange inside a decoder's graph, as cells with gradients.

Only sums are exchanged, since a CPU has no other collective for a part of the processes inside a graph: a gather is a
sum of arrays that are zero but in one rank's place. In every graph each collective needs the result of the one before,
so that all ranks come to them in one order.

Tensor ranks compute the same loss from the same activations, so a gradient is whole wherever an activation is whole
(Megatron-LM's f and g). Sequence ranks hold different tokens of one loss: there each takes 1 / S of the loss
(`TrainStep`), and gradients of collectives are their transposes.
"""

from typing import NamedTuple

from mindspore import nn, ops

from mindrlhf.layout import Layout
from mindrlhf.utils.parallel import group_name, world


class Group(NamedTuple):
    """The ranks along an axis of a layout, this one among them."""

    ranks: tuple[int, ...]
    index: int  # this rank's place among them

    @classmethod
    def of(cls, layout: Layout, *axes: str) -> "Group":
        rank = world().rank
        if layout.size == 1:  # a model of its own, whatever rank this is
            return cls((rank,), 0)
        ranks = layout.group(rank, *axes)
        return cls(ranks, ranks.index(rank))

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self) -> ops.AllReduce:
        return ops.AllReduce(group=group_name(self.ranks))


class Collective(nn.Cell):
    """A cell that exchanges something within a group."""

    def __init__(self, group: Group):
        super().__init__(auto_prefix=False)
        self.all_reduce = group.all_reduce()
        self.size, self.index = group.size, group.index

    def gathered(self, x):
        """[...] -> [size, ...], every rank's."""
        before, after = self.index, self.size - 1 - self.index
        parts = (x.expand_dims(0),)
        if before:
            parts = (ops.zeros((before, *x.shape), x.dtype), *parts)
        if after:
            parts = (*parts, ops.zeros((after, *x.shape), x.dtype))
        return self.all_reduce(ops.concat(parts))


class Copy(Collective):
    """x; its gradient summed. Before a matrix whose outputs are split."""

    def construct(self, x):
        return x

    def bprop(self, x, out, dout):
        return (self.all_reduce(dout),)


class Sum(Collective):
    """The sum of x; the gradient is that of the sum. Behind a matrix whose inputs are split."""

    def construct(self, x):
        return self.all_reduce(x)

    def bprop(self, x, out, dout):
        return (dout,)


class GatherColumns(Collective):
    """[N, V / T] -> [N, V]; the gradient is this rank's columns of it."""

    def construct(self, x):
        return self.gathered(x).transpose(1, 0, 2).reshape(x.shape[0], -1)

    def bprop(self, x, out, dout):
        return (dout.reshape(x.shape[0], self.size, x.shape[1])[:, self.index],)


class GatherTokens(Collective):
    """[B, T / S, ...] of packed rows -> [B, T, ...]."""

    def construct(self, x):
        parts = self.gathered(x)  # [S, B, T / S, ...]
        axes = (1, 0, *range(2, parts.ndim))
        return parts.transpose(axes).reshape(x.shape[0], -1, *x.shape[2:])

    def bprop(self, x, out, dout):
        parts = self.all_reduce(dout).reshape(x.shape[0], self.size, *x.shape[1:])
        return (parts[:, self.index],)


class SumOfParts(Collective):
    """The sum of x over sequence ranks; and the sum of their gradients."""

    def construct(self, x):
        return self.all_reduce(x)

    def bprop(self, x, out, dout):
        return (self.all_reduce(dout),)


def unchanged(x):
    """What stands for Copy, Sum and GatherColumns where there is one rank."""
    return x
