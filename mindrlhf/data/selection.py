"""From rewarded answers to a data set for the next round of training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindrlhf.data.templates import checked_messages

CONDITION = " <rm_score>: {reward:.2f} "  # behind the prompt of conditional SFT


@dataclass(frozen=True, slots=True)
class RewardedAnswers:
    """The answers to one prompt."""

    prompt: Any  # as the data set has it: text, or a list of messages
    responses: Sequence[str]
    rewards: np.ndarray  # [answers]


def rejection_sampling(group: RewardedAnswers) -> list[dict[str, Any]]:
    """The best answer of each prompt, for SFT; the first of several. Best-of-n: arXiv 2112.09332."""
    best = int(np.argmax(group.rewards))
    return [{"prompt": group.prompt, "response": group.responses[best], "reward": float(group.rewards[best])}]


def conditional_sft(group: RewardedAnswers) -> list[dict[str, Any]]:
    """Every answer, with its reward told behind the prompt, for SFT; later a high reward is asked for.

    Hu et al. 2023, arXiv 2308.12050. The reward stands behind the prompt as CONDITION.
    """
    return [
        {"prompt": _conditioned(group.prompt, float(reward)), "response": response, "reward": float(reward)}
        for response, reward in zip(group.responses, group.rewards, strict=True)
    ]


def iterative_dpo(group: RewardedAnswers) -> list[dict[str, Any]]:
    """The best against the worst answer of each prompt, for DPO; nothing where they are as good or the same text.

    Xu et al. 2023, arXiv 2312.16682; Yuan et al. 2024, arXiv 2401.10020.
    """
    best, worst = int(np.argmax(group.rewards)), int(np.argmin(group.rewards))
    chosen, rejected = group.responses[best], group.responses[worst]
    high, low = float(group.rewards[best]), float(group.rewards[worst])
    if high == low or chosen == rejected:
        return []
    return [
        {
            "prompt": group.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_reward": high,
            "rejected_reward": low,
            "margin": high - low,
        }
    ]


SELECTIONS: dict[str, Callable[[RewardedAnswers], list[dict[str, Any]]]] = {
    "rs": rejection_sampling,
    "csft": conditional_sft,
    "iter_dpo": iterative_dpo,
}


def _conditioned(prompt: Any, reward: float) -> Any:
    condition = CONDITION.format(reward=reward)
    if isinstance(prompt, str):
        return prompt + condition
    *before, last = checked_messages(prompt, "a prompt")
    return [*before, {**last, "content": last["content"] + condition}]
