"""Which of a run's evaluations was the best, and whether it is time to stop."""

import difflib
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from mindrlhf.config import TrainerConfig
from mindrlhf.errors import UserError


@dataclass(frozen=True)
class Best:
    """The evaluations of a run so far, by one metric."""

    metric: str = ""  # empty: nobody asked
    best_is: str = "largest"  # or smallest
    step: int | None = None  # of the best evaluation; None: no value was finite yet
    value: float | None = None
    worse: int = 0  # evaluations since then
    seen: int = -1  # step of the last evaluation; -1: there was none

    @classmethod
    def resumed(cls, state: dict[str, Any], config: TrainerConfig) -> "Best":
        """From `state()` in a checkpoint. Under another metric its evaluations say nothing: it begins anew."""
        best = cls(**state)
        return best if (best.metric, best.best_is) == (config.best, config.best_is) else cls.of(config)

    @classmethod
    def of(cls, config: TrainerConfig) -> "Best":
        """At the start of a run."""
        return cls(config.best, config.best_is)

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def after(self, step: int, values: dict[str, float | None]) -> "Best":
        """With the evaluation at `step`, which is the best where its metric is better than all before: a tie is not.

        Raises UserError where the metric is not among the values.
        """
        if self.metric not in values:
            raise UserError(f"trainer.best: the evaluations have no {self.metric!r}; {_hint(self.metric, values)}")
        value = values[self.metric]
        if not self._is_better(value):
            return replace(self, worse=self.worse + 1, seen=step)
        return replace(self, step=step, value=float(value), worse=0, seen=step)

    def _is_better(self, value: float | None) -> bool:
        if value is None or not math.isfinite(value):  # metrics.jsonl has None for what is not finite
            return False
        return self.value is None or (value > self.value if self.best_is == "largest" else value < self.value)


def _hint(metric: str, values: dict[str, Any]) -> str:
    if not values:
        return "without held-out rows there are none: set data.test"
    near = difflib.get_close_matches(metric, values, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"there are {', '.join(values)}"
