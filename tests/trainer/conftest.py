"""A tiny online job: a one-layer model, six problems, two a step."""

import json

import pytest

import mindrlhf
from tests.trainer import stages

DECODER = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """Path of a file of six additions."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"prompt": f"{a}+{a + 1}=", "label": str(2 * a + 1), "response": str(2 * a + 1)} for a in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def letter_reward(completions, **columns):
    """The share of even characters: dense, so that every group has a signal, and learnable in a few steps."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture()
def tiny_config(problems, tmp_path):
    """A function: overrides as keyword arguments with __ for the dot -> a config that writes below tmp_path."""
    from mindrlhf.config import GRPOConfig, load_config

    def make(output="run", kind=GRPOConfig, **overrides):
        values = {
            "output": str(tmp_path / output),
            "model.build.decoder": json.dumps(DECODER),
            "model.build.tokenizer_files": f"[{problems}]",
            "model.build.vocab_size": "270",
            "data.train": f"[{{path: {problems}}}]",
            "rollout.prompts_per_step": "2",
            "rollout.num_generations": "4",
            "rollout.slots": "8",
            "rollout.max_prompt_tokens": "8",
            "rollout.sampling.max_tokens": "8",
            "algorithm.learning_rate": "1e-3",
            "trainer.rows": "4",
            "trainer.row_tokens": "32",
            "trainer.steps": "4",
            "logging.tensorboard": "false",
            "logging.progress": "false",
        }
        for name, value in overrides.items():
            values[name.replace("__", ".")] = str(value).replace("PROBLEMS", str(problems))
        return load_config(kind, None, [f"{name}={value}" for name, value in values.items()])

    return make


@pytest.fixture(scope="session")
def stage_rows(tmp_path_factory):
    return stages.write_rows(tmp_path_factory.mktemp("stages") / "rows.jsonl")


@pytest.fixture(scope="session")
def teacher(mindspore, stage_rows, tmp_path_factory):
    """A random model with the vocabulary of the others."""
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build

    directory = tmp_path_factory.mktemp("teacher")
    build(BuildConfig(stages.DECODER, 300, [str(stage_rows)]), seed=7).write(directory)
    return directory


@pytest.fixture()
def make_stage(mindspore, stage_rows, teacher, tmp_path):
    """A function: stage, overrides -> a trainer that writes below tmp_path."""

    def trainer(stage, *overrides, output="run"):
        config_name, trainer_name, own = stages.STAGES[stage]
        values = {
            "output": tmp_path / output,
            "model.build.decoder": json.dumps(stages.DECODER),
            "model.build.tokenizer_files": f"[{stage_rows}]",
            "model.build.vocab_size": 300,
            "data.train": f"[{{path: {stage_rows}}}]",
            "data.test": f"[{{path: {stage_rows}}}]",
            "data.max_rows": 20,
            "training.batch_size": 4,
            "training.learning_rate": 3e-3,
            "trainer.rows": 4,
            "trainer.row_tokens": 64,
            "trainer.steps": 20,
            "logging.tensorboard": "false",
            "logging.progress": "false",
        }
        texts = [f"{name}={value}" for name, value in values.items()]
        texts += [override.replace("TEACHER", str(teacher)) for override in (*own, *overrides)]
        config = mindrlhf.load_config(getattr(mindrlhf, config_name), None, texts)
        return getattr(mindrlhf, trainer_name)(config)

    return trainer
