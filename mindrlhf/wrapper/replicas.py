"""One optimizer step shared by the ranks of a layout: gradients summed, optimizer states split, numbers added up.

Data ranks have micro-batches of their own and sequence ranks tokens of their own, so gradients are summed over both, in
buckets: few large messages. With ZeRO-1 each data rank then keeps some rows of every matrix, for which alone it has
Adam's moments, and the updated rows are brought together.
"""

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindrlhf.layout import sees_a_part, split_axis
from mindrlhf.models.collectives import Group
from mindrlhf.models.shard import Shard
from mindrlhf.utils.parallel import gather_objects, world
from mindrlhf.wrapper.graph import Graph

BUCKET_BYTES = 64 << 20  # of gradients in one message

Rows = slice | None  # of a parameter, of which this data rank has the optimizer's states; None: all


class _SumGradients(Graph):
    """Gradient buffers summed over a group; where a rank keeps some rows, those are taken and the buffer zeroed."""

    def __init__(self, buffers, kept, rows: Sequence[Rows], group: Group):
        super().__init__(auto_prefix=False)
        self.buffers, self.kept, self.rows = buffers, kept, tuple(rows)
        self.sizes = tuple(int(np.prod(buffer.shape)) for buffer in buffers)
        self.buckets = buckets(self.sizes)
        self.all_reduce = group.all_reduce()
        self.none = Tensor(0.0, ms.float32)

    def construct(self):
        done = self.none
        for bucket in self.buckets:
            flat = ops.concat([self.buffers[i].reshape(-1) for i in bucket])
            total = self.all_reduce(ops.depend(flat, done))  # one message after the other, in one order on all ranks
            start = 0
            for i in bucket:
                whole = total[start : start + self.sizes[i]].reshape(self.buffers[i].shape)
                start += self.sizes[i]
                rows = self.rows[i]
                if rows is None:
                    done = ops.depend(done, ops.assign(self.buffers[i], whole))
                else:
                    taken = ops.assign(self.kept[i], whole[rows])
                    done = ops.depend(done, (taken, ops.assign(self.buffers[i], whole * 0.0)))
            done = ops.depend(total[0], done)
        return done


class _GatherRows(Graph):
    """The rows that every data rank has updated, into the parameters."""

    def __init__(self, parameters, kept, rows: Sequence[slice], group: Group):
        super().__init__(auto_prefix=False)
        self.parameters, self.kept, self.rows = parameters, kept, tuple(rows)
        self.all_reduce = group.all_reduce()
        self.none = Tensor(0.0, ms.float32)

    def construct(self):
        done = self.none
        for i in range(len(self.parameters)):
            shape, rows = self.parameters[i].shape, self.rows[i]
            parts = (self.kept[i],)
            if rows.start:
                parts = (ops.zeros((rows.start, *shape[1:]), ms.float32), *parts)
            if rows.stop < shape[0]:
                parts = (*parts, ops.zeros((shape[0] - rows.stop, *shape[1:]), ms.float32))
            whole = self.all_reduce(ops.depend(ops.concat(parts), done))
            done = ops.depend(done, ops.assign(self.parameters[i], whole))
        return done


