"""Bad input from the command line: exit code 2, one line that names the place, and nothing written over."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindrlhf.cli.main import main
from mindrlhf.config import GRPOConfig, config_to_yaml
from mindrlhf.models.families import FAMILIES
from tests.checkpoints import write_checkpoint, write_problems


@pytest.fixture(scope="module")
def whole_model(mindspore, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    problems = write_problems(directory / "problems.jsonl", 4)
    return write_checkpoint(directory / "model", problems)


@pytest.fixture()
def job(whole_model, tmp_path, capsys):
    """A job directory of model/, problems.jsonl and job.yaml; job() runs it and returns the one line on stderr."""
    model = tmp_path / "model"
    shutil.copytree(whole_model, model)
    problems = write_problems(tmp_path / "problems.jsonl", 4)
    config = {
        "output": str(tmp_path / "run"),
        "model": {"path": "model"},
        "data": {"train": [{"path": "problems.jsonl"}], "prompt_key": "question", "label_key": "answer"},
        "rollout": {
            "prompts_per_step": 2, "num_generations": 2, "slots": 4, "max_prompt_tokens": 128,
            "sampling": {"max_tokens": 4},
        },
        "algorithm": {"kl_coef": 0},
        "trainer": {"steps": 1, "rows": 2},
        "logging": {"tensorboard": False, "progress": False},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(config, indent=1))

    class Job:
        directory, weights, data, output = tmp_path, model / "model.safetensors", problems, tmp_path / "run"

        def __call__(self, *overrides):
            before = snapshot(tmp_path)
            assert main(["grpo", "--config", str(tmp_path / "job.yaml"), *overrides]) == 2
            captured = capsys.readouterr()
            assert captured.err.startswith("mindrlhf: error: ") and captured.err.count("\n") == 1, captured.err
            after = snapshot(tmp_path)
            assert {path: after.get(path) for path in before} == before
            self.written = sorted(set(after) - set(before))
            return captured.err

    return Job()


def snapshot(directory):
    """Path -> content of every file."""
    files = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def drop(tensors, name):
    del tensors[name]


def cut(tensors, name):
    tensors[name] = tensors[name][:-1].copy()


def add(tensors, name):
    tensors[name] = np.zeros(8, np.float32)


NORM, UP, EXTRA = "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (drop, NORM, "model.norm.weight [32] is missing"),
        (cut, UP, "model.layers.0.mlp.up_proj.weight has shape [47, 32], config.json makes it [48, 32]"),
        (add, EXTRA, f"{EXTRA} [8] is unexpected: qwen2 models have no such tensor"),
    ],
    ids=["missing", "misshapen", "unexpected"],
)
def test_a_wrong_tensor(job, change, name, message):
    tensors = load_file(job.weights)
    change(tensors, name)
    save_file(tensors, job.weights)
    line = job()
    assert f"{job.weights.parent}: {message}" in line and not job.written


def test_an_unknown_architecture(job):
    path = job.weights.with_name("config.json")
    path.write_text(path.read_text().replace('"qwen2"', '"mamba"'))
    assert f"{path}: model_type 'mamba' is not supported; known: {', '.join(FAMILIES)}" in job() and not job.written


def test_a_vocabulary_of_another_model(job):
    """The embedding has fewer rows than the tokenizer has tokens."""
    tensors = load_file(job.weights)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:256].copy()
    save_file(tensors, job.weights)
    path = job.weights.with_name("config.json")
    path.write_text(path.read_text().replace('"vocab_size": 300', '"vocab_size": 256'))
    line = job()
    assert f"{path.parent}: the tokenizer has token " in line and "but the model's vocab_size is 256" in line
    assert not job.written


def test_a_file_cut_short(job):
    job.weights.write_bytes(job.weights.read_bytes()[:-100])
    assert str(job.weights) in job() and not job.written


def test_a_missing_checkpoint(job):
    assert "nowhere: no such checkpoint directory" in job("model.path=nowhere")
    assert not job.written


def test_a_missing_column(job):
    line = job("data.prompt_key=questions")
    assert f"{job.data}:1: no column 'questions'; did you mean 'question'?" in line and "data.prompt_key" in line
    assert f"{job.data}:1: no column 'label'" in job("data.label_key=label")
    assert not job.written


def test_a_broken_line(job):
    lines = job.data.read_text().splitlines()
    lines[2] = lines[2][:-1]
    job.data.write_text("\n".join(lines))
    assert f"{job.data}:3: not JSON" in job() and not job.written


def test_an_empty_data_set(job):
    job.data.write_text("\n")
    assert f"{job.data}: the data set has no rows" in job() and not job.written


def test_an_empty_prompt(job):
    job.data.write_text(json.dumps({"question": " ", "answer": "1"}) + "\n")
    assert f"{job.data}:1: column 'question' is empty" in job() and not job.written


def test_a_prompt_over_the_window(job):
    assert f"{job.data}:1: the prompt has" in job("rollout.max_prompt_tokens=4") and not job.written


def test_an_unknown_key(job):
    assert "unknown key 'trainer.stepz'; did you mean 'steps'?" in job("trainer.stepz=3")
    config = job.directory / "job.yaml"
    config.write_text(config.read_text().replace('"kl_coef"', '"kl_coeff"'))
    number = 1 + [n for n, line in enumerate(config.read_text().splitlines()) if "kl_coeff" in line][0]
    assert f"{config}:{number}: unknown key 'algorithm.kl_coeff'; did you mean 'kl_coef'?" in job()
    assert not job.written


def test_a_value_of_the_wrong_type(job):
    assert "trainer.steps: 'many' is not a whole number" in job("trainer.steps=many") and not job.written


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0][5:][0]", "reward.py:2: IndexError"),
        ("return [1.0]", "returned 1 numbers for 4 completions"),
        ("return [0.0, float('nan'), 1.0, 1.0]", "returned nan, which is not a finite number, at index 1"),
        ("return ['good'] * len(completions)", "returned 'good', which is not a number"),
    ],
    ids=["raises", "length", "nan", "text"],
)
def test_a_reward_function_that_fails(job, body, message):
    """It is met after the first answers: the checkpoint of step 0 is left, and the line says so."""
    reward = job.directory / "reward.py"
    reward.write_text(f"def mine(completions, **columns):\n    {body}\n")
    line = job(f"rewards=[{{function: '{reward}:mine'}}]")
    assert "reward 'mine'" in line and message in line and str(reward) in line
    assert f"stopped at step 0, saved {job.output}/checkpoints/step-000000" in line
    assert all(path.startswith("run/") for path in job.written)


def test_a_reward_file_that_is_not_there(job):
    assert "no such file" in job(f"rewards=[{{function: '{job.directory}/absent.py:mine'}}]") and not job.written


def test_the_directory_of_another_run_is_left_alone(job):
    job.output.mkdir()
    (job.output / "config.yaml").write_text(config_to_yaml(GRPOConfig(seed=9)))
    (job.output / "metrics.jsonl").write_text('{"step": 1}\n')
    line = job()
    assert f"{job.output}: holds a run with another configuration" in line and not job.written


def test_answers_are_not_written_over(job, capsys):
    answers = job.directory / "answers.jsonl"
    answers.write_text("mine\n")
    command = ["generate", "--model", str(job.directory / "model"), "--prompt", "2+2", "--output", str(answers)]
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err and answers.read_text() == "mine\n"


def test_nothing_to_answer_and_a_missing_model(job, capsys):
    model = str(job.directory / "model")
    for command, message in (
        (["generate", "--model", model], "nothing to answer"),
        (["eval", "--model", model], "nothing to evaluate on"),
        (["eval", "--model", model, "--data", str(job.data), "--k", "2"], "--k 2: must be between 1"),
        (["generate", "--model", "nowhere", "--prompt", "2"], "nowhere: no such checkpoint directory"),
        (["eval", "--model", model, "--data", "nowhere.jsonl"], "nowhere.jsonl: no such data file"),
        (["grpo", "--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
    ):
        assert main(command) == 2
        captured = capsys.readouterr().err
        assert message in captured and captured.count("\n") == 1
