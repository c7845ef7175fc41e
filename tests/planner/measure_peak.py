"""A program of test_peak.py: some steps of an online job on random weights, with the peak of resident memory by phase.

    python tests/planner/measure_peak.py grpo|ppo FILE.yaml [overrides]

Prints one JSON line: `baseline`, the process before any model is made, and the peak of each phase, in bytes. The
kernel's high-water mark is set back before each phase.
"""

import json
import sys
from pathlib import Path


def resident(name: str = "VmRSS") -> int:
    """Bytes; VmHWM is the peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(name)))


def peak_of(run) -> int:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run()
    return resident("VmHWM")


def even(completions, **columns):
    """A reward that random answers earn different amounts of."""
    return [sum(ord(character) % 2 == 0 for character in text) / max(len(text), 1) for text in completions]


def main(command: str, config_path: str, overrides: list[str]) -> None:
    from mindrlhf import config as configurations
    from mindrlhf.trainer.grpo import GRPOTrainer
    from mindrlhf.trainer.ppo import PPOTrainer
    from mindrlhf.utils.parallel import start

    start()
    baseline = resident()
    job = {"grpo": ("GRPOConfig", GRPOTrainer), "ppo": ("PPOConfig", PPOTrainer)}[command]
    config = configurations.load_config(getattr(configurations, job[0]), config_path, overrides)
    made = []
    peaks = {"make": peak_of(lambda: made.append(job[1](config, reward_funcs=even)))}
    trainer = made[0]
    for number in (1, 2):
        peaks[f"generate {number}"] = peak_of(trainer.make_experience)
        dataset = []
        peaks[f"score {number}"] = peak_of(lambda dataset=dataset: dataset.extend(trainer.make_dataset()))
        peaks[f"train {number}"] = peak_of(lambda dataset=dataset: trainer.train(trainer.train_step, dataset))
    tokens = [len(rollout.response_ids) for rollout in trainer.rollouts]
    print(json.dumps({"baseline": baseline, "peaks": peaks, "answer_tokens": tokens}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