def buckets(sizes: Sequence[int], limit: int = BUCKET_BYTES // 4) -> tuple[tuple[int, ...], ...]:
    """Numbers of consecutive buffers that go together, at most `limit` elements where one alone is not larger."""
    found: list[list[int]] = []
    filled = limit
    for number, size in enumerate(sizes):
        if filled + size > limit:
            found.append([])
            filled = 0
        found[-1].append(number)
        filled += size
    return tuple(tuple(bucket) for bucket in found)


class Replicas:
    """What a train step does beyond one rank. parameters and gradients: this rank's, gradients of its micro-batches.

    updated, reduced: what the optimizer steps on, and by which gradients; the same two without ZeRO.
    """

    def __init__(self, shard: Shard, parameters: Sequence[Parameter], gradients: Sequence[Parameter]):
        self.shard, self.layout = shard, shard.layout
        place = self.layout.place(world().rank) if self.layout.size > 1 else None
        self.data = Group.of(self.layout, "data")
        self.every = Group.of(self.layout, "data", "sequence", "tensor")
        # Of every sum of numbers over all ranks, what the others repeat counts once.
        self.is_first = place is None or (place.sequence == 0 and place.tensor == 0)
        self.names = [parameter.name for parameter in parameters]
        self.rows = [self._rows(parameter) for parameter in parameters]
        self.updated, self.reduced = list(parameters), list(gradients)
        for i, rows in enumerate(self.rows):
            if rows is not None:
                for kept, kind in ((self.updated, "zero"), (self.reduced, "zero_gradient")):
                    empty = np.zeros((rows.stop - rows.start, *parameters[i].shape[1:]), np.float32)
                    kept[i] = Parameter(Tensor(empty), name=f"{kind}.{self.names[i]}")
        self.updated, self.reduced = ms.ParameterTuple(self.updated), ms.ParameterTuple(self.reduced)
        self._parameters = parameters
        self._sums = self._make_sums(gradients)
        split = [i for i, rows in enumerate(self.rows) if rows is not None]
        self._gather = None
        if split:
            mine = [ms.ParameterTuple([these[i] for i in split]) for these in (parameters, self.updated)]
            self._gather = _GatherRows(*mine, [self.rows[i] for i in split], self.data)

    def _rows(self, parameter: Parameter) -> Rows:
        """Matrices whose rows divide; the rest is small."""
        count = self.data.size
        if not self.layout.zero or count == 1 or len(parameter.shape) < 2 or parameter.shape[0] % count:
            return None
        share = parameter.shape[0] // count
        return slice(self.data.index * share, (self.data.index + 1) * share)

    def _make_sums(self, gradients: Sequence[Parameter]) -> list[_SumGradients]:
        """What every tensor rank has whole but sees a part of the activations with: over the tensor ranks too."""
        whole = [sees_a_part(name) for name in self.names]
        cells = []
        for axes, members in (
            (("data", "sequence"), [i for i, found in enumerate(whole) if not found]),
            (("data", "sequence", "tensor"), [i for i, found in enumerate(whole) if found]),
        ):
            group = Group.of(self.layout, *axes)
            if members and group.size > 1:
                mine = [ms.ParameterTuple([these[i] for i in members]) for these in (gradients, self.reduced)]
                cells.append(_SumGradients(*mine, [self.rows[i] for i in members], group))
        return cells

    def own(self, batches: Sequence) -> list[tuple[int, object]]:
        """This data rank's micro-batches with their numbers."""
        return list(enumerate(batches))[self.data.index :: self.data.size]

    def add(self, loss: float, metrics: dict[str, float]) -> tuple[float, dict[str, float]]:
        """Sums over the data ranks; maxima of what ends in _max."""
        total, sums = 0.0, {}
        for own_loss, own in gather_objects((loss, metrics), self.data.ranks):
            total += own_loss
            for name, value in own.items():
                known = sums.get(name, value if name.endswith("_max") else 0.0)
                sums[name] = max(known, value) if name.endswith("_max") else known + value
        return total, sums

    def sum_gradients(self) -> None:
        """Into `reduced`; and the rows to be updated into `updated`: somebody may have changed the parameters."""
        for cell in self._sums:
            cell().asnumpy()
        for rows, parameter, kept in zip(self.rows, self._parameters, self.updated, strict=True):
            if rows is not None:
                kept.set_data(Tensor(np.ascontiguousarray(parameter.asnumpy()[rows])))

    def gather_parameters(self) -> None:
        """From `updated`."""
        if self._gather:
            self._gather().asnumpy()

    def squared_norms(self, squared: np.ndarray) -> dict[str, float]:
        """Of this rank's `reduced` gradients, [parameters] -> of whole gradients by name, the same on every rank."""
        own = {}
        for name, rows, value in zip(self.names, self.rows, squared.tolist(), strict=True):
            is_part = split_axis(name) is not None and self._is_first_sequence
            if (self.is_first or is_part) and (rows is not None or self.data.index == 0):
                own[name] = value
        total: dict[str, float] = {}
        for values in gather_objects(own, self.every.ranks):
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + value
        return total

    @property
    def _is_first_sequence(self) -> bool:
        return self.shard.sequence.index == 0

    # -- the optimizer's tensors, for checkpoints ---------------------------------------------------------------------

    def whole(self, name: str, moments: dict[str, Parameter]) -> np.ndarray:
        """The moment of that parameter as one process would have it; every rank has to call it."""
        part = moments[name].asnumpy()
        if self.rows[self.names.index(name)] is not None:
            part = np.concatenate(gather_objects(part, self.data.ranks))
        return self.shard.whole(name, part)

    def part(self, name: str, whole: np.ndarray) -> np.ndarray:
        """The inverse: what this rank keeps of it."""
        part = self.shard.cut(lambda _: whole)(name)
        rows = self.rows[self.names.index(name)]
        return part if rows is None else part[rows]
