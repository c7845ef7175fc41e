"""Weights from one layout to another, rank to rank, without a file: the plan of reshard_plan.py, carried out.

Arrays are NumPy views of what the decoders hold; they meet tensors in `_exchange` alone. On a CPU sending and receiving
is as fast as the collectives or faster, and it suits every pair of layouts (docs/resharding.md has the figures).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest

import numpy as np

from mindrlhf.layout import Box, Layout
from mindrlhf.utils import parallel
from mindrlhf.utils.reshard_plan import BUCKET_BYTES, Message, Plan, Spans, plan, volume, within

Read = Callable[[str], np.ndarray]  # name -> this rank's slice in Hugging Face's orientation, of any strides
Write = Callable[[str, Box, np.ndarray], None]  # name, box in this rank's slice, what to put there
WORD = np.dtype(np.int32)  # what goes over the wire: bits, so that NaN and -0.0 arrive as they are
P2P_GROUP = "hccl_world_group"  # MindSpore's send looks it up, whatever group it is told; a CPU has none by itself


class ReshardError(RuntimeError):
    """What arrived is not what was there; the message names the tensors and the ranks."""


class Resharder:
    """From `source` to `target`, as often as needed; the plan is made once. Every rank of the world has one.

    dtype: of all arrays, 4, 2 or 1 bytes an element. Raises UserError where a tensor cannot be split like that.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        source: Layout,
        target: Layout,
        bucket_bytes: int = BUCKET_BYTES,
        dtype: np.dtype | type = np.float32,
    ):
        self.dtype = np.dtype(dtype)
        self.plan = plan(shapes, source, target, bucket_bytes, self.dtype.itemsize)
        rank = self.rank = parallel.world().rank
        self._copies = list(self.plan.parts(rank, rank))
        self._exchanges = [
            (partner, self.plan.messages(rank, partner), self.plan.messages(partner, rank))
            for partner in self.plan.partners(rank)
        ]
        if self.plan.moved:
            _prepare_sending()
            words = max(1, bucket_bytes // 2 // WORD.itemsize)
            self._buffers = np.zeros(words, WORD), np.zeros(words, WORD)  # what leaves, what arrives

    def run(self, read: Read, write: Write, check: Read | None = None) -> None:
        """All ranks of the world together, ranks that hold nothing too.

        read: asked for slices of the source only. write: called once for every piece of this rank's target; what it is
        given is its own until it returns. check: like `read` but of the target; then the sums of both are compared
        over all ranks. Raises ReshardError where they differ, on every rank.
        """
        read = _latest(read)
        before = sums(self.plan, self.plan.source, self.rank, read) if check else None
        for name, spans in self._copies:
            write(name, self._box(self.plan.target, name, spans), self._slice(read, name, spans))
        for partner, leaving, coming in self._exchanges:
            for ours, theirs in zip_longest(leaving, coming, fillvalue=[]):
                first = self.rank < partner if ours and theirs else bool(ours)
                _exchange(partner, self._pack(ours, read), self._space(1, theirs), first)
                self._unpack(theirs, write)
        if check:
            found = parallel.gather_objects((before, sums(self.plan, self.plan.target, self.rank, check)))
            wrong = differences(self.plan, [source for source, _ in found], [target for _, target in found])
            if wrong:
                raise ReshardError("; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""))

    def _box(self, layout: Layout, name: str, spans: Spans) -> Box:
        return within(spans, self.plan.held(layout, self.rank, name))

    def _slice(self, read: Read, name: str, spans: Spans) -> np.ndarray:
        array = read(name)
        assert array.dtype == self.dtype, f"{name} is {array.dtype}, and the plan is for {self.dtype}"
        return array[self._box(self.plan.source, name, spans)]

    def _space(self, buffer: int, message: Message) -> np.ndarray:
        """Words of a buffer for a message, one at least: an empty message says that its sender is so far."""
        size = sum(volume(spans) for _, spans in message) * self.dtype.itemsize
        return self._buffers[buffer][: max(1, -(-size // WORD.itemsize))]

    def _pack(self, message: Message, read: Read) -> np.ndarray:
        for part, (name, spans) in zip(self._parts(0, message), message, strict=True):
            part[...] = self._slice(read, name, spans)
        return self._space(0, message)

    def _unpack(self, message: Message, write: Write) -> None:
        for part, (name, spans) in zip(self._parts(1, message), message, strict=True):
            write(name, self._box(self.plan.target, name, spans), part)

    def _parts(self, buffer: int, message: Message) -> list[np.ndarray]:
        """Views of a buffer, one for each part of the message."""
        values, start, parts = self._buffers[buffer].view(self.dtype), 0, []
        for _, spans in message:
            size = volume(spans)
            parts.append(values[start : start + size].reshape([b - a for a, b in spans]))
            start += size
        return parts


def _latest(read: Read) -> Read:
    """Asks once for the pieces of one tensor, which follow each other: what is read may have to be computed."""
    return lru_cache(maxsize=1)(read)


def _prepare_sending() -> None:
    """Every rank calls it, those without a message too: all of them are in the group."""
    import mindspore
    from mindspore.communication import create_group

    if mindspore.get_context("device_target") == "CPU":
        create_group(P2P_GROUP, list(range(parallel.world().size)))


def _exchange(partner: int, leaving: np.ndarray, arriving: np.ndarray, first: bool) -> None:
    """Send some words and fill others with what comes; first: send before receiving, and the partner the other way.

    Both always send: MindSpore's send returns before the other side has asked for it, so
    without an answer a fast rank would fill its partner's memory with messages.
    """
    from mindspore import Tensor
    from mindspore.mint import distributed

    leaving, tensor = Tensor.from_numpy(leaving), Tensor.from_numpy(arriving)  # both share the arrays' memory
    if first:
        distributed.send(leaving, partner)
    distributed.recv(tensor, partner)
    tensor.asnumpy()  # waits for it
    if not first:
        distributed.send(leaving, partner)


# -- the check --------------------------------------------------------------------------------------------------------


def checksum(array: np.ndarray, spans: Spans, shape: Sequence[int]) -> int:
    """Of the slice `spans` of a tensor of that shape; the sums of disjoint slices add up, modulo 2^64, to the whole's.

    Every element's bits times one odd random number for each of its coordinates (multilinear hashing, Carter and
    Wegman 1979): one wrong element is always found, and several go unnoticed by a chance of about 2^-32 or less.
    """
    bits = array.view(np.dtype(f"u{array.dtype.itemsize}"))
    for axis in reversed(range(len(shape))):
        start, stop = spans[axis]
        bits = np.einsum("...i,i->...", bits, _factors(axis, shape[axis])[start:stop])
    return int(bits)


@lru_cache(maxsize=64)
def _factors(axis: int, length: int) -> np.ndarray:
    return np.random.default_rng(axis).integers(0, 2**64, length, np.uint64) | np.uint64(1)


def sums(plan: Plan, layout: Layout, rank: int, read: Read) -> np.ndarray:
    """[tensors] uint64: checksums of what the rank holds in that layout, 0 where it holds nothing."""
    found = np.zeros(len(plan.shapes), np.uint64)
    for number, (name, shape) in enumerate(plan.shapes.items()):
        spans = plan.held(layout, rank, name)
        if spans is not None:
            found[number] = checksum(read(name), spans, shape)
    return found


def differences(plan: Plan, source: list[np.ndarray], target: list[np.ndarray]) -> list[str]:
    """source, target: every rank's `sums`. One line for each tensor that is not the same in all copies of it."""
    wrong = []
    for number, name in enumerate(plan.shapes):
        before = _copies(plan, plan.source, name, [int(rank[number]) for rank in source])
        after = _copies(plan, plan.target, name, [int(rank[number]) for rank in target])
        expected = before[0][1]
        differ = [ranks for ranks, total in before if total != expected]
        if differ:
            wrong.append(f"{name}: ranks {before[0][0]} and {differ[0]} had different values before resharding")
        for ranks, total in after:
            if total != expected and not differ:
                wrong.append(f"{name}: ranks {ranks} hold other values after resharding than ranks {before[0][0]} had")
    return wrong


def _copies(plan: Plan, layout: Layout, name: str, values: list[int]) -> list[tuple[list[int], int]]:
    """Every complete copy of a tensor that a layout has: the ranks that hold it, and the checksum of the whole.

    Where ranks of one copy hold the same slice, each of them makes a copy of its own with the other slices.
    """
    copies = []
    for first in range(0, layout.size, layout.tensor):
        slices: dict[Spans, list[int]] = {}
        for rank in layout.group(first, "tensor"):
            spans = plan.held(layout, rank, name)
            if spans is not None:
                slices.setdefault(spans, []).append(rank)
        for twin in range(max(map(len, slices.values()))):
            ranks = [holders[min(twin, len(holders) - 1)] for holders in slices.values()]
            copies.append((ranks, sum(values[rank] for rank in ranks) % 2**64))
    return copies
