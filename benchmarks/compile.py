"""Seconds until a job's first training steps and answers are done: without its compiled graphs, and with them.

    python benchmarks/compile.py

Rounds of three processes each, medians of the rounds: the cache off, on and empty, on and filled. What is measured
begins behind the imports and the weights; the job is tests/compile_job.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STARTS = ("without", "first", "second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[str, list[dict[str, float]]] = {start: [] for start in STARTS}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as directory:
            for start in STARTS:
                report = run(options.layers, "0" if start == "without" else directory)
                loaded, count = report["loaded"]
                assert loaded == (count if start == "second" else 0), report["loaded"]
                seconds[start].append(report["seconds"])
    print(f"| {options.layers} layers | cache off | first start | second start | second / off |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind, name in (("training", "training step"), ("both", "and generator")):
        medians = [statistics.median(one[kind] for one in seconds[start]) for start in STARTS]
        shown = " | ".join(f"{median:.1f} s" for median in medians)
        print(f"| {name} | {shown} | {medians[2] / medians[0]:.2f} |")


def run(layers: int, cache: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINDRLHF_COMPILE_CACHE": cache}
    command = [sys.executable, str(ROOT / "tests" / "compile_job.py"), str(layers), "0.2"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
