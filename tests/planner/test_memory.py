"""Bytes by phase against hand values, what layouts do to them, and what a weight sync moves."""

from dataclasses import replace

import pytest

from mindrlhf.layout import Layout
from mindrlhf.planner.activations import kept_numbers
from mindrlhf.planner.architecture import architecture_of, read_architecture
from mindrlhf.planner.job import Arrangement, Devices, Job
from mindrlhf.planner.memory import plan_phases, total
from mindrlhf.planner.sync import weight_sync
from mindrlhf.utils.reshard_plan import BUCKET_BYTES
from tests.planner.test_architecture import FIXTURES, SMALL

DENSE = architecture_of({"model_type": "llama", **SMALL}, "here")
EXPERTS = architecture_of({"model_type": "mixtral", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}, "here")
MATRICES = 2 * 48 * 32 + 3 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 40)  # numbers of DENSE that are split
NORMS = 7 * 32
DEVICES = Devices(1, 10**9)
ONE = Layout()


def job(model=DENSE, **fields):
    sizes = dict(prompts_per_step=4, num_generations=2, prompt_tokens=16, answer_tokens=15, slots=4, rows=2)
    return Job(model, **{"row_tokens": 31, **sizes, **fields})


def planned(training=ONE, generation=ONE, devices=DEVICES, **fields):
    own = job(**fields)
    return plan_phases(own, replace(devices, count=training.size), Arrangement(training, generation, own.rows))


def test_one_device_in_16_bits_by_hand():
    phases = planned(reference=DENSE)
    count = MATRICES + NORMS
    train = phases["train policy"]
    assert train["policy", "weights"] == 2 * count and train["policy", "gradients"] == 4 * count
    assert train["policy", "optimizer"] == (8 + 4) * count
    assert train["reference", "weights"] == 2 * count
    generate = phases["generate"]
    assert generate["generator", "weights"] == 2 * count
    assert generate["generator", "KV cache"] == 2 * 4 * 64 * 3 * 2 * 16  # slots, length in steps of 64, layers, k and v
    assert ("policy", "gradients") not in generate and ("generator", "reshard buffers") not in generate
    assert phases["score"]["policy", "optimizer"] == 12 * count


def test_kept_activations_by_hand():
    """Two norms' inputs and outputs; q, k, v, the output and a number a head; gate, up, product. Then the last norm."""
    layer = 4 * 32 + (2 * 32 + 4 + 2 * 16) + 3 * 40
    assert kept_numbers(DENSE, ONE) == 3 * layer + 2 * 32
    halved = 4 * 32 + (2 * 32 + 4 + 2 * 16) / 2 + 3 * 40 / 2
    assert kept_numbers(DENSE, Layout(1, 2)) == 3 * halved + 2 * 32
    assert kept_numbers(DENSE, Layout(1, 1, 1, 2)) == 3 * (layer + 2 * 16) + 2 * 32  # keys and values of whole rows


def test_float32_has_no_masters_until_zero_splits_the_states():
    devices = replace(DEVICES, precision="float32")
    count = MATRICES + NORMS
    assert planned(devices=devices)["train policy"]["policy", "optimizer"] == 8 * count
    zero = planned(Layout(4, zero=True), Layout(4), devices)
    assert zero["train policy"]["policy", "optimizer"] == 12 * count / 4
    assert planned(Layout(4), Layout(4), devices)["train policy"]["policy", "optimizer"] == 8 * count


def test_tensor_ranks_split_matrices_and_not_norms():
    phases = planned(Layout(1, 2), Layout(1, 2))
    assert phases["train policy"]["policy", "weights"] == 2 * (MATRICES / 2 + NORMS)
    assert phases["generate"]["generator", "reshard buffers"] == BUCKET_BYTES


@pytest.mark.parametrize("expert", [1, 2])
def test_experts_are_split_evenly_however_they_are_spread(expert):
    routed = 3 * 4 * 3 * 32 * 40
    phases = planned(Layout(1, 2, expert), Layout(1, 2, expert), model=EXPERTS)
    router, attention = 3 * 4 * 32, MATRICES - 3 * 3 * 32 * 40
    assert phases["train policy"]["policy", "weights"] == 2 * ((attention + routed) / 2 + router + NORMS)


def test_swap_leaves_each_phase_what_it_uses():
    critic = DENSE.scoring()
    models = dict(reference=DENSE, critic=critic, reward_models=(critic,))
    swapped, kept = planned(swap=True, **models), planned(**models)
    roles = {phase: {role for role, _ in use} for phase, use in swapped.items()}
    assert roles == {
        "generate": {"policy", "generator"},
        "score": {"reference", "critic", "reward model 1"},
        "train policy": {"policy"},
        "train critic": {"critic"},
    }
    assert ("policy", "optimizer") not in swapped["generate"]
    for phase in kept:
        assert total(swapped[phase]) < total(kept[phase])


