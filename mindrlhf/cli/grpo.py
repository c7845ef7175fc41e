"""`mindrlhf grpo`: train a policy online."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a policy with GRPO, Dr.GRPO or DAPO (algorithm.name) as a YAML says."
    parser.add_argument("--config", required=True, help="the job's YAML, for example examples/grpo/arithmetic.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for example algorithm.learning_rate=1e-5 seed=2"
    )
    parser.epilog = "Every key and its meaning: mindrlhf/config.py and docs/configuration.md."


def run(arguments: argparse.Namespace) -> int:
    from mindrlhf.config import GRPOConfig, load_config

    config = load_config(GRPOConfig, arguments.config, arguments.overrides)

    from mindrlhf.trainer.grpo import GRPOTrainer

    print(report(GRPOTrainer(config).fit(), config.output))
    return 0


def report(summary: dict[str, Any], output: str) -> str:
    """The table before/after, sampled answers, and where everything lies."""
    lines = []
    if summary["after"]:
        names = list(summary["after"])
        width = max(map(len, names)) + 2
        lines += ["", f"{'held out, greedy':<{width + 18}}{'before':>8}{'after':>8}"]
        for name in names:
            before = summary["before"].get(name)
            shown = f"{before:8.3f}" if before is not None else f"{'-':>8}"
            lines.append(f"  {name:<{width + 16}}{shown}{summary['after'][name]:8.3f}")
    if summary.get("samples"):
        lines += ["", "three held-out problems:"]
        for sample in summary["samples"]:
            lines.append(f"  {sample['prompt']}{sample['completion']}   reward {sample['reward']:g}")
    lines += ["", f"{summary['steps']} steps in {summary['seconds']:.0f} s; metrics, curves.png and tb/ in {output}/"]
    if summary["skipped_updates"]:
        lines.append(f"{summary['skipped_updates']} updates were skipped: a gradient was not finite, see metrics.jsonl")
    lines.append(f"checkpoint: {summary['checkpoint']}")
    return "\n".join(lines)
