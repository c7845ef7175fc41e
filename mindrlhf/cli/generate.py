"""`mindrlhf generate`: answers of a checkpoint, and data sets made of the best of them."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindrlhf.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from mindrlhf.cli.inference import Answers
    from mindrlhf.config import InferenceConfig

EPILOG = """--post-process writes a data set for the next round of training; it takes num_generations answers a prompt,
rewarded by --reward-model or by the config's `rewards`:
  rs        the best answer of each prompt (rejection sampling, best of n), for `mindrlhf sft`
  csft      every answer with its reward told behind the prompt, for `mindrlhf sft`
  iter_dpo  the best against the worst answer of each prompt, for `mindrlhf dpo`"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mindrlhf.cli import inference
    from mindrlhf.data.selection import SELECTIONS

    parser.description = "Answer prompts with a checkpoint."
    parser.epilog = EPILOG
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--output", help="write the answers as JSON lines here instead of printing them")
    parser.add_argument("--post-process", choices=tuple(SELECTIONS), help="write a data set instead, see below")
    parser.add_argument("--reward-model", metavar="DIR", help="a reward model's checkpoint, for --post-process")
    parser.add_argument("--normalize-reward", action="store_true", help="(score - mean) / std of the reward model")
    inference.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from mindrlhf.cli import inference

    inference.check_output(arguments.output)
    config = inference.read_config(arguments)
    if arguments.reward_model or not arguments.post_process:
        config.data.label_key = ""  # labels are for reward functions
    if not arguments.post_process and (arguments.reward_model or arguments.normalize_reward):
        raise UserError("--reward-model and --normalize-reward are for --post-process; add it, or remove them")
    if arguments.normalize_reward and not arguments.reward_model:
        raise UserError("--normalize-reward: needs --reward-model, whose mean and deviation it uses")
    if arguments.post_process == "iter_dpo" and config.num_generations < 2:
        raise UserError(
            f"num_generations: {config.num_generations}; iter_dpo compares answers, so 2 or more are needed"
        )
    reward = _rewarder(arguments, config) if arguments.post_process else None  # before the work: it may be misspelt
    answers = inference.answer(arguments.model, config, arguments.prompt)
    rows = _selected(arguments.post_process, config, answers, reward(answers)) if reward else _rows(answers)
    if arguments.output:
        inference.write_rows(arguments.output, rows)
        what = "rows" if arguments.post_process else "answers"
        print(f"{len(rows)} {what} in {arguments.output}")
    elif arguments.post_process:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    else:
        for row in rows:
            print(row["prompt"] + row["completion"])
    return 0


def _rows(answers: "Answers") -> list[dict[str, Any]]:
    return [
        {
            "prompt": answers.prompts[rollout.group].text,
            "completion": text,
            "prompt_ids": rollout.prompt_ids.tolist(),
            "ids": rollout.response_ids.tolist(),
            "tokens": len(rollout.response_ids),
            "finished": rollout.finished,
            "logprob": round(float(rollout.sampled_logprobs.sum()), 4),
        }
        for rollout, text in zip(answers.rollouts, answers.texts, strict=True)
    ]


def _selected(kind: str, config: "InferenceConfig", answers: "Answers", rewards: "np.ndarray") -> list[dict[str, Any]]:
    from mindrlhf.data.selection import SELECTIONS, RewardedAnswers

    count, rows = config.num_generations, []
    for number, prompt in enumerate(answers.prompts):
        span = slice(number * count, (number + 1) * count)
        given = prompt.row[config.data.prompt_key]  # not as the template rendered it: training renders it again
        rows += SELECTIONS[kind](RewardedAnswers(given, answers.texts[span], rewards[span]))
    return rows


def _rewarder(arguments: argparse.Namespace, config: "InferenceConfig") -> "Callable[[Answers], np.ndarray]":
    """From answers to their rewards, [answers] float in their order."""
    from mindrlhf.config import RewardFunctionConfig
    from mindrlhf.trainer.reward_parts import open_rewards

    parts = config.rewards
    if arguments.reward_model:
        parts = [RewardFunctionConfig(model=arguments.reward_model, normalize_reward=arguments.normalize_reward)]
    rewards = open_rewards(parts, Path())

    def reward(answers: "Answers") -> "np.ndarray":
        repeated = [prompt for prompt in answers.prompts for _ in range(config.num_generations)]
        return rewards(repeated, answers.texts)[0]

    return reward
