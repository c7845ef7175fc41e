import numpy as np
import pytest

from mindrlhf.data.packing import Packing, bucket, pack


def make(shapes, seed=0):
    """Sequences of (prompt, response) tokens with random ids of 1 and more, and their response targets."""
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(1, 1000, prompt + response).astype(np.int32) for prompt, response in shapes]
    targets = [np.arange(prompt + response) >= prompt for prompt, response in shapes]
    return sequences, targets


def random_shapes(count, seed=0):
    generator = np.random.default_rng(seed)
    return [(int(generator.integers(1, 12)), int(generator.integers(1, 20))) for _ in range(count)]


def test_pack_is_first_fit_decreasing_with_ties_by_number():
    assert pack([3, 5, 5, 2, 7, 3], 10) == [[4, 0], [1, 2], [5, 3]]
    assert pack([10, 10], 10) == [[0], [1]]
    assert pack([], 10) == []


def test_pack_refuses_what_no_row_holds():
    with pytest.raises(ValueError, match="sequence 1 has 11 tokens; a row holds 1 to 10"):
        pack([3, 11], 10)
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        pack([0], 10)


def test_bucket():
    given = [0, 64, 65, 96, 97, 128, 129, 192, 193, 257, 385, 1025]
    assert [bucket(n) for n in given] == [64, 64, 96, 96, 128, 128, 192, 192, 256, 384, 512, 1536]


def test_one_micro_batch_by_hand():
    sequences = [np.array(ids, np.int32) for ids in ([11, 12, 13], [21, 22, 23, 24, 25], [31, 32])]
    targets = [np.array(flags, bool) for flags in ([0, 0, 1], [0, 1, 0, 1, 1], [0, 1])]
    packing = Packing.of(sequences, targets, rows=3, row_tokens=8)
    (batch,) = packing.batches
    # Lengths 5 and 3 fill one row, with 4 targets; 2 opens the next, with 1; the third stays empty.
    assert batch.tokens.tolist() == [[21, 22, 23, 24, 25, 11, 12, 13], [31, 32] + [0] * 6, [0] * 8]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1] + [0] * 6, [0] * 8]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1] + [0] * 6, [0] * 8]
    assert batch.index.tolist() == [0, 2, 3, 6, 8] + [0] * 59
    assert batch.labels.tolist() == [22, 24, 25, 13, 32] + [0] * 59
    assert batch.sequence.tolist() == [0, 0, 0, 1, 2] + [63] * 59
    assert batch.mask.tolist() == [1.0] * 5 + [0.0] * 59
    assert all(array.dtype == np.int32 for array in batch[:-1])
    assert batch.mask.dtype == np.float32
    values = [np.array(value, np.float32) for value in ([0.5], [1, 2, 3], [4])]
    (spread,) = packing.spread(values)
    assert spread.tolist() == [1, 2, 3, 0.5, 4] + [0] * 59
    assert [value.tolist() for value in packing.collect([spread])] == [[0.5], [1, 2, 3], [4]]


def test_every_label_is_the_token_after_its_index_and_every_sequence_is_there_once():
    sequences, targets = make(random_shapes(60))
    packing = Packing.of(sequences, targets, rows=4, row_tokens=32)
    assert len(packing.batches) > 2
    found = []
    for batch in packing.batches:
        flat, segments = batch.tokens.ravel(), batch.segments.ravel()
        real = batch.mask == 1
        assert (flat[batch.index[real] + 1] == batch.labels[real]).all()
        assert (segments[batch.index[real] + 1] == segments[batch.index[real]]).all()
        assert (segments[batch.index[real]] > 0).all()
        for row, segment in zip(batch.tokens, batch.segments, strict=True):
            found += [row[segment == number].tolist() for number in range(1, segment.max() + 1)]
    assert sorted(found) == sorted(sequence.tolist() for sequence in sequences)


def test_segment_sums_by_sequence_number_are_the_sums_of_each_sequence():
    sequences, targets = make(random_shapes(60))
    packing = Packing.of(sequences, targets, rows=4, row_tokens=32)
    for number, batch in enumerate(packing.batches):
        sums = np.bincount(batch.sequence, weights=batch.labels * batch.mask, minlength=len(batch.labels))
        assert len(sums) == len(batch.labels)
        members = [i for i, (owner, _) in enumerate(packing.slots) if owner == number]
        expected = {packing.slots[i][1].start: sequences[i][targets[i]].sum() for i in members}
        assert sums[: len(members)].tolist() == [expected[start] for start in sorted(expected)]
        assert not sums[len(members) :].any()


def test_spread_and_collect_are_exact_inverses():
    shapes = random_shapes(60) + [(3, 0)]  # one sequence has no targets at all
    sequences, targets = make(shapes)
    packing = Packing.of(sequences, targets, rows=4, row_tokens=32)
    values = [np.random.default_rng(i).normal(size=shape[1]).astype(np.float32) for i, shape in enumerate(shapes)]
    spread = packing.spread(values)
    assert [value.shape for value in spread] == [batch.labels.shape for batch in packing.batches]
    assert all(value.dtype == np.float32 for value in spread)
    for returned, value in zip(packing.collect(spread), values, strict=True):
        np.testing.assert_array_equal(returned, value)
    for value, batch in zip(spread, packing.batches, strict=True):
        np.testing.assert_array_equal(value[batch.mask == 0], 0.0)
    labels = packing.collect([batch.labels for batch in packing.batches])
    for label, sequence, target in zip(labels, sequences, targets, strict=True):
        np.testing.assert_array_equal(label, sequence[target])


