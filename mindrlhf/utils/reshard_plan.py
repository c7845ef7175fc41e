"""Who sends what to whom when weights change their layout: pure Python, the same on every rank, no communication.

For each tensor the slices that the source layout's ranks hold are cut against those that the target's ranks need. What
a rank has already is copied; the rest comes from one of the ranks that have it. The same idea as MindSpore's own
planner of redistribution, but for layouts of different sizes, experts and ranks that hold nothing.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mindrlhf.errors import UserError
from mindrlhf.layout import Box, Layout, is_stacked, split_axis

# Of a step, sent and received; on a CPU messages of 4 MB are the fastest, see docs/resharding.md.
BUCKET_BYTES = 8 << 20

Spans = tuple[tuple[int, int], ...]  # a box that can be a key: start and stop of each axis
Part = tuple[str, Spans]  # of the whole tensor of that name
Message = list[Part]


class Route(NamedTuple):
    """One piece of a tensor on its way; source and target are the same rank where it is a copy."""

    source: int
    target: int
    spans: Spans  # of the whole tensor


class Pattern(NamedTuple):
    """Tensors that are alike in shape and split, so that their pieces take the same routes."""

    names: list[str]
    routes: list[Route]


@dataclass(frozen=True)
class Plan:
    """From `source` to `target`; bytes are of elements of item_bytes each.

    sent, received and copied are bytes by rank, for the ranks of both layouts. bucket_bytes is what a rank sends and
    receives in one step; that much it holds beyond its slices of the two layouts.
    """

    shapes: Mapping[str, tuple[int, ...]]
    source: Layout
    target: Layout
    bucket_bytes: int
    item_bytes: int
    patterns: list[Pattern]
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Ranks that have a part in it."""
        return max(self.source.size, self.target.size)

    @property
    def moved(self) -> int:
        """Bytes that go from one rank to another, in total."""
        return sum(self.sent)

    def held(self, layout: Layout, rank: int, name: str) -> Spans | None:
        """What the rank holds of the tensor in that layout; None: nothing."""
        place = layout.place(rank)
        return None if place is None else held_spans(layout, name, self.shapes[name], place.tensor)

    def parts(self, source: int, target: int) -> Iterator[Part]:
        """What goes from the one rank to the other, in an order that both agree on; the same rank: its copies."""
        for names, routes in self.patterns:
            spans = [route.spans for route in routes if (route.source, route.target) == (source, target)]
            yield from ((name, piece) for name in names for piece in spans) if spans else ()

    def messages(self, source: int, target: int) -> list[Message]:
        """The same in messages of at most half a bucket, all but the last at least 7/8 of that."""
        limit = max(1, self.bucket_bytes // 2 // self.item_bytes)
        messages, room = [], 0
        for name, spans in self.parts(source, target):
            for piece in _cut(spans, max(1, limit // 8)):
                if volume(piece) > room:
                    messages.append([])
                    room = limit
                messages[-1].append((name, piece))
                room -= volume(piece)
        return messages

    def partners(self, rank: int) -> list[int]:
        """Whom the rank exchanges with, in order.

        The order is a round-robin tournament's (the circle method): in every turn each rank has one partner at most,
        and as all keep to the turns nobody waits in a circle.
        """
        found = {
            route.target if route.source == rank else route.source
            for pattern in self.patterns
            for route in pattern.routes
            if rank in (route.source, route.target) and route.source != route.target
        }
        return sorted(found, key=lambda partner: _turn(rank, partner, self.size))


def plan(
    shapes: Mapping[str, tuple[int, ...]],
    source: Layout,
    target: Layout,
    bucket_bytes: int = BUCKET_BYTES,
    item_bytes: int = 4,
) -> Plan:
    """shapes: the decoder's name -> shape of the whole tensor. Raises UserError where a tensor cannot be split so."""
    alike: dict[tuple, list[str]] = {}
    for name, shape in shapes.items():
        alike.setdefault((tuple(shape), split_axis(name), is_stacked(name)), []).append(name)
    made = Plan(shapes, source, target, bucket_bytes, item_bytes, [])
    for totals in (made.sent, made.received, made.copied):
        totals.extend([0] * made.size)
    for names in alike.values():
        holders = _holders(source, names[0], shapes[names[0]])
        needing = _holders(target, names[0], shapes[names[0]])
        routes = []
        for ours, having in holders.items():
            for theirs, ranks in needing.items():
                piece = meet(ours, theirs)
                if piece:
                    routes += _routes(piece, having, ranks, made, len(names))
        made.patterns.append(Pattern(names, routes))
    return made


def _holders(layout: Layout, name: str, shape: tuple[int, ...]) -> dict[Spans, list[int]]:
    """The slices of a tensor that there are in a layout -> the ranks that hold them, rising."""
    spans = [held_spans(layout, name, shape, number) for number in range(layout.tensor)]
    holders: dict[Spans, list[int]] = {}
    for rank in range(layout.size):
        holders.setdefault(spans[layout.place(rank).tensor], []).append(rank)
    if sum(map(volume, holders)) != math.prod(shape):
        raise UserError(f"{layout.describe()}: does not divide {name} of shape {list(shape)}; choose another layout")
    return holders


def _routes(spans: Spans, having: list[int], needing: list[int], plan: Plan, count: int) -> list[Route]:
    """One piece to every rank that needs it, for `count` tensors alike; adds its bytes to the plan's.

    Every holder serves equally many, its neighbours first, which is where hosts and copies of a model are; among those
    that are equally near the one that has least to do.
    """
    size = volume(spans) * plan.item_bytes * count
    receivers = [rank for rank in needing if rank not in having]
    copies = [rank for rank in needing if rank in having]
    for rank in copies:
        plan.copied[rank] += size
    for rank in receivers:
        plan.received[rank] += size
    routes = [Route(rank, rank, spans) for rank in copies]
    served = dict.fromkeys(having, 0)
    for rank in receivers:
        free = [holder for holder in having if served[holder] < math.ceil(len(receivers) / len(having))]
        sender = min(free, key=lambda holder: (abs(holder - rank), plan.sent[holder] + plan.received[holder]))
        served[sender] += 1
        plan.sent[sender] += size
        routes.append(Route(sender, rank, spans))
    return routes


def _turn(one: int, other: int, size: int) -> int:
    """The turn of a round-robin tournament of `size` ranks in which these two meet."""
    turns = size - 1 if size % 2 == 0 else size
    if turns in (one, other):  # an even number of ranks: the last one stands still while the others rotate
        return 2 * min(one, other) % turns
    return (one + other) % turns


# -- boxes ------------------------------------------------------------------------------------------------------------


def held_spans(layout: Layout, name: str, shape: tuple[int, ...], tensor: int) -> Spans:
    """Layout.box as spans."""
    return tuple((part.start, part.stop) for part in layout.box(name, shape, tensor))


def meet(one: Spans, other: Spans) -> Spans | None:
    """What both have; None: nothing."""
    spans = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return spans if all(start < stop for start, stop in spans) else None


def volume(spans: Spans) -> int:
    return math.prod(stop - start for start, stop in spans)


def within(spans: Spans, outer: Spans) -> Box:
    """Where `spans` are in an array that is `outer` of the same tensor."""
    return tuple(slice(a - origin, b - origin) for (a, b), (origin, _) in zip(spans, outer, strict=True))


def _cut(spans: Spans, limit: int) -> Iterator[Spans]:
    """Into pieces of at most so many elements, each as contiguous as can be."""
    if volume(spans) <= limit:
        yield spans
        return
    axis = next(i for i, (start, stop) in enumerate(spans) if stop - start > 1)
    start, stop = spans[axis]
    step = max(1, limit * (stop - start) // volume(spans))
    for first in range(start, stop, step):
        yield from _cut((*spans[:axis], (first, min(first + step, stop)), *spans[axis + 1 :]), limit)
