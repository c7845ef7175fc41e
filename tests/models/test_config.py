"""mindrlhf/models/config.py: every spelling of a configuration, and a clear refusal of what cannot be computed."""

import json
from pathlib import Path

import pytest

from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import stored_shapes
from mindrlhf.models.families import FAMILIES
from mindrlhf.models.hf import read_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz") if path.with_name("config.json").exists())
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


# Keys that are written in another spelling of the same.
RESPELT = {"pad_token_id", "n_inner", "decoder_sparse_step", "mlp_only_layers"}


def test_the_fixtures_are_there():
    assert {DecoderConfig.read(FIXTURES / name).model_type for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name):
    config = DecoderConfig.read(FIXTURES / name)
    written = json.loads(json.dumps(config.to_hf()))
    assert DecoderConfig.from_hf(written) == config
    assert hash(config) == hash(DecoderConfig.from_hf(written))
    original = json.loads((FIXTURES / name / "config.json").read_text())
    shared = set(written) & set(original) - RESPELT
    assert len(shared) > 12
    assert {key: written[key] for key in shared} == {key: original[key] for key in shared}


@pytest.mark.parametrize("name", MODELS)
def test_number_of_parameters(name):
    config = DecoderConfig.read(FIXTURES / name)
    assert config.num_parameters == sum(array.size for array in read_tensors(FIXTURES / name).values())
    assert stored_shapes(config) == read_tensors(FIXTURES / name).shapes


def test_what_transformers_loads(tmp_path):
    from transformers import AutoConfig

    config = DecoderConfig.read(FIXTURES / "llama_llama3_rope")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.architectures == ["LlamaForCausalLM"]
    assert (loaded.num_key_value_heads, loaded.head_dim, loaded.rope_theta) == (1, 16, 100.0)
    assert loaded.rope_scaling == config.rope_scaling
    assert loaded.eos_token_id == [2, 3]
    assert config.eos_token_ids == (2, 3)


def test_defaults_and_flags():
    config = DecoderConfig.from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.norm_epsilon, config.rope_theta) == (4, 8, 1e-6, 10000.0)
    assert (config.qkv_bias, config.output_bias, config.tie_embeddings) == (False, False, False)
    biased = DecoderConfig.from_hf({**LLAMA, "attention_bias": True})
    assert (biased.qkv_bias, biased.output_bias) == (True, True)
    qwen = DecoderConfig.from_hf(QWEN2)
    assert (qwen.qkv_bias, qwen.output_bias) == (True, False)
    wide = DecoderConfig.from_hf({**LLAMA, "head_dim": 16, "num_key_value_heads": None, "eos_token_id": 7})
    assert (wide.head_dim, wide.num_kv_heads, wide.eos_token_ids) == (16, 4, (7,))
    assert qwen.eos_token_ids == ()


