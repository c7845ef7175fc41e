"""One PPO step with four roles of the same shape - policy, reference, a critic of its own and a reward model - and what
memory.swap saves: its peak of resident memory, its seconds and those of the processor's cores (which say more where a
machine is busy with other work), against the same step with every role in memory.

    python benchmarks/swap.py --output swap.json

Three ways, each in a process of its own, in rounds that alternate: `resident` keeps everything, `default` gives back
what is written anew anyway (gradients, the generator's weights and cache), `swap` puts the rest away too. A process
takes one step that compiles, and then --steps that count. Needs 6 GB of memory and 4 GB of disk below --directory.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {
    "model_type": "qwen2", "hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 14,
    "num_attention_heads": 10, "num_key_value_heads": 5, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
VOCABULARY = 4096
PROMPTS, ANSWERS, TOKENS = 4, 4, 112
WAYS = ("resident", "default", "swap")


def write_inputs(directory: Path) -> None:
    """Problems, and a reward model with random weights."""
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build

    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"prompt": f"{n}+{n}=", "label": str(2 * n)}) + "\n" for n in range(100)))
    build(BuildConfig(SHAPE, VOCABULARY, [str(text)]), 1, head="score").write(directory / "reward_model")


def open_trainer(directory: Path, way: str):
    from mindrlhf.config import PPOConfig, load_config
    from mindrlhf.trainer.ppo import PPOTrainer
    from mindrlhf.utils import memory

    if way == "resident":
        memory.drop = lambda pages: None
    overrides = [
        f"output={directory / way}", f"model.build.decoder={json.dumps(SHAPE)}",
        f"model.build.tokenizer_files=[{directory / 'text.jsonl'}]", f"model.build.vocab_size={VOCABULARY}",
        f"data.train=[{{path: {directory / 'text.jsonl'}}}]", f"rewards=[{{model: {directory / 'reward_model'}}}]",
        f"rollout.prompts_per_step={PROMPTS}", f"rollout.num_generations={ANSWERS}",
        f"rollout.slots={PROMPTS * ANSWERS}", "rollout.max_prompt_tokens=16", f"rollout.sampling.max_tokens={TOKENS}",
        "trainer.rows=2", "trainer.row_tokens=128", "trainer.steps=1000", "algorithm.kl_coef=0.05",
        "algorithm.learning_rate=1e-6", f"memory.swap={str(way == 'swap').lower()}", f"memory.directory={directory}",
    ]  # fmt: skip
    return PPOTrainer(load_config(PPOConfig, None, overrides))


def run_way(directory: Path, way: str, steps: int) -> None:
    """In a process of its own: a line of JSON with each counted step's metrics."""
    trainer = open_trainer(directory, way)
    measured = []
    for number in range(1 + steps):
        wall, busy = time.perf_counter(), time.process_time()
        metrics, _ = trainer.run_step()
        if number:
            taken = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - busy}
            measured.append(metrics | taken)
    trainer.output.mkdir()
    trainer.memory.write(trainer.output)
    parameters = sum(parameter.size for parameter in trainer.policy.decoder.get_parameters())
    print(json.dumps({"parameters": parameters, "steps": measured}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where the files go (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way (default: 2)")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of each process (default: 2)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="copy the swapped step's memory.png there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there as JSON")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # of a process that this one starts
    options = parser.parse_args()
    if options.way:
        return run_way(Path(options.directory), options.way, options.steps)
    directory = Path(tempfile.mkdtemp(dir=options.directory))
    measured = {way: [] for way in WAYS}
    try:
        write_inputs(directory)
        for _ in range(options.rounds):
            for way in WAYS:
                shutil.rmtree(directory / way, ignore_errors=True)
                command = [sys.executable, __file__, "--way", way, "--directory", str(directory)]
                command += ["--steps", str(options.steps)]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(printed.splitlines()[-1])
                measured[way] += found["steps"]
        if options.picture:
            shutil.copy(directory / "swap" / "memory.png", options.picture)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report = {"parameters": found["parameters"], "ways": {way: summary(steps) for way, steps in measured.items()}}
    show(report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def summary(steps: list[dict]) -> dict[str, float]:
    """Of one way: the highest peak, and medians of the seconds."""
    middle = {
        name: round(statistics.median(step.get(name, 0.0) for step in steps), 3)
        for name in ("seconds", "processor_seconds", "seconds/memory", "memory/spilled_gb")
    }
    return {"peak_gb": round(max(step["memory/rss_peak_gb"] for step in steps), 3), "steps": len(steps), **middle}


def show(report: dict) -> None:
    resident = report["ways"]["resident"]
    print(f"{report['parameters'] / 1e6:.0f} M parameters a role; peak of the process, medians of seconds a step")
    head = ("peak GB", "less", "seconds", "more", "processor", "more", "moving", "written GB")
    print(" " * 10 + "".join(f"{name:>{width}}" for name, width in zip(head, (9, 7, 10, 8, 11, 8, 8, 12), strict=True)))
    for way, found in report["ways"].items():
        less = 100 * (1 - found["peak_gb"] / resident["peak_gb"])
        wall, busy = (100 * (found[name] / resident[name] - 1) for name in ("seconds", "processor_seconds"))
        print(
            f"{way:<10}{found['peak_gb']:>9.2f}{less:>6.0f}%{found['seconds']:>10.2f}{wall:>+7.1f}%"
            f"{found['processor_seconds']:>11.2f}{busy:>+7.1f}%{found['seconds/memory']:>8.2f}"
            f"{found['memory/spilled_gb']:>12.2f}"
        )


if __name__ == "__main__":
    main()
