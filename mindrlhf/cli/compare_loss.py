"""`mindrlhf compare-loss`: two runs' losses, step by step."""

import argparse
import json
import math
from pathlib import Path

from mindrlhf.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Mean error of two loss curves, sum |a - b| / N over their N steps, 0.02 being 2%. A file has one JSON object "
        'a line, {"step": 1, "loss": 0.69, ...}, as metrics.jsonl of a run; lines without the metric are passed over. '
        "The exit code is 0 within the limit and 1 beyond it."
    )
    parser.add_argument("a", type=Path, help="one run's metrics.jsonl")
    parser.add_argument("b", type=Path, help="the other's")
    parser.add_argument("--key", default="loss", help="the metric to compare (default: loss)")
    parser.add_argument("--limit", type=float, default=2.0, help="percent that the mean error may have (default: 2)")


def run(arguments: argparse.Namespace) -> int:
    limit = arguments.limit
    if not (math.isfinite(limit) and limit >= 0):
        raise UserError(f"--limit {limit}: must be a percentage of 0 or more, such as 2")
    paths = arguments.a, arguments.b
    curves = [read_curve(path, arguments.key) for path in paths]
    require_same_steps(curves, paths)
    differences = {step: abs(value - curves[1][step]) for step, value in curves[0].items()}
    mean = sum(differences.values()) / len(differences)
    worst = max(differences, key=differences.__getitem__)
    within = 100 * mean <= limit
    print(f"{'steps':<20}{len(differences)}")
    print(f"{'mean error':<20}{mean:.6g} ({100 * mean:.4g}%)")
    print(f"{'largest difference':<20}{differences[worst]:.6g} at step {worst}")
    print(f"{'limit':<20}{limit:g}%: {'within' if within else 'exceeded'}")
    return 0 if within else 1


def read_curve(path: Path, key: str) -> dict[int, float]:
    """Step -> value of the metric, from the lines that have it.

    Raises UserError for a file that is missing, not UTF-8 or without the metric, and for a line that is not an object,
    has no step, repeats a step or has a value that is not finite.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the metrics.jsonl of a run")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); give the metrics.jsonl of a run") from None
    curve: dict[int, float] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            values = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error.msg}; one object a line, or remove the line") from None
        if not isinstance(values, dict):
            raise UserError(f'{where}: not an object; write {{"step": 1, "{key}": 0.5}}, or remove the line')
        if key not in values:
            continue
        step, value = values.get("step"), values[key]
        if not isinstance(step, int):
            raise UserError(f'{where}: step: {json.dumps(step)} is not a whole number; every {key} needs its "step"')
        if not isinstance(value, int | float) or not math.isfinite(value):
            problem = f"{key}: {json.dumps(value)} is not a finite number"
            raise UserError(f"{where}: {problem}; a run that diverged there has no loss to compare")
        if step in curve:
            raise UserError(f"{where}: step {step} a second time; leave one line with {key} a step")
        curve[step] = float(value)
    if not curve:
        raise UserError(f"{path}: no line has {key!r}; choose a metric that it has with --key")
    return curve


def require_same_steps(curves: list[dict[int, float]], paths: tuple[Path, Path]) -> None:
    """Raises UserError unless both curves have the same steps."""
    if not curves[0].keys() & curves[1].keys():
        ranges = " and ".join(f"{min(curve)} to {max(curve)}" for curve in curves)
        raise UserError(f"{paths[0]} and {paths[1]} have no step in common: {ranges}; count both from the same step")
    for mine, other in ((0, 1), (1, 0)):
        only = sorted(curves[mine].keys() - curves[other].keys())
        if only:
            steps = "1 step" if len(only) == 1 else f"{len(only)} steps"
            problem = f"{paths[mine]} has {steps} that {paths[other]} lacks, the first is {only[0]}"
            raise UserError(f"{problem}; run both for the same number of steps, or cut the longer file")