def test_both_gradients_are_there_while_either_trains():
    phases = planned(critic=DENSE.scoring())
    for phase in ("train policy", "train critic"):
        assert {("policy", "gradients"), ("critic", "gradients")} <= set(phases[phase])
    assert ("critic", "gradients") not in phases["score"]


def test_an_asynchronous_generator_stays():
    assert ("generator", "KV cache") in planned(asynchronous=True)["train policy"]
    assert ("generator", "KV cache") not in planned()["train policy"]


def test_a_process_keeps_the_memory_of_its_largest_pass():
    phases = planned(devices=replace(DEVICES, precision="float32", host_process=True))
    sums = [sum(value for (_, kind), value in use.items() if kind == "activations") for use in phases.values()]
    assert len(set(sums)) == 1
    for use in phases.values():
        assert use["executor", "runtime"] == pytest.approx(1e6 * (70 + 6.5 * 3 + 0.87 * 9 + 45 + 3.2 * 3))


def test_more_of_anything_needs_no_less():
    least = {phase: total(use) for phase, use in planned().items()}
    for field, value in (("rows", 4), ("slots", 8), ("prompt_tokens", 64), ("row_tokens", 62)):
        own = replace(job(), **{field: value})
        phases = plan_phases(own, DEVICES, Arrangement(ONE, ONE, own.rows))
        assert all(total(phases[phase]) >= least[phase] for phase in least), field
        assert any(total(phases[phase]) > least[phase] for phase in least), field


def test_sync_by_hand():
    """tensor 2 to 1: each rank lacks the other's half. To and fro are not the same: 1 to 2 has all it needs."""
    assert weight_sync(DENSE, Layout(1, 2), Layout(2, 1), 2) == (2 * 2 * MATRICES / 2, 2 * MATRICES / 2)
    assert weight_sync(DENSE, Layout(2, 1), Layout(1, 2), 2) == (0, 0)
    assert weight_sync(DENSE, Layout(2, 2), Layout(2, 2), 2) == (0, 0)
    # 4 to 2 on four ranks: rank r had quarter r and gets half r % 2; ranks 0 and 3 have half of theirs, 1 and 2 none.
    four = weight_sync(DENSE, Layout(1, 4), Layout(2, 2), 2)
    assert four == (2 * MATRICES * (1 / 4 + 1 / 2 + 1 / 2 + 1 / 4), 2 * MATRICES / 2)
    # The second rank of generation had no part in training.
    assert weight_sync(DENSE, ONE, Layout(2), 2) == (2 * MATRICES, 2 * MATRICES)


def test_sync_of_experts_is_by_box():
    """Whole experts against slices of all: a rank of two has a half of the half that it needs. So say Layout.box."""
    routed = 3 * 4 * 3 * 32 * 40
    assert weight_sync(EXPERTS, Layout(1, 2, 2), Layout(1, 2, 1), 2) == (2 * 2 * routed / 4, 2 * routed / 4)


@pytest.mark.parametrize("pair", [(Layout(2, 2), Layout(1, 4)), (Layout(1, 4, 2), Layout(2, 2)),
                                  (Layout(1, 2, 1, 2), Layout(4))], ids=str)  # fmt: skip
def test_sync_agrees_with_the_boxes_of_every_tensor(pair):
    """Against mindrlhf.layout, number by number: what a rank's new box has outside its old one."""
    training, generation = pair
    model = architecture_of({"model_type": "mixtral", **SMALL, "num_key_value_heads": 4, "num_local_experts": 4,
                             "num_experts_per_tok": 2}, "here")  # fmt: skip
    moved = []
    for rank in range(generation.size):
        missing = 0
        for name, shape, copies in model.weights:
            new = generation.box(name, shape, generation.place(rank).tensor)
            place = training.place(rank)
            old = training.box(name, shape, place.tensor) if place else None
            missing += copies * (_size(new) - _size(_common(new, old)))
        moved.append(4 * missing)
    assert weight_sync(model, training, generation, 4) == pytest.approx((sum(moved), max(moved)))


def _size(box):
    size = box is not None
    for side in box or ():
        size *= max(side.stop - side.start, 0)
    return size


def _common(one, other):
    if one is None or other is None:
        return None
    sides = zip(one, other, strict=True)
    return tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in sides)


def test_deepseek_by_published_facts():
    """576 numbers a token and layer in the cache, on every tensor rank: the latent vector belongs to all heads."""
    model = read_architecture(FIXTURES / "configs" / "deepseek_v3")
    phases = planned(Layout(1, 8), Layout(1, 8), model=model)
    assert phases["generate"]["generator", "KV cache"] == 2 * 4 * 64 * 61 * 576
