"""The examples of PPO: their data, and what each command reaches on two cores."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mindrlhf.config import PPOConfig, RewardConfig, SFTConfig, load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SUMS = "grpo/data/arithmetic_{}.jsonl"
SCRIPTS = {  # folder -> (script that writes its data, files)
    "ppo": ("make_problems.py", {"products_warmup.jsonl", "products_train.jsonl"}),
    "rlhf": ("make_comparisons.py", {"comparisons_train.jsonl", "comparisons_test.jsonl"}),
}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


def prompts(name: str) -> set[str]:
    return {row["prompt"] for row in rows(name)}


@pytest.mark.parametrize(
    ("cls", "name"),
    [(PPOConfig, "ppo/arithmetic"), (SFTConfig, "rlhf/sft"),
     (RewardConfig, "rlhf/reward_model"), (PPOConfig, "rlhf/ppo")],
)  # fmt: skip
def test_every_yaml_is_a_configuration_with_files(cls, name):
    config = load_config(cls, str(EXAMPLES / f"{name}.yaml"), [])
    sources = config.data.train + config.data.test
    assert sources and all(Path(source.path).is_file() for source in sources)


def test_each_stage_of_rlhf_goes_on_from_the_one_before():
    sft = load_config(SFTConfig, str(EXAMPLES / "rlhf/sft.yaml"), [])
    reward_model = load_config(RewardConfig, str(EXAMPLES / "rlhf/reward_model.yaml"), [])
    ppo = load_config(PPOConfig, str(EXAMPLES / "rlhf/ppo.yaml"), [])

    def checkpoint(config):
        return (ROOT / config.output / f"checkpoints/step-{config.trainer.steps:06d}").resolve()

    assert Path(reward_model.model.path).resolve() == Path(ppo.model.path).resolve() == checkpoint(sft)
    rule, model = ppo.rewards
    assert Path(model.model).resolve() == Path(ppo.critic.model).resolve() == checkpoint(reward_model)
    assert (rule.function, rule.weight, model.weight) == ("accuracy", 0.0, 1.0)


@pytest.mark.parametrize("folder", SCRIPTS)
def test_the_data_is_what_its_script_writes(folder, tmp_path):
    script, names = SCRIPTS[folder]
    for name in ("grpo", folder):
        (tmp_path / name).mkdir()
        for file in (EXAMPLES / name).glob("*.py"):
            shutil.copy(file, tmp_path / name)
    subprocess.run([sys.executable, str(tmp_path / folder / script)], check=True, timeout=60)
    assert {file.name for file in (tmp_path / folder / "data").iterdir()} == names
    for name in names:
        assert (tmp_path / folder / "data" / name).read_bytes() == (EXAMPLES / folder / "data" / name).read_bytes()


def test_no_problem_is_in_two_files():
    sums = [prompts(SUMS.format(part)) for part in ("warmup", "train", "test")]
    comparisons = [prompts(f"rlhf/data/comparisons_{part}.jsonl") for part in ("train", "test")]
    products = [prompts(f"ppo/data/products_{part}.jsonl") for part in ("warmup", "train")]
    files = [*sums, *comparisons, *products]
    assert len(set().union(*files)) == sum(map(len, files))


def test_the_better_answer_is_right_and_the_worse_one_wrong():
    def is_right(prompt, answer):
        return re.search(r"<answer>(\d+)</answer>$", answer)[1] == str(sum(map(int, prompt[:-1].split("+"))))

    for part in ("train", "test"):
        for row in rows(f"rlhf/data/comparisons_{part}.jsonl"):
            assert is_right(row["prompt"], row["chosen"])
            assert not is_right(row["prompt"], row["rejected"])


@pytest.fixture
def place(tmp_path):
    """A directory with a copy of examples/."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    return tmp_path


def run(place: Path, *command: str) -> str:
    """As a user types it in `place`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_ppo_learns_and_its_critic_explains_the_returns(place):
    run(place, sys.executable, "-m", "mindrlhf", "ppo", "--config", "examples/ppo/arithmetic.yaml",
        "logging.progress=false")  # fmt: skip
    summary = json.loads((place / "runs/ppo/summary.json").read_text())
    assert summary["before"]["accuracy"] < 0.6
    assert summary["after"]["accuracy"] > 0.88
    lines = map(json.loads, (place / "runs/ppo/metrics.jsonl").read_text().splitlines())
    explained = [line["critic/explained_variance"] for line in lines if "critic/explained_variance" in line]
    assert sum(explained[-10:]) / 10 > 0.5


@pytest.mark.slow
def test_rlhf_raises_the_score_and_the_true_accuracy(place):
    script = ("bash", "examples/rlhf/run.sh", "logging.progress=false")
    first = run(place, *script)
    summary = json.loads((place / "runs/rlhf/ppo/summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert after["reward_model"] > before["reward_model"] + 1
    assert after["accuracy"] > before["accuracy"] + 0.3
    assert after["pass@1"] > before["pass@1"] + 0.1
    assert abs(before["kl"]) < 1e-3
    assert 0.3 < after["kl"] < 5
    table = first[first.index(" SFT ") :]
    assert "KL paid, nats an answer" in table
    again = run(place, *script)
    assert again[again.index(" SFT ") :] == table


@pytest.mark.slow
def test_the_agent_learns_to_call_its_calculator(place):
    run(place, sys.executable, "-m", "mindrlhf", "grpo", "--config", "examples/agent/calculator.yaml",
        "logging.progress=false")  # fmt: skip
    summary = json.loads((place / "runs/agent/summary.json").read_text())
    assert summary["before"]["accuracy"] < 0.2 < 0.6 < summary["after"]["accuracy"]
    lines = map(json.loads, (place / "runs/agent/metrics.jsonl").read_text().splitlines())
    turns = [line["turns"] for line in lines if "turns" in line]
    assert turns[0] < 1.5 and turns[-1] > 1.8
