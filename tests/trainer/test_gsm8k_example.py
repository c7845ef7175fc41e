"""The shipped GSM8K job at a tiny size, from a checkpoint directory to a checkpoint directory."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindrlhf.cli.main import main
from tests.checkpoints import write_checkpoint, write_problems

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "grpo"
SMALL = [
    "rollout.prompts_per_step=2", "rollout.num_generations=4", "rollout.slots=8", "rollout.max_prompt_tokens=192",
    "rollout.sampling.max_tokens=8", "trainer.steps=2", "algorithm.learning_rate=1e-3", "algorithm.entropy_coef=0.01",
    "algorithm.warmup_steps=0", "logging.completions_every=1", "logging.tensorboard=false", "logging.progress=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def downloads(mindspore, tmp_path_factory):
    """A directory that holds what a user downloads: model/, train.jsonl and test.jsonl."""
    directory = tmp_path_factory.mktemp("downloads")
    train = write_problems(directory / "train.jsonl", 6)
    write_problems(directory / "test.jsonl", 3)
    write_checkpoint(directory / "model", train)
    return directory


def overrides(downloads, output):
    paths = [f"output={output}", f"model.path={downloads}/model"]
    return paths + [f"data.{part}=[{{path: {downloads}/{part}.jsonl}}]" for part in ("train", "test")] + SMALL


def test_the_job_runs_and_leaves_a_checkpoint_that_is_usable(downloads, tmp_path, capsys):
    from mindrlhf.trainer.roles import open_checkpoint

    output = tmp_path / "run"
    config = str(EXAMPLE / "qwen2_5_gsm8k.yaml")
    assert main(["grpo", "--config", config, *overrides(downloads, output)]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2
    for line in steps:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert {"reward/accuracy", "reward/format", "kl"} <= set(line) and line["mismatch_max"] < 1e-4
    assert json.loads((output / "summary.json").read_text())["after"]["accuracy"] == 0
    prompts = {row["prompt"] for row in read_lines(output / "completions.jsonl")}
    assert prompts and all(
        prompt.startswith("<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.")
        and prompt.endswith("pears does it have?<|im_end|>\n<|im_start|>assistant\n")
        for prompt in prompts
    )

    checkpoint = output / "checkpoints" / "step-000002"
    before, after = open_checkpoint(downloads / "model"), open_checkpoint(checkpoint)
    assert before.decoder.config == after.decoder.config
    assert before.generation_config == after.generation_config
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    assert before.tokenizer.chat_template == after.tokenizer.chat_template
    name = "model.layers.0.mlp.up_proj.weight"
    assert abs(before.decoder.weights(name) - after.decoder.weights(name)).max() > 1e-4

    capsys.readouterr()
    data = ["data.prompt_key=question", "data.label_key=answer", "data.apply_chat_template=true"]
    data += ["sampling.max_tokens=8", "--model", str(checkpoint)]
    assert main(["eval", "--data", f"{downloads}/test.jsonl", "--json", *data]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["problems"] == 3 and values["accuracy"] == values["pass@1"] == 0
    answers = tmp_path / "answers.jsonl"
    assert main(["generate", "--prompt", "2+2?", "--prompt", "Hello", "--output", str(answers), *data]) == 0
    rows = read_lines(answers)
    assert [row["prompt"].count("<|im_start|>") for row in rows] == [3, 3]  # system, user, assistant
    for row in rows:
        assert row["prompt_ids"] == after.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        assert after.tokenizer.decode(row["ids"], skip_special_tokens=True) == row["completion"]
        assert len(row["ids"]) == row["tokens"] <= 8


def test_the_scheduler_that_msrun_starts_does_not_train(downloads, tmp_path):
    """msrun runs the command once more with MS_ROLE=MS_SCHED."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "mindrlhf", "grpo", "--config", str(EXAMPLE / "qwen2_5_gsm8k.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "1"}
    done = subprocess.run(
        [*command, *overrides(downloads, output)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not output.exists()


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
