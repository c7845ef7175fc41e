"""GRPOTrainer and the functions of the published GRPO program around it."""

from collections.abc import Callable, Sequence
from typing import Any

from mindrlhf.config import GRPOConfig
from mindrlhf.errors import UserError
from mindrlhf.rewards import Rewards
from mindrlhf.trainer.algorithms import ALGORITHMS
from mindrlhf.trainer.layouts import training_layout
from mindrlhf.trainer.online import OnlineTrainer
from mindrlhf.trainer.published import (
    PromptBatches,
    check_same,
    described_policy,
    described_reference,
    refuse_without_model,
)
from mindrlhf.trainer.updates import Update
from mindrlhf.wrapper.train_step import TrainStep


class GRPOTrainer(OnlineTrainer):
    """GRPO and its kin (the config's algorithm.name says which).

    Either GRPOTrainer(config), where the config names or builds the model, or as the published program has it:
    model configurations of MindFormers (LlamaConfig), a list of reward functions and a tokenizer. A model
    configuration's checkpoint_name_or_path may name a Hugging Face checkpoint directory; without one the weights are
    random. One decoder serves training and generation, so the infer and train configurations must describe the same
    model; their seq_length are the windows.
    """

    def __init__(
        self,
        grpo_config: GRPOConfig | None = None,
        sft_model_config_infer: Any = None,
        sft_model_config_train: Any = None,
        ref_model_config: Any = None,
        reward_funcs: Callable | Sequence[Callable] | None = None,
        tokenizer: Any = None,
    ):
        config = grpo_config or GRPOConfig()
        row = ALGORITHMS.get(config.algorithm.name)
        if row and row.needs == "critic":
            raise UserError(f"algorithm.name: {config.algorithm.name} has a critic; take `mindrlhf ppo` or PPOTrainer")
        rewards = Rewards.from_functions(reward_funcs) if reward_funcs else None
        policy = None
        if sft_model_config_train is None:
            refuse_without_model(
                "GRPOTrainer", "sft_model_config_train", sft_model_config_infer=sft_model_config_infer,
                ref_model_config=ref_model_config, tokenizer=tokenizer,
            )  # fmt: skip
        else:
            if tokenizer is None:
                raise UserError("GRPOTrainer: tokenizer is needed beside the model configurations")
            for name, other in (
                ("sft_model_config_infer", sft_model_config_infer),
                ("ref_model_config", ref_model_config),
            ):
                if other is not None:
                    check_same("sft_model_config_train", sft_model_config_train, name, other)
            layout = training_layout(config)
            policy = described_policy(sft_model_config_train, tokenizer, config.seed, "sft_model_config_train", layout)
        super().__init__(config, policy, rewards)
        self.prompt_dataset = PromptBatches(len(self.prompts), config.rollout.prompts_per_step)
        if policy is not None and self.needs_reference:
            self.scorer = described_reference(ref_model_config, policy, self.algorithm.loss.temperature)


def init_grpo_network_and_optimizer(trainer: GRPOTrainer) -> TrainStep:
    """The compiled network with loss and optimizer that `trainer.train` takes."""
    return trainer.train_step


def init_grpo_dataset(trainer: GRPOTrainer) -> list[Update]:
    """The experience that `trainer.make_experience` made, packed for training."""
    return trainer.make_dataset()
