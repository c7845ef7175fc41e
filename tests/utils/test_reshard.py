"""mindrlhf/utils/reshard.py and its plan: every rank simulated on the host, and real processes."""

import numpy as np
import pytest

from mindrlhf.errors import UserError
from mindrlhf.layout import Layout
from mindrlhf.utils.reshard import checksum, differences, sums
from mindrlhf.utils.reshard_plan import plan, volume, within
from tests.processes import run_ranks
from tests.utils.reshard_cases import SHAPES, bits, empty, filled, layouts, whole

WORLD = 4
MATRIX = {"lm_head.weight": (8, 5)}  # split by rows


def carry_out(made, source, target):
    """Every rank's part of the plan, one after the other; source, target: the arrays by rank."""

    def move(parts, sender, receiver):
        for name, spans in parts:
            outer, inner = made.held(made.target, receiver, name), made.held(made.source, sender, name)
            target[receiver][name][within(spans, outer)] = source[sender][name][within(spans, inner)]

    for rank in range(made.size):
        move(made.parts(rank, rank), rank, rank)
        for partner in made.partners(rank):
            for message in made.messages(rank, partner):
                move(message, rank, partner)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(bits(one[name]), bits(other[name])) for name in one)


@pytest.mark.parametrize("one", layouts(WORLD), ids=str)
def test_there_and_back(one):
    values = {layout: [filled(layout, rank) for rank in range(WORLD)] for layout in layouts(WORLD)}
    for other in layouts(WORLD):
        middle = [empty(other, rank) for rank in range(WORLD)]
        carry_out(plan(SHAPES, one, other), values[one], middle)
        assert all(map(same, middle, values[other])), other
        back = [empty(one, rank) for rank in range(WORLD)]
        carry_out(plan(SHAPES, other, one), middle, back)
        assert all(map(same, back, values[one])), other


def test_more_ranks_than_are_here():
    """tensor 8 x data 2 to tensor 4, of which each gets two slices of a neighbourhood."""
    made = plan({"lm_head.weight": (16, 4)}, Layout(data=2, tensor=8), Layout(data=4, tensor=4))
    assert made.received == [32] + [64] * 6 + [32] + [32] + [64] * 6 + [32]
    assert made.moved == sum(made.received) == sum(made.sent)
    assert max(made.sent) <= 96


def test_bytes():
    """8 rows of 5 numbers of 4 bytes: 160 bytes, of which a rank of two has 80."""
    halves, copies = Layout(tensor=2), Layout(data=2)
    gathered = plan(MATRIX, halves, copies)
    assert (gathered.sent, gathered.received, gathered.copied, gathered.moved) == ([80, 80], [80, 80], [80, 80], 160)
    split = plan(MATRIX, copies, halves)
    assert (split.moved, split.copied) == (0, [80, 80])
    assert plan(MATRIX, halves, halves).moved == 0
    to_one = plan(MATRIX, halves, Layout())
    assert (to_one.sent, to_one.received, to_one.copied) == ([0, 80], [80, 0], [80, 0])
    from_one = plan(MATRIX, Layout(), copies, item_bytes=2)
    assert (from_one.sent, from_one.received) == ([80, 0], [0, 80])


def test_load_is_spread_among_holders():
    """Two copies of two halves to four quarters: ranks 1 and 2 lack theirs, and ranks 0 and 3 have it and are idle."""
    made = plan(MATRIX, Layout(data=2, tensor=2), Layout(tensor=4))
    assert (made.sent, made.received) == ([40, 0, 0, 40], [0, 40, 40, 0])
    two_to_four = plan(MATRIX, Layout(data=2), Layout(data=4))
    assert two_to_four.sent == [160, 160, 0, 0]


