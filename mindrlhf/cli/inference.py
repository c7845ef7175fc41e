"""What `generate` and `eval` share: a checkpoint, prompts, a generator and its answers."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mindrlhf.config import InferenceConfig, SamplingConfig, SourceConfig, load_config
from mindrlhf.errors import UserError

if TYPE_CHECKING:
    from mindrlhf.trainer.roles import Policy
    from mindrlhf.types import Prompt, Rollout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a Hugging Face checkpoint directory")
    parser.add_argument("--data", help="a .json, .jsonl, .csv or .parquet file with a prompt a row")
    parser.add_argument("--config", help="a YAML of mindrlhf.config.InferenceConfig")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="for example sampling.temperature=0.7 sampling.max_tokens=64 num_generations=8 data.prompt_key=question",
    )


def read_config(arguments: argparse.Namespace) -> InferenceConfig:
    config = load_config(InferenceConfig, arguments.config, arguments.overrides)
    if arguments.data:
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

    policy = open_checkpoint(model)
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
    typed = [Prompt(i, t, None, len(rows) + n) for n, (i, t) in enumerate(zip(ids, rendered, strict=True))]
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
