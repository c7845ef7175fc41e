"""Rewards: (prompt, completion, label) -> number."""

from mindrlhf.rewards.combine import Rewards
from mindrlhf.rewards.rules import accuracy_reward, format_reward

__all__ = ["Rewards", "accuracy_reward", "format_reward"]
