"""`mindrlhf plan` as it is typed: jobs and models, output in three forms, and bad input in one line."""

import json
from pathlib import Path

import pytest

from mindrlhf.cli.main import main
from mindrlhf.cli.plan import UNITS, measured_rates, quantity, read_config, read_job

ROOT = Path(__file__).parents[2]
QWEN = str(ROOT / "tests" / "fixtures" / "configs" / "qwen2_5_7b")
GRPO, PPO = (str(ROOT / "examples" / name / "arithmetic.yaml") for name in ("grpo", "ppo"))
DEVICES = ["--devices", "8", "--device-memory", "64GB"]


def job_of(path, *overrides, model=None):
    return read_job(read_config(path, list(overrides)), model)


def test_table_json_and_picture(tmp_path, capsys):
    files = ["--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.png")]
    assert main(["plan", "--config", QWEN, *DEVICES, *files, "memory.swap=true", "rollout.slots=32"]) == 0
    text = capsys.readouterr().out
    assert "7,615,616,512 parameters" in text and "\nfits: train policy needs most" in text
    assert max(map(len, text.splitlines())) <= 100
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["fits"] and plan["swap"] and plan["training"]["data"] * plan["training"]["tensor"] == 8
    use = plan["phases"]["train policy"]
    assert plan["peak"]["bytes"] == pytest.approx(sum(row["bytes"] for row in use), abs=len(use))
    assert {"policy", "generator"} == {row["role"] for row in plan["phases"]["generate"]}
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_ends_with_1(capsys):
    assert main(["plan", "--config", QWEN, "--devices", "1", "--device-memory", "16GB"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("does not fit: train policy needs ") and "GB too much" in last


def test_jobs_have_the_roles_of_their_yaml():
    grpo, ppo = job_of(GRPO), job_of(PPO)
    assert grpo.reference and grpo.critic is None and grpo.answers == 64 * 8
    assert (grpo.rows, grpo.row_tokens, grpo.slots, grpo.updates) == (32, 64, 128, 2)
    assert ppo.critic.head == "score" and ppo.critic.num_parameters == ppo.policy.num_parameters + 128
    assert job_of(GRPO, "algorithm.kl_coef=0").reference is None
    assert job_of(PPO, "critic.shared_trunk=true", "critic.warmup_steps=0").critic is None
    reward = job_of(GRPO, f"rewards=[{{model: {QWEN}}}]").reward_models
    assert [model.num_parameters for model in reward] == [7_615_616_512 - 152064 * 3584 + 3584]
    assert job_of(GRPO, model=QWEN).policy.num_layers == 28


def test_adapters_and_chosen_layers_are_all_that_is_trained():
    adapted = job_of(GRPO, "model.lora.rank=4")
    per_layer = 4 * (128 + 128) + 4 * (128 + 64)  # q: 128 to 128, v: 128 to 2 heads of 32
    assert sum(weight.numbers for weight in adapted.trainable) == 3 * per_layer
    assert adapted.adapters == adapted.trainable
    layer = job_of(GRPO, "model.train_layers=[2]")
    every = sum(weight.numbers for weight in layer.policy.weights if ".layers." in weight.name)
    assert sum(weight.numbers for weight in layer.trainable) == every / 3


def test_layouts_of_the_config(capsys):
    kept = ["--keep-layouts", "parallel.tensor=2", "parallel.zero=true", "rollout.parallel.tensor=1"]
    assert main(["plan", "--config", QWEN, *DEVICES, *kept, "trainer.rows=1"]) == 0
    text = capsys.readouterr().out
    assert "training    data 4, tensor 2, zero" in text and "generation  data 8\n" in text
    # Each of 8 devices lacks a half of 7.6 GB of numbers of 2 bytes.
    assert "as the config has it" in text and "weight sync 60.9 GB between devices, 7.6 GB at most into one" in text


@pytest.mark.parametrize(
    ("text", "value"), [("64GB", 64e9), ("64 GiB", 64 * 2**30), ("1.5tb", 1.5e12), ("1000", 1000)]
)  # fmt: skip
def test_quantities(text, value):
    assert quantity(text, "--device-memory", UNITS) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", QWEN, "--devices", "8", "--device-memory", "64XB"],
            "--device-memory: '64XB' is not a number with",
        ),
        (["--config", QWEN, "--devices", "8", "--device-memory", "0GB"], "--device-memory: 0 must be over 0"),
        (["--config", QWEN, "--devices", "0", "--device-memory", "64GB"], "--devices: 0 must be over 0"),
        (["--config", QWEN, *DEVICES, "--flops", "fast"], "--flops: 'fast' is not a number with"),
        (["--config", "nowhere.yaml", *DEVICES], "nowhere.yaml: no such config file"),
        (["--config", GRPO, *DEVICES, "--model", "nowhere"], "nowhere: no such file"),
        (["--config", str(ROOT / "examples/sft/sft.yaml"), *DEVICES], "is an offline job's; the planner takes"),
        (["--config", GRPO, *DEVICES, "model.build.decoder={model_type: mamba}"], "model_type 'mamba' is not"),
        (["--config", GRPO, *DEVICES, "model.build.decoder={}"], "model.path: empty, and so is model.build.decoder"),
        (["--config", QWEN, *DEVICES, "--keep-layouts", "parallel.tensor=3"], "8 processes do not divide by tensor 3"),
        (["--config", QWEN, *DEVICES, "--keep-layouts", "parallel.tensor=8"], "parallel.tensor: the model's num_"),
        (["--config", QWEN, *DEVICES, "--json", "/nowhere/plan.json"], "/nowhere/plan.json: No such file"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_measured_rates_are_rates(capsys):
    rates = measured_rates(256, 1)
    assert set(rates) == {"flops", "memory_bandwidth"} and all(rate > 1e6 for rate in rates.values())
    assert "GFLOP/s" in capsys.readouterr().out
