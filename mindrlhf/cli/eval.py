"""`mindrlhf eval`: accuracy, pass@k and maj@k of a checkpoint on problems with labels."""

import argparse
import json

from mindrlhf.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mindrlhf.cli import inference

    parser.description = (
        "Mean rewards, pass@k and maj@k of a checkpoint. One answer a problem is greedy unless sampling.temperature is "
        "given; pass@k (one of k answers is right) and maj@k (the most frequent one is) want num_generations=N, N >= k."
    )
    parser.add_argument("--k", default="1", help="comma-separated k of pass@k and maj@k (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    inference.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from mindrlhf.cli import inference

    try:
        ks = [int(k) for k in arguments.k.split(",")]
    except ValueError:
        raise UserError(f"--k {arguments.k}: whole numbers with commas between, such as 1,4") from None
    config = inference.read_config(arguments)
    if not config.data.test:
        raise UserError("nothing to evaluate on: give --data FILE")
    given = any(override.startswith("sampling.temperature=") for override in arguments.overrides)
    if config.num_generations == 1 and not given and not arguments.config:
        config.sampling.temperature = 0.0
    for k in ks:
        if not 1 <= k <= config.num_generations:
            raise UserError(f"--k {k}: must be between 1 and num_generations, {config.num_generations}")
    values = evaluate(arguments.model, config, ks)
    if arguments.json:
        print(json.dumps(values))
    else:
        inference.print_values(values)
    return 0


def evaluate(model: str, config, ks: list[int]) -> dict[str, float | int]:
    """Means of the rewards; pass@k and maj@k by the first reward function, whose 1 means right."""
    from pathlib import Path

    import numpy as np

    from mindrlhf.cli import inference
    from mindrlhf.trainer.evaluation import evaluation_metrics
    from mindrlhf.trainer.reward_parts import open_rewards

    rewards = open_rewards(config.rewards, Path())
    answers = inference.answer(model, config, [])
    count = config.num_generations
    repeated = [prompt for prompt in answers.prompts for _ in range(count)]
    _, parts = rewards(repeated, answers.texts)
    first = parts[rewards.parts[0][0]]
    return {
        "problems": len(answers.prompts),
        "answers_per_problem": count,
        **{name: float(values.mean()) for name, values in parts.items()},
        **evaluation_metrics(first, answers.texts, count, ks),
        "response_tokens": float(np.mean([len(rollout.response_ids) for rollout in answers.rollouts])),
    }
