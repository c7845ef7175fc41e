"""A Qwen2.5-0.5B shape end to end: written as a sharded checkpoint, loaded, 4 prompts x 4 answers of 32 tokens, one
GRPO step, saved. Each phase's seconds and peak of resident memory; compilation apart, as the difference between a
phase's first and second run.

    python benchmarks/real_size.py --output real_size.json

Needs 6 GB of disk below --directory, given back at the end. --kl-coef over 0 adds the reference policy's 2 GB.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

SHAPE = {  # Qwen2.5-0.5B's config.json
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
}  # fmt: skip
PROMPTS, ANSWERS, TOKENS = 4, 4, 32


class Phases:
    """Seconds and peak resident memory, a row a phase."""

    def __init__(self):
        self.rows: list[dict[str, float | str]] = []

    def __call__(self, name: str, function):
        from mindrlhf.utils.memory import peak_rss, reset_peak_rss

        reset_peak_rss()
        start = time.perf_counter()
        result = function()
        seconds = round(time.perf_counter() - start, 2)
        row = {"phase": name, "seconds": seconds, "peak_gib": round(peak_rss() / 2**30, 2)}
        self.rows.append(row)
        print(f"{name:<34}{row['seconds']:>9.2f} s {row['peak_gib']:>8.2f} GiB", flush=True)
        return result

    def seconds(self, name: str) -> float:
        return next(row["seconds"] for row in self.rows if row["phase"] == name)


def even_reward(completions, **columns):
    """The share of even characters: random weights earn something, and answers differ."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1) for text in completions]


def write_checkpoint(directory: Path) -> None:
    """Random weights, four shards, one tensor in memory at a time; a small tokenizer."""
    from mindrlhf.data.tokenizers import build_tokenizer, load_tokenizer
    from mindrlhf.models.config import DecoderConfig
    from mindrlhf.models.decoder import random_weights
    from mindrlhf.models.shapes import expected_shapes
    from mindrlhf.utils.checkpoint import write_model

    text = directory / "text.jsonl"
    directory.mkdir(parents=True)
    text.write_text("".join(json.dumps({"prompt": f"{n}+{n}=", "label": str(2 * n)}) + "\n" for n in range(100)))
    build_tokenizer([text], 300, directory / "tokenizer")
    config = DecoderConfig.from_hf(SHAPE)
    weights = random_weights(config, 0)
    tensors = [(name, shape, lambda name=name: weights(name)) for name, shape in expected_shapes(config).items()]
    tokenizer = load_tokenizer(directory / "tokenizer")
    generation_config = {"eos_token_id": tokenizer.eos_token_id}
    write_model(directory / "model", config, tensors, tokenizer, generation_config, shard_bytes=6e8)


def open_trainer(directory: Path, kl_coef: float):
    from mindrlhf.config import GRPOConfig, load_config
    from mindrlhf.models.decoder import Decoder
    from mindrlhf.trainer.grpo import GRPOTrainer
    from mindrlhf.wrapper.scorer import Scorer

    overrides = [
        f"output={directory / 'run'}", f"model.path={directory / 'model'}",
        f"data.train=[{{path: {directory / 'text.jsonl'}}}]", f"rollout.prompts_per_step={PROMPTS}",
        f"rollout.num_generations={ANSWERS}", f"rollout.slots={PROMPTS * ANSWERS}", "rollout.max_prompt_tokens=32",
        f"rollout.sampling.max_tokens={TOKENS}", "trainer.rows=4", "trainer.row_tokens=64", "trainer.steps=2",
        f"algorithm.kl_coef={kl_coef}", "algorithm.learning_rate=1e-6",
    ]  # fmt: skip
    trainer = GRPOTrainer(load_config(GRPOConfig, None, overrides), reward_funcs=even_reward)
    if kl_coef:
        trainer.scorer = Scorer(Decoder(trainer.policy.decoder.config, trainer.policy.decoder.weights), 1.0)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where the checkpoints go (default: a temporary folder)")
    parser.add_argument("--kl-coef", type=float, default=0.0, help="over 0: with a reference policy (default: 0)")
    parser.add_argument("--output", type=Path, help="write the report there as JSON")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=arguments.directory)) / "real_size"
    phases = Phases()
    try:
        phases("write a sharded checkpoint", lambda: write_checkpoint(directory))
        trainer = phases("load", lambda: open_trainer(directory, arguments.kl_coef))
        for number in ("first", "second"):
            phases(f"generate, {number}", trainer.make_experience)
            dataset = phases(f"pack and score, {number}", trainer.make_dataset)
            phases(f"train, {number}", lambda dataset=dataset: trainer.train(trainer.train_step, dataset))
        phases("save", trainer.save_checkpoint)
    finally:
        shutil.rmtree(directory.parent, ignore_errors=True)
    tokens = sum(len(rollout.response_ids) for rollout in trainer.rollouts)
    report = {
        "phases": phases.rows,
        "peak_gib": max(row["peak_gib"] for row in phases.rows),
        "compile_seconds": {
            name: round(phases.seconds(f"{name}, first") - phases.seconds(f"{name}, second"), 2)
            for name in ("generate", "pack and score", "train")
        },
        "generated_tokens_per_second": round(tokens / phases.seconds("generate, second"), 1),
        "kl_coef": arguments.kl_coef,
    }
    print(json.dumps({name: value for name, value in report.items() if name != "phases"}))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
