"""GRPOTrainer and the functions of the published GRPO program around it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindrlhf.config import GRPOConfig
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.decoder import Decoder, random_weights
from mindrlhf.rewards import Rewards
from mindrlhf.trainer.online import OnlineTrainer, Update
from mindrlhf.trainer.roles import Policy, check_vocabulary, checkpoint_weights
from mindrlhf.wrapper.scorer import Scorer
from mindrlhf.wrapper.train_step import TrainStep


class PromptBatches:
    """The prompts as the published program counts them."""

    def __init__(self, size: int, batch_size: int):
        self._size, self._batch_size = size, batch_size

    def get_dataset_size(self) -> int:
        """Prompts in the training set."""
        return self._size

    def get_batch_size(self) -> int:
        """Prompts a step."""
        return self._batch_size


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
        rewards = Rewards.from_functions(reward_funcs) if reward_funcs else None
        policy = None
        if sft_model_config_train is None:
            _refuse_without_model(
                sft_model_config_infer=sft_model_config_infer, ref_model_config=ref_model_config, tokenizer=tokenizer
            )
        else:
            if tokenizer is None:
                raise UserError("GRPOTrainer: tokenizer is needed beside the model configurations")
            policy = _policy(sft_model_config_train, sft_model_config_infer, ref_model_config, tokenizer, config.seed)
        super().__init__(config, policy, rewards)
        self.prompt_dataset = PromptBatches(len(self.prompts), config.rollout.prompts_per_step)
        if policy is not None and self.algorithm.kl_coef:
            checkpoint = getattr(ref_model_config, "checkpoint_name_or_path", None)
            same = policy.decoder.config
            weights = checkpoint_weights(Path(checkpoint), same) if checkpoint else policy.decoder.weights
            self.scorer = Scorer(Decoder(same, weights), self.algorithm.loss.temperature)


def init_grpo_network_and_optimizer(trainer: GRPOTrainer) -> TrainStep:
    """The compiled network with loss and optimizer that `trainer.train` takes."""
    return trainer.train_step


def init_grpo_dataset(trainer: GRPOTrainer) -> list[Update]:
    """The experience that `trainer.make_experience` made, packed for training."""
    return trainer.make_dataset()


# What makes two configurations one model; tables, initial spread and token ids may differ.
_ARCHITECTURE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "qkv_bias",
    "output_bias", "tie_embeddings", "norm_epsilon", "rope_theta", "rope_scaling",
)  # fmt: skip


def _policy(train: Any, infer: Any, ref: Any, tokenizer: Any, seed: int) -> Policy:
    config = DecoderConfig.from_mindformers(train, "sft_model_config_train")
    for name, other in (("sft_model_config_infer", infer), ("ref_model_config", ref)):
        if other is not None:
            _check_same(config, DecoderConfig.from_mindformers(other, name), name)
    check_vocabulary(tokenizer, config, "sft_model_config_train")
    checkpoint = getattr(train, "checkpoint_name_or_path", None)
    weights = checkpoint_weights(Path(checkpoint), config) if checkpoint else random_weights(config, seed)
    # LlamaConfig's default, 2, is Llama's end and an ordinary token elsewhere: only special tokens end an answer.
    ends = [tokenizer.eos_token_id, *(n for n in config.eos_token_ids if n in tokenizer.all_special_ids)]
    return Policy(Decoder(config, weights), tokenizer, {"eos_token_id": list(dict.fromkeys(ends))})


def _check_same(config: DecoderConfig, other: DecoderConfig, name: str) -> None:
    for field in _ARCHITECTURE:
        if getattr(other, field) != getattr(config, field):
            raise UserError(
                f"{name}: {field} is {getattr(other, field)}, but {getattr(config, field)} in sft_model_config_train; "
                "they must describe the same model"
            )


def _refuse_without_model(**given: Any) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UserError(
            f"GRPOTrainer: sft_model_config_train is needed beside {', '.join(names)}; or leave them all out, and set "
            "grpo_config.model.path"
        )
