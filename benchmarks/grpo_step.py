"""One whole GRPO step of the demo's model: generation, rewards, reference, training. Medians over several steps.

python benchmarks/grpo_step.py --output grpo_step.json
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "examples" / "grpo" / "arithmetic.yaml"
PHASES = ("seconds/experience", "seconds/scores", "seconds/train", "tokens_per_second", "response_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured steps, behind two that compile")
    parser.add_argument("--output", type=Path, help="write the report there as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = measure(directory, arguments.steps)
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def measure(directory: str, steps: int) -> dict[str, float | int]:
    """The shipped configuration after a short warm-up, so that answers have their usual length."""
    from mindrlhf.config import GRPOConfig, load_config
    from mindrlhf.utils.parallel import prepare_environment

    prepare_environment()
    from mindrlhf.trainer.grpo import GRPOTrainer
    from mindrlhf.utils.logging import RunLog

    overrides = [f"output={directory}/run", "warmup.steps=60", "logging.progress=false", "logging.tensorboard=false"]
    config = load_config(GRPOConfig, CONFIG, overrides)
    trainer = GRPOTrainer(config)
    with RunLog(trainer.output, config.logging, "{}") as log:
        trainer.prepare(log)
    measured = [trainer.run_step()[0] for _ in range(steps + 2)][2:]
    report: dict[str, float | int] = {name: statistics.median(m[name] for m in measured) for name in PHASES}
    report["seconds"] = statistics.median(sum(m[name] for name in PHASES[:3]) for m in measured)
    return report | {"answers": int(measured[0]["answers"]), "steps": steps}


if __name__ == "__main__":
    main()
