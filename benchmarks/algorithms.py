"""Every row of the algorithms' table on the demo's task, from the same warm start, as a table for docs/algorithms.md.

python benchmarks/algorithms.py --directory runs/algorithms

A run that is there already is not run again, so the same command goes on where it was stopped. The seconds to 0.8 are
the steps to it times the seconds of a step: the median over a short run of each row, made one after the other at the
end, when nothing else should run. Compilation and evaluation are left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "grpo" / "arithmetic.yaml"
GOAL = 0.8
STEPS, EVERY, TIMED_STEPS = 30, 2, 6
COMMON = (
    "rollout.prompts_per_step=32", "trainer.keep_checkpoints=1", "warmup.steps=0", "logging.tensorboard=false",
    "logging.progress=false",
)  # fmt: skip
# What a row is given besides its defaults.
OWN: dict[str, tuple[str, ...]] = {
    "ppo": ("critic.learning_rate=5e-4", "critic.warmup_steps=2"),
    # In larger groups the second best is soon as good as the best: pass@2, of as many answers.
    "pass_at_k": ("rollout.prompts_per_step=128", "rollout.num_generations=2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the runs go")
    parser.add_argument("--rows", nargs="*", help="of the table (default: all)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run")
    arguments = parser.parse_args()
    from mindrlhf.trainer.algorithms import ALGORITHMS

    warm = warm_start(arguments.directory)
    names = arguments.rows or list(ALGORITHMS)
    lengths = f"trainer.steps={STEPS}", f"trainer.evaluate_every={EVERY}", "trainer.evaluate_rows=250"
    curves = {name: [] for name in names}
    for seed in arguments.seeds:
        for name in names:
            output = run(f"{name}-{seed}", name, seed, warm, arguments, lengths)
            curves[name].append(accuracies(output))
            print(name, seed, curves[name][-1], flush=True)
    print(f"\n| algorithm | held-out accuracy after {STEPS} steps | steps to {GOAL} | seconds to {GOAL} |")
    print("|---|---|---|---|")
    for name in names:
        timed = f"trainer.steps={TIMED_STEPS}", "data.test=[]"
        print(line(name, curves[name], step_seconds(run(f"{name}-timed", name, 1, warm, arguments, timed))), flush=True)


def mindrlhf(command: str, output: Path, *overrides: str) -> None:
    """One command of the suite, in a process of its own; what it prints goes into output.log."""
    output.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "mindrlhf", command, "--config", str(DEMO), f"output={output}", *overrides]
    with open(output.with_suffix(".log"), "w", encoding="utf-8") as log:
        subprocess.run(line, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)


def warm_start(directory: Path) -> Path:
    """The policy behind the demo's warm-up, which its first checkpoint holds as the reference."""
    checkpoint = directory / "warm" / "checkpoints" / "step-000000"
    if not checkpoint.is_dir():
        mindrlhf("grpo", directory / "warm", "trainer.steps=1", "logging.progress=false")
    return checkpoint.resolve()


def run(folder: str, name: str, seed: int, warm: Path, arguments: argparse.Namespace, lengths: tuple[str, ...]) -> Path:
    output = (arguments.directory / folder).resolve()
    if (output / "summary.json").is_file():
        return output
    own = (f"algorithm.name={name}", f"seed={seed}", f"model.path={warm}", *OWN.get(name, ()))
    mindrlhf("ppo" if name == "ppo" else "grpo", output, *COMMON, *own, *lengths, *arguments.overrides)
    return output


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]


def accuracies(directory: Path) -> dict[int, float]:
    """Held-out accuracy by step."""
    return {line["step"]: line["eval/accuracy"] for line in lines(directory) if "eval/accuracy" in line}


def step_seconds(directory: Path) -> float:
    """Median without the first steps, which compile."""
    timed = [line for line in lines(directory) if "seconds/train" in line][2:]
    return statistics.median(sum(v for k, v in line.items() if k.startswith("seconds/")) for line in timed)


def line(name: str, curves: list[dict[int, float]], seconds: float) -> str:
    reached = [next((step for step in sorted(curve) if curve[step] >= GOAL), None) for curve in curves]
    cells = (
        ", ".join(f"{curve[max(curve)]:.3f}" for curve in curves),
        ", ".join("-" if step is None else str(step) for step in reached),
        ", ".join("-" if step is None else f"{step * seconds:.0f}" for step in reached),
    )
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
