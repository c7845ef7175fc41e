"""The layouts that are tried, the best of them, and the estimate behind it."""

from dataclasses import replace

import pytest

from mindrlhf.layout import Layout
from mindrlhf.planner.architecture import read_architecture
from mindrlhf.planner.estimate import generation_seconds, pass_seconds, step_seconds
from mindrlhf.planner.job import Arrangement, Devices, Job
from mindrlhf.planner.memory import plan_phases, total
from mindrlhf.planner.report import as_text, verdict
from mindrlhf.planner.search import layouts, search
from tests.planner.test_architecture import FIXTURES
from tests.planner.test_memory import DENSE, EXPERTS, job

LARGE = Devices(512, 64 * 10**9)


def large(name, **fields):
    model = read_architecture(FIXTURES / "configs" / name)
    return Job(model, 32, 8, 512, 256, 64, 16, 768, **{"reference": model, **fields})


def test_layouts_divide_model_and_devices():
    """Two key-value heads, so tensor 1 or 2; rows of 31 tokens do not split."""
    found = set(layouts([DENSE], 4, True))
    assert found == {Layout(4), Layout(4, zero=True), Layout(2, 2), Layout(2, 2, zero=True)}
    assert {layout.sequence for layout in layouts([DENSE], 4, True)} == {1}
    assert {layout.expert for layout in layouts([EXPERTS], 4, False)} == {1, 2}
    assert {layout.expert for layout in layouts([DENSE], 4, False)} == {1}


@pytest.mark.parametrize(("name", "swap"), [("qwen2_5_7b", False), ("qwen2_5_32b", False), ("deepseek_v3", True)])
def test_large_models_fit_on_512_devices(name, swap):
    plan = search(large(name, swap=swap), LARGE)
    assert plan.overrun <= 0
    assert plan.arrangement.training.size == plan.arrangement.generation.size == 512
    plan.arrangement.training.check(plan.job.policy, "training")
    plan.arrangement.generation.check(plan.job.policy, "generation")
    assert max(map(len, as_text(plan).splitlines())) <= 100
    assert verdict(plan).startswith("fits: train policy needs most")


def test_search_is_the_best_of_all():
    own, devices = job(rows=4, row_tokens=32), Devices(4, 10**9)
    plan = search(own, devices)
    fastest = min(
        sum(step_seconds(own, devices, Arrangement(training, generation, rows)).values())
        for training in layouts([DENSE], 4, True)
        for generation in layouts([DENSE], 4, False)
        for rows in (4, 2, 1)
    )
    assert plan.step_seconds == pytest.approx(fastest, rel=1e-3)


def test_what_does_not_fit_says_what_would_help():
    plan = search(large("deepseek_v3"), LARGE)
    line = verdict(plan)
    assert plan.overrun > 0 and "\n" not in line
    assert line.startswith("does not fit: train policy needs 72.4 GB on each device, 8.4 GB too much; ")
    assert "memory.swap=true fits" in line and "1024 devices fit with data 8, tensor 128" in line
    hopeless = verdict(search(large("deepseek_v3"), Devices(8, 10**9)))
    assert "neither memory.swap nor 64 devices would do" in hopeless


def test_smaller_memory_takes_zero_and_smaller_micro_batches():
    roomy, tight = (search(large("qwen2_5_7b"), Devices(16, memory)) for memory in (80 * 10**9, 40 * 10**9))
    assert tight.overrun <= 0
    assert tight.arrangement.training.zero and tight.arrangement.rows < roomy.arrangement.rows
    assert tight.peak[1] < roomy.peak[1]


def test_replicas_divide_any_model():
    """Neither rows of 31 tokens nor 3 heads split into 4; replicas always do."""
    assert {layout.tensor for layout in layouts([replace(DENSE, num_heads=3, num_kv_heads=3)], 4, True)} == {1}


def test_a_pass_by_hand():
    """8 answers of 31 tokens, one a row of 31, on one device: no link, no padding."""
    devices, own = Devices(1, 10**9, flops=1e9), job()
    seconds = pass_seconds(DENSE, own, devices, Arrangement(Layout(), Layout(), 2), 1)
    tokens = 8 * 31
    products = 2 * DENSE.active_parameters
    attention = 2 * 4 * 2 * 8 * 31 * 3 / 2  # heads, scores and values, width, row, layers; half is masked
    assert seconds == pytest.approx(tokens * (products + attention) / 1e9)
    assert pass_seconds(DENSE, own, devices, Arrangement(Layout(), Layout(), 2), 3) == pytest.approx(3 * seconds)


def test_rows_that_stay_empty_cost_as_much():
    devices = Devices(4, 10**9, flops=1e6)
    four, two = (pass_seconds(DENSE, job(), devices, Arrangement(Layout(4), Layout(4), rows), 1) for rows in (4, 2))
    assert four == pytest.approx(2 * two)  # two answers a replica


def test_decoding_waits_for_memory():
    """Prefill apart, each step reads the weights and the cache once: half the bandwidth, twice the time."""
    fast = Devices(1, 10**9, flops=1e18, memory_bandwidth=1e9)
    once = generation_seconds(job(), fast, Layout())
    assert generation_seconds(job(), replace(fast, memory_bandwidth=5e8), Layout()) == pytest.approx(2 * once, rel=1e-6)


def test_rates_are_all_that_the_estimate_knows():
    """Everything twice as fast takes half as long."""
    own = job(reference=DENSE, swap=True)
    slow = Devices(4, 10**9, latency=2e-5)
    names = ("flops", "memory_bandwidth", "interconnect", "network", "swap_bandwidth")
    fast = replace(slow, latency=1e-5, **{name: 2 * getattr(slow, name) for name in names})
    arrangement = Arrangement(Layout(2, 2, zero=True), Layout(2, 2), 1)
    before, after = (step_seconds(own, devices, arrangement) for devices in (slow, fast))
    assert after == pytest.approx({name: value / 2 for name, value in before.items()})


def test_more_tensor_ranks_hold_less():
    model = large("qwen2_5_32b")
    sums = []
    for tensor in (1, 2, 4, 8):
        layout = Layout(512 // tensor, tensor)
        phases = plan_phases(model, LARGE, Arrangement(layout, layout, 1))
        sums.append(max(total(use) for use in phases.values()))
    assert sums == sorted(sums, reverse=True)
