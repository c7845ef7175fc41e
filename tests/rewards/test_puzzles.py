"""The puzzles that examples/grpo/make_knights_and_knaves.py writes."""

import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mindrlhf.rewards.logic import knights_and_knaves_reward

SCRIPT = Path(__file__).parents[2] / "examples" / "grpo" / "make_knights_and_knaves.py"


@pytest.fixture(scope="module")
def make_rows():
    return runpy.run_path(str(SCRIPT))["make_rows"]


def worlds_that_fit(prompt):
    """Read from the English of the puzzle: every {name: is a knight} in which knights are right and knaves are not."""
    names = re.search(r"lie\. (.*?) are each", prompt)[1].replace(" and ", ", ").split(", ")
    said = dict(re.findall(r'(\w+) says: "(.*?)\."', prompt))
    assert list(said) == names
    for values in itertools.product([True, False], repeat=len(names)):
        world = dict(zip(names, values, strict=True))
        if all(is_true(said[name], world) == world[name] for name in names):
            yield world


def is_true(sentence, world):
    if match := re.fullmatch("if (.*) then (.*)", sentence):
        return is_true(match[2], world) if is_true(match[1], world) else True
    for words, join in ((" if and only if ", lambda a, b: a is b), (" and ", min), (" or ", max)):
        if words in sentence:
            return join(*(is_true(part, world) for part in sentence.split(words)))
    name, role = re.fullmatch(r"(\w+) is a (knight|knave)", sentence).groups()
    return world[name] if role == "knight" else not world[name]


def test_every_puzzle_has_one_solution_and_it_is_the_label(make_rows):
    rows = make_rows(200, [2, 3, 4, 5], 0)
    for row in rows:
        (world,) = worlds_that_fit(row["prompt"])
        answer = ", ".join(f"{name}: {'knight' if knight else 'knave'}" for name, knight in world.items())
        assert knights_and_knaves_reward([f"<answer>{answer}</answer>"], [row["label"]]) == [1]
    assert [row["label"].count("is a") for row in rows[:8]] == [2, 3, 4, 5] * 2
    assert len({row["prompt"] for row in rows}) == len(rows)
    roles = " ".join(row["label"] for row in rows)
    assert 0.3 < roles.count("knave") / roles.count(" is a ") < 0.7


def test_the_seed_decides(make_rows):
    assert make_rows(20, [3], 1) == make_rows(20, [3], 1) != make_rows(20, [3], 2)


def test_the_files(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--people",
        "2",
        "3",
        "--train",
        "8",
        "--test",
        "4",
        "--output",
        tmp_path / "new",
    ]
    subprocess.run(command, check=True, timeout=60)
    train, test = (
        [json.loads(line) for line in (tmp_path / "new" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    assert len(train) == 8 and len(test) == 4
    assert all(row.keys() == {"prompt", "label"} for row in train + test)


def test_too_many_puzzles(make_rows):
    with pytest.raises(SystemExit, match="there are no 3000 puzzles of 2 people: ask for fewer"):
        make_rows(3000, [2], 0)
