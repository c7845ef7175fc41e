"""The published PPO program at a size that runs in seconds. tests/trainer/test_published_ppo.py runs and reads it.

Between the lines of the published program stand lines of setup: sizes, data, and what the test wants to know.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mindrlhf import PPOTrainer, init_configs, init_network_and_optimizer, init_ppo_dataset

parser = argparse.ArgumentParser()
parser.add_argument("--config", required=True)
parser.add_argument("--sft_model_path", required=True)
parser.add_argument("--critic_model_path", required=True)
parser.add_argument("--reward_model_path", required=True)
args = parser.parse_args()
rank_id = 0

ppo_config, sft_model_config, ref_model_config, critic_model_config, rm_model_config = init_configs(args)
trainer = PPOTrainer(ppo_config=ppo_config, sft_model_config=sft_model_config, ref_model_config=ref_model_config,
                     critic_model_config=critic_model_config, rm_model_config=rm_model_config)  # fmt: skip
ppo_with_grad = init_network_and_optimizer(trainer)

names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
policy, critic = trainer.policy.decoder, trainer.critic.model.decoder
start = {name: policy.weights(name).copy() for name in names}
critic_start = critic.weights("score.weight").copy()
history, rewards = [], []
train = trainer.train
trainer.train = lambda *arguments: history.append(trainer.experience | train(*arguments))

for epoch in range(ppo_config.epochs):
    trainer.make_experience(num_rollouts=ppo_config.num_rollouts)
    rewards.append([rollout.reward for rollout in trainer.rollouts])
    dataset = init_ppo_dataset(trainer)
    trainer.train(ppo_with_grad, dataset, epoch)
    trainer.save_checkpoint(rank_id, epoch)

report = {
    "history": history,
    "rewards": rewards,
    "texts": trainer.collector.texts(trainer.rollouts),
    "prompts": [trainer.policy.tokenizer.decode(rollout.prompt_ids) for rollout in trainer.rollouts],
    "moved": {name: float(np.abs(policy.weights(name) - start[name]).max()) for name in names},
    "critic_moved": float(np.abs(critic.weights("score.weight") - critic_start).max()),
    "checkpoints": trainer.checkpoints.steps(),
}
Path(ppo_config.output, "report.json").write_text(json.dumps(report))
