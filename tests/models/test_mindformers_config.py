"""MindFormers' YAMLs as configurations of the decoder: keys, what is refused, and what is named as not read."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mindrlhf.config import ParallelConfig
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.hf_config import Latent, Router
from mindrlhf.models.mindformers_config import decoder_config, difference, read_mindformers

MODEL_CONFIGS = sorted((Path(__file__).parents[2] / "model_configs").glob("*.yaml"))
# As published YAMLs have it, their sizes aside: keys that decide elsewhere, and keys that nothing knows.
QWEN2_5 = {
    "type": "LlamaConfig", "batch_size": 1, "seq_length": 8192, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
    "n_kv_heads": 2, "vocab_size": 96, "intermediate_size": 80, "qkv_has_bias": True, "rms_norm_eps": 1.0e-6,
    "theta": 1000000.0, "max_position_embedding": 131072, "emb_dropout_prob": 0.0, "eos_token_id": 3,
    "pad_token_id": 3, "compute_dtype": "bfloat16", "softmax_compute_type": "float16", "use_past": False,
    "extend_method": "None", "use_flash_attention": True, "qkv_concat": False, "offset": 0, "top_p": 0.8,
    "checkpoint_name_or_path": "", "compute_in_2d": True, "rotary_pct": 1.0,
}  # fmt: skip
QWEN2_5_MCORE = {
    "type": "Qwen2Config", "seq_length": 4096, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "intermediate_size": 80, "max_position_embeddings": 131072,
    "add_qkv_bias": True, "rms_norm_eps": 1.0e-6, "rope_theta": 1000000.0, "position_embedding_type": "rope",
    "eos_token_id": 3, "compute_dtype": "bfloat16", "params_dtype": "bfloat16", "tie_word_embeddings": False,
    "normalization": "RMSNorm", "hidden_act": "silu", "add_bias_linear": False, "gated_linear_unit": True,
}  # fmt: skip
GLM4 = {
    "type": "ChatGLM2Config", "num_layers": 2, "padded_vocab_size": 96, "hidden_size": 64, "ffn_hidden_size": 80,
    "kv_channels": 16, "num_attention_heads": 4, "seq_length": 512, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "layernorm_epsilon": 1.0e-5, "rmsnorm": True, "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True, "add_bias_linear": False, "add_qkv_bias": True, "multi_query_attention": True,
    "multi_query_group_num": 2, "quantization_bit": 0, "pre_seq_len": "None", "eos_token_id": [5, 6],
    "mlp_concat": False, "use_llama_rope": True, "alpha": 1.0,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "max_position_embeddings": 512,
    "rms_norm_eps": 1.0e-6, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
DEEPSEEK = {
    **LATENT, "type": "DeepseekV3Config", "auto_register": "deepseek3_config.DeepseekV3Config", "num_layers": 4,
    "num_heads": 4, "n_kv_heads": 4, "seq_length": 256, "theta": 10000.0, "extend_method": "None", "mtp_depth": 1,
}  # fmt: skip
EXPERTS = {
    "expert_num": 8, "num_experts_chosen": 2, "routing_policy": "TopkRouterV2", "shared_expert_num": 1,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "use_gating_sigmoid": True, "balance_via_topk_bias": True, "capacity_factor": 1.5,
}  # fmt: skip
DEEPSEEK_MCORE = {
    **LATENT, "model_type": "deepseek_v3", "architectures": "DeepseekV3ForCausalLM", "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "moe_intermediate_size": 32, "rope_theta": 10000.0, "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.fixture()
def read(tmp_path):
    """A function: the model_config, other sections -> what is read."""

    def read(values, **sections):
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump({"model": {"model_config": values}} | sections))
        return read_mindformers(path)

    return read


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_shipped_files(path):
    """Their sizes: tests/planner/test_model_configs.py."""
    found = read_mindformers(path)
    families = {"LlamaConfig": ("qwen2", "llama"), "ChatGLM2Config": ("glm",), "DeepseekV3Config": ("deepseek_v3",)}
    assert found.config.model_type in families[found.kind]
    assert not any(note.endswith(": not known") for note in found.notes)


def test_qwen2_5(read):
    found = read(QWEN2_5, parallel_config={"data_parallel": 2, "model_parallel": 4, "pipeline_stage": 2}, optimizer={})
    assert found.config == DecoderConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        max_positions=131072, norm_epsilon=1e-6, rope_theta=1e6, qkv_bias=True, model_type="qwen2",
        initializer_range=0.01, bos_token_id=1, eos_token_id=3,
    )  # fmt: skip
    assert found.is_legacy and found.training == ParallelConfig(data=2, tensor=4)
    assert found.generation == ParallelConfig(data=0, tensor=0, expert=0)  # as in training
    notes = dict(reversed(note.split(": ", 1)) for note in found.notes)
    assert notes["not known"] == "compute_in_2d, rotary_pct"
    assert notes["the job's own YAML decides"] == "optimizer"
    assert "offset, parallel_config.pipeline_stage" in notes.values()
    assert "is not taken from here; a job says parallel.data=2 parallel.tensor=4" in notes
    named = ", ".join(notes.values())
    for key in ("compute_dtype", "softmax_compute_type", "use_flash_attention", "top_p", "qkv_concat", "use_past"):
        assert key in named
    assert "emb_dropout_prob" not in named and "hidden_size" not in named


def test_the_mcore_schema_is_the_same_model(read):
    legacy, mcore = read(QWEN2_5).config, read(QWEN2_5_MCORE, use_legacy=False)
    assert difference(legacy, mcore.config) is None
    assert not mcore.is_legacy
    other = read({**QWEN2_5_MCORE, "num_key_value_heads": 4}).config
    assert difference(legacy, other) == "num_kv_heads"
    megatron = {"num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size"}
    renamed = {**QWEN2_5_MCORE, **{theirs: QWEN2_5_MCORE[ours] for theirs, ours in megatron.items()}}
    assert read({key: value for key, value in renamed.items() if key not in megatron.values()}).config == mcore.config


def test_glm4(read):
    config = read(GLM4).config
    assert config == DecoderConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        max_positions=512, norm_epsilon=1e-5, rotary_dim=8, qkv_bias=True, model_type="glm", eos_token_id=(5, 6),
    )  # fmt: skip
    further = {"post_self_attn_layernorm": True, "post_mlp_layernorm": True, "rope_ratio": 50}
    assert read({**GLM4, **further}).config.model_type == "glm4"
    assert read({**GLM4, **further}).config.rope_theta == 500000
    assert read({**GLM4, "multi_query_attention": False}).config.num_kv_heads == 4


def test_deepseek_v3(read):
    """Legacy, whose experts are a section of their own, and mcore; no groups where the router has none."""
    legacy, mcore = read(DEEPSEEK, moe_config=EXPERTS), read(DEEPSEEK_MCORE, use_legacy=False)
    assert difference(legacy.config, mcore.config) is None
    config = legacy.config
    assert config.latent == Latent(24, 16, 8, 4, 8) and config.router == Router("sigmoid", True, 2.5, 1, 1)
    assert (config.num_experts, config.experts_per_token, config.shared_width) == (8, 2, 32)
    assert config.dense_layers == (0,) and config.max_positions == 512
    assert any("mtp_depth" in note for note in legacy.notes)
    assert any("moe_config.capacity_factor" in note for note in legacy.notes)
    groups = {**EXPERTS, "n_group": 4, "topk_group": 2}
    assert read(DEEPSEEK, moe_config=groups).config.router.groups == 4
    assert read(DEEPSEEK, moe_config={**groups, "topk_method": "greedy"}).config.router.groups == 1
    yarn = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    long = {**DEEPSEEK, "extend_method": "YARN", "scaling_factor": {**yarn, "original_max_position_embeddings": 128}}
    assert read(long, moe_config=EXPERTS).config.rope_scaling["mscale_all_dim"] == 1.0


def test_a_directory_with_config_json(read, tmp_path):
    """The mcore networks' way: the YAML has what differs."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(DEEPSEEK_MCORE))
    found = read({"initializer_range": 0.01}, use_legacy=False, pretrained_model_dir="hf")
    assert found.kind == "DeepseekV3Config" and found.config.initializer_range == 0.01
    with pytest.raises(UserError, match="nowhere/config.json"):
        read({"initializer_range": 0.01}, use_legacy=False, pretrained_model_dir="nowhere")


