"""The learning curves of a run as one picture."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEPS, WARMUP_STEPS = "step", "warm-up step"  # labels of the horizontal axes
THICK, FAINT, PARTS = "#1f5fa8", "#9dbfe3", ("#d1662b", "#3f8f4f", "#8a56a8", "#b08a1e", "#7a7a7a")
PANEL_INCHES, DOTS_PER_INCH = (3.65, 2.45), 100  # three panels are about 1100 pixels wide


def plot_curves(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the panels that there is data for; `metrics` are the lines of metrics.jsonl, None where not finite.

    Written beside and renamed. Without any data nothing is written.
    """
    panels = _panels(metrics)
    if not panels:
        return
    # Not pyplot: it would choose a backend for the whole process and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (columns * PANEL_INCHES[0], rows * PANEL_INCHES[1] + 0.35)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    for number, draw in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        draw(axes)
        axes.grid(True, color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.locator_params(axis="x", integer=True, nbins=6)
        left, right = axes.get_xlim()
        if right - left < 1:  # one point: a step to each side, for ticks at whole steps
            axes.set_xlim(left - 1, right + 1)
    save_figure(figure, path)


def plot_scores(chosen: np.ndarray, rejected: np.ndarray, path: Path, title: str) -> None:
    """Histograms of a reward model's scores of chosen and rejected answers [pairs], and of their differences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * PANEL_INCHES[0], PANEL_INCHES[1] + 0.35), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {len(chosen)} pairs", fontsize=12)
    both = np.concatenate([chosen, rejected])
    edges = np.linspace(both.min(), max(both.max(), both.min() + 1e-6), 31)
    left, right = figure.subplots(1, 2)
    left.hist(chosen, edges, color=THICK, alpha=0.7, label="chosen")
    left.hist(rejected, edges, color=PARTS[0], alpha=0.7, label="rejected")
    left.legend(fontsize=8, frameon=False)
    _label(left, "Scores", "score", "answers")
    difference = chosen - rejected
    right.hist(difference, 31, color=THICK, alpha=0.7)
    right.axvline(0.0, color="#444444", linewidth=1.0)
    ahead = 100 * float(np.mean(np.where(difference == 0, 0.5, difference > 0)))
    _label(right, f"Chosen minus rejected: {ahead:.1f}% right", "difference", "pairs")
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """As PNG, written beside and renamed."""
    temporary = path.with_name(".partial-" + path.name)
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _panels(metrics: list[dict[str, Any]]) -> list[Callable[[Any], None]]:
    """A drawing function for each panel that has data."""
    online = [line for line in metrics if "warmup_step" not in line]
    warmup = [line for line in metrics if "warmup_step" in line]
    reward = [name for name in _names(online) if name.startswith("reward/") and name != "reward/total"]
    offline = online if not _series(online, "step", "reward/total")[0].size else []  # a policy loss says nothing
    rewards = ["rewards_chosen", "rewards_rejected", "rewards_desirable", "rewards_undesirable"]
    several = [name for name in _names(online) if name.startswith(("eval/pass@", "eval/maj@"))]
    # On one engine the mismatch is rounding, of which there is nothing to see.
    stale = [line for line in online if (line.get("mismatch_max") or 0) > 1e-3]
    mismatch, variance = "Old against sampled log-probs", "Variance that the critic explains"
    candidates = (
        (_held_out(offline, "loss", "Loss", "nats"), ["loss", "eval/loss"], offline),
        (_accuracy(_series(online, "step", "eval/accuracy")), ["eval/accuracy"], online),
        (_implicit_rewards(offline, rewards), rewards, offline),
        (_held_out(offline, "teacher_kl", "KL from the teacher", "nats per token"), ["teacher_kl"], offline),
        (_reward(online, reward), ["reward/total", *reward], online),
        (_curve(online, "kl", "KL to the reference", "nats per token"), ["kl"], online),
        (_curve(online, "entropy", "Entropy", "nats per token"), ["entropy"], online),
        (_curve(online, "response_tokens", "Response length", "tokens"), ["response_tokens"], online),
        (_curve(online, "critic/explained_variance", variance, "share"), ["critic/explained_variance"], online),
        (
            _curve(online, "eval/sampled_reward", "Held out, reward", "reward per answer"),
            ["eval/sampled_reward"],
            online,
        ),
        (_curve(online, "eval/kl", "Held out, KL that was paid", "nats per answer"), ["eval/kl"], online),
        (_lines(online, several, "Held out, several answers", "% of problems"), several, online),
        (_curve(online, "experts/busiest", "Busiest expert", "load over the mean"), ["experts/busiest"], online),
        (_curve(online, "turns", "Turns", "turns per answer"), ["turns"], online),
        (_curve(stale, "mismatch_mean", mismatch, "mean difference, nats"), ["mismatch_mean"], stale),
        (_curve(warmup, "warmup/loss", "Warm-up loss", "nats per token"), ["warmup/loss"], warmup),
        (_curve(online, "tokens_per_second", "Speed", "tokens/s"), ["tokens_per_second"], online),
    )
    return [draw for draw, names, lines in candidates if any(len(_series(lines, "step", name)[0]) for name in names)]


def _names(lines: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _series(lines: list[dict[str, Any]], axis: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values [n] of one metric, without the lines that lack it."""
    points = [(line[axis], line[name]) for line in lines if line.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the run; at both ends over what there is of the window."""
    radius = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - radius, 0), np.minimum(at + radius, len(values) - 1)
    return (sums[last + 1] - sums[first]) / (last - first + 1)


def _draw_line(axes: Any, steps: np.ndarray, values: np.ndarray, label: str | None = None) -> None:
    axes.plot(steps, values, color=FAINT, linewidth=0.9, marker="o" if len(steps) == 1 else None)
    axes.plot(steps, _smooth(values), color=THICK, linewidth=2.0, label=label)


def _label(axes: Any, title: str, horizontal: str, vertical: str) -> None:
    axes.set_title(title, fontsize=10.5)
    axes.set_xlabel(horizontal, fontsize=9)
    axes.set_ylabel(vertical, fontsize=9)


def _curve(lines: list[dict[str, Any]], name: str, title: str, unit: str) -> Callable[[Any], None]:
    warmup = name.startswith("warmup/")

    def draw(axes: Any) -> None:
        _draw_line(axes, *_series(lines, "warmup_step" if warmup else "step", name))
        _label(axes, title, WARMUP_STEPS if warmup else STEPS, unit)

    return draw


def _held_out(lines: list[dict[str, Any]], name: str, title: str, unit: str) -> Callable[[Any], None]:
    """A metric in training, and as dots the same on held-out rows."""

    def draw(axes: Any) -> None:
        steps, values = _series(lines, "step", name)
        if len(steps):
            _draw_line(axes, steps, values, label="training")
        steps, values = _series(lines, "step", f"eval/{name}")
        if len(steps):
            axes.plot(steps, values, color=PARTS[0], linewidth=1.0, marker="o", markersize=4, label="held out")
        axes.legend(fontsize=8, frameon=False)
        _label(axes, title, STEPS, unit)

    return draw


def _implicit_rewards(lines: list[dict[str, Any]], names: list[str]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for name in names:
            steps, values = _series(lines, "step", name)
            if len(steps):
                kind = name.removeprefix("rewards_")
                colour = THICK if kind in ("chosen", "desirable") else PARTS[0]
                axes.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=kind)
        axes.legend(fontsize=8, frameon=False)
        _label(axes, "Rewards", STEPS, "reward per answer")

    return draw


def _lines(lines: list[dict[str, Any]], names: list[str], title: str, unit: str) -> Callable[[Any], None]:
    """Several evaluations in percent."""

    def draw(axes: Any) -> None:
        for number, name in enumerate(names):
            steps, values = _series(lines, "step", name)
            colour = (THICK, *PARTS)[number % (1 + len(PARTS))]
            label = name.removeprefix("eval/")
            axes.plot(steps, 100 * values, color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
        axes.legend(fontsize=8, frameon=False)
        _label(axes, title, STEPS, unit)

    return draw


def _accuracy(series: tuple[np.ndarray, np.ndarray]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        steps, values = series
        axes.plot(steps, 100 * values, color=THICK, linewidth=2.0, marker="o", markersize=4)
        # The first and the last number are what a reader looks for.
        for at in {0, len(values) - 1}:
            below = at == 0 and values[-1] > values[0]
            axes.annotate(
                f"{100 * values[at]:.1f}%",
                (steps[at], 100 * values[at]),
                xytext=(4 if at == 0 else 0, -13 if below else 6),
                textcoords="offset points",
                ha="left" if at == 0 else "right",
                fontsize=9,
            )
        axes.margins(x=0.06, y=0.2)
        axes.set_ylim(top=min(axes.get_ylim()[1], 104))
        _label(axes, "Held-out accuracy", STEPS, "% right, greedy")

    return draw


def _reward(lines: list[dict[str, Any]], parts: list[str]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for number, name in enumerate(parts):
            steps, values = _series(lines, "step", name)
            colour = PARTS[number % len(PARTS)]
            axes.plot(steps, _smooth(values), color=colour, linewidth=1.0, label=name.removeprefix("reward/"))
        _draw_line(axes, *_series(lines, "step", "reward/total"), label="total")
        if parts:
            axes.legend(fontsize=8, frameon=False)
        _label(axes, "Reward", STEPS, "reward per answer")

    return draw
