"""`mindrlhf generate`: answers of a checkpoint."""

import argparse
import json
from pathlib import Path

from mindrlhf.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mindrlhf.cli import inference

    parser.description = "Answer prompts with a checkpoint."
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--output", help="write the answers as JSON lines here instead of printing them")
    inference.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from mindrlhf.cli import inference

    if arguments.output and Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output}: exists already; remove it or name another file")
    if arguments.output and not Path(arguments.output).resolve().parent.is_dir():
        raise UserError(f"--output {arguments.output}: no such directory; make it first")
    config = inference.read_config(arguments)
    answers = inference.answer(arguments.model, config, arguments.prompt)
    rows = [
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
    if arguments.output:
        with open(arguments.output, "x", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{len(rows)} answers in {arguments.output}")
    else:
        for row in rows:
            print(row["prompt"] + row["completion"])
    return 0
