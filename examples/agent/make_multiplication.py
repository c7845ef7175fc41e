"""Writes the agent's problems: products of a three-digit and a two-digit number.

    python examples/agent/make_multiplication.py

Three files in examples/agent/data/, no problem in two of them. multiplication_warmup.jsonl has answers to imitate: a
minority calls the calculator of calculator.py, the others state the product at once, which a small model cannot learn.
multiplication_train.jsonl has problems and labels only: what reinforcement learning sees, which has to find out by
itself that calling pays. multiplication_test.jsonl is held out.
"""

import json
import random
from pathlib import Path

SIZES = {"warmup": 900, "train": 4000, "test": 200}
CALLING = 300  # of the warm-up's answers


def calling(a: int, b: int) -> str:
    """What the model writes, with what the calculator writes behind the bracket."""
    return f"calc({a}*{b}) {a * b}\n{stated(a, b)}"


def stated(a: int, b: int) -> str:
    return f"<answer>{a * b}</answer>"


def main() -> None:
    problems = [(a, b) for a in range(100, 1000) for b in range(10, 100)]
    random.Random(0).shuffle(problems)
    directory = Path(__file__).parent / "data"
    directory.mkdir(exist_ok=True)
    start = 0
    for name, size in SIZES.items():
        with open(directory / f"multiplication_{name}.jsonl", "w", encoding="utf-8") as file:
            for number, (a, b) in enumerate(problems[start : start + size]):
                row = {"prompt": f"{a}*{b}=", "label": str(a * b)}
                if name == "warmup":
                    row["response"] = calling(a, b) if number < CALLING else stated(a, b)
                file.write(json.dumps(row) + "\n")
        start += size


if __name__ == "__main__":
    main()
