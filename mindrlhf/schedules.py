"""The learning rate of each optimizer step."""

import math

from mindrlhf.errors import UserError

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(
    step: int, total_steps: int, peak: float, schedule: str = "constant", warmup_steps: int = 0, min_ratio: float = 0.0
) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of total_steps.

    Warm-up, step < warmup_steps: peak (step + 1) / warmup_steps. transformers has step / warmup_steps, so that its
    first update is lost at learning rate 0; ours reaches the peak one step earlier.
    After it, as transformers' get_scheduler, with p = (step - warmup_steps) / (total_steps - warmup_steps) in [0, 1]:
    constant 1, linear 1 - p, cosine (1 + cos(pi p)) / 2, each scaled by s -> min_ratio + (1 - min_ratio) s, so that
    min_ratio * peak is what step = total_steps would get; constant never decays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        shape = 1.0 - progress
    elif schedule == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        raise UserError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    return peak * (min_ratio + (1.0 - min_ratio) * shape)
