"""The commands that train: one YAML, one trainer, one report."""

import argparse
import importlib
import math
from typing import Any, NamedTuple

from mindrlhf.utils.parallel import is_main


class Job(NamedTuple):
    description: str
    config: str  # class of mindrlhf.config
    trainer: str  # module:class
    example: str  # a YAML to begin with


JOBS = {
    "sft": Job(
        "Fine-tune on answers: prompt and response, Alpaca rows, conversations, or text.",
        "SFTConfig", "mindrlhf.trainer.supervised:SFTTrainer", "examples/sft/sft.yaml",
    ),
    "rm": Job(
        "Train a reward model on pairs of answers.",
        "RewardConfig", "mindrlhf.trainer.preference:RewardTrainer", "examples/reward_model/reward_model.yaml",
    ),
    "prm": Job(
        "Train a process reward model on solutions with judged steps.",
        "PRMConfig", "mindrlhf.trainer.supervised:PRMTrainer", "examples/prm/prm.yaml",
    ),
    "dpo": Job(
        "Train a policy on pairs of answers with DPO or one of its kin (loss.name).",
        "DPOConfig", "mindrlhf.trainer.preference:DPOTrainer", "examples/dpo/dpo.yaml",
    ),
    "kto": Job(
        "Train a policy on answers that were liked or not.",
        "KTOConfig", "mindrlhf.trainer.kto:KTOTrainer", "examples/kto/kto.yaml",
    ),
    "kd": Job(
        "Distil a teacher into a student.",
        "KDConfig", "mindrlhf.trainer.distillation:KDTrainer", "examples/kd/kd.yaml",
    ),
    "grpo": Job(
        "Train a policy online without a critic: GRPO, RLOO, REINFORCE++ and their kin (algorithm.name).",
        "GRPOConfig", "mindrlhf.trainer.grpo:GRPOTrainer", "examples/grpo/arithmetic.yaml",
    ),
    "ppo": Job(
        "Train a policy online with PPO and its critic.",
        "PPOConfig", "mindrlhf.trainer.ppo:PPOTrainer", "examples/ppo/arithmetic.yaml",
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    job = JOBS[parser.get_default("command")]
    parser.description = job.description
    parser.add_argument("--config", required=True, help=f"the job's YAML, for example {job.example}")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for example seed=2 trainer.steps=100 output=runs/two"
    )
    parser.epilog = "Every key and its meaning: docs/configuration.md."


def run(arguments: argparse.Namespace) -> int:
    import mindrlhf.config as configurations

    job = JOBS[arguments.command]
    config = configurations.load_config(getattr(configurations, job.config), arguments.config, arguments.overrides)
    module, _, name = job.trainer.partition(":")
    trainer = getattr(importlib.import_module(module), name)(config)
    if config.model.mindformers and is_main():
        from mindrlhf.models.mindformers_config import read_mindformers

        for note in read_mindformers(config.model.mindformers).notes:
            print(f"{config.model.mindformers}: {note}", flush=True)
    try:
        summary = trainer.fit()
        if is_main():
            print(report(summary, config.output))
    except KeyboardInterrupt:
        steps = trainer.checkpoints.own_steps()
        saved = f"the same command goes on from step {steps[-1]}" if steps else "nothing saved: see trainer.save_every"
        raise KeyboardInterrupt(saved) from None
    return 0


def report(summary: dict[str, Any], output: str) -> str:
    """The table before/after, sampled answers, and where everything lies."""
    lines = []
    for split, reasons in summary.get("skipped_rows", {}).items():
        lines.append(f"skipped rows of data.{split}: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items()))
    if summary["after"]:
        names = list(summary["after"])
        width = max(map(len, names)) + 2
        lines += ["", f"{'held out':<{width + 18}}{'before':>8}{'after':>8}"]
        for name in names:
            shown = _rounded(summary["before"][name]) if name in summary["before"] else f"{'-':>8}"
            lines.append(f"  {name:<{width + 16}}{shown}{_rounded(summary['after'][name])}")
    if summary.get("samples"):
        lines += ["", "three held-out problems:"]
        for sample in summary["samples"]:
            lines.append(f"  {sample['prompt']}{sample['completion']}   reward {sample['reward']:g}")
    if "score_mean" in summary:
        lines += ["", f"scores: mean {summary['score_mean']:.3f}, deviation {summary['score_std']:.3f}; see scores.png"]
    lines += ["", f"{summary['steps']} steps in {summary['seconds']:.0f} s; metrics, curves.png and tb/ in {output}/"]
    if summary["skipped_updates"]:
        lines.append(f"{summary['skipped_updates']} updates were skipped: a gradient was not finite, see metrics.jsonl")
    lines += _best(summary)
    lines.append(f"checkpoint: {summary['checkpoint']}")
    return "\n".join(lines)


def _best(summary: dict[str, Any]) -> list[str]:
    """What trainer.best and trainer.patience led to."""
    best, lines = summary.get("best"), []
    if not best:
        return lines
    if summary["stopped_early"]:
        lines.append(f"stopped early: {best['evaluations_since']} evaluations without a better {best['metric']}")
    if best["step"] is None:
        return [*lines, f"best: no evaluation had a finite {best['metric']}"]
    found = f"{best['metric']} {_rounded(best['value']).strip()} at step {best['step']}"
    return [*lines, f"best: {found}, {best['checkpoint']}"]


def _rounded(value: float | None) -> str:
    """Three digits, and no minus before a zero; None stands for what was not finite."""
    if value is None or not math.isfinite(value):
        return f"{'nan':>8}"
    return f"{round(value, 3) + 0.0:8.3f}"
