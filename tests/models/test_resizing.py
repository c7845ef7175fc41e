"""mindrlhf/models/resizing.py: new special tokens, their rows, and what a job writes with them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mindrlhf.config import LoraConfig, ModelConfig
from mindrlhf.data.tokenizers import build_tokenizer, encode, load_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.models.shapes import EMBEDDING, HEAD
from tests.checkpoints import write_checkpoint, write_problems

TOKENS = ["<tool>", "</tool>"]


@pytest.fixture
def tokenizer(tmp_path):
    """260 tokens."""
    (tmp_path / "corpus.txt").write_text("ab ab ab", encoding="utf-8")
    build_tokenizer([tmp_path / "corpus.txt"], 260, tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def weights(micro_config):
    from mindrlhf.models.decoder import random_weights

    return lambda size: random_weights(replace(micro_config, vocab_size=size, tie_embeddings=False), 0)


def test_rows_are_the_mean(tokenizer, micro_config, weights):
    from mindrlhf.models.resizing import with_tokens

    config, before = replace(micro_config, vocab_size=260, tie_embeddings=False), weights(260)
    grown, after = with_tokens(tokenizer, config, before, TOKENS)
    assert grown == replace(config, vocab_size=262)
    assert encode(tokenizer, ["ab<tool>ab</tool>"])[0].tolist() == [256, 260, 256, 261]
    assert set(TOKENS) <= set(tokenizer.all_special_tokens)
    for name in (EMBEDDING, HEAD):
        rows = after(name)
        np.testing.assert_array_equal(rows[:260], before(name))
        np.testing.assert_allclose(rows[260:], [before(name).mean(0)] * 2, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(after("model.norm.weight"), before("model.norm.weight"))
    # Known by now: nothing changes.
    assert with_tokens(tokenizer, grown, after, TOKENS) == (grown, after)


def test_rows_of_a_padded_embedding_are_used(tokenizer, micro_config, weights):
    from mindrlhf.models.resizing import with_tokens

    config, before = replace(micro_config, vocab_size=261, tie_embeddings=False), weights(261)
    grown, after = with_tokens(tokenizer, config, before, TOKENS)
    assert grown.vocab_size == 262
    np.testing.assert_array_equal(after(EMBEDDING)[:260], before(EMBEDDING)[:260])
    # The row that no token had is not part of the mean either.
    np.testing.assert_allclose(after(EMBEDDING)[260:], [before(EMBEDDING)[:260].mean(0)] * 2, rtol=1e-6, atol=1e-8)


def test_an_empty_token(tokenizer, micro_config, weights):
    from mindrlhf.models.resizing import with_tokens

    with pytest.raises(UserError, match="model.add_tokens: one of the tokens is empty; remove it"):
        with_tokens(tokenizer, micro_config, weights(48), ["<a>", " "])


@pytest.fixture(scope="module")
def checkpoint(mindspore, tmp_path_factory):
    directory = tmp_path_factory.mktemp("resizing")
    return write_checkpoint(directory / "model", write_problems(directory / "problems.jsonl", 4))


def test_a_checkpoint_with_more_tokens(checkpoint, tmp_path):
    from mindrlhf.trainer.roles import open_checkpoint, open_policy

    policy = open_policy(ModelConfig(path=str(checkpoint), add_tokens=TOKENS), seed=1)
    policy.write(tmp_path / "written")
    before = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    assert json.loads((tmp_path / "written" / "config.json").read_text())["vocab_size"] == before + 2
    again = open_checkpoint(tmp_path / "written")
    assert again.decoder.config == policy.decoder.config
    ids = encode(again.tokenizer, ["a<tool></tool>"])[0].tolist()
    assert ids[1:] == [before, before + 1]
    np.testing.assert_array_equal(again.decoder.weights(EMBEDDING), policy.decoder.weights(EMBEDDING))
    # The same job resumed: its checkpoint fits the policy that the config describes.
    policy.load(tmp_path / "written")


def test_adapters_cannot_have_more_tokens(checkpoint):
    from mindrlhf.trainer.roles import open_policy

    model = ModelConfig(path=str(checkpoint), add_tokens=TOKENS, lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match="model.add_tokens: adapters have no rows for new tokens"):
        open_policy(model, seed=1)


def test_a_tokenizer_of_another_model(checkpoint, tmp_path):
    from mindrlhf.trainer.roles import open_checkpoint

    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(str(tmp_path))
    expected = f"the tokenizer has token {size}, but the model's vocab_size is {size}; they are of different models"
    with pytest.raises(UserError, match=expected):
        open_checkpoint(checkpoint, str(tmp_path))
