"""Writes the reward model's data: two answers to a sum, of which a careful reader would take the first.

    python examples/rlhf/make_comparisons.py

Two files in examples/rlhf/data/, comparisons_train.jsonl and comparisons_test.jsonl. Their problems are in none of the
files of examples/grpo/make_arithmetic.py, from which the other two stages have theirs. The better answer is right, the
worse one is wrong, both of the kinds that the model of the first stage writes: what it works is mostly right, what it
states without working mostly wrong.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "grpo"))
from make_arithmetic import SIZES, stated, worked

PAIRS = {"train": 2400, "test": 300}
WORKED = {True: 0.85, False: 0.3}  # share of the right answers that are worked, and of the wrong ones


def shifted(number: int, draw: random.Random) -> int:
    """Another number, most often a near one; never below 0."""
    steps = [1, -1, 1, -1, 2, -2, 10, -10, 10, -10, 20, -20, 100, -100]
    return draw.choice([number + step for step in steps if number + step >= 0])


def slipped(a: int, b: int, draw: random.Random) -> str:
    """A worked answer with one slip, which what follows it takes over."""
    units, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    tens = a // 10 + b // 10 + carry
    right = worked(a, b)
    kind = draw.choice(("units", "tens", "carry", "answer", "digit"))
    if kind == "answer":
        return right.replace(f"<answer>{a + b}<", f"<answer>{shifted(a + b, draw)}<")
    digits = [a % 10, b % 10, a // 10, b // 10]
    if kind == "digit":  # of the problem, misread
        place = draw.randrange(4)
        digits[place] = draw.choice([digit for digit in range(place // 2, 10) if digit != digits[place]])
        return worked(digits[2] * 10 + digits[0], digits[3] * 10 + digits[1])
    if kind == "units":
        units = draw.choice([other for other in (units - 2, units - 1, units + 1, units + 2) if 0 <= other <= 18])
        carry = units // 10
    elif kind == "carry":
        carry = 1 - carry
    tens = digits[2] + digits[3] + carry
    if kind == "tens":
        tens = draw.choice([other for other in (tens - 2, tens - 1, tens + 1, tens + 2) if other >= 1])
    steps = f"{digits[0]}+{digits[1]}={units}, {digits[2]}+{digits[3]}{'+1' * carry}={tens}"
    return f"<think>{steps}</think>{stated(10 * tens + units % 10, 0)}"


def answer(a: int, b: int, right: bool, draw: random.Random) -> str:
    if draw.random() < WORKED[right]:
        return worked(a, b) if right else slipped(a, b, draw)
    return stated(a, b) if right else stated(shifted(a + b, draw), 0)


def main() -> None:
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(problems)  # as make_arithmetic.py does
    start = sum(SIZES.values())
    directory = Path(__file__).parent / "data"
    directory.mkdir(exist_ok=True)
    draw = random.Random(0)
    for name, size in PAIRS.items():
        with open(directory / f"comparisons_{name}.jsonl", "w", encoding="utf-8") as file:
            for a, b in problems[start : start + size]:
                chosen, rejected = (answer(a, b, right, draw) for right in (True, False))
                file.write(json.dumps({"prompt": f"{a}+{b}=", "chosen": chosen, "rejected": rejected}) + "\n")
        start += size


if __name__ == "__main__":
    main()
