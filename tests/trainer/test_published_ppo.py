"""The published PPO program: policy, reference, critic and reward model from MindFormers' configurations."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from mindrlhf.config import PPOConfig, SourceConfig
from mindrlhf.errors import UserError
from tests.trainer.test_published_grpo import llama_config

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "programs" / "ppo_published.py"
PUBLISHED = """
ppo_config, sft_model_config, ref_model_config, critic_model_config, rm_model_config = init_configs(args)
trainer = PPOTrainer(ppo_config=ppo_config, sft_model_config=sft_model_config, ref_model_config=ref_model_config,
                     critic_model_config=critic_model_config, rm_model_config=rm_model_config)
ppo_with_grad = init_network_and_optimizer(trainer)
for epoch in range(ppo_config.epochs):
    trainer.make_experience(num_rollouts=ppo_config.num_rollouts)
    dataset = init_ppo_dataset(trainer)
    trainer.train(ppo_with_grad, dataset, epoch)
    trainer.save_checkpoint(rank_id, epoch)
"""


@pytest.fixture(scope="module")
def checkpoints(mindspore, problems, tmp_path_factory):
    """Directories of a language model and of a reward model with a head that is not zero."""
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build
    from tests.trainer.conftest import DECODER

    directory = tmp_path_factory.mktemp("checkpoints")
    for name, head in (("policy", "logits"), ("reward", "score")):
        built = build(BuildConfig(DECODER, 270, [str(problems)]), seed=3, head=head)
        if head == "score":
            from mindspore import Tensor

            size = built.decoder.config.hidden_size
            score = np.random.default_rng(0).standard_normal((1, size)).astype(np.float32)
            built.decoder.by_name["score.weight"].set_data(Tensor(score))
        built.write(directory / name)
    return directory


@pytest.fixture()
def arguments(checkpoints, problems, tmp_path):
    """Paths of the YAMLs that init_configs reads."""
    shipped = yaml.safe_load((ROOT / "model_configs" / "qwen2_5_0_5b.yaml").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 4, "n_kv_heads": 2,
             "vocab_size": 270, "seq_length": 64, "max_position_embedding": 64, "theta": 10000.0}  # fmt: skip
    for name in ("policy", "reward"):
        shipped["model"]["model_config"] |= sizes | {"checkpoint_name_or_path": str(checkpoints / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(shipped))
    job = {
        "output": "run", "data": {"train": [{"path": str(problems)}]},
        "rollout": {"prompts_per_step": 2, "num_generations": 4, "slots": 8, "max_prompt_tokens": 8,
                    "sampling": {"max_tokens": 8}},
        "algorithm": {"learning_rate": 1e-3}, "critic": {"learning_rate": 1e-2},
        "trainer": {"epochs": 2, "rows": 4, "row_tokens": 32},
    }  # fmt: skip
    job["output"] = str(tmp_path / "run")
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(job))
    return SimpleNamespace(
        config=str(tmp_path / "ppo.yaml"), sft_model_path=str(tmp_path / "policy.yaml"),
        critic_model_path=str(tmp_path / "reward.yaml"), reward_model_path=str(tmp_path / "reward.yaml"),
    )  # fmt: skip


def test_the_program_has_the_published_lines_in_order():
    lines = iter(PROGRAM.read_text(encoding="utf-8").splitlines())
    for line in PUBLISHED.strip().splitlines():
        assert any(found.partition("  # ")[0] == line for found in lines), line


def test_the_published_program_runs(arguments, checkpoints, tmp_path):
    from mindrlhf.trainer.reward_model import RewardModel

    command = [sys.executable, str(PROGRAM)]
    for name, value in vars(arguments).items():
        command += [f"--{name}", value]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["history"]) == 2 and report["checkpoints"] == [1, 2]
    assert all(math.isfinite(value) for metrics in report["history"] for value in metrics.values())
    for metrics in report["history"]:
        assert metrics["answers"] == 8 and "critic/explained_variance" in metrics and metrics["mismatch_max"] < 1e-4
    assert report["history"][0]["kl_per_answer"] == pytest.approx(0, abs=1e-4)
    assert abs(report["history"][1]["kl_per_answer"]) > 1e-4  # the reference stayed where it was
    assert all(moved > 1e-4 for moved in report["moved"].values()) and report["critic_moved"] > 1e-3
    expected = RewardModel.open(checkpoints / "reward").score_texts(report["prompts"], report["texts"])
    np.testing.assert_allclose(report["rewards"][-1], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft_model_config": None}, "sft_model_config is needed beside ref_model_config"),
        (
            {"ref_model_config": llama_config(num_layers=2, vocab_size=270)},
            "ref_model_config: num_layers is 2, but 1 in sft_model_config",
        ),
        ({"critic_model_config": llama_config(vocab_size=100)}, "critic_model_config: the tokenizer has token"),
        ({"sft_model_config": llama_config()}, "PPOTrainer: no tokenizer; pass tokenizer="),
        ({"reward_funcs": [len]}, "rm_model_config and reward_funcs are both a reward"),
    ],
)
def test_contradictions_are_one_line(mindspore, problems, checkpoints, changes, message):
    from mindrlhf import PPOTrainer

    config = PPOConfig()
    config.data.train = [SourceConfig(path=str(problems))]
    config.rollout.max_prompt_tokens = config.rollout.sampling.max_tokens = 8

    def model(name):
        return llama_config(vocab_size=270, seq_length=64, checkpoint_name_or_path=str(checkpoints / name))

    given = dict(
        ppo_config=config, sft_model_config=model("policy"), ref_model_config=model("policy"),
        critic_model_config=model("reward"), rm_model_config=model("reward"),
    )  # fmt: skip
    with pytest.raises(UserError, match=message) as error:
        PPOTrainer(**{**given, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"sft_model_path": ""}, "sft_model_path: no file is named"),
        ({"sft_model_path": "/nowhere.yaml"}, "sft_model_path: /nowhere.yaml: no such file"),
    ],
)
def test_init_configs_names_what_is_missing(paths, message):
    from mindrlhf import init_configs

    with pytest.raises(UserError, match=message):
        init_configs(SimpleNamespace(**paths))
