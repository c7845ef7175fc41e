"""Every YAML that is shipped can be read."""

from pathlib import Path

import pytest
import yaml

from mindrlhf import config as configurations
from mindrlhf.cli.train import JOBS as COMMANDS
from mindrlhf.config import load_config

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "examples").rglob("*.y*ml"))
DOWNLOADED = {ROOT / "examples" / "grpo" / "qwen2_5_gsm8k.yaml"}  # checkpoint and data are the user's to fetch
MODELS = sorted((ROOT / "model_configs").rglob("*.y*ml"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def read(path):
    """As the command reads it whose example it is: an example's folder, in the pipeline its file, is named after it, or
    else here."""
    name = path.stem if path.parent.name == "rlhf" else path.parent.name
    command = {"reward_model": "rm", "lora": "sft", "agent": "grpo"}.get(name, name)
    return load_config(getattr(configurations, COMMANDS[command].config), path)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_that_help_names_exists(command):
    assert (ROOT / COMMANDS[command].example).is_file()


def test_there_are_jobs():
    assert JOBS


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_job_parses(path):
    read(path)


@pytest.mark.parametrize("path", [path for path in JOBS if path not in DOWNLOADED], ids=name_of)
def test_files_of_a_job_exist(path):
    """Paths in a YAML are relative to it."""
    config = read(path)
    sources = [*config.data.train, *config.data.test]
    sources += config.warmup.train if isinstance(config, configurations.GRPOConfig) else []
    for name in [source.path for source in sources] + config.model.build.tokenizer_files:
        assert (path.parent / name).is_file(), f"{name_of(path)}: {name} is not there"


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_model_config_is_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
