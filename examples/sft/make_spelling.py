"""The data of the offline examples: four-digit numbers, spelt out digit by digit behind one of four openings.

    python examples/sft/make_spelling.py

writes data/ beside each example's YAML. The held-out numbers are in no training file. An answer's opening is drawn at
random, so no model can do better on examples/sft than ln 4 an answer; everything else can be learnt.
"""

import json
import random
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPENINGS = ("Sure", "Well", "So", "Okay")
HELD_OUT = 200


def spelt(digits: str) -> list[str]:
    return [WORDS[int(digit)] for digit in digits]


def mistaken(words: list[str], draw: random.Random) -> list[str]:
    """One or two of the words are others."""
    wrong = list(words)
    for place in draw.sample(range(len(words)), draw.choice((1, 2))):
        wrong[place] = draw.choice([word for word in WORDS if word != words[place]])
    return wrong


def answer(opening: str, words: list[str]) -> str:
    return " ".join([opening, *words])


def sft(digits: str, draw: random.Random) -> dict:
    return {"prompt": f"{digits}=", "response": answer(draw.choice(OPENINGS), spelt(digits))}


def reward_model(digits: str, draw: random.Random) -> dict:
    """The right spelling against a wrong one."""
    opening, words = draw.choice(OPENINGS), spelt(digits)
    chosen, rejected = answer(opening, words), answer(opening, mistaken(words, draw))
    return {"prompt": f"{digits}=", "chosen": chosen, "rejected": rejected}


def dpo(digits: str, draw: random.Random) -> dict:
    """Somebody prefers answers that begin with Sure."""
    words = spelt(digits)
    rejected = answer(draw.choice(OPENINGS[1:]), words)
    return {"prompt": f"{digits}=", "chosen": answer("Sure", words), "rejected": rejected}


def kto(digits: str, draw: random.Random) -> dict:
    """The same taste, told of one answer at a time."""
    opening = draw.choice((OPENINGS[0], draw.choice(OPENINGS[1:])))
    return {"prompt": f"{digits}=", "response": answer(opening, spelt(digits)), "label": opening == "Sure"}


def prm(digits: str, draw: random.Random) -> dict:
    """A `;` behind each word, and whether the word is right."""
    right = spelt(digits)
    words = mistaken(right, draw) if draw.random() < 0.8 else right
    labels = ["+" if word == correct else "-" for word, correct in zip(words, right, strict=True)]
    return {"input": f"{digits}=" + "".join(f" {word};" for word in words), "label": labels}


def lora(digits: str, draw: random.Random) -> dict:
    """Another task for the same model: the digits backwards."""
    return {"prompt": f"{digits}<", "response": answer("Sure", spelt(digits[::-1]))}


# folder -> (row maker, training rows)
DATA = {"sft": (sft, 3000), "reward_model": (reward_model, 3000), "dpo": (dpo, 1000), "kto": (kto, 1000),
        "prm": (prm, 3000), "lora": (lora, 3000)}  # fmt: skip


def main() -> None:
    numbers = [f"{number:04d}" for number in range(10000)]
    random.Random(0).shuffle(numbers)
    for folder, (make, count) in DATA.items():
        draw = random.Random(folder)
        parts = {"test": numbers[:HELD_OUT], "train": numbers[HELD_OUT : HELD_OUT + count]}
        (EXAMPLES / folder / "data").mkdir(exist_ok=True)
        for part, chosen in parts.items():
            lines = [json.dumps(make(digits, draw)) + "\n" for digits in chosen]
            (EXAMPLES / folder / "data" / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
