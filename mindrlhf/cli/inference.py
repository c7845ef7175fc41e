"""What `generate`, `eval` and `chat` share: the options; and of the first two the prompts and their answers."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindrlhf.config import InferenceConfig, SamplingConfig, SourceConfig, load_config
from mindrlhf.errors import UserError

if TYPE_CHECKING:
    from mindrlhf.trainer.roles import Policy
    from mindrlhf.types import Prompt, Rollout


def add_arguments(parser: argparse.ArgumentParser, data: bool = True) -> None:
    """data: whether the command reads a file of prompts."""
    example = "sampling.temperature=0.7 sampling.max_tokens=64"
    parser.add_argument("--model", required=True, help="a Hugging Face checkpoint directory")
    if data:
        parser.add_argument("--data", help="a .json, .jsonl, .csv or .parquet file with a prompt a row")
        example += " num_generations=8 data.prompt_key=question"
    parser.add_argument("--config", help="a YAML of mindrlhf.config.InferenceConfig")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help=f"for example {example}",
    )


def read_config(arguments: argparse.Namespace) -> InferenceConfig:
    config = load_config(InferenceConfig, arguments.config, arguments.overrides)
    if getattr(arguments, "data", None):
        config.data.test = [SourceConfig(path=str(Path(arguments.data).resolve()))]
    for name in ("num_generations", "slots", "max_prompt_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: {getattr(config, name)} must be 1 or more")
    return config


@dataclass
class Answers:
    """num_generations answers a prompt, in the order of the prompts."""

    policy: "Policy"
    prompts: list["Prompt"]
    rollouts: list["Rollout"]
    texts: list[str]


def answer(model: str, config: InferenceConfig, texts: list[str]) -> Answers:
    """Answers to `texts` and to the rows of config.data.test."""
    from mindrlhf.utils.parallel import start

    start()
    from mindrlhf.data.prompts import PromptDataset
    from mindrlhf.data.templates import render_prompt
    from mindrlhf.data.tokenizers import encode
    from mindrlhf.trainer.roles import open_checkpoint
    from mindrlhf.types import Prompt
    from mindrlhf.wrapper.generator import Generator

    policy = open_checkpoint(model, head="logits")
    data, tokenizer = config.data, policy.tokenizer
    window, asked = policy.decoder.config.max_positions, config.sampling.max_tokens
    # Nobody asked for the default length, which a small model's window may not hold.
    reserved = 1 if asked == SamplingConfig().max_tokens else asked
    limit = min(config.max_prompt_tokens, max(window - reserved, 1))
    rows = PromptDataset.read(data.test, data, tokenizer, limit, Path()).prompts if data.test else []
    rendered = [render_prompt(text, data, tokenizer) for text in texts]
    ids = encode(tokenizer, rendered)
    for number, one in enumerate(ids, 1):
        if not 0 < len(one) <= limit:
            raise UserError(f"--prompt number {number}: {len(one)} tokens; 1 to {limit} fit beside the answer")
    typed = [
        Prompt(one, text, None, len(rows) + number, {data.prompt_key: given})
        for number, (one, text, given) in enumerate(zip(ids, rendered, texts, strict=True))
    ]
    prompts = rows + typed
    if not prompts:
        raise UserError("nothing to answer: give --prompt or --data")
    # No longer than the prompts need: the window of a checkpoint may be short.
    longest = max(len(prompt.ids) for prompt in prompts)
    if reserved != asked:
        config.sampling.max_tokens = min(asked, window - longest)
    stop = policy.stop_ids(config.sampling.stop)
    slots = min(config.slots, len(prompts) * config.num_generations)
    generator = Generator(policy.decoder, slots, longest, config.sampling.max_tokens, stop)
    rollouts = generator.generate(prompts, config.num_generations, config.sampling, config.seed)
    decoded = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    return Answers(policy, prompts, rollouts, decoded)


def check_output(output: str | None) -> None:
    """Before anything is computed. Raises UserError for a file that exists and a directory that does not."""
    if output and Path(output).exists():
        raise UserError(f"--output {output}: exists already; remove it or name another file")
    if output and not Path(output).resolve().parent.is_dir():
        raise UserError(f"--output {output}: no such directory; make it first")


def write_rows(output: str, rows: list[dict[str, Any]]) -> None:
    """JSON lines into a new file."""
    with open(output, "x", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def print_values(values: dict[str, float | int]) -> None:
    """One a line, names and numbers in columns."""
    for name, value in values.items():
        print(f"{name:<24}{value:10.4f}" if isinstance(value, float) else f"{name:<24}{value:10d}")
