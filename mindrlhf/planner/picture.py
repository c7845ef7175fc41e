"""A plan as stacked bars: bytes by phase and role against the device's memory."""

from pathlib import Path

from mindrlhf.planner.memory import KINDS, total
from mindrlhf.planner.report import rows_of
from mindrlhf.planner.search import Plan

COLORS = {
    "policy": "#1f5fa8",
    "critic": "#3f8f4f",
    "reference": "#8a56a8",
    "generator": "#d1662b",
    "executor": "#7a7a7a",
}
OTHER = "#b08a1e"  # reward models
HATCHES = dict(zip(KINDS, ("", "//", "xx", "..", "++", "oo", "--"), strict=True))
SMALLEST = 0.004  # of the device's memory: what is thinner is left out of the legend


def plot_plan(plan: Plan, path: Path, title: str) -> None:
    """A PNG. A colour a role, a hatching a kind."""
    # Not pyplot: it would choose a backend for the whole process and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    phases, memory = plan.phases, plan.devices.memory
    unit, name = (1e9, "GB") if memory >= 1e10 else (1e6, "MB")
    figure = Figure(figsize=(9.2, 4.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bottoms = dict.fromkeys(phases, 0.0)
    for role, kind in rows_of(phases):
        heights = [use.get((role, kind), 0.0) / unit for use in phases.values()]
        shown = max(heights) * unit > SMALLEST * memory
        axes.bar(
            list(phases), heights, 0.6, bottom=list(bottoms.values()), color=COLORS.get(role, OTHER),
            hatch=HATCHES[kind], edgecolor="white", linewidth=0.6, label=f"{role} {kind}" if shown else None,
        )  # fmt: skip
        for phase, height in zip(phases, heights, strict=True):
            bottoms[phase] += height
    for number, (phase, use) in enumerate(phases.items()):
        axes.annotate(f"{total(use) / unit:.1f}", (number, bottoms[phase]), ha="center", va="bottom", fontsize=9)
    axes.axhline(memory / unit, color="#b02020", linewidth=1.4)
    axes.annotate(f"{memory / unit:g} {name}", (0.005, memory / unit), xycoords=("axes fraction", "data"),
                  va="bottom", color="#b02020", fontsize=9)  # fmt: skip
    axes.set_ylabel(f"{name} on each device")
    axes.set_ylim(0, 1.12 * max(memory / unit, *bottoms.values()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)
    training, generation = plan.arrangement.training, plan.arrangement.generation
    axes.set_xlabel(f"training: {training.describe()}    generation: {generation.describe()}", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, reverse=True)
    figure.savefig(path)
