"""What goes wrong with several processes: named once, nothing lost, and the same command goes on."""

import os
import subprocess
import sys

import pytest
import yaml

from tests.processes import ROOT
from tests.trainer import parallel_job

FAULT_JOB = str(ROOT / "tests" / "fault_job.py")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A directory with job.yaml, a small GRPO job of four steps that is saved at each."""
    directory = tmp_path_factory.mktemp("faults")
    parallel_job.write_data(directory)
    (directory / "rewards.py").write_text(
        "def letters(completions, **columns):\n    return [sum(ord(c) % 2 for c in text) / 8 for text in completions]\n"
    )
    values = {**parallel_job.COMMON, **parallel_job.ONLINE, "trainer.steps": 4, "trainer.save_every": 1}
    warmup = {"steps": 2, "batch_size": 6, "train": [{"path": "problems.jsonl"}]}
    config = {
        "warmup": warmup,
        "model": {"build": {"decoder": parallel_job.DECODER, "tokenizer_files": ["rows.jsonl"]}},
        "data": {"train": [{"path": "problems.jsonl"}]},
        "rewards": [{"function": "rewards.py:letters"}],
    }
    for key, value in values.items():
        section = config
        *path, name = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[name] = yaml.safe_load(str(value))
    (directory / "job.yaml").write_text(yaml.safe_dump(config))
    return directory


def launch(directory, *program, workers=2, timeout=300):
    """(exit code, standard output, standard error) of a job under the launcher."""
    command = [sys.executable, "-m", "mindrlhf.launch", "--workers", str(workers), "--log-dir", str(directory / "logs")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--", *program], capture_output=True, text=True, cwd=directory, env=environment, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


def test_a_layout_that_does_not_fit_is_one_line(job):
    options = (f"output={job / 'never'}", "parallel.tensor=2", "model.build.vocab_size=271")
    code, output, error = launch(job, "grpo", "--config", str(job / "job.yaml"), *options)
    message = "parallel.tensor: the model's vocab_size, 271, does not divide by 2"
    assert (code, output, error) == (2, f"mindrlhf: error: {message}\n", "")
    assert not (job / "never").exists()


def test_configurations_that_differ_are_one_line(job):
    program = job / "two.py"
    program.write_text(
        "import os, sys\nfrom mindrlhf.cli.main import main\n"
        "sys.exit(main([*sys.argv[1:], f'seed={os.environ[\"RANK_ID\"]}']))\n"
    )
    arguments = ("grpo", "--config", str(job / "job.yaml"), f"output={job / 'never'}")
    code, output, error = launch(job, str(program), *arguments)
    message = "the configuration: process 1 has 'seed: 1', process 0 has 'seed: 0'; start all of them with the same"
    assert (code, error) == (2, "")
    assert output == f"mindrlhf: error: {message}\n"
    assert not (job / "never").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "call"),
    [
        ("mindrlhf.wrapper.train_step:TrainStep._apply", 4),  # two are the warm-up's
        ("mindrlhf.utils.reshard:_exchange", 4),
        ("mindrlhf.utils.checkpoint:Checkpoints._finish", 3),
        ("mindrlhf.models.hf:_flush", 9),
    ],
)
def test_a_worker_that_is_killed_is_named_and_the_run_goes_on(job, moment, call):
    """In mid-step, in mid-sync, and in the two halves of a checkpoint, which rank 0 writes."""
    output = job / moment.rpartition(".")[2]
    rank = 0 if "checkpoint" in moment or "hf" in moment else 1
    arguments = (
        "grpo", "--config", str(job / "job.yaml"), f"output={output}", "parallel.tensor=2", "rollout.parallel.tensor=1"
    )  # fmt: skip
    code, _, error = launch(job, FAULT_JOB, moment, str(call), str(rank), "--", *arguments)
    assert code == 128 + 9
    assert f"rank {rank} was killed by SIGKILL; the end of" in error
    assert not (output / "summary.json").exists()
    code, text, error = launch(job, *arguments)
    assert code == 0, error
    assert "resumed from" in text
    whole = job / "whole"
    if not whole.exists():
        assert launch(job, *arguments[:3], f"output={whole}", *arguments[4:])[0] == 0
    for name in ("model.safetensors", "optimizer/model.safetensors"):
        one, other = (path / "checkpoints/step-000004" / name for path in (whole, output))
        assert one.read_bytes() == other.read_bytes(), name
