"""PPO: the critic's half of the online loop, with everything that can be mixed into it."""

import json

import numpy as np
import pytest

from mindrlhf.config import PPOConfig
from mindrlhf.errors import UserError
from mindrlhf.models.hf import read_tensors
from mindrlhf.utils import memory
from tests.servers import write_reward_model
from tests.trainer.conftest import letter_reward
from tests.trainer.test_online import memory_of, metrics_of, same_checkpoint

EVERYTHING = {
    "warmup__steps": 2, "warmup__batch_size": 4, "warmup__train": "[{path: PROBLEMS}]",
    "algorithm__updates_per_epoch": 2, "algorithm__epochs_per_rollout": 2, "algorithm__ema_decay": 0.5,
    "algorithm__kl_target": 0.01, "algorithm__kl_horizon": 40, "algorithm__gae_lambda": 0.9,
    "algorithm__missing_stop_penalty": 0.5, "pretraining__coef": 0.1, "pretraining__train": "[{path: PROBLEMS}]",
    "pretraining__batch_size": 2, "critic__learning_rate": 1e-2,
}  # fmt: skip
OWN, SHARED = pytest.param({}, id="own-critic"), {"critic__shared_trunk": "true"}
KINDS = pytest.mark.parametrize("kind", [OWN, pytest.param(SHARED, id="shared-trunk")])


@pytest.fixture()
def make_ppo(mindspore, tiny_config):
    def make(functions=letter_reward, **overrides):
        from mindrlhf.trainer.ppo import PPOTrainer

        return PPOTrainer(tiny_config(kind=PPOConfig, **overrides), reward_funcs=functions)

    return make


@pytest.mark.slow
@KINDS
def test_a_resumed_and_swapped_run_is_bit_equal_to_an_uninterrupted_one(
    make_ppo, compilations, monkeypatch, mindspore, tmp_path, kind
):
    """With warm-up, average, pre-training, several epochs of minibatches, a reward model and a coefficient that moves;
    interrupted, and what a phase does not need swapped out, down to the last page."""
    monkeypatch.setattr(memory, "SMALLEST", 0)
    rewards = f"[{{model: {write_reward_model(tmp_path / 'reward_model', mindspore)}}}]"
    options = {**EVERYTHING, **kind, "rewards": rewards, "data__test": "[{path: PROBLEMS}]", "evaluation__kl": "true"}
    options["trainer__evaluate_every"] = 2
    straight = make_ppo(None, output="straight", **options)
    straight.fit()
    make_ppo(None, output="resumed", **options, memory__swap="true", trainer__steps=2).fit()
    second = make_ppo(None, output="resumed", **options, memory__swap="true")
    second.fit()
    one, two = straight.checkpoints.path(4), second.checkpoints.path(4)
    same_checkpoint(one, two)
    for directory in ("critic", "average"):
        ours = sorted(path.name for path in (one / directory).glob("*.safetensors"))
        assert ours and all((one / directory / n).read_bytes() == (two / directory / n).read_bytes() for n in ours)
    lines = metrics_of(straight)
    assert lines == metrics_of(second)
    steps = [line for line in lines if "loss" in line]
    assert steps[0]["kl_coef"] == 0.05 and len({line["kl_coef"] for line in steps}) == len(steps)
    assert all(line["pretraining_loss"] > 0 and "critic/explained_variance" in line for line in steps)
    with_all, with_swap = (memory_of(trainer) for trainer in (straight, second))
    assert with_swap["memory/spilled_gb"] > 0 and with_swap["memory/peak_gb"] < 0.8 * with_all["memory/peak_gb"]
    report = json.loads((second.output / "memory.json").read_text())
    training = ["train policy"] if kind else ["train critic", "train policy"]
    before_it = ["sync", "generate", "rewards", "score reference", "score critic"]
    assert [phase["phase"] for phase in report["phases"]] == [*before_it, *training]
    name = "model.embed_tokens.weight"  # of who asks when all is done
    np.testing.assert_array_equal(second.policy.decoder.weights(name), straight.policy.decoder.weights(name))
    compiled = compilations()
    second.run_step()
    assert compilations() == compiled


