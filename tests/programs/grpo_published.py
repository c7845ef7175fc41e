"""The published GRPO program at a size that runs in seconds. tests/trainer/test_published_grpo.py runs and reads it.

Between the lines of the published program stand lines of setup: sizes, data, and what the test wants to know.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from mindformers import LlamaConfig, MindFormerConfig

from mindrlhf import (
    GRPOConfig,
    GRPOTrainer,
    Qwen2Tokenizer,
    accuracy_reward,
    format_reward,
    init_grpo_dataset,
    init_grpo_network_and_optimizer,
)
from mindrlhf.config import SourceConfig
from mindrlhf.models.decoder import random_weights

parser = argparse.ArgumentParser()
parser.add_argument("--vocab_path", required=True)
parser.add_argument("--merges_file_path", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
args = parser.parse_args()
rank_id = 0


def small(path):
    """Qwen2.5-0.5B as shipped, with other sizes."""
    config = MindFormerConfig(str(path))
    config.model.model_config.update(
        hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, n_kv_heads=2, vocab_size=272, seq_length=32,
        max_position_embedding=32,
    )  # fmt: skip
    return config


model_yaml = Path(__file__).parents[2] / "model_configs" / "qwen2_5_0_5b.yaml"
sft_config_infer, sft_config_train, ref_config = small(model_yaml), small(model_yaml), small(model_yaml)

grpo_config = GRPOConfig()

grpo_config.output = args.output
grpo_config.data.train = [SourceConfig(path=args.data)]
grpo_config.rollout.prompts_per_step = 2
grpo_config.rollout.num_generations = 4
grpo_config.rollout.slots = 8
grpo_config.rollout.max_prompt_tokens = 16
grpo_config.rollout.sampling.max_tokens = 8
grpo_config.algorithm.learning_rate = 1e-3
grpo_config.algorithm.entropy_coef = 0.01  # random weights are never right: without it there would be no gradient
grpo_config.trainer.epochs = 2
grpo_config.trainer.rows = 4

sft_model_config_infer = LlamaConfig(**sft_config_infer.model.model_config)
sft_model_config_train = LlamaConfig(**sft_config_train.model.model_config)
ref_model_config = LlamaConfig(**ref_config.model.model_config)
tokenizer = Qwen2Tokenizer(args.vocab_path, args.merges_file_path, add_bos_token=False, add_eos_token=False)
trainer = GRPOTrainer(grpo_config=grpo_config, sft_model_config_infer=sft_model_config_infer,
                      sft_model_config_train=sft_model_config_train, ref_model_config=ref_model_config,
                      reward_funcs=[accuracy_reward, format_reward], tokenizer=tokenizer)  # fmt: skip
grpo_with_grad = init_grpo_network_and_optimizer(trainer)

history = []
train = trainer.train
trainer.train = lambda *arguments: history.append(trainer.experience | train(*arguments))

for n in range(grpo_config.epochs):  # noqa: B007
    steps = trainer.prompt_dataset.get_dataset_size() // trainer.prompt_dataset.get_batch_size()
    for i in range(steps):  # noqa: B007
        trainer.make_experience(num_generations=grpo_config.num_generations, rank_id=rank_id)
        dataset = init_grpo_dataset(trainer)
        trainer.train(grpo_with_grad, dataset)

decoder = trainer.policy.decoder
start = random_weights(decoder.config, grpo_config.seed)
names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
moved = {name: float(np.abs(decoder.weights(name) - start(name)).max()) for name in names}
checkpoint = trainer.save_checkpoint()
Path(args.output, "report.json").write_text(
    json.dumps({"history": history, "moved": moved, "checkpoint": str(checkpoint)})
)
