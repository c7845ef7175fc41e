"""A tiny job of every offline stage: a one-layer model and two dozen rows that can be learnt."""

import json
from pathlib import Path

DECODER = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "initializer_range": 0.1,
}  # fmt: skip
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def rows():
    """Numbers and their spelling, right and wrong, with the columns of every stage."""
    for number in range(24):
        digits = f"{number * 37 % 1000:0{1 + number % 3}d}"
        right = [WORDS[int(digit)] for digit in digits]
        wrong = [WORDS[(int(digit) + 1 + place) % 10] for place, digit in enumerate(digits)]
        liked = number % 3 != 0
        steps = [(right if (place + number) % 2 else wrong)[place] for place in range(len(digits))]
        yield {
            "prompt": f"{digits}=",
            "response": " ".join(right if liked else wrong),
            "label": liked,
            "chosen": " ".join(right),
            "rejected": " ".join(wrong),
            "score": 0.1 * (number % 4),
            "input": f"{digits}=" + "".join(f"{word};" for word in steps),
            "labels": ["+" if word == correct else "-" for word, correct in zip(steps, right, strict=True)],
        }


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


# stage -> (config class, trainer, overrides)
STAGES = {
    "sft": ("SFTConfig", "SFTTrainer", ["data.response_key=chosen"]),
    "rm": ("RewardConfig", "RewardTrainer", ["data.margin_key=score", "loss.centering_coef=0.01"]),
    "prm": (
        "PRMConfig", "PRMTrainer",
        ["steps.placeholder=;", "data.label_key=labels", "data.prompt_key="],
    ),
    "dpo": ("DPOConfig", "DPOTrainer", ["loss.nll_coef=0.1"]),
    "kto": ("KTOConfig", "KTOTrainer", ["loss.undesirable_weight=1.2"]),
    "kto_pair": ("KTOConfig", "KTOTrainer", ["loss.name=kto_pair"]),
    "kd": ("KDConfig", "KDTrainer", ["data.response_key=chosen", "distillation.teacher=TEACHER"]),
}  # fmt: skip


def losses(trainer, steps=20):
    """Of the next steps, without the run's files."""
    if trainer.step == 0:
        trainer.prepare(None)
    return [trainer.run_step()[0]["loss"] for _ in range(steps)]


def weights(trainer):
    return {name: array.copy() for name, array in trainer.policy.decoder.tensors()}
