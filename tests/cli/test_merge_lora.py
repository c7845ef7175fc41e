"""`mindrlhf merge-lora`: the checkpoint that an adapter and its base come to."""

import argparse
import shutil

import numpy as np
import pytest

from mindrlhf.cli import merge_lora
from mindrlhf.config import LoraConfig, ModelConfig
from mindrlhf.errors import UserError
from tests.checkpoints import write_checkpoint, write_problems


@pytest.fixture(scope="module")
def adapter(mindspore, tmp_path_factory):
    """(adapter directory, its policy); model/ is beside it."""
    from mindrlhf.trainer.roles import open_policy

    directory = tmp_path_factory.mktemp("merge")
    write_checkpoint(directory / "model", write_problems(directory / "problems.jsonl", 4))
    lora = LoraConfig(rank=2, target_modules=["v_proj", "up_proj"])
    policy = open_policy(ModelConfig(path=str(directory / "model"), lora=lora), 1)
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(array.shape) for name, array in policy.decoder.adapter_tensors()}
    policy.decoder.load_adapter(values.__getitem__)
    policy.write(directory / "adapter")
    return directory / "adapter", policy


def merge(*words):
    parser = argparse.ArgumentParser()
    merge_lora.add_arguments(parser)
    return merge_lora.run(parser.parse_args([str(word) for word in words]))


def test_merged(adapter, tmp_path):
    from mindrlhf.trainer.roles import open_checkpoint

    directory, policy = adapter
    assert merge("--adapter", directory, "--output", tmp_path / "merged") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    found = open_checkpoint(tmp_path / "merged")
    assert found.decoder.lora is None
    assert found.decoder.config == policy.decoder.config
    assert found.generation_config == policy.generation_config
    assert found.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    for name, array in policy.decoder.tensors():
        np.testing.assert_array_equal(found.decoder.weights(name), array)


def test_another_place_of_the_base(adapter, tmp_path):
    directory, policy = adapter
    shutil.copytree(directory, tmp_path / "adapter")
    shutil.copytree(directory.parent / "model", tmp_path / "moved")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(directory.parent), "elsewhere"))
    with pytest.raises(UserError, match="base_model_name_or_path is 'elsewhere/model', and there is no such directory"):
        merge("--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    merge("--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", "--base", tmp_path / "moved")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_refused(adapter, tmp_path):
    directory, _ = adapter
    with pytest.raises(UserError, match="--output .*: exists already; remove it or name another directory"):
        merge("--adapter", directory, "--output", tmp_path)
    with pytest.raises(UserError, match="--output .*: no such directory to write it into"):
        merge("--adapter", directory, "--output", tmp_path / "a" / "b")
    with pytest.raises(UserError, match="--adapter .*model: has no adapter_config.json; give a PEFT adapter's"):
        merge("--adapter", directory.parent / "model", "--output", tmp_path / "merged")
    assert not list(tmp_path.iterdir())
