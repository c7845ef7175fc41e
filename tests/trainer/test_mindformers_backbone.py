"""Jobs whose policy is MindFormers' network: the numbers are those of the same job with our decoder."""

import json

import numpy as np
import pytest
import yaml

from mindrlhf.errors import UserError
from tests.trainer import stages
from tests.trainer.conftest import DECODER, letter_reward

# DECODER's and stages.DECODER's model in MindFormers' words.
LLAMA_CONFIG = dict(
    type="LlamaConfig", hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, n_kv_heads=2, seq_length=64,
    max_position_embedding=64, tie_word_embeddings=True, qkv_has_bias=True, rms_norm_eps=1e-6, top_p=0.8,
)  # fmt: skip


@pytest.fixture()
def write_yaml(tmp_path):
    """A function: vocabulary, further keys -> the path of a MindFormers YAML."""

    def write(vocabulary, **values):
        path = tmp_path / "llama.yaml"
        path.write_text(
            yaml.safe_dump({"model": {"model_config": {**LLAMA_CONFIG, "vocab_size": vocabulary, **values}}})
        )
        return path

    return write


def agree(ours, theirs):
    """Metrics of two runs, step by step, to 1e-4; but those of the machine."""
    for step, other in zip(ours, theirs, strict=True):
        assert step.keys() == other.keys()
        for name, value in step.items():
            if not name.startswith(("time", "tokens_per_second", "seconds", "memory/")):
                assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def agree_in_weights(ours, theirs):
    for name, expected in ours.policy.decoder.tensors():
        np.testing.assert_allclose(theirs.policy.decoder.weights(name), expected, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_grpo(mindspore, tiny_config, write_yaml):
    """Three steps with a reference, sampled answers among the numbers; then its checkpoint resumes."""
    from mindrlhf.trainer.grpo import GRPOTrainer

    own = {"model__build__decoder": json.dumps({**DECODER, "initializer_range": 0.01})}
    described = {"model__build__decoder": "{}", "model__mindformers": write_yaml(270), "model__backbone": "mindformers"}
    runs = []
    for output, options in (("ours", own), ("theirs", described)):
        trainer = GRPOTrainer(tiny_config(output=output, trainer__steps=3, **options), reward_funcs=letter_reward)
        trainer.fit()
        lines = [json.loads(line) for line in (trainer.output / "metrics.jsonl").read_text().splitlines()]
        runs.append((trainer, [line for line in lines if "loss" in line]))
    (ours, our_steps), (theirs, their_steps) = runs
    assert len(our_steps) == 3
    agree(our_steps, their_steps)
    assert all(step["mismatch_max"] < 1e-4 for step in their_steps)
    agree_in_weights(ours, theirs)
    longer = GRPOTrainer(tiny_config(output="theirs", trainer__steps=4, **described), reward_funcs=letter_reward)
    assert longer.fit()["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("shared_trunk", ["false", "true"], ids=["own-critic", "shared-trunk"])
def test_ppo(mindspore, tiny_config, write_yaml, shared_trunk):
    """A critic of its own is made of the policy's weights and has our cells; a head on the trunk is on theirs."""
    from mindrlhf.config import PPOConfig
    from mindrlhf.trainer.ppo import PPOTrainer

    own = {"model__build__decoder": json.dumps({**DECODER, "initializer_range": 0.01})}
    described = {"model__build__decoder": "{}", "model__mindformers": write_yaml(270), "model__backbone": "mindformers"}
    more = {"kind": PPOConfig, "critic__shared_trunk": shared_trunk, "rollout__num_generations": 1}
    runs = []
    for output, options in (("ours", own), ("theirs", described)):
        trainer = PPOTrainer(tiny_config(output=output, **options, **more), reward_funcs=letter_reward)
        trainer.prepare(None)
        runs.append((trainer, [trainer.run_step()[0] for _ in range(2)]))
    (ours, our_steps), (theirs, their_steps) = runs
    agree(our_steps, their_steps)
    agree_in_weights(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "prm", "dpo", "kto", "kd"])
def test_offline(make_stage, write_yaml, stage):
    described = ["model.build.decoder={}", "model.backbone=mindformers"]
    described.append(f"model.mindformers={write_yaml(300, init_method_std=0.1)}")
    ours, theirs = make_stage(stage, output="ours"), make_stage(stage, *described, output="theirs")
    np.testing.assert_allclose(stages.losses(theirs, 5), stages.losses(ours, 5), rtol=1e-4)
    agree_in_weights(ours, theirs)


def test_our_decoder_of_their_yaml(make_stage, write_yaml):
    """And a checkpoint beside it, which has to be of the same model."""
    path = write_yaml(300, init_method_std=0.1)
    described = ["model.build.decoder={}", f"model.mindformers={path}"]
    ours, theirs = make_stage("sft", output="ours"), make_stage("sft", *described, output="theirs")
    for name, expected in ours.policy.decoder.tensors():
        np.testing.assert_array_equal(theirs.policy.decoder.weights(name), expected)
    ours.policy.write(path.parent / "model")
    opened = make_stage("sft", f"model.path={path.parent / 'model'}", f"model.mindformers={path}", output="opened")
    assert opened.policy.decoder.config.model_type == "qwen2"
    with pytest.raises(UserError, match=r"model.mindformers: hidden_size is 64 in \S+ and 32 in \S+; remove"):
        write_yaml(300, hidden_size=64)
        make_stage("sft", f"model.path={path.parent / 'model'}", f"model.mindformers={path}")
    with pytest.raises(UserError, match=r"model.build.decoder: model.mindformers describes the model too; remove one"):
        make_stage("sft", f"model.mindformers={path}")
    with pytest.raises(
        UserError, match=r"model.mindformers: the tokenizer has token \d+, but the model's vocab_size is 99"
    ):
        write_yaml(99)
        make_stage("sft", *described)