def test_buckets():
    """No message over half a bucket, elements of a row being cut where it must be; all but the last nearly full."""
    for bucket in (64, 1024, 8192):
        for one, other in ((Layout(tensor=4), Layout(data=4)), (Layout(), Layout(data=2, tensor=2))):
            made = plan(SHAPES, one, other, bucket)
            for rank in range(made.size):
                for partner in made.partners(rank):
                    sizes = [4 * sum(volume(spans) for _, spans in m) for m in made.messages(rank, partner)]
                    assert max(sizes, default=0) <= bucket // 2
                    assert all(size >= bucket // 2 * 7 // 8 for size in sizes[:-1])


@pytest.mark.parametrize("size", (2, 3, 4, 5, 8, 9))
def test_partners_meet_in_turns(size):
    """Everybody with everybody: carried out in order, blocking, it comes to an end; so no rank waits in a circle."""
    made = plan({"lm_head.weight": (size * 2, 1)}, Layout(tensor=size), Layout(data=size))
    waiting = [made.partners(rank) for rank in range(size)]
    assert all(len(partners) == size - 1 for partners in waiting)
    rounds = 0
    while any(waiting):
        pairs = {(r, w[0]) for r, w in enumerate(waiting) if w and waiting[w[0]][0] == r}
        assert pairs
        for rank, _ in pairs:
            waiting[rank].pop(0)
        rounds += 1
    assert rounds == size - 1 + size % 2


def test_the_same_plan_every_time():
    one, other = Layout(data=2, tensor=2, expert=2), Layout(tensor=4)
    assert plan(SHAPES, one, other) == plan(dict(SHAPES), one, other)


def test_what_does_not_divide():
    with pytest.raises(UserError, match="tensor 3: does not divide lm_head.weight of shape"):
        plan(MATRIX, Layout(), Layout(tensor=3))
    with pytest.raises(UserError, match="tensor 3, expert 3: does not divide"):
        plan({"model.layers.0.mlp.experts.gate_proj.weight": (4, 9, 4)}, Layout(), Layout(tensor=3, expert=3))


def test_checksums_add_up():
    for name in ("lm_head.weight", "model.layers.0.self_attn.o_proj.bias"):
        array, shape = whole(name), SHAPES[name]
        total = checksum(array, tuple((0, length) for length in shape), shape)
        parts = [tuple((0, length) for length in shape[:-1]) + (ends,) for ends in ((0, 5), (5, shape[-1]))]
        found = [checksum(array[tuple(slice(*span) for span in spans)], spans, shape) for spans in parts]
        assert sum(found) % 2**64 == total
        for place in ((0,) * len(shape), (1,) * len(shape)):
            for bit in (1, 1 << 31):
                damaged = array.copy()
                bits(damaged)[place] ^= np.uint32(bit)
                assert checksum(damaged, tuple((0, length) for length in shape), shape) != total
        assert checksum(array[::-1], tuple((0, length) for length in shape), shape) != total


def test_differences_name_tensor_and_ranks():
    made = plan(SHAPES, Layout(data=2, tensor=2), Layout(tensor=4))
    source = [filled(made.source, rank) for rank in range(WORLD)]
    target = [filled(made.target, rank) for rank in range(WORLD)]

    def compared():
        before = [sums(made, made.source, rank, source[rank].__getitem__) for rank in range(WORLD)]
        after = [sums(made, made.target, rank, target[rank].__getitem__) for rank in range(WORLD)]
        return differences(made, before, after)

    assert compared() == []
    norm = "model.layers.0.input_layernorm.weight"
    bits(target[2][norm])[3] ^= 1
    assert compared() == [f"{norm}: ranks [2] hold other values after resharding than ranks [0] had"]
    bits(source[3]["lm_head.weight"])[0, 0] ^= 1
    assert "lm_head.weight: ranks [0, 1] and [2, 3] had different values before resharding" in compared()


@pytest.mark.parametrize("count", (2, pytest.param(WORLD, marks=pytest.mark.slow)))
def test_processes(count):
    """Many pairs of layouts in one job, there and back, checked; and a wrong element, which every rank names."""
    done = run_ranks(["-m", "tests.utils.reshard_job"], count, timeout=120)
    assert [rank.code for rank in done] == [0] * count, done
    holders = list(range(count))
    for rank in done:
        assert "found: model.layers.0.mlp.down_proj.weight: ranks" in rank.output, rank.output
        assert "pairs" in rank.output
        assert f"{holders[-1]}] hold other values after resharding" in rank.output
