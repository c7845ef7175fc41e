"""Bytes by role, phase and device over one step: what they were, and a picture of them."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.utils.checkpoint import write_json
from mindrlhf.utils.curves import DOTS_PER_INCH, save_figure
from mindrlhf.utils.memory import GB, peak_rss, reset_peak_rss
from mindrlhf.utils.parallel import device_target


@dataclass
class _Phase:
    name: str
    start: float  # seconds since the step began
    seconds: float = 0.0
    here: dict[str, int] = field(default_factory=dict)  # bytes in memory by role, once it has what it needs
    elsewhere: dict[str, int] = field(default_factory=dict)  # and in files, or in the host's memory
    rss_peak: int = 0  # bytes, of the whole process


class Timeline:
    """What happened in one step. Several threads may call `moved`."""

    def __init__(self, here: dict[str, int], elsewhere: dict[str, int]):
        """Bytes by role, in memory and kept elsewhere, as the step begins."""
        self._start = time.perf_counter()
        self.changes = [(0.0, here)]  # seconds since the start, and bytes in memory by role from then on
        self.phases: list[_Phase] = []
        self.written = 0  # bytes
        self.waited = 0.0  # seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def begin(self, name: str) -> None:
        """A phase, and the end of the one before."""
        self._end_phase()
        self.phases.append(_Phase(name, self.seconds))
        reset_peak_rss()

    def moved(
        self, here: dict[str, int], elsewhere: dict[str, int], written: int = 0, waited: float | None = None
    ) -> None:
        """How it is after a move; waited: the seconds of one that a phase began with, None for one within a phase."""
        self.changes.append((self.seconds, here))
        self.written += written
        if waited is not None:
            self.waited += waited
            self.phases[-1].here, self.phases[-1].elsewhere = here, elsewhere

    def finish(self) -> dict[str, float]:
        """The metrics of the step."""
        self._end_phase()
        return {
            "memory/peak_gb": max(sum(here.values()) for _, here in self.changes) / GB,
            "memory/rss_peak_gb": max((phase.rss_peak for phase in self.phases), default=peak_rss()) / GB,
            "memory/spilled_gb": self.written / GB,
            "seconds/memory": self.waited,
        }

    def _end_phase(self) -> None:
        if self.phases:
            last = self.phases[-1]
            last.seconds, last.rss_peak = self.seconds - last.start, peak_rss()


def write_timeline(step: Timeline, roles: dict[str, int], directory: Path) -> None:
    """memory.json and memory.png in the directory; roles: bytes of each, wherever it is."""
    here, elsewhere = ("cpu", "file") if device_target() == "CPU" else ("device", "host")
    phases = [
        {
            "phase": phase.name,
            "start": round(phase.start, 4),
            "seconds": round(phase.seconds, 4),
            "rss_peak": phase.rss_peak,
            here: phase.here,
            elsewhere: phase.elsewhere,
        }
        for phase in step.phases
    ]
    changes = [[round(at, 4), sizes] for at, sizes in step.changes]
    write_json(directory / "memory.json", {"roles": roles, "phases": phases, "timeline": changes})
    plot_timeline(step, directory / "memory.png", f"{directory.resolve().name}: memory over one step")


COLOURS = {
    "policy": "#1f5fa8", "policy_optimizer": "#6f9fd4", "policy_gradients": "#b9d2ec", "average": "#123a68",
    "critic": "#d1662b", "critic_optimizer": "#e99a68", "critic_gradients": "#f6cfb4",
    "reference": "#7a7a7a", "reward_model": "#8a56a8", "generator": "#3f8f4f", "kv_cache": "#9fd0a5",
}  # fmt: skip


def plot_timeline(step: Timeline, path: Path, title: str) -> None:
    """Bytes in memory by role over the seconds of a step, the phases above them, and each one's peak of the process."""
    # Not pyplot: it would choose a backend for the whole process and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    end = max(phase.start + phase.seconds for phase in step.phases)
    times = [at for at, _ in step.changes] + [end]
    base = np.zeros(len(times))
    for role, colour in COLOURS.items():
        sizes = [here.get(role, 0) / GB for _, here in step.changes]
        if any(sizes):
            top = base + np.array([*sizes, sizes[-1]])
            label = role.replace("_", " ")
            axes.fill_between(times, base, top, step="post", color=colour, linewidth=0, label=label)
            base = top
    highest = max(base.max(), max(phase.rss_peak for phase in step.phases) / GB)
    for number, phase in enumerate(step.phases):
        span = (phase.start, phase.start + phase.seconds)
        axes.plot(span, [phase.rss_peak / GB] * 2, color="#222222", linewidth=1.6,
                  label=None if number else "the process, peak of the phase")  # fmt: skip
        axes.axvline(phase.start, color="#ffffff" if number else "none", linewidth=0.8)
    _name_phases(axes, step.phases, end, highest)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.3 * highest)
    axes.set_xlabel("seconds", fontsize=9)
    axes.set_ylabel("GB in memory", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=12)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def _name_phases(axes: Any, phases: list[_Phase], end: float, highest: float) -> None:
    """Their names above the picture; a short one's stands upright, one that is hardly to be seen has none."""
    for number, phase in enumerate(phases):
        share = phase.seconds / end
        if number % 2 == 0:
            axes.axvspan(phase.start, phase.start + phase.seconds, color="#f3f3f3", zorder=0, linewidth=0)
        if share > 0.012:
            middle, upright = phase.start + phase.seconds / 2, share < 0.012 * len(phase.name)
            axes.text(middle, 1.28 * highest, phase.name, fontsize=8.5, ha="center", va="top",
                      rotation=90 if upright else 0)  # fmt: skip