def test_both_spellings_of_rope():
    four = DecoderConfig.from_hf({**LLAMA, "rope_theta": 500000, "rope_scaling": LLAMA3_ROPE})
    five = DecoderConfig.from_hf({**LLAMA, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}})
    assert four == five
    assert four.rope_scaling == LLAMA3_ROPE
    old = {("type" if key == "rope_type" else key): value for key, value in LLAMA3_ROPE.items()}
    assert DecoderConfig.from_hf({**LLAMA, "rope_theta": 500000, "rope_scaling": old}) == four
    plain = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert DecoderConfig.from_hf(plain).rope_scaling is None
    assert DecoderConfig.from_hf(plain).rope_theta == 1e6
    with pytest.raises(UserError, match="disagree; keep one of the spellings"):
        DecoderConfig.from_hf({**LLAMA, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"model_type 'mamba' is not supported; known: llama, qwen2"),
        ({"model_type": ["llama"]}, "model_type .'llama'. is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}}, "must not be negative"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"vocab_size": None}, "vocab_size is missing; add it"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ({"num_attention_heads": 0}, "hidden_size 32 is not a multiple of num_attention_heads 0"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"head_dim": 7}, "head_dim is 7 with 7 rotated; rotary embeddings need even numbers"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported; only False is"),
        ({"quantization_config": {}}, "quantization_config is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding-window attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a number"),
        ({"rope_theta": 0}, "rope_theta is 0.0; it must be over 1"),
        ({"eos_token_id": ["</s>"]}, "it must be a token id"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported; known: default"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing; rope_type yarn needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "must be at least 1"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor must be over low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one mapping with rope_type"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        DecoderConfig.from_hf({**LLAMA, **changes}, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert str(caught.value).count("some/config.json") == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "baichuan", "vocab_size": 64000}, "vocab_size 64000 is not supported: that is Baichuan 1"),
        ({"model_type": "baichuan", "max_position_embeddings": None}, "that is the 13B, with ALiBi"),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, "rope_interleave False is not supported; only True"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ({"model_type": "mixtral", "sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ({"model_type": "qwen3_moe", "use_sliding_window": True, "max_window_layers": 2}, "sliding-window attention"),
        ({"model_type": "baichuan", "hidden_size": 5120}, "that is the 13B, with ALiBi"),
        ({"model_type": "glm4", "partial_rotary_factor": 0.0}, "partial_rotary_factor is 0.0; it must leave 1 to"),
        ({"model_type": "deepseek_v3", "attention_bias": True}, "attention_bias true is not supported"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be 1 to 8"),
        ({"model_type": "qwen3_moe", "attention_bias": 1}, "attention_bias is 1; it must be true or false"),
        ({"model_type": "glm4", "head_dim": 6, "partial_rotary_factor": 0.5}, "head_dim is 6 with 3 rotated"),
    ],
)
def test_other_models_under_a_familys_name(changes, message):
    with pytest.raises(UserError, match=message):
        DecoderConfig.from_hf({**LLAMA, **changes})


def test_reward_models():
    score = {**QWEN2, "architectures": ["Qwen2ForSequenceClassification"]}
    config = DecoderConfig.from_hf({**score, "id2label": {"0": "LABEL_0"}, "score_mean": -1.5, "score_std": 2})
    assert (config.head, config.score_mean, config.score_std) == ("score", -1.5, 2.0)
    assert DecoderConfig.from_hf({**score, "num_labels": 1}).head == "score"
    assert DecoderConfig.from_hf({**QWEN2, "architectures": ["Qwen2ForCausalLM"], "num_labels": 3}).head == "logits"
    written = config.to_hf()
    assert written["architectures"] == ["Qwen2ForSequenceClassification"]
    assert (written["id2label"], written["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    assert written["pad_token_id"] is None
    assert DecoderConfig.from_hf(written) == config
    assert "score_mean" not in DecoderConfig.from_hf(QWEN2).to_hf()
    for labels in ({}, {"num_labels": 2}, {"id2label": {"0": "a", "1": "b"}}):
        with pytest.raises(UserError, match="x.json: Qwen2ForSequenceClassification with 2 labels is not supported"):
            DecoderConfig.from_hf({**score, **labels}, "x.json")
    with pytest.raises(UserError, match="score_std 0.0 over 0"):
        DecoderConfig.from_hf({**score, "num_labels": 1, "score_std": 0})


def test_a_sliding_window_that_is_not_in_use():
    values = {**QWEN2, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}
    assert DecoderConfig.from_hf(values).num_layers == 2
    assert DecoderConfig.from_hf({**QWEN2, "use_sliding_window": True}).num_layers == 2  # 28 layers come first
    with pytest.raises(UserError, match="attention_bias false is not supported in model_type qwen2"):
        DecoderConfig.from_hf({**QWEN2, "attention_bias": False})


def test_read(tmp_path):
    with pytest.raises(UserError, match="config.json: no such file"):
        DecoderConfig.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="config.json: not JSON"):
        DecoderConfig.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list, not a JSON object"):
        DecoderConfig.read(tmp_path)


def test_from_yaml():
    values = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    config = DecoderConfig.from_yaml({**values, "rope_scaling": LLAMA3_ROPE}, 320)
    assert config == DecoderConfig.from_hf({**LLAMA, "vocab_size": 320, "rope_scaling": LLAMA3_ROPE})
    with pytest.raises(UserError, match="x.yaml: unknown key 'num_hiden_layers'; did you mean 'num_hidden_layers'"):
        DecoderConfig.from_yaml({**values, "num_hiden_layers": 2}, 320, "x.yaml")
    with pytest.raises(UserError, match="rope_scaling: unknown key 'low_factor'; did you mean 'low_freq_factor'"):
        DecoderConfig.from_yaml({**values, "rope_scaling": {**LLAMA3_ROPE, "low_factor": 1}}, 320)
    with pytest.raises(UserError, match="move it to build.vocab_size"):
        DecoderConfig.from_yaml(LLAMA, 320)
    with pytest.raises(UserError, match="model.build.decoder: hidden_size is missing"):
        DecoderConfig.from_yaml({"model_type": "llama"}, 320)