@KINDS
def test_policy_and_critic_learn(make_ppo, compilations, kind):
    trainer = make_ppo(
        trainer__steps=25, rollout__num_generations=16, rollout__slots=32, trainer__rows=16, algorithm__kl_coef=0,
        algorithm__learning_rate=5e-3, critic__learning_rate=1e-2, critic__coef=0.5, **kind,
    )  # fmt: skip
    trainer.prepare(None)
    lines = []
    for step in range(25):
        lines.append(trainer.run_step()[0])
        if step == 4:
            before = compilations()
        assert lines[-1]["mismatch_max"] < 1e-4
    assert compilations() == before
    rewards = [line["reward/total"] for line in lines]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert lines[0]["critic/value"] == 0 and lines[0]["critic/explained_variance"] == 0
    errors = [abs(line["critic/value"] - line["critic/return"]) for line in lines]
    assert np.mean(errors[-5:]) < 0.5 * errors[0]


@pytest.mark.slow
def test_the_critics_warm_up_leaves_the_policy_alone(make_ppo):
    trainer = make_ppo(critic__warmup_steps=1, algorithm__kl_coef=0)
    trainer.prepare(None)
    policy, critic = trainer.policy.decoder, trainer.critic.model.decoder
    name = "model.norm.weight"
    policy_before, critic_before = policy.weights(name).copy(), critic.weights(name).copy()
    metrics, _ = trainer.run_step()
    np.testing.assert_array_equal(policy.weights(name), policy_before)
    assert "loss" not in metrics and metrics["critic/loss"] > 0 and critic.weights("score.weight").any()
    metrics, _ = trainer.run_step()
    assert (policy.weights(name) != policy_before).any() and (critic.weights(name) != critic_before).any()


def test_schedule_and_controller_begin_behind_the_critics_warm_up(make_ppo):
    """The policy's rate rises from its own first step; a coefficient does not fall while there is nothing to pay."""
    trainer = make_ppo(
        critic__warmup_steps=2, algorithm__warmup_steps=2, algorithm__kl_target=1.0, algorithm__kl_horizon=40,
        algorithm__learning_rate=1e-3,
    )  # fmt: skip
    trainer.prepare(None)
    lines = [trainer.run_step()[0] for _ in range(4)]
    assert [line["learning_rate"] for line in lines[2:]] == pytest.approx([5e-4, 1e-3])
    assert lines[0]["kl_coef"] == lines[1]["kl_coef"] == lines[2]["kl_coef"] != lines[3]["kl_coef"]


def test_a_critic_of_another_tokenizer_is_refused(make_ppo, make_stage, problems, tmp_path):
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build
    from tests.trainer.conftest import DECODER

    text = tmp_path / "other.txt"
    text.write_text("something else entirely, said in other words and letters, and again in other words " * 9)
    build(BuildConfig(DECODER, 270, [str(text)]), 0, "score").write(tmp_path / "other")
    with pytest.raises(UserError, match=r"critic.model: .*token \d+ is .* there and .* for the policy"):
        make_ppo(critic__model=str(tmp_path / "other"))


def test_the_critic_begins_as_the_warmed_up_policy(make_ppo):
    trainer = make_ppo(**{key: value for key, value in EVERYTHING.items() if "warmup" in key})
    cold = trainer.critic.model.decoder.weights("model.norm.weight").copy()
    with _log(trainer) as log:
        trainer.prepare(log)
    warm = trainer.critic.model.decoder.weights("model.norm.weight")
    np.testing.assert_array_equal(warm, trainer.policy.decoder.weights("model.norm.weight"))
    assert (warm != cold).any()


