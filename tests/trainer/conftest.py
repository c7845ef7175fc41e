"""A tiny online job: a one-layer model, six problems, two a step."""

import json

import pytest

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
    """A function: overrides as keyword arguments with __ for the dot -> GRPOConfig that writes below tmp_path."""
    from mindrlhf.config import GRPOConfig, load_config

    def make(output="run", **overrides):
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
        return load_config(GRPOConfig, None, [f"{name}={value}" for name, value in values.items()])

    return make
