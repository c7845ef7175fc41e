"""Prints what the three stages of examples/rlhf came to: python examples/rlhf/report.py runs/rlhf"""

import json
import sys
from pathlib import Path

STAGES = ("sft", "reward_model", "ppo")
# name in the summary of PPO, what it is; all on held-out problems
ROWS = {
    "reward_model": "reward model's score, greedy answers",
    "accuracy": "true accuracy, greedy answers",
    "sampled_reward": "reward model's score, sampled answers",
    "pass@1": "true accuracy, sampled answers",
    "kl": "KL paid, nats an answer",
    "reward_minus_kl": "score less the KL penalty",
}


def main(directory: Path) -> None:
    summaries = {stage: json.loads((directory / stage / "summary.json").read_text()) for stage in STAGES}
    before, after = summaries["ppo"]["before"], summaries["ppo"]["after"]
    print(f"\n{'':38} {'SFT':>8} {'PPO':>8}")
    for name, text in ROWS.items():
        print(f"{text:38} {round(before[name], 3) + 0.0:8.3f} {after[name]:8.3f}")
    judged = summaries["reward_model"]["after"]["accuracy"]
    print(f"\nThe reward model judges {100 * judged:.0f}% of held-out comparisons right.")
    seconds = " + ".join(f"{summaries[stage]['seconds']:.0f}" for stage in STAGES)
    print(f"{seconds} s; pictures:", *(str(directory / stage / "curves.png") for stage in STAGES), sep="\n  ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
