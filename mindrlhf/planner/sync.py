"""What a weight sync moves: from the slices of the training layout to those of the generation layout."""

import math
from collections import Counter
from functools import cache
from typing import NamedTuple

from mindrlhf.layout import Layout
from mindrlhf.planner.architecture import Architecture


class Sync(NamedTuple):
    """Bytes that come from other ranks."""

    total: float
    most: float  # of the rank that gets most


def weight_sync(model: Architecture, training: Layout, generation: Layout, width: int) -> Sync:
    """width: bytes of a number. What a rank has of its new slices already is not moved; where several ranks have the
    rest, it does not matter which one sends it. Tensors that every rank holds whole are not moved."""
    return _weight_sync(*_numbers(model), training, generation, width)


@cache
def _numbers(model: Architecture) -> tuple[int, int]:
    """Of the split tensors, and of the routed experts'."""
    routed = sum(weight.numbers for weight in model.weights if weight.is_routed)
    split = sum(weight.numbers for weight in model.weights if weight.is_split) - routed
    return split, routed


@cache
def _weight_sync(split: int, routed: int, training: Layout, generation: Layout, width: int) -> Sync:
    # Tensor is the fastest axis of both layouts, so the pairs of places repeat.
    both, period = min(training.size, generation.size), math.lcm(training.tensor, generation.tensor)
    pairs: Counter[tuple[int | None, int]] = Counter()
    for rank in range(min(period, both)):
        pairs[rank % training.tensor, rank % generation.tensor] = len(range(rank, both, period))
    for rank in range(both, generation.size):  # they had no part in training
        pairs[None, rank % generation.tensor] += 1
    received = {}
    for before, after in pairs:
        share = _overlap(_slice(before, training.tensor), _slice(after, generation.tensor))
        missing = split * (1 / generation.tensor - share)
        if routed:
            shared = 0.0 if before is None else _routed_overlap(before, training, after, generation)
            missing += routed * (1 / generation.tensor - shared)
        received[before, after] = width * max(missing, 0.0)
    return Sync(sum(received[pair] * count for pair, count in pairs.items()), max(received.values(), default=0.0))


def _slice(number: int | None, parts: int) -> tuple[float, float]:
    return (0.0, 0.0) if number is None else (number / parts, (number + 1) / parts)


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    return max(min(one[1], other[1]) - max(one[0], other[0]), 0.0)


def _routed_overlap(before: int, training: Layout, after: int, generation: Layout) -> float:
    """Share of the experts' weights: the experts that both places have, times the slices of them."""
    share = 1.0
    places = [divmod(before, training.tensor // training.expert), divmod(after, generation.tensor // generation.expert)]
    share *= _overlap(_slice(places[0][0], training.expert), _slice(places[1][0], generation.expert))
    inner = training.tensor // training.expert, generation.tensor // generation.expert
    return share * _overlap(_slice(places[0][1], inner[0]), _slice(places[1][1], inner[1]))