@pytest.mark.parametrize(
    ("values", "sections", "message"),
    [
        ({**QWEN2_5, "hiden_size": 64}, {}, "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ({**QWEN2_5, "type": "BloomConfig"}, {}, "type 'BloomConfig' is not known; known: LlamaConfig"),
        ({**QWEN2_5, "emb_dropout_prob": 0.1}, {}, "emb_dropout_prob 0.1 is not supported"),
        (QWEN2_5, {"moe_config": {"expert_num": 8}}, "expert_num is over 1; LlamaConfig with experts"),
        (QWEN2_5, {"model": 3}, "model: 3 is not a mapping"),
        (QWEN2_5, {"parallel_config": 3}, "parallel_config: 3 is not a mapping"),
        (QWEN2_5, {"parallel_config": {"model_parallel": "two"}}, "model_parallel is 'two'; it must be a whole number"),
        (QWEN2_5, {"base_config": "other.yaml"}, "base_config is not followed"),
        ({**QWEN2_5, "hidden_size": "wide"}, {}, "hidden_size is 'wide'; it must be a whole number"),
        ({**QWEN2_5, "extend_method": "YARN"}, {}, "scaling_factor is 1.0; extend_method YARN needs a mapping"),
        ({**QWEN2_5_MCORE, "normalization": "LayerNorm"}, {}, "normalization 'LayerNorm' is not supported; only 'RMSN"),
        ({**QWEN2_5_MCORE, "position_embedding_type": "yarn"}, {}, "yarn without rope_scaling"),
        ({**GLM4, "rmsnorm": False}, {}, "rmsnorm False is not supported; only True is"),
        ({**GLM4, "post_mlp_layernorm": True}, {}, "post_mlp_layernorm have no form alone"),
        (DEEPSEEK, {"moe_config": {**EXPERTS, "use_gating_sigmoid": False}}, "moe_config: use_gating_sigmoid False"),
        ({**DEEPSEEK_MCORE, "moe_layer_freq": 2}, {}, "moe_layer_freq 2 is not supported; only 1 is"),
        ({}, {}, "model.model_config is missing"),
    ],
)
def test_what_is_refused(read, values, sections, message):
    with pytest.raises(UserError, match="model.yaml: ") as error:
        read(values, **sections)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_yaml(tmp_path):
    with pytest.raises(UserError, match="no such file; give a MindFormers YAML"):
        read_mindformers(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("model: [")
    with pytest.raises(UserError, match="broken.yaml:1: not YAML"):
        read_mindformers(tmp_path / "broken.yaml")


def llama_config(**changes):
    """The attributes of mindformers.models.LlamaConfig, with its defaults."""
    values = dict(
        vocab_size=64, hidden_size=32, intermediate_size=None, num_layers=2, num_heads=4, n_kv_heads=None,
        multiple_of=16, ffn_dim_multiplier=None, rms_norm_eps=1e-5, qkv_has_bias=False, attn_proj_has_bias=False,
        theta=10000.0, seq_length=64, max_position_embedding=32, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, init_method_std=0.01, extend_method="None", scaling_factor=1.0,
        moe_config=SimpleNamespace(expert_num=1),
    )  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_objects():
    assert decoder_config(llama_config()) == DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8,
        max_positions=64, norm_epsilon=1e-5, initializer_range=0.01, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    # Llama 2 70B: hidden 8192, multiplier 1.3, multiple of 4096 -> 28672
    large = llama_config(hidden_size=8192, num_heads=64, multiple_of=4096, ffn_dim_multiplier=1.3, n_kv_heads=8)
    assert decoder_config(large).intermediate_size == 28672
    assert decoder_config(llama_config(intermediate_size=50)).intermediate_size == 50
    assert decoder_config(llama_config(qkv_has_bias=True)).model_type == "qwen2"
    both = decoder_config(llama_config(qkv_has_bias=True, attn_proj_has_bias=True))
    assert (both.model_type, both.output_bias) == ("llama", True)
    for changes in (
        {"attn_proj_has_bias": True},
        {"extend_method": "DYNAMIC_NTK"},
        {"moe_config": SimpleNamespace(expert_num=8)},
    ):
        with pytest.raises(UserError, match="LlamaConfig"):
            decoder_config(llama_config(**changes))


def test_rope():
    def rope(method, factor):
        config = decoder_config(llama_config(extend_method=method, scaling_factor=factor))
        return config.rope_theta, config.rope_scaling

    assert rope("NTK", 4.0) == (40000.0, None)
    assert rope("PI", 4.0) == (10000.0, {"rope_type": "linear", "factor": 4.0})
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    assert rope("LLAMA3", llama3) == (10000.0, {"rope_type": "llama3", **llama3})
    yarn = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 16}
    _, scaling = rope("YARN", {**yarn, "mscale": 1.0, "mscale_all_dim": 0.0})
    assert scaling["attention_factor"] == pytest.approx(1.1386294)
    assert "mscale" not in scaling
