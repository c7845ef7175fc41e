"""Writes the PPO example's products of two two-digit numbers; its sums are those of examples/grpo/make_arithmetic.py.

    python examples/ppo/make_problems.py

Two files in examples/ppo/data/, no problem in both. products_warmup.jsonl has answers to imitate;
products_train.jsonl has problems and labels only. A model of this size does not learn to multiply: products are there
because real problems are not all within reach, and the critic should know which are not.
"""

import json
import random
from pathlib import Path

SIZES = {"warmup": 400, "train": 1600}


def worked(a: int, b: int) -> str:
    units, tens = a * (b % 10), a * (b // 10)
    return f"<think>{a}*{b % 10}={units}, {a}*{b // 10}={tens}</think><answer>{a * b}</answer>"


def main() -> None:
    problems = [(a, b) for a in range(11, 100) for b in range(11, 100)]
    random.Random(0).shuffle(problems)
    directory = Path(__file__).parent / "data"
    directory.mkdir(exist_ok=True)
    start = 0
    for name, size in SIZES.items():
        with open(directory / f"products_{name}.jsonl", "w", encoding="utf-8") as file:
            for a, b in problems[start : start + size]:
                row = {"prompt": f"{a}*{b}=", "label": str(a * b)}
                if name == "warmup":
                    row["response"] = worked(a, b)
                file.write(json.dumps(row) + "\n")
        start += size


if __name__ == "__main__":
    main()