def test_micro_batches_share_one_shape_and_near_equal_target_counts():
    sequences, targets = make(random_shapes(200, seed=1))
    packing = Packing.of(sequences, targets, rows=4, row_tokens=32)
    counts = [int(batch.mask.sum()) for batch in packing.batches]
    assert {batch.tokens.shape for batch in packing.batches} == {(4, 32)}
    assert {batch.labels.shape for batch in packing.batches} == {(bucket(max(counts)),)}
    assert sum(counts) == sum(int(target.sum()) for target in targets)
    assert max(counts) - min(counts) <= 32  # the targets of one row


def test_rows_are_dealt_out_by_target_count():
    # Rows of 5 tokens with 1, 2, 3 and 4 targets: cut in order they would give 3 and 7, lightest first 4 and 6.
    sequences, targets = make([(4, 1), (3, 2), (2, 3), (1, 4)])
    packing = Packing.of(sequences, targets, rows=2, row_tokens=5)
    assert [int(batch.mask.sum()) for batch in packing.batches] == [5, 5]
    # Three equal rows in micro-batches of two rows: one row of the second stays empty.
    sequences, targets = make([(1, 3)] * 3)
    packing = Packing.of(sequences, targets, rows=2, row_tokens=4)
    assert [batch.segments.max(axis=1).tolist() for batch in packing.batches] == [[1, 1], [1, 0]]


def test_packing_is_deterministic():
    sequences, targets = make(random_shapes(40))
    first, second = (Packing.of(sequences, targets, rows=4, row_tokens=32) for _ in range(2))
    assert first.slots == second.slots
    for one, other in zip(first.batches, second.batches, strict=True):
        for array, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, same)


def test_padding_has_a_sequence_number_of_its_own_even_where_every_sequence_has_one_target():
    sequences, targets = make([(1, 1)] * 64)
    packing = Packing.of(sequences, targets, rows=1, row_tokens=128)
    (batch,) = packing.batches
    assert batch.labels.shape == (96,)  # 64 would leave no number for padding
    assert batch.sequence.tolist() == list(range(64)) + [95] * 32


def test_sequence_numbers_count_the_sequences_that_have_targets():
    sequences, targets = make([(1, 1), (3, 0), (1, 2)])  # packed by length: second, third, first
    packing = Packing.of(sequences, targets, rows=1, row_tokens=8)
    assert packing.batches[0].sequence.tolist() == [0, 0, 1] + [63] * 61
    assert packing.slots == [(0, slice(2, 3)), (0, slice(0, 0)), (0, slice(0, 2))]


def test_a_full_micro_batch_needs_no_more_than_its_tokens():
    sequences, targets = make([(1, 63), (1, 63)])
    packing = Packing.of(sequences, targets, rows=2, row_tokens=64)
    assert packing.batches[0].labels.shape == (128,)


def test_sequences_that_cannot_be_packed():
    sequences, targets = make([(2, 3)])
    with pytest.raises(ValueError, match="sequence 0 has 5 tokens; a row holds 1 to 4"):
        Packing.of(sequences, targets, rows=2, row_tokens=4)
    with pytest.raises(AssertionError, match="first token"):
        Packing.of(sequences, [np.ones(5, bool)], rows=2, row_tokens=8)
    assert Packing.of([], [], rows=2, row_tokens=8).batches == []


def test_pairs_share_a_row_and_have_neighbouring_numbers():
    shapes = random_shapes(20)
    sequences, targets = make(shapes)
    packing = Packing.of(sequences, targets, rows=2, row_tokens=64, together=2)
    assert len(packing.batches) > 1
    for pair in range(10):
        (batch, chosen), (same, rejected) = packing.slots[2 * pair], packing.slots[2 * pair + 1]
        rows = packing.batches[batch]
        assert batch == same
        assert rows.index[chosen.start] // 64 == rows.index[rejected.start] // 64
        number = rows.sequence[chosen.start]
        assert number % 2 == 0 and rows.sequence[rejected.start] == number + 1
        assert len(rows.labels) % 2 == 0, "the [N] numbers of sequences are taken in pairs"


def test_a_pair_that_no_row_holds():
    sequences, targets = make([(2, 3), (2, 3)])
    with pytest.raises(ValueError, match="sequence 0 has 10 tokens; a row holds 1 to 8"):
        Packing.of(sequences, targets, rows=2, row_tokens=8, together=2)


def test_without_a_shift_the_model_is_read_at_the_token():
    sequences = [np.array([7, 8, 9], np.int32), np.array([5], np.int32)]
    targets = [np.array([False, False, True]), np.array([True])]
    (batch,) = Packing.of(sequences, targets, rows=1, row_tokens=8, shift=0).batches
    assert batch.tokens.reshape(-1)[batch.index[:2]].tolist() == [9, 5]
    assert batch.labels[:2].tolist() == [9, 5]


def test_numbers_of_sequences():
    sequences, targets = make([(3, 4), (2, 9), (1, 1)])
    packing = Packing.of(sequences, targets, rows=1, row_tokens=12)
    arrays = packing.by_sequence([1.5, 2.5, 3.5])
    for (batch, place), value in zip(packing.slots, [1.5, 2.5, 3.5], strict=True):
        number = packing.batches[batch].sequence[place.start]
        assert arrays[batch][number] == value
        arrays[batch][number] = 0.0
    assert not any(array.any() for array in arrays)
