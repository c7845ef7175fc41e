"""The layouts that divide a model and the devices, and the best of those that fit."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mindrlhf.errors import UserError
from mindrlhf.layout import Layout
from mindrlhf.planner.architecture import Architecture
from mindrlhf.planner.estimate import generation_seconds, step_seconds
from mindrlhf.planner.job import Arrangement, Devices, Job
from mindrlhf.planner.memory import GENERATE, GENERATOR, Use, peak, plan_phases
from mindrlhf.planner.sync import Sync, weight_sync


@dataclass(frozen=True)
class Plan:
    """An arrangement, and what comes of it on each device."""

    job: Job
    devices: Devices
    arrangement: Arrangement
    phases: dict[str, Use]
    seconds: dict[str, float]
    sync: Sync
    considered: int = 1  # arrangements

    @property
    def peak(self) -> tuple[str, float]:
        return peak(self.phases)

    @property
    def overrun(self) -> float:
        """Bytes over the device's memory; negative where there is room."""
        return self.peak[1] - self.devices.memory

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def make_plan(job: Job, devices: Devices, arrangement: Arrangement, considered: int = 1) -> Plan:
    sync = weight_sync(job.policy, arrangement.training, arrangement.generation, devices.numbers.weight)
    phases, seconds = plan_phases(job, devices, arrangement), step_seconds(job, devices, arrangement)
    return Plan(job, devices, arrangement, phases, seconds, sync, considered)


def layouts(models: list[Architecture], devices: int, is_training: bool) -> Iterator[Layout]:
    """All without sequence ranks that use every device and divide each of the models.

    Sequence ranks keep the scores of whole rows, which the formulas of activations do not know.
    Pipeline stages do not exist yet: they would be one axis more here, a share of the layers in numbers_on_rank, and
    several micro-batches' activations in training_bytes.
    """
    for tensor in _divisors(devices):
        for expert in _divisors(tensor) if any(model.num_experts for model in models) else [1]:
            layout = Layout(devices // tensor, tensor, expert)
            if all(_divides(model, layout) for model in models):
                yield layout
                if is_training and layout.data > 1:
                    yield replace(layout, zero=True)


def search(job: Job, devices: Devices) -> Plan:
    """The fastest by the estimate of what fits; of equals, the one that needs least memory. Where nothing fits, the
    one with the smallest overrun. There is always a layout: replicas divide any model."""
    models = [model for model in (job.policy, job.reference, job.critic, *job.reward_models) if model]
    training = list(layouts(models, devices.count, True))
    generation = _undominated(job, devices, list(layouts([job.policy], devices.count, False)))
    rows = _halves(job.rows)
    considered = len(training) * len(generation) * len(rows)
    arrangements = itertools.product(training, generation, rows)
    return min((make_plan(job, devices, Arrangement(*one), considered) for one in arrangements), key=_order)


def _halves(rows: int) -> list[int]:
    """rows, a half of them, a quarter... and 1."""
    return [rows] + (_halves(rows // 2) if rows > 1 else [])


def _undominated(job: Job, devices: Devices, candidates: list[Layout]) -> list[Layout]:
    """Those that no other one beats in both memory and time."""
    seen: list[tuple[float, float, Layout]] = []
    for layout in candidates:
        use = plan_phases(job, devices, Arrangement(Layout(), layout, 1))[GENERATE]
        own = sum(value for (role, _), value in use.items() if role == GENERATOR)
        seen.append((generation_seconds(job, devices, layout), own, layout))
    return [
        layout
        for seconds, own, layout in seen
        if not any(s <= seconds and o <= own and (s, o) != (seconds, own) for s, o, _ in seen)
    ]


def _order(plan: Plan) -> tuple[float, float, float]:
    """Seconds to three digits: an estimate says no more."""
    return max(plan.overrun, 0.0), float(f"{plan.step_seconds:.3g}"), plan.peak[1]


def _divides(model: Architecture, layout: Layout) -> bool:
    try:
        layout.check(model, "")
    except UserError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
