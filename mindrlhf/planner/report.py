"""A plan as text, as JSON and in one line where nothing fits."""

from dataclasses import asdict, replace
from typing import Any

from mindrlhf.planner.memory import KINDS, RUNTIME, total
from mindrlhf.planner.search import Plan, search

ROLE_WIDTH, COLUMN = 34, 15  # columns of the table, which four phases make 94 wide


def as_text(plan: Plan) -> str:
    job, devices, arrangement = plan.job, plan.devices, plan.arrangement
    model = job.policy
    roles = ["policy", *["reference"] * bool(job.reference), *["critic"] * bool(job.critic)]
    roles += [f"{len(job.reward_models)} reward model(s)"] * bool(job.reward_models) + ["generator"]
    lines = [
        f"model       {model.model_type}, {model.num_parameters:,} parameters, {model.active_parameters:,} a token",
        f"roles       {', '.join(roles)}{'; swap' if job.swap else ''}",
        f"step        {job.answers} answers of {job.prompt_tokens} + {job.answer_tokens} tokens",
        f"devices     {devices.count} of {_gigabytes(devices.memory)}, {devices.precision}",
        "",
        f"training    {arrangement.training.describe()}; trainer.rows={arrangement.rows}"
        + (f" instead of {job.rows}" if arrangement.rows != job.rows else ""),
        f"generation  {arrangement.generation.describe()}",
        f"            {'the fastest that fits' if plan.overrun <= 0 else 'the nearest to fitting'} of "
        f"{plan.considered} arrangements"
        if plan.considered > 1
        else "            as the config has it",
        "",
        *_table(plan),
        "",
        f"weight sync {_bytes(plan.sync.total)} between devices, {_bytes(plan.sync.most)} at most into one",
        "seconds     " + ", ".join(f"{name} {value:.3g}" for name, value in plan.seconds.items())
        + f": {plan.step_seconds:.3g} a step, estimated",
        "",
        as_config(plan),
    ]  # fmt: skip
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    phases = plan.phases
    head = f"{'GB on each device':<{ROLE_WIDTH}}" + "".join(f"{name:>{COLUMN}}" for name in phases)
    lines = [head]
    for key in rows_of(phases):
        values = [use.get(key, 0.0) for use in phases.values()]
        if max(values) >= 5e6:
            shown = "".join(f"{value / 1e9:>{COLUMN}.2f}" if value else f"{'-':>{COLUMN}}" for value in values)
            lines.append(f"{'  ' + ' '.join(key):<{ROLE_WIDTH}}{shown}")
    sums = [total(use) for use in phases.values()]
    lines.append(f"{'  together':<{ROLE_WIDTH}}" + "".join(f"{value / 1e9:>{COLUMN}.2f}" for value in sums))
    shares = (f"{value / plan.devices.memory:>{COLUMN}.0%}" for value in sums)
    lines.append(f"{'  of ' + _gigabytes(plan.devices.memory):<{ROLE_WIDTH}}" + "".join(shares))
    return lines


def rows_of(phases: dict[str, dict[tuple[str, str], float]]) -> list[tuple[str, str]]:
    """Every (role, kind) once: roles as they come, kinds in their order."""
    keys = list(dict.fromkeys(key for use in phases.values() for key in use))
    roles = list(dict.fromkeys(role for role, _ in keys))
    return sorted(keys, key=lambda key: (roles.index(key[0]), KINDS.index(key[1])))


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes and seconds; layouts by their config keys."""
    name, most = plan.peak
    return {
        "model": {
            "model_type": plan.job.policy.model_type,
            "parameters": plan.job.policy.num_parameters,
            "active_parameters": plan.job.policy.active_parameters,
        },
        "devices": asdict(plan.devices),
        "swap": plan.job.swap,
        "training": asdict(plan.arrangement.training),
        "generation": asdict(plan.arrangement.generation),
        "rows": plan.arrangement.rows,
        "arrangements_considered": plan.considered,
        "fits": plan.overrun <= 0,
        "peak": {"phase": name, "bytes": round(most)},
        "phases": {
            phase: [{"role": role, "kind": kind, "bytes": round(use[role, kind])} for role, kind in use]
            for phase, use in plan.phases.items()
        },
        "sync": {"total_bytes": round(plan.sync.total), "most_bytes": round(plan.sync.most)},
        "seconds": plan.seconds,
    }


def as_config(plan: Plan) -> str:
    """What to write into the job's YAML."""
    training, generation = plan.arrangement.training, plan.arrangement.generation
    own = [f"data: {training.data}", f"tensor: {training.tensor}", f"expert: {training.expert}"]
    own += [f"sequence: {training.sequence}", f"zero: {str(training.zero).lower()}"]
    other = f"data: {generation.data}, tensor: {generation.tensor}, expert: {generation.expert}"
    lines = [f"parallel: {{{', '.join(own)}}}", f"rollout: {{parallel: {{{other}}}}}"]
    lines.append(f"trainer: {{rows: {plan.arrangement.rows}}}")
    return "\n".join(lines + ["memory: {swap: true}"] * plan.job.swap)


def verdict(plan: Plan) -> str:
    """One line: whether it fits, and if not by how much the nearest one fails and what would help."""
    phase, most = plan.peak
    if plan.overrun <= 0:
        return f"fits: {phase} needs most, {_gigabytes(most)} of {_gigabytes(plan.devices.memory)} on each device"
    return (
        f"does not fit: {phase} needs {_gigabytes(most)} on each device, {_gigabytes(plan.overrun)} too much; "
        f"{remedies(plan)}"
    )


def remedies(plan: Plan) -> str:
    """Tried, not guessed: swap, then more devices."""
    job, devices = plan.job, plan.devices
    found, nearest = [], plan.overrun
    if not job.swap:
        swapped = search(replace(job, swap=True), devices)
        nearest = min(nearest, swapped.overrun)
        if swapped.overrun <= 0:
            found.append(f"memory.swap=true fits in {_gigabytes(swapped.peak[1])}")
    for times in (2, 4, 8):
        larger = search(job, replace(devices, count=times * devices.count))
        if larger.overrun <= 0:
            found.append(f"{times * devices.count} devices fit with {larger.arrangement.training.describe()}")
            break
    if found:
        return ", or ".join(found)
    held = [(value, " ".join(key)) for key, value in plan.phases[plan.peak[0]].items() if key[1] != RUNTIME]
    largest = max(held)
    return (
        f"neither memory.swap nor {8 * devices.count} devices would do: the {largest[1]} alone need "
        f"{_gigabytes(largest[0])}; take more devices, a smaller model, or more memory"
    )


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if abs(value) >= 1e8 else f"{value / 1e6:.1f} MB"


def _bytes(value: float) -> str:
    return "nothing" if value == 0 else _gigabytes(value)
