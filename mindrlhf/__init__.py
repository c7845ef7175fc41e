"""Post-training of language models on MindSpore: `from mindrlhf import GRPOTrainer, GRPOConfig`.

Names are imported when first used, so that `import mindrlhf` and the command line's help cost nothing.
"""

import importlib

_PUBLIC = {
    "load_config": "mindrlhf.config",
    "SFTConfig": "mindrlhf.config",
    "SFTTrainer": "mindrlhf.trainer.supervised",
    "RewardConfig": "mindrlhf.config",
    "RewardTrainer": "mindrlhf.trainer.preference",
    "PRMConfig": "mindrlhf.config",
    "PRMTrainer": "mindrlhf.trainer.supervised",
    "DPOConfig": "mindrlhf.config",
    "DPOTrainer": "mindrlhf.trainer.preference",
    "KTOConfig": "mindrlhf.config",
    "KTOTrainer": "mindrlhf.trainer.kto",
    "KDConfig": "mindrlhf.config",
    "KDTrainer": "mindrlhf.trainer.distillation",
    "GRPOConfig": "mindrlhf.config",
    "GRPOTrainer": "mindrlhf.trainer.grpo",
    "init_grpo_dataset": "mindrlhf.trainer.grpo",
    "init_grpo_network_and_optimizer": "mindrlhf.trainer.grpo",
    "PPOConfig": "mindrlhf.config",
    "PPOTrainer": "mindrlhf.trainer.ppo",
    "init_configs": "mindrlhf.trainer.ppo",
    "init_network_and_optimizer": "mindrlhf.trainer.ppo",
    "init_ppo_dataset": "mindrlhf.trainer.ppo",
    "Environment": "mindrlhf.environments",
    "accuracy_reward": "mindrlhf.rewards",
    "format_reward": "mindrlhf.rewards",
    "Decoder": "mindrlhf.models.decoder",
    "DecoderConfig": "mindrlhf.models.config",
    "Generator": "mindrlhf.wrapper.generator",
    "Qwen2Tokenizer": "mindrlhf.data.qwen2",
    "UserError": "mindrlhf.errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mindrlhf' has no attribute {name!r}")
    # Threads are fixed when MindSpore is imported, which most of these do.
    from mindrlhf.utils.parallel import prepare_environment

    prepare_environment()
    return getattr(importlib.import_module(_PUBLIC[name]), name)
