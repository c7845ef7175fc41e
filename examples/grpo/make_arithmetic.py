"""Writes the demo's problems: sums of two two-digit numbers.

    python examples/grpo/make_arithmetic.py

Three files in examples/grpo/data/, no problem in two of them. arithmetic_warmup.jsonl has answers to imitate, of two
kinds: some are worked digit by digit, more of them just state the sum, which is harder to get right.
arithmetic_train.jsonl has problems and labels only: what reinforcement learning sees, which has to find out by itself
that working pays. arithmetic_test.jsonl is held out.
"""

import json
import random
from pathlib import Path

SIZES = {"warmup": 900, "train": 4000, "test": 500}
WORKED = 400  # of the warm-up's answers


def worked(a: int, b: int) -> str:
    """47, 85 -> the units, then the tens with the carry, then the sum."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    carry = "+1" if units >= 10 else ""
    steps = f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{carry}={tens}"
    return f"<think>{steps}</think>{stated(a, b)}"


def stated(a: int, b: int) -> str:
    return f"<answer>{a + b}</answer>"


def main() -> None:
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(problems)
    directory = Path(__file__).parent / "data"
    directory.mkdir(exist_ok=True)
    start = 0
    for name, size in SIZES.items():
        with open(directory / f"arithmetic_{name}.jsonl", "w", encoding="utf-8") as file:
            for number, (a, b) in enumerate(problems[start : start + size]):
                row = {"prompt": f"{a}+{b}=", "label": str(a + b)}
                if name == "warmup":
                    row["response"] = worked(a, b) if number < WORKED else stated(a, b)
                file.write(json.dumps(row) + "\n")
        start += size


if __name__ == "__main__":
    main()
