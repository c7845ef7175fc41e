"""`mindrlhf bench generate`: how much the KV cache is worth."""

import argparse
import json
import statistics
import time

from mindrlhf.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokens per second of cached generation against full recomputation of every token, side by side, greedy, "
        "compilation apart. Without --model: a random Qwen2 shape, 256 wide, 4 layers, vocabulary 4096."
    )
    parser.add_argument("what", choices=["generate"])
    parser.add_argument("--model", help="a Hugging Face checkpoint directory")
    parser.add_argument("--tokens", type=int, default=512, help="tokens an answer (default: 512)")
    parser.add_argument("--batch", type=int, default=4, help="answers at the same time (default: 4)")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="tokens a prompt (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="cached runs, of which the median counts (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    for name in ("tokens", "batch", "prompt_tokens", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(arguments, name)} must be 1 or more")
    report = measure(arguments)
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            shown = f"{value:.1f}" if isinstance(value, float) else str(value)
            print(f"{name.replace('_', ' '):<32}{shown:>12}")
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, float | int | bool]:
    """Both generators on the same prompts; the answers are compared token by token."""
    from mindrlhf.utils.parallel import start

    start()
    import numpy as np

    from mindrlhf.config import SamplingConfig
    from mindrlhf.types import Prompt
    from mindrlhf.wrapper.generator import Generator
    from mindrlhf.wrapper.recompute import RecomputeGenerator

    decoder = _decoder(arguments.model, arguments.prompt_tokens + arguments.tokens)
    random = np.random.default_rng(0)
    shape = (arguments.batch, arguments.prompt_tokens)
    ids = random.integers(0, decoder.config.vocab_size, shape).astype(np.int32)
    prompts = [Prompt(row, "", None, key) for key, row in enumerate(ids)]
    generator = Generator(decoder, arguments.batch, arguments.prompt_tokens, arguments.tokens)
    sampling = SamplingConfig(temperature=0.0, max_tokens=arguments.tokens)

    clock = time.perf_counter()
    generator.generate(prompts, 1, SamplingConfig(temperature=0.0, max_tokens=1), 0)
    compiled = time.perf_counter() - clock
    cached_seconds = []
    for _ in range(arguments.rounds):
        clock = time.perf_counter()
        cached = [rollout.response_ids.tolist() for rollout in generator.generate(prompts, 1, sampling, 0)]
        cached_seconds.append(time.perf_counter() - clock)
    oracle = RecomputeGenerator(decoder)
    oracle.compile(arguments.batch, arguments.prompt_tokens + arguments.tokens)
    clock = time.perf_counter()
    recomputed = oracle.generate(list(ids), arguments.tokens)
    recomputed_seconds = time.perf_counter() - clock
    tokens, seconds = arguments.batch * arguments.tokens, statistics.median(cached_seconds)
    return {
        "answers": arguments.batch,
        "tokens_an_answer": arguments.tokens,
        "compile_seconds": compiled,
        "cached_tokens_per_second": tokens / seconds,
        "recomputed_tokens_per_second": tokens / recomputed_seconds,
        "times_faster": recomputed_seconds / seconds,
        "same_tokens": cached == recomputed,
    }


def _decoder(model: str | None, window: int):
    from mindrlhf.models.config import DecoderConfig
    from mindrlhf.models.decoder import Decoder, random_weights
    from mindrlhf.trainer.roles import open_checkpoint

    if model:
        return open_checkpoint(model, head="logits").decoder
    config = DecoderConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4, num_kv_heads=4,
        head_dim=64, max_positions=window, qkv_bias=True, tie_embeddings=True, model_type="qwen2",
    )  # fmt: skip
    return Decoder(config, random_weights(config, 0))
