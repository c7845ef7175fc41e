"""The examples of the offline stages: their data, and what each command reaches on two cores."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mindrlhf.config import load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# name -> (command, YAML, final checkpoint, examples whose checkpoints it begins with)
JOBS = {
    "sft": ("sft", "sft/sft.yaml", 300, ()),
    "reward_model": ("rm", "reward_model/reward_model.yaml", 200, ("sft",)),
    "dpo": ("dpo", "dpo/dpo.yaml", 80, ("sft",)),
    "kto": ("kto", "kto/kto.yaml", 80, ("sft",)),
    "prm": ("prm", "prm/prm.yaml", 300, ("sft",)),
    "kd": ("kd", "kd/kd.yaml", 300, ("sft",)),
    "gkd": ("kd", "kd/gkd.yaml", 100, ("kd", "dpo")),
    "lora": ("sft", "lora/lora.yaml", 300, ("sft",)),
}
FOLDERS = ("sft", "reward_model", "dpo", "kto", "prm", "lora")
OPENING_FLOOR = math.log(4) / 6  # one of four openings, then four words and the stop token: nats a token


@pytest.fixture(scope="module")
def spelling():
    spec = importlib.util.spec_from_file_location("make_spelling", EXAMPLES / "sft" / "make_spelling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", JOBS)
def test_every_yaml_is_a_configuration_of_its_command(name):
    import mindrlhf.config as configurations
    from mindrlhf.cli.train import JOBS as COMMANDS

    command, yaml, steps, _ = JOBS[name]
    config = load_config(getattr(configurations, COMMANDS[command].config), str(EXAMPLES / yaml), [])
    assert config.output == f"runs/{name}"
    assert config.trainer.steps == steps
    assert all(Path(source.path).is_file() for source in config.data.train + config.data.test)


def test_the_data_is_what_its_script_writes(spelling, tmp_path, monkeypatch):
    monkeypatch.setattr(spelling, "EXAMPLES", tmp_path)
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    spelling.main()
    assert set(spelling.DATA) == set(FOLDERS)
    for folder in FOLDERS:
        for part in ("train.jsonl", "test.jsonl"):
            written = (tmp_path / folder / "data" / part).read_bytes()
            assert written == (EXAMPLES / folder / "data" / part).read_bytes(), f"{folder}/{part}"


def test_no_held_out_number_is_trained_on():
    def numbers(part):
        files = [(EXAMPLES / folder / "data" / part).read_text(encoding="utf-8") for folder in FOLDERS]
        rows = [json.loads(line) for file in files for line in file.splitlines()]
        return {row.get("prompt", row.get("input"))[:4] for row in rows}

    assert len(numbers("test.jsonl")) == 200
    assert not numbers("test.jsonl") & numbers("train.jsonl")


class Runs:
    """A directory with a copy of examples/, where commands run as a user types them; each job once."""

    def __init__(self, root: Path):
        self.root = root
        self.summaries = {}
        shutil.copytree(EXAMPLES, root / "examples")

    def mindrlhf(self, *arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "mindrlhf", *arguments]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def summary(self, name: str) -> dict:
        if name not in self.summaries:
            command, yaml, _, needed = JOBS[name]
            for other in needed:
                self.summary(other)
            self.mindrlhf(command, "--config", f"examples/{yaml}", "logging.progress=false")
            self.summaries[name] = json.loads((self.root / "runs" / name / "summary.json").read_text())
        return self.summaries[name]

    def checkpoint(self, name: str) -> str:
        self.summary(name)
        return f"runs/{name}/checkpoints/step-{JOBS[name][2]:06d}"

    def evaluations(self, name: str, metric: str) -> list[float]:
        self.summary(name)
        lines = (self.root / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [row[f"eval/{metric}"] for row in map(json.loads, lines) if f"eval/{metric}" in row]

    def shares(self, spelling, model: str, data: str = "sft") -> tuple[float, float]:
        """Of sampled answers to held-out prompts: those that begin with Sure, those that spell the number."""
        output = self.root / f"{model.replace('/', '-')}.jsonl"
        self.mindrlhf(
            "generate", "--model", model, "--data", f"examples/{data}/data/test.jsonl", "--output", str(output),
            "num_generations=4", "sampling.max_tokens=16",
        )  # fmt: skip
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(rows) == 800
        sure = right = 0
        for row in rows:
            digits, sign = row["prompt"][:4], row["prompt"][4]
            opening, *words = row["completion"].split() or [""]
            sure += opening == "Sure"
            right += words == spelling.spelt(digits[::-1] if sign == "<" else digits)
        return sure / len(rows), right / len(rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("examples"))


@pytest.mark.slow
def test_sft_reaches_the_floor(runs, spelling):
    assert OPENING_FLOOR - 0.01 < runs.summary("sft")["after"]["loss"] < OPENING_FLOOR + 0.01
    sure, right = runs.shares(spelling, runs.checkpoint("sft"))
    assert 0.15 < sure < 0.35
    assert right > 0.97


@pytest.mark.slow
def test_reward_model_tells_right_from_wrong(runs):
    assert runs.summary("reward_model")["after"]["accuracy"] > 0.95
    data = "examples/reward_model/data/test.jsonl"
    scored = runs.mindrlhf("score", "--model", runs.checkpoint("reward_model"), "--data", data)
    values = dict(line.split() for line in scored.splitlines() if len(line.split()) == 2)
    assert float(values["accuracy"]) == pytest.approx(runs.summary("reward_model")["after"]["accuracy"], abs=1e-4)


@pytest.mark.slow
def test_dpo_begins_with_sure_and_still_spells(runs, spelling):
    before, after = (runs.summary("dpo")[when] for when in ("before", "after"))
    assert after["accuracy"] > 0.95
    assert after["logprobs_chosen"] > before["logprobs_chosen"] + 1
    sure, right = runs.shares(spelling, runs.checkpoint("dpo"))
    assert sure > 0.95
    assert right > 0.95


@pytest.mark.slow
def test_kto_grows_its_margin_and_still_spells(runs, spelling):
    margins = runs.evaluations("kto", "margin")
    assert len(margins) == 9
    assert margins == sorted(margins)
    assert margins[1] > 0
    sure, right = runs.shares(spelling, runs.checkpoint("kto"))
    assert sure > 0.9
    assert right > 0.95


@pytest.mark.slow
def test_prm_judges_steps(runs):
    assert runs.summary("prm")["after"]["accuracy"] > 0.95


@pytest.mark.slow
def test_kd_follows_the_teacher(runs):
    after = runs.summary("kd")["after"]
    assert after["teacher_kl"] < 0.02
    assert abs(after["nll"] - runs.summary("sft")["after"]["loss"]) < 0.02


@pytest.mark.slow
def test_gkd_follows_the_teacher_after_its_dpo(runs, spelling):
    before, after = (runs.summary("gkd")[when]["teacher_kl"] for when in ("before", "after"))
    assert after < 0.02 < 0.15 < before
    sure, right = runs.shares(spelling, runs.checkpoint("gkd"))
    assert sure > 0.9
    assert right > 0.95


@pytest.mark.slow
def test_lora_learns_another_task_and_merges(runs, spelling):
    assert runs.summary("lora")["after"]["loss"] < 0.01
    adapter = runs.checkpoint("lora")
    assert (runs.root / adapter / "adapter_config.json").is_file()
    runs.mindrlhf("merge-lora", "--adapter", adapter, "--output", "runs/lora/merged")
    asked = ("--prompt", "1234<", "sampling.temperature=0")
    said = [runs.mindrlhf("generate", "--model", model, *asked) for model in (adapter, "runs/lora/merged")]
    assert said == ["1234<Sure four three two one\n"] * 2
    sure, right = runs.shares(spelling, "runs/lora/merged", "lora")
    assert min(sure, right) > 0.95
