"""mindrlhf/trainer/roles.py: heads and adapters of the models that a job opens, and what is written of them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mindrlhf.config import BuildConfig, LoraConfig, ModelConfig
from mindrlhf.errors import UserError
from tests.checkpoints import write_checkpoint, write_problems


@pytest.fixture(scope="module")
def language_model(mindspore, tmp_path_factory):
    directory = tmp_path_factory.mktemp("roles")
    return write_checkpoint(directory / "model", write_problems(directory / "problems.jsonl", 4))


def test_a_reward_model_from_a_language_model(language_model, tmp_path):
    from mindrlhf.trainer.roles import open_checkpoint, open_policy

    language = open_checkpoint(language_model)
    reward = open_policy(ModelConfig(path=str(language_model)), 1, head="score")
    assert (language.decoder.config.head, reward.decoder.config.head) == ("logits", "score")
    np.testing.assert_array_equal(reward.decoder.weights("score.weight"), np.zeros((1, 32)))
    for name, array in language.decoder.tensors():
        np.testing.assert_array_equal(reward.decoder.weights(name), array)
    assert reward.generation_config == language.generation_config

    ones = np.ones((1, 32), np.float32)
    reward.decoder.load(lambda name: ones if name == "score.weight" else language.decoder.weights(name))
    reward.decoder.config = replace(reward.decoder.config, score_mean=0.5, score_std=2.0)
    reward.write(tmp_path / "reward")
    for head in ("score", None):
        again = open_checkpoint(tmp_path / "reward", head=head)
        assert again.decoder.config == reward.decoder.config
        np.testing.assert_array_equal(again.decoder.weights("score.weight"), ones)
    with pytest.raises(UserError, match="a reward model, which has no lm_head.weight; give a language model"):
        open_policy(ModelConfig(path=str(tmp_path / "reward")), 1)


def with_adapter(path, head="logits", **fields):
    """A policy with new adapters, their B random."""
    from mindrlhf.trainer.roles import open_policy

    model = ModelConfig(path=str(path), lora=LoraConfig(**{"rank": 2, "target_modules": ["all-linear"], **fields}))
    policy = open_policy(model, 1, head)
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(array.shape) for name, array in policy.decoder.adapter_tensors()}
    policy.decoder.load_adapter(values.__getitem__)
    return policy


@pytest.mark.parametrize("head", ["logits", "score"])
def test_an_adapter_is_written_and_opened(language_model, tmp_path, head):
    from mindrlhf.trainer.roles import checkpoint_weights, open_checkpoint, open_policy

    policy = with_adapter(language_model, head, dropout=0.1, alpha=3)
    policy.decoder.config = replace(policy.decoder.config, score_mean=0.5 if head == "score" else 0.0)
    policy.generation_config["eos_token_id"] = 3
    policy.write(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert (tmp_path / "adapter" / "config.json").exists() == (head == "score")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(language_model.resolve())
    assert (written["task_type"], written["lora_alpha"]) == ("SEQ_CLS" if head == "score" else "CAUSAL_LM", 3)

    again = open_checkpoint(tmp_path / "adapter")
    assert (again.decoder.config, again.decoder.lora) == (policy.decoder.config, policy.decoder.lora)
    assert again.generation_config == policy.generation_config
    assert [p.name for p in again.trainable] == [p.name for p in policy.trainable]
    merged = checkpoint_weights(tmp_path / "adapter", policy.decoder.config)
    for name, array in policy.decoder.tensors():
        np.testing.assert_array_equal(again.decoder.weights(name), array)
        np.testing.assert_array_equal(merged(name), array)
    again.write(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "adapter" / path.name).read_bytes(), path

    fresh = open_policy(ModelConfig(path=str(language_model), lora=LoraConfig(2, 3, 0.1, ["all-linear"])), 1, head)
    assert (fresh.decoder.lora, fresh.base) == (policy.decoder.lora, policy.base)
    fresh.load(tmp_path / "adapter")
    loaded = dict(fresh.decoder.adapter_tensors())
    for name, array in policy.decoder.adapter_tensors():
        np.testing.assert_array_equal(loaded[name], array)


def test_training_goes_on_with_a_written_adapter(language_model, tmp_path):
    from mindrlhf.trainer.roles import open_policy

    policy = with_adapter(language_model)
    policy.write(tmp_path / "adapter")
    model = ModelConfig(path=str(tmp_path / "adapter"))
    assert open_policy(model, 1).decoder.lora == policy.decoder.lora
    reward = open_policy(model, 1, head="score")
    assert [p.name for p in reward.trainable][-1] == "score.weight"
    model.lora.rank = 5
    with pytest.raises(UserError, match="model.lora: .* holds an adapter of rank 2 with its own settings; remove"):
        open_policy(model, 1)
    with pytest.raises(UserError, match="model.train_layers: with adapters no layers are trained"):
        open_policy(ModelConfig(path=str(tmp_path / "adapter"), train_layers=[0]), 1)


def test_a_whole_policy_is_loaded_in_place(language_model, tmp_path):
    from mindrlhf.trainer.roles import open_checkpoint

    one, other = open_checkpoint(language_model), open_checkpoint(language_model)
    one.decoder.load(lambda name: other.decoder.weights(name) + 1)
    one.write(tmp_path / "model")
    other.load(tmp_path / "model")
    for name, array in one.decoder.tensors():
        np.testing.assert_array_equal(other.decoder.weights(name), array)


def test_chosen_layers(language_model):
    from mindrlhf.trainer.roles import open_policy

    policy = open_policy(ModelConfig(path=str(language_model), train_layers=[0]), 1)
    assert {p.name.split(".layers.0.")[0] for p in policy.trainable} == {"model"}
    with pytest.raises(UserError, match="model.train_layers: there is no layer 1; the model has 0 to 0"):
        open_policy(ModelConfig(path=str(language_model), train_layers=[1]), 1)
    both = ModelConfig(path=str(language_model), train_layers=[0], lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match="model.train_layers: with adapters no layers are trained"):
        open_policy(both, 1)


def test_an_adapter_needs_a_checkpoint(mindspore):
    from mindrlhf.trainer.roles import open_policy

    model = ModelConfig(build=BuildConfig({"model_type": "qwen2"}), lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match="model.lora: needs model.path"):
        open_policy(model, 1)


def test_more_stop_ids(language_model):
    from mindrlhf.trainer.roles import open_checkpoint

    policy = open_checkpoint(language_model)
    ends = policy.generation_config["eos_token_id"]
    policy.add_stop_ids([5, *ends])
    assert policy.generation_config["eos_token_id"] == [*ends, 5]
    policy.generation_config["eos_token_id"] = None
    policy.add_stop_ids([5])
    assert policy.generation_config["eos_token_id"] == [5]
