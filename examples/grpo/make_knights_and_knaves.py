"""Writes knights-and-knaves puzzles, each with exactly one solution, as the reward `knights_and_knaves` reads them.

    python examples/grpo/make_knights_and_knaves.py --people 2 3 4 5 --train 2000 --test 200 --output runs/puzzles

Two files, train.jsonl and test.jsonl, with the columns prompt and label. No two puzzles in them are made of the same
statements, with other names neither. The same arguments write the same files.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

NAMES = ["Zoey", "Oliver", "Amelia", "Liam", "Ella", "Noah", "Ava", "Jack", "Mia", "Henry", "Sofia", "Logan"]
PUZZLE = """Knights always tell the truth, and knaves always lie. {people} are each a knight or a knave. {statements} \
Who is what? Answer in the form <answer>{form}</answer>."""
MOST_ATTEMPTS = 10_000  # in a row without a new puzzle: few people have few of them

# A statement is ("knight", i), ("knave", i), or one of the connectives below with two statements.
CONNECTIVES = {
    "and": ("{0} and {1}", lambda a, b: a and b),
    "or": ("{0} or {1}", lambda a, b: a or b),
    "if": ("if {0} then {1}", lambda a, b: not a or b),
    "iff": ("{0} if and only if {1}", lambda a, b: a == b),
}


def holds(statement: tuple, world: tuple[bool, ...]) -> bool:
    """Whether a statement is true where world[i] says if person i is a knight."""
    kind, *parts = statement
    if kind in CONNECTIVES:
        return CONNECTIVES[kind][1](*(holds(part, world) for part in parts))
    return world[parts[0]] == (kind == "knight")


def solutions(statements: list[tuple]) -> list[tuple[bool, ...]]:
    """Every world in which exactly the knights' statements are true; statements[i] is what person i says."""
    worlds = itertools.product([True, False], repeat=len(statements))
    return [world for world in worlds if all(holds(s, world) == w for s, w in zip(statements, world, strict=True))]


def make_puzzle(people: int, generator: random.Random) -> tuple[list[tuple], tuple[bool, ...]]:
    """What each of them says, and the only solution."""
    while True:
        statements = [make_statement(people, generator) for _ in range(people)]
        found = solutions(statements)
        if len(found) == 1:
            return statements, found[0]


def make_statement(people: int, generator: random.Random) -> tuple:
    """About one person, or in two cases of three a connective about two different ones."""
    first, second = ((generator.choice(["knight", "knave"]), i) for i in generator.sample(range(people), 2))
    kind = generator.choice([None, *generator.sample(sorted(CONNECTIVES), 2)])
    return (kind, first, second) if kind else first


def say(statement: tuple, names: list[str]) -> str:
    kind, *parts = statement
    if kind in CONNECTIVES:
        return CONNECTIVES[kind][0].format(*(say(part, names) for part in parts))
    return f"{names[parts[0]]} is a {kind}"


def to_row(statements: list[tuple], world: tuple[bool, ...], names: list[str]) -> dict[str, str]:
    said = [f'{name} says: "{say(statement, names)}."' for name, statement in zip(names, statements, strict=True)]
    form = ", ".join(f"({i}) {name} is a ..." for i, name in enumerate(names, 1))
    people = f"{', '.join(names[:-1])} and {names[-1]}"
    roles = ["knight" if knight else "knave" for knight in world]
    label = [f"({i}) {name} is a {role}" for i, (name, role) in enumerate(zip(names, roles, strict=True), 1)]
    return {
        "prompt": PUZZLE.format(people=people, statements=" ".join(said), form=form),
        "label": "\n".join(label),
    }


def make_rows(count: int, people: list[int], seed: int) -> list[dict[str, str]]:
    """Puzzles that differ in more than their names, the numbers of people in turn."""
    generator = random.Random(seed)
    rows: list[dict[str, str]] = []
    seen: set[tuple] = set()
    attempts = 0
    while len(rows) < count:
        number = people[len(rows) % len(people)]
        statements, world = make_puzzle(number, generator)
        attempts += 1
        if tuple(statements) not in seen:
            seen.add(tuple(statements))
            rows.append(to_row(statements, world, generator.sample(NAMES, number)))
            attempts = 0
        elif attempts == MOST_ATTEMPTS:
            raise SystemExit(f"there are no {count} puzzles of {number} people: ask for fewer, or for more --people")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    people = range(2, 6)
    parser.add_argument("--people", type=int, nargs="+", default=[*people], choices=people, help="in a puzzle")
    parser.add_argument("--train", type=int, default=2000, help="puzzles to train on")
    parser.add_argument("--test", type=int, default=200, help="held-out puzzles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data" / "knights_and_knaves")
    arguments = parser.parse_args()
    rows = make_rows(arguments.train + arguments.test, arguments.people, arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": rows[: arguments.train], "test": rows[arguments.train :]}.items():
        with open(arguments.output / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)


if __name__ == "__main__":
    main()
