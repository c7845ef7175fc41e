"""Writes the demo's problems: additions of two-digit numbers, worked digit by digit.

    python examples/grpo/make_arithmetic.py

Three files in examples/grpo/data/, no problem in two of them: arithmetic_warmup.jsonl (few, with worked answers),
arithmetic_train.jsonl (problems and labels only: what reinforcement learning sees) and arithmetic_test.jsonl (held
out).
"""

import json
import random
from pathlib import Path

SIZES = {"warmup": 80, "train": 4000, "test": 500}


def worked(a: int, b: int) -> str:
    """47, 85 -> the units, then the tens with the carry, then the sum."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    carry = "+1" if units >= 10 else ""
    steps = f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{carry}={tens}"
    return f"<think>{steps}</think><answer>{a + b}</answer>"


def main() -> None:
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(problems)
    directory = Path(__file__).parent / "data"
    directory.mkdir(exist_ok=True)
    start = 0
    for name, size in SIZES.items():
        with open(directory / f"arithmetic_{name}.jsonl", "w", encoding="utf-8") as file:
            for a, b in problems[start : start + size]:
                row = {"prompt": f"{a}+{b}=", "label": str(a + b)}
                if name == "warmup":
                    row["response"] = worked(a, b)
                file.write(json.dumps(row) + "\n")
        start += size


if __name__ == "__main__":
    main()
