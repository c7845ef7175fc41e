"""Sequences of many lengths packed into micro-batches of one shape, and the one place where labels are shifted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindrlhf.types import PackedRows


def pack(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: the longest sequence first, each into the first row that has room.

    Returns the sequence numbers of every row. Ties go to the lower number, so the same lengths pack the same way.
    Never more than 11/9 of the fewest possible rows + 6/9 (Dosa 2007). Raises ValueError for a sequence that no
    row holds.
    """
    for number, length in enumerate(lengths):
        if not 1 <= length <= row_tokens:
            raise ValueError(f"sequence {number} has {length} tokens; a row holds 1 to {row_tokens}")
    free = np.full(len(lengths), row_tokens)  # at worst a row each; rows open in order, as the first that fits
    rows: list[list[int]] = [[] for _ in lengths]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        row = int(np.argmax(free >= lengths[number]))
        rows[row].append(number)
        free[row] -= lengths[number]
    return [row for row in rows if row]


def bucket(n: int) -> int:
    """The least of 64, 96, 128, 192, 256, ... (powers of two and 1.5 times them) that is n or more.

    A compiled graph has one shape; rounding up keeps the number of graphs logarithmic for at most half more work.
    """
    size = 64
    while size < n:
        if size + size // 2 >= n:
            return size + size // 2
        size *= 2
    return size


def row_width(longest: int) -> int:
    """Of rows for sequences of at most `longest` tokens: in eights and 64 at least, since each width is a graph."""
    return max(64, -(-longest // 8) * 8)


@dataclass(frozen=True, eq=False)
class Packing:
    """Micro-batches of one shape, and where in them the targets of each sequence went."""

    batches: list[PackedRows]
    slots: list[tuple[int, slice]]  # of each sequence: its micro-batch, and its targets' place among the N

    @classmethod
    def of(
        cls,
        sequences: list[np.ndarray],
        targets: list[np.ndarray],
        rows: int,
        row_tokens: int,
        together: int = 1,
        shift: int = 1,
    ) -> "Packing":
        """Pack sequences ([n_i] int32) into micro-batches of `rows` x `row_tokens`.

        `targets[i][j]` ([n_i] bool) is True where token j of sequence i is predicted, at token j-1; so targets[i][0]
        is False. With shift 0 the model is read at token j itself. Every `together` consecutive sequences share a row,
        and so a micro-batch: the two answers of a pair. All micro-batches have the same N, the bucket of the largest
        one's targets. Rows are spread so that target counts are near equal; rows that stay empty are padding. Padding
        is token 0, position 0, segment 0. Sequence numbers run from 0 in each micro-batch, over the sequences that
        have targets; padding among the N targets is index 0, label 0, mask 0 and sequence N-1, a number no real
        sequence has.

        Raises ValueError for a sequence of more than `row_tokens` tokens.
        """
        for sequence, target in zip(sequences, targets, strict=True):
            assert len(sequence) == len(target), (len(sequence), len(target))
            assert not (shift and target[:1].any()), "the first token of a sequence has nothing before it"
        counts = [int(np.count_nonzero(target)) for target in targets]
        starts = range(0, len(sequences), together)
        packed = pack([sum(map(len, sequences[start : start + together])) for start in starts], row_tokens)
        members = [[unit * together + i for unit in row for i in range(together)] for row in packed]
        dealt = _deal(members, counts, rows)
        size = bucket(max((_least_size(batch, counts) for batch in dealt), default=0))
        slots: list[tuple[int, slice]] = [(0, slice(0))] * len(sequences)
        batches = []
        for number, batch in enumerate(dealt):
            filled, places = _fill(batch, sequences, targets, (rows, row_tokens), size, shift)
            batches.append(filled)
            for sequence_number, place in places.items():
                slots[sequence_number] = number, place
        return cls(batches, slots)

    def spread(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Numbers for each sequence's targets ([R_i] float32, in order) as [N] float32 a micro-batch, 0 on padding."""
        spread = [np.zeros(len(batch.labels), np.float32) for batch in self.batches]
        for (number, place), value in zip(self.slots, values, strict=True):
            assert value.shape == (place.stop - place.start,), (value.shape, place)
            spread[number][place] = value
        return spread

    def collect(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """The inverse of `spread`: [N] a micro-batch as [R_i] a sequence, in the order the sequences were given."""
        assert len(values) == len(self.batches), (len(values), len(self.batches))
        return [values[number][place].copy() for number, place in self.slots]

    def by_sequence(self, values: Sequence[float]) -> list[np.ndarray]:
        """One number a sequence as [N] float32 a micro-batch, at the sequence's number there, 0 elsewhere."""
        arrays = [np.zeros(len(batch.labels), np.float32) for batch in self.batches]
        for (number, place), value in zip(self.slots, values, strict=True):
            assert place.stop > place.start, "a sequence without targets has no number"
            arrays[number][self.batches[number].sequence[place.start]] = value
        return arrays


def _deal(packed: list[list[int]], counts: list[int], rows: int) -> list[list[list[int]]]:
    """Rows of sequence numbers into the fewest micro-batches of at most `rows`, with near equal target counts.

    The row with the most targets first, each to the micro-batch that has the fewest so far (longest processing time).
    """
    weights = [sum(counts[number] for number in row) for row in packed]
    batches: list[list[list[int]]] = [[] for _ in range(-(-len(packed) // rows))]
    loads = [0] * len(batches)
    for row in sorted(range(len(packed)), key=lambda row: -weights[row]):
        open_batches = [number for number, batch in enumerate(batches) if len(batch) < rows]
        lightest = min(open_batches, key=lambda number: loads[number])
        batches[lightest].append(packed[row])
        loads[lightest] += weights[row]
    return batches


def _least_size(batch: list[list[int]], counts: list[int]) -> int:
    """N must hold every target, and one sequence number more than there are sequences with targets, for padding."""
    targets = [counts[number] for row in batch for number in row if counts[number]]
    return max(sum(targets), len(targets) + 1)


def _fill(
    batch: list[list[int]],
    sequences: list[np.ndarray],
    targets: list[np.ndarray],
    shape: tuple[int, int],
    size: int,
    shift: int,
) -> tuple[PackedRows, dict[int, slice]]:
    """One micro-batch of `shape` rows x tokens with N = size, and the slots of its sequences by their number."""
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    index, labels = (np.zeros(size, np.int32) for _ in range(2))
    sequence = np.full(size, size - 1, np.int32)
    mask = np.zeros(size, np.float32)
    places: dict[int, slice] = {}
    filled = real = 0  # targets, and sequences with targets, so far
    for row, members in enumerate(batch):
        start = 0
        for segment, number in enumerate(members, 1):
            ids = sequences[number]
            span = slice(start, start + len(ids))
            tokens[row, span] = ids
            positions[row, span] = np.arange(len(ids))
            segments[row, span] = segment
            predicted = np.flatnonzero(targets[number])
            place = slice(filled, filled + len(predicted))
            index[place] = row * shape[1] + start + predicted - shift
            labels[place] = ids[predicted]
            sequence[place] = real
            mask[place] = 1.0
            places[number] = place
            start, filled = span.stop, place.stop
            real += len(predicted) > 0
    assert real < size, (real, size)
    return PackedRows(tokens, positions, segments, index, labels, sequence, mask), places