def test_a_critic_from_a_reward_models_checkpoint(make_ppo, teacher, make_stage):
    """And back: what a run leaves in critic/ opens as a reward model."""
    from mindrlhf.trainer.reward_model import RewardModel

    reward_model = make_stage("rm", "trainer.steps=2", output="rm").fit()["checkpoint"]
    options = {"model__path": str(teacher), "critic__model": reward_model, "trainer__steps": 1}
    trainer = make_ppo(**options)
    score = trainer.critic.model.decoder.weights("score.weight").copy()
    assert score.any()
    checkpoint = trainer.fit()["checkpoint"]
    found = RewardModel.open(f"{checkpoint}/critic").policy.decoder.weights("score.weight")
    assert found.shape == score.shape and (found != score).any()


def test_the_average_is_what_it_says(make_ppo):
    trainer = make_ppo(algorithm__ema_decay=0.75, algorithm__kl_coef=0, trainer__steps=3)
    name = "model.norm.weight"
    trainer.prepare(None)
    expected = trainer.policy.decoder.weights(name).astype(np.float64).copy()
    for _ in range(3):
        trainer.run_step()
        expected = 0.75 * expected + 0.25 * trainer.policy.decoder.weights(name)
    trainer.save_checkpoint()
    saved = read_tensors(trainer.checkpoints.path(3) / "average")[name]
    np.testing.assert_allclose(saved, expected, atol=1e-6)
    assert np.abs(saved - trainer.policy.decoder.weights(name)).max() > 1e-5


@pytest.mark.slow
def test_pretraining_is_in_the_gradient(make_ppo):
    """With advantages of 0 only the supervised loss is left: its answers become likelier."""
    options = {key: value for key, value in EVERYTHING.items() if "pretraining" in key}
    trainer = make_ppo(
        lambda completions, **columns: [1.0] * len(completions), algorithm__kl_coef=0, algorithm__learning_rate=1e-2,
        trainer__steps=8, **options,
    )  # fmt: skip
    trainer.prepare(None)
    losses = [trainer.run_step()[0]["pretraining_loss"] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    weights = [float(batch.loss_weight.sum()) for batch in trainer._pretraining_batches()]
    assert sum(weights) == pytest.approx(0.1, abs=1e-6)


def test_an_unfinished_answer_pays(make_ppo):
    trainer = make_ppo(algorithm__missing_stop_penalty=0.5)
    rollouts = trainer.make_experience(num_rollouts=5)
    assert len(rollouts) == 8  # two whole groups
    for rollout in rollouts:
        assert rollout.reward_parts["missing_stop"] == (0.0 if rollout.finished else -0.5)
        assert rollout.reward == pytest.approx(sum(rollout.reward_parts.values()), abs=1e-6)
    assert not all(rollout.finished for rollout in rollouts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm__name": "grpo"}, "algorithm.name: grpo has no critic; take `mindrlhf grpo`"),
        ({"critic__shared_trunk": "true", "critic__warmup_steps": 2}, "critic.warmup_steps: on a shared trunk"),
        ({"critic__shared_trunk": "true", "critic__model": "/x"}, "critic.model: a shared trunk is the policy's"),
        ({"critic__value_clip": -1}, r"critic.value_clip: -1.0 must be 0 \(off\) or more"),
        ({"critic__model": "/nowhere"}, "/nowhere: no such checkpoint directory"),
        ({"pretraining__coef": 0.5}, "pretraining.train: no file is named"),
        ({"algorithm__ema_decay": 1.0}, "algorithm.ema_decay: 1.0 must be"),
    ],
)
def test_contradictions_are_one_line(make_ppo, options, message):
    with pytest.raises(UserError, match=message) as error:
        make_ppo(**options)
    assert "\n" not in str(error.value)


def test_grpo_refuses_a_row_with_a_critic(tiny_config, mindspore):
    from mindrlhf.trainer.grpo import GRPOTrainer

    with pytest.raises(UserError, match="algorithm.name: ppo has a critic; take `mindrlhf ppo`"):
        GRPOTrainer(tiny_config(algorithm__name="ppo"))


def _log(trainer):
    from mindrlhf.utils.logging import RunLog

    return RunLog(trainer.output, trainer.config.logging, json.dumps({}))
