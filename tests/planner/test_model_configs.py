"""model_configs/: sizes against published counts, and layouts against the planner that they are from."""

import re
from pathlib import Path

import pytest

from mindrlhf.cli.plan import read_job
from mindrlhf.config import GRPOConfig, load_config
from mindrlhf.layout import Layout
from mindrlhf.models.mindformers_config import read_mindformers
from mindrlhf.models.shapes import expected_shapes
from mindrlhf.planner.architecture import read_architecture
from mindrlhf.planner.job import Devices
from mindrlhf.planner.search import search
from tests.planner.test_architecture import FIXTURES

DIRECTORY = Path(__file__).parents[2] / "model_configs"
PARAMETERS = {  # as their makers publish them: 0.49, 1.54, 3.09, 7.62, 14.8, 32.8, 8.03, 9.4 and 671 billion
    "qwen2_5_0_5b": 494_032_768, "qwen2_5_1_5b": 1_543_714_304, "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512, "qwen2_5_14b": 14_770_033_664, "qwen2_5_32b": 32_763_876_352,
    "llama3_8b": 8_030_261_248, "glm4_9b": 9_399_951_360, "deepseek_v3_671b": 671_026_419_200,
}  # fmt: skip


def architecture(name):
    return read_architecture(DIRECTORY / f"{name}.yaml")


def layout(config):
    return Layout.of(config, config.data * config.tensor * config.sequence, "parallel")


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
    assert expected_shapes(architecture(name)) == expected_shapes(read_architecture(FIXTURES / "configs" / fixture))


@pytest.mark.parametrize("name", PARAMETERS)
def test_layouts_divide_and_are_the_planners(name, tmp_path):
    text = (DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8")
    devices, memory, overrides = re.search(r"--devices (\d+) --device-memory (\d+)GB ?([^`]*)`", text).groups()
    model, found = architecture(name), read_mindformers(DIRECTORY / f"{name}.yaml")
    training, generation = layout(found.training), layout(found.generation)
    assert not any("pipeline_stage" in note for note in found.notes)
    assert training.size == generation.size == int(devices)
    training.check(model, "parallel_config")
    generation.check(model, "generation_parallel_config")
    job = read_job(load_config(GRPOConfig, None, overrides.split()), None, model)
    plan = search(job, Devices(int(devices), int(memory) * 10**9))
    assert plan.overrun <= 0
    assert (training, generation) == (plan.arrangement.training, plan.arrangement.generation)
