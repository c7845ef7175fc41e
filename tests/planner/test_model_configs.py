"""model_configs/: sizes against published counts, and layouts against the planner that they are from."""

import re
from pathlib import Path

import pytest
import yaml

from mindrlhf.cli.plan import read_job
from mindrlhf.config import GRPOConfig, load_config
from mindrlhf.layout import Layout
from mindrlhf.models.config import DecoderConfig
from mindrlhf.planner.architecture import architecture_of, read_architecture
from mindrlhf.planner.job import Devices
from mindrlhf.planner.search import search
from tests.planner.test_architecture import FIXTURES

DIRECTORY = Path(__file__).parents[2] / "model_configs"
PARAMETERS = {  # as their makers publish them: 0.49, 1.54, 3.09, 7.62, 14.8, 32.8, 8.03, 9.4 and 671 billion
    "qwen2_5_0_5b": 494_032_768, "qwen2_5_1_5b": 1_543_714_304, "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512, "qwen2_5_14b": 14_770_033_664, "qwen2_5_32b": 32_763_876_352,
    "llama3_8b": 8_030_261_248, "glm4_9b": 9_399_951_360, "deepseek_v3_671b": 671_026_419_200,
}  # fmt: skip
RUNS = [name for name in PARAMETERS if name.startswith(("qwen", "llama"))]
LLAMA_KEYS = {
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_position_embedding",
}  # fmt: skip
GLM_KEYS = {
    "num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size", "vocab_size": "padded_vocab_size",
    "num_key_value_heads": "multi_query_group_num", "head_dim": "kv_channels", "max_position_embeddings": "seq_length",
    "attention_bias": "add_qkv_bias",
}  # fmt: skip


def content(name):
    return yaml.safe_load((DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8"))


def architecture(name):
    """From MindFormers' keys to Hugging Face's."""
    values = content(name)["model"]["model_config"]
    kind = values.get("type")
    if kind == "LlamaConfig":
        family = "qwen2" if values["qkv_has_bias"] else "llama"
        values = {"model_type": family, **values, **{ours: values[theirs] for ours, theirs in LLAMA_KEYS.items()}}
    elif kind == "ChatGLM2Config":
        values = {"model_type": "glm", **values, **{ours: values[theirs] for ours, theirs in GLM_KEYS.items()}}
    return architecture_of(values, name)


def layout(section, zero=False):
    assert section["pipeline_stage"] == 1
    keys = ("data_parallel", "model_parallel", "expert_parallel", "context_parallel")
    return Layout(*(section[key] for key in keys), zero)


def test_every_file_is_listed():
    assert {path.stem for path in DIRECTORY.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes(name):
    assert architecture(name).num_parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "fixture"),
    [("qwen2_5_7b", "qwen2_5_7b"), ("qwen2_5_32b", "qwen2_5_32b"), ("deepseek_v3_671b", "deepseek_v3")],
)
def test_sizes_are_those_of_config_json(name, fixture):
    assert architecture(name) == read_architecture(FIXTURES / "configs" / fixture)


@pytest.mark.parametrize("name", PARAMETERS)
def test_layouts_divide_and_are_the_planners(name, tmp_path):
    text = (DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8")
    devices, memory, overrides = re.search(r"--devices (\d+) --device-memory (\d+)GB ?([^`]*)`", text).groups()
    values, model = yaml.safe_load(text), architecture(name)
    training = layout(values["parallel_config"], values["parallel"]["enable_parallel_optimizer"])
    generation = layout(values["generation_parallel_config"])
    assert training.size == generation.size == int(devices)
    model.check(training, "parallel_config")
    model.check(generation, "generation_parallel_config")
    job = read_job(load_config(GRPOConfig, None, overrides.split()), None, model)
    plan = search(job, Devices(int(devices), int(memory) * 10**9))
    assert plan.overrun <= 0
    assert (training, generation) == (plan.arrangement.training, plan.arrangement.generation)


@pytest.mark.parametrize("name", RUNS)
def test_what_the_decoder_runs_is_read_by_it(name):
    """By the attributes that a LlamaConfig has; with MindFormers' own reader: tests/trainer/test_published_grpo.py."""
    values = content(name)["model"]["model_config"]
    defaults = {"multiple_of": 256, "ffn_dim_multiplier": None, "extend_method": "None", "scaling_factor": 1.0}
    config = DecoderConfig.from_mindformers(type("LlamaConfig", (), {**defaults, **values})())
    assert config.num_parameters == PARAMETERS[name]
