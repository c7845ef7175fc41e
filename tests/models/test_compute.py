"""What a config says of how a decoder is computed, and that every decoder of a job follows it."""

import pytest

from mindrlhf.config import BuildConfig, ModelConfig
from mindrlhf.errors import UserError
from mindrlhf.models.compute import Compute
from mindrlhf.trainer.roles import open_policy

DECODER = {
    "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip


def model(tmp_path, **settings):
    text = tmp_path / "text.txt"
    text.write_text("one two three\n" * 9, encoding="utf-8")
    return ModelConfig(build=BuildConfig(decoder=DECODER, tokenizer_files=[str(text)]), **settings)


def test_a_config_reaches_the_decoder(mindspore, tmp_path):
    found = open_policy(model(tmp_path, compute_dtype="float16", recompute=True, logits_at_once=640), 1).decoder
    assert found.config.compute == Compute("float16", True, 640)
    assert found.chunked.rows == 2 and found.dtype == mindspore.float16
    assert found.layers[0].self_attn.q_proj.dtype == mindspore.float16
    assert found.layers[0].self_attn.q_proj.weight.dtype == mindspore.float32
    assert open_policy(model(tmp_path), 1).decoder.config.compute == Compute()


def test_targets_at_once():
    assert [Compute(logits_at_once=1000).targets_at_once(vocabulary) for vocabulary in (100, 300, 5000)] == [10, 3, 1]
    assert Compute(logits_at_once=0).targets_at_once(100) == 0


def test_what_cannot_be_is_refused(mindspore, tmp_path):
    with pytest.raises(UserError, match="model.compute_dtype: MindSpore multiplies no bfloat16 matrices on a CPU"):
        open_policy(model(tmp_path, compute_dtype="bfloat16"), 1)
    with pytest.raises(UserError, match="model.logits_at_once: -1 is negative"):
        open_policy(model(tmp_path, logits_at_once=-1), 1)
