"""The online trainer: runs, resumes bit-equal, learns, stops cleanly."""

import json
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.errors import UserError
from mindrlhf.models.hf import read_tensors
from tests.trainer.conftest import letter_reward


@pytest.fixture()
def make_trainer(mindspore, tiny_config):
    def make(reward=letter_reward, **overrides):
        from mindrlhf.trainer.grpo import GRPOTrainer

        return GRPOTrainer(tiny_config(**overrides), reward_funcs=reward)

    return make


def metrics_of(trainer):
    """metrics.jsonl without what depends on the machine."""
    names = ("time", "tokens_per_second", "seconds/", "memory/")
    return [{k: v for k, v in line.items() if not k.startswith(names)} for line in _lines(trainer)]


def memory_of(trainer):
    """What metrics.jsonl says about memory in the last step."""
    return next(line for line in reversed(_lines(trainer)) if "memory/peak_gb" in line)


def _lines(trainer):
    return [json.loads(line) for line in (trainer.output / "metrics.jsonl").read_text().splitlines()]


def same_checkpoint(one, two):
    for directory in ("", "optimizer"):
        first, second = read_tensors(one / directory), read_tensors(two / directory)
        assert list(first) == list(second)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert (one / "trainer_state.json").read_text() == (two / "trainer_state.json").read_text()


def test_swap_is_refused_where_everything_is_needed_all_the_time(make_trainer):
    with pytest.raises(UserError, match=r"memory.swap: True must be false with rollout.asynchronous"):
        make_trainer(memory__swap="true", rollout__asynchronous="true")


@pytest.mark.parametrize(
    "stop", [pytest.param(2, id="mid-epoch"), pytest.param(3, id="at-an-epochs-end", marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(make_trainer, stop):
    """Warm-up, a reference policy and two updates a step included; an epoch is three steps."""
    options = {"warmup__steps": 2, "warmup__batch_size": 4, "algorithm__updates_per_epoch": 2}
    straight = make_trainer(output="straight", **options, warmup__train="[{path: PROBLEMS}]")
    straight.fit()
    first = make_trainer(output="resumed", **options, warmup__train="[{path: PROBLEMS}]", trainer__steps=stop)
    first.fit()
    partial = first.output / "checkpoints" / ".partial-step-000009"  # what a kill in mid-save leaves
    partial.mkdir()
    (partial / "trainer_state.json").write_text("{")
    second = make_trainer(output="resumed", **options, warmup__train="[{path: PROBLEMS}]")
    summary = second.fit()
    assert summary["steps"] == 4
    same_checkpoint(straight.checkpoints.path(4), second.checkpoints.path(4))
    assert metrics_of(straight) == metrics_of(second)
    assert not partial.exists()


def test_it_learns_and_counts_no_compilations_in_the_loop(make_trainer, compilations):
    trainer = make_trainer(trainer__steps=25, rollout__num_generations=16, algorithm__kl_coef=0, rollout__slots=32,
                           algorithm__learning_rate=5e-3, trainer__rows=16)  # fmt: skip
    rewards = []
    for step in range(25):
        metrics, _ = trainer.run_step()
        rewards.append(metrics["reward/total"])
        if step == 4:
            before = compilations()
        assert metrics["mismatch_max"] < 1e-4
    assert compilations() == before
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm__name": "dapo", "algorithm__overlong_buffer": 4},
        {"algorithm__kl_in_reward": "true", "algorithm__kl_coef": 0.1, "algorithm__kl_estimator": "k1"},
        pytest.param({"algorithm__name": "remax", "rollout__num_generations": 1}, marks=pytest.mark.slow),
        pytest.param(
            {"algorithm__mismatch__correction": "icepop", "algorithm__policy_loss": "cispo"}, marks=pytest.mark.slow
        ),
    ],
    ids=["dapo", "kl-in-reward", "remax", "correction"],
)
def test_a_step_of_several_kinds(make_trainer, options):
    """What rows are made of; each row's numbers are in test_credit.py, each loss's in test_policy_losses.py."""
    trainer = make_trainer(**options)
    trainer.prepare(None)
    before = trainer.policy.decoder.weights("model.norm.weight").copy()
    metrics, _ = trainer.run_step()
    assert trainer.step == 1
    assert np.isfinite([value for value in metrics.values()]).all()
    assert (trainer.policy.decoder.weights("model.norm.weight") != before).any()
    assert ("kl" in metrics) == bool(trainer.algorithm.kl_coef)
    assert ("reward/overlong" in metrics) == (options.get("algorithm__name") == "dapo")
    assert metrics["mismatch_max"] < 1e-4


def test_remax_compares_with_one_greedy_answer_a_prompt(make_trainer):
    calls = []

    def reward(completions, prompts, **columns):
        calls.append(list(prompts))
        return [float(len(calls) == 2)] * len(completions)

    trainer = make_trainer(reward, algorithm__name="remax")
    rollouts = trainer.make_experience()
    assert [len(prompts) for prompts in calls] == [8, 2] and calls[0][::4] == calls[1]
    assert all(rollout.greedy_reward == 1 and rollout.reward == 0 for rollout in rollouts)
    assert trainer.experience["answers"] == 8


def test_dynamic_sampling_refills_and_keeps_only_groups_that_differ(make_trainer):
    def constant_for_even(completions, prompts, **columns):
        return [1.0 if int(p[0]) % 2 == 0 else letter_reward([c])[0] for p, c in zip(prompts, completions, strict=True)]

    trainer = make_trainer(constant_for_even, algorithm__dynamic_sampling="true", rollout__prompts_per_step=3)
    rollouts = trainer.make_experience()
    assert trainer.experience["rounds"] > 1 and trainer.experience["groups"] == 3
    assert sorted({rollout.group for rollout in rollouts}) == [0, 1, 2]
    first = trainer.collector.rewards.parts[0][0]
    for group in range(3):
        values = {r.reward_parts[first] for r in rollouts if r.group == group}
        assert len(values) > 1


def test_a_step_without_an_informative_group_trains_nothing(make_trainer):
    trainer = make_trainer(
        lambda completions, **columns: [0.0] * len(completions), algorithm__dynamic_sampling="true",
        algorithm__dynamic_sampling_max_rounds=2,
    )  # fmt: skip
    before = trainer.policy.decoder.weights("model.norm.weight").copy()
    metrics, _ = trainer.run_step()
    assert metrics["groups"] == 0 and metrics["rounds"] == 2 and trainer.step == 1
    np.testing.assert_array_equal(trainer.policy.decoder.weights("model.norm.weight"), before)


def failing(at):
    """letter_reward, whose call number `at` raises."""
    calls = []

    def letter_reward_that_fails(completions, **columns):
        calls.append(max(map(len, completions)))  # never called without answers
        if len(calls) == at:
            raise KeyError("lost")
        return letter_reward(completions)

    return letter_reward_that_fails


def test_a_reward_function_that_fails_stops_after_saving(make_trainer):
    trainer = make_trainer(failing(3), algorithm__kl_coef=0)
    expected = r"letter_reward_that_fails.*test_online.py:\d+.*KeyError.*step 2, saved .*step-000002"
    with pytest.raises(UserError, match=expected):
        trainer.fit()
    assert trainer.checkpoints.steps() == [2]
    resumed = make_trainer(algorithm__kl_coef=0)
    assert resumed.fit()["steps"] == 4


def test_an_update_that_is_not_finite_is_skipped_counted_and_named(make_trainer):
    """With TensorBoard on: the tensor's name is in metrics.jsonl, and no curve."""
    trainer = make_trainer(trainer__steps=1, algorithm__kl_coef=0, logging__tensorboard="true")
    make_dataset = trainer.make_dataset

    def broken():
        return [
            update._replace(policy=[b._replace(advantages=b.advantages * np.inf) for b in update.policy])
            for update in make_dataset()
        ]

    trainer.make_dataset = broken
    summary = trainer.fit()
    assert summary["skipped_updates"] == 1
    (line,) = (line for line in metrics_of(trainer) if line["step"] == 1)
    assert line["skipped_updates"] == 1 and line["skipped_tensor"].startswith("model.")


def test_another_configuration_in_the_same_directory_is_refused(make_trainer):
    make_trainer(trainer__steps=1, algorithm__kl_coef=0).fit()
    with pytest.raises(UserError, match="algorithm.learning_rate: 0.001 there, 0.5 here"):
        make_trainer(algorithm__learning_rate=0.5, algorithm__kl_coef=0).fit()
    with pytest.raises(UserError, match="holds a run already"):
        make_trainer(trainer__resume="never", algorithm__kl_coef=0).fit()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("rollout__num_generations", 1, "2 or more"),
        ("rollout__sampling__temperature", 0, "over 0"),
        ("algorithm__name", "gropo", "grpo, dr_grpo, dapo"),
        ("algorithm__aggregation", "mean", "token_mean"),
        ("trainer__row_tokens", 9, "under"),
        ("data__train", "[]", "data.train"),
        ("rollout__max_prompt_tokens", 60, "window of 64"),
        ("rollout__max_prompt_tokens", 2, r"problems.jsonl:1.*max_prompt_tokens"),
        ("data__label_key", "answer", "label"),
    ],
)
def test_contradictions_are_one_line(make_trainer, option, value, message):
    with pytest.raises(UserError, match=message) as error:
        make_trainer(**{"trainer__row_tokens": 0, option: value})
    assert "\n" not in str(error.value)


def test_adapters_are_trained_online(make_trainer, teacher):
    """Answers are sampled with the adapter merged, and trained with it beside the weights: the same numbers."""
    trainer = make_trainer(
        model__path=teacher,
        model__lora__rank=2,
        trainer__steps=4,
        algorithm__learning_rate=1e-2,
        algorithm__kl_coef=0.01,
    )
    summary = trainer.fit()
    assert max(line["mismatch_max"] for line in metrics_of(trainer) if "mismatch_max" in line) < 1e-4
    assert (Path(summary["checkpoint"]) / "adapter_model.safetensors").is_file()
    adapter = dict(trainer.policy.decoder.adapter_tensors())
    assert any(array.any() for name, array in adapter.items() if "lora_B" in name)
    with pytest.raises(UserError, match="model.lora.dropout: 0.5 must be 0: the ratio would not be 1 on policy"):
        make_trainer(model__path=teacher, model__lora__rank=2, model__lora__dropout=0.5, output="other")


def test_asynchronous_answers_are_of_the_policy_one_step_before(make_trainer):
    """Step by step the same as: sample with the weights of before the last update, rescore, correct, train."""
    options = {"rollout__asynchronous": "true", "algorithm__kl_coef": 0, "algorithm__learning_rate": 5e-3}
    trainer = make_trainer(**options, trainer__steps=4)
    trainer.prepare(None)
    stale = make_trainer(**options, output="stale")
    weights = {name: array.copy() for name, array in trainer.policy.decoder.tensors()}
    lines = []
    for step in range(4):
        before = {name: array.copy() for name, array in trainer.policy.decoder.tensors()}
        lines.append(trainer.run_step()[0])
        stale.policy.decoder.load((weights if step else before).__getitem__)
        stale.collector.sync()
        expected, _ = stale.collector._collect(step, 2, 4)
        for ours, theirs in zip(trainer.rollouts, expected, strict=True):
            np.testing.assert_array_equal(ours.response_ids, theirs.response_ids)
            np.testing.assert_array_equal(ours.sampled_logprobs, theirs.sampled_logprobs)
        weights = before
    assert lines[0]["mismatch_max"] < 1e-4 < 1e-3 < min(line["mismatch_max"] for line in lines[1:])
    assert all(line["mismatch_mean"] <= line["mismatch_max"] for line in lines)


@pytest.mark.slow
def test_an_asynchronous_run_resumes_bit_equal(make_trainer):
    """What was generated and not trained on is in the checkpoint."""
    options = {"rollout__asynchronous": "true", "trainer__evaluate_every": 2, "data__test": "[{path: PROBLEMS}]"}
    straight = make_trainer(output="straight", **options)
    straight.fit()
    first = make_trainer(output="resumed", **options, trainer__save_every=2)
    run_step = first.run_step

    def stops():
        if first.step == 2:
            raise KeyboardInterrupt
        return run_step()

    first.run_step = stops
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = make_trainer(output="resumed", **options, trainer__save_every=2)
    second.fit()
    same_checkpoint(straight.checkpoints.path(4), second.checkpoints.path(4))
    assert metrics_of(straight) == metrics_of(second)


@pytest.mark.slow
def test_an_asynchronous_reward_that_fails_stops_after_saving(make_trainer):
    options = {"rollout__asynchronous": "true", "algorithm__kl_coef": 0}
    with pytest.raises(UserError, match=r"KeyError.*step 2, saved .*step-000002"):
        make_trainer(failing(3), **options).fit()
    resumed = make_trainer(**options)
    resumed.fit()
    straight = make_trainer(output="straight", **options)
    straight.fit()
    drawn = [trainer.collector.order.state() for trainer in (resumed, straight)]
    assert drawn[0] == drawn[1]


def test_evaluation_says_pass_and_majority_and_the_kl_that_was_paid(make_trainer):
    options = {
        "data__test": "[{path: PROBLEMS}]", "evaluation__num_generations": 4, "evaluation__k": "[1, 4]",
        "evaluation__kl": "true", "algorithm__kl_coef": 0.5, "algorithm__learning_rate": 5e-3,
        "algorithm__ema_decay": 0.9,
    }  # fmt: skip
    trainer = make_trainer(**options)
    summary = trainer.fit()
    names = {"letter_reward", "pass@1", "pass@4", "maj@4", "sampled_reward", "kl", "reward_minus_kl"}
    assert set(summary["after"]) == names | {"average/letter_reward"}
    before, after = summary["before"], summary["after"]
    assert before["kl"] == pytest.approx(0, abs=1e-4) and before["average/letter_reward"] == before["letter_reward"]
    for values in (before, after):
        paid = values["sampled_reward"] - 0.5 * values["kl"]
        assert values["reward_minus_kl"] == pytest.approx(paid, abs=1e-6)
        assert 0 <= values["pass@1"] <= values["pass@4"] <= 1
    assert abs(after["kl"]) > 1e-3


def test_the_kl_of_an_evaluation_is_that_of_its_answers(make_trainer):
    """Against log-probs of whole sequences, one row each."""
    from mindrlhf.trainer.held_out import evaluate_kl
    from mindrlhf.trainer.updates import pack

    trainer = make_trainer(data__test="[{path: PROBLEMS}]", evaluation__kl="true", algorithm__learning_rate=1e-2)
    trainer.prepare(None)
    for _ in range(2):
        trainer.run_step()
    prompts = trainer.held_out.prompts
    trainer.collector.sync()
    values = evaluate_kl(trainer.collector, prompts, trainer.scorer, 0.1)
    trainer.collector.sync()  # the scorers have taken the generator's place
    answers = [group[0] for group in trainer.collector.groups(prompts, 1, trainer.config.rollout.sampling, 0)]
    total = 0.0
    for answer in answers:
        packing = pack([answer], trainer.config, trainer.policy.decoder.layout)
        policy, ref = (scorer.score(packing.batches)[0] for scorer in (trainer.old_scorer, trainer.scorer))
        total += float((policy - ref).sum())
    assert values["kl"] == pytest.approx(total / len(answers), abs=1e-4)


def test_the_best_checkpoint_and_an_early_stop(make_trainer):
    """Nothing can be better than the first evaluation where every answer is worth the same."""
    trainer = make_trainer(
        lambda completions, **columns: [1.0] * len(completions), data__test="[{path: PROBLEMS}]",
        trainer__best="<lambda>", trainer__patience=2, trainer__evaluate_every=1, algorithm__kl_coef=0,
        trainer__steps=6,
    )  # fmt: skip
    summary = trainer.fit()
    assert summary["steps"] == 2 and summary["stopped_early"] and summary["best"]["step"] == 0


@pytest.mark.slow
def test_a_killed_reward_server_costs_retries_and_not_the_run(make_trainer, mindspore, tmp_path):
    """Killed in the middle of the run; the run waits, and goes on when it is back."""
    import threading

    from tests.servers import RewardServer, write_reward_model

    model = write_reward_model(tmp_path / "rm", mindspore)
    with RewardServer(model) as server:
        entry = f"[{{urls: ['{server.url}'], retries: 8}}]"
        trainer = make_trainer(None, rewards=entry, trainer__steps=4, algorithm__kl_coef=0)
        run_step, back = trainer.run_step, threading.Thread(target=server.start)

        def killed_before_the_third():
            if trainer.step == 2:
                server.kill()
                back.start()
            return run_step()

        trainer.run_step = killed_before_the_third
        assert trainer.fit()["steps"] == 4
        back.join(60)
    lines = [line for line in metrics_of(trainer) if "reward/remote" in line]
    retries = [line["reward/remote/retries"] for line in lines]
    assert retries[0] == retries[1] == retries[3] == 0 < retries[2]
    straight = make_trainer(None, output="straight", rewards=f"[{{model: {model}}}]", trainer__steps=4,
                            algorithm__kl_coef=0)  # fmt: skip
    straight.fit()
    same = [line["reward/model"] for line in metrics_of(straight) if "reward/model" in line]
    assert [line["reward/remote"] for line in lines] == pytest.approx(same, abs=1e-4)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda completions: [float("nan")] * len(completions), "nan, which is not a finite number, at index 0"),
        (lambda completions: [1.0], "returned 1 numbers for 8 completions"),
    ],
    ids=["nan", "length"],
)
def test_a_reward_that_is_no_reward_is_one_line(make_trainer, returned, message):
    trainer = make_trainer(lambda completions, **columns: returned(completions))
    with pytest.raises(UserError, match=message) as error:
        trainer.fit()
    assert "\n" not in str(error.value) and "stopped at step 0, saved" in str(error.value)


class Echo:
    """Says a letter back after every turn, and that it liked it; three turns."""

    stop = tuple("0123456789")

    def __init__(self):
        self.turns = 0

    def reset(self, prompt):
        return ""

    def step(self, text):
        self.turns += 1
        return "2", 0.5, self.turns == 3


@pytest.mark.parametrize("name", ["grpo", pytest.param("reinforce++", marks=pytest.mark.slow)])
def test_conversations_with_an_environment_are_trained(make_trainer, name):
    """Its tokens are no targets; its rewards count, alone too."""
    trainer = make_trainer(
        None, rewards="[]", rollout__environment=f"{__file__}:Echo", rollout__max_turns=3, algorithm__name=name,
        algorithm__kl_coef=0.01, data__test="[{path: PROBLEMS}]", trainer__steps=3, algorithm__learning_rate=1e-2,
        warmup__steps=10, warmup__batch_size=4, warmup__learning_rate=1e-2, warmup__train="[{path: PROBLEMS}]",
    )  # fmt: skip
    trainer.fit()
    lines = [line for line in metrics_of(trainer) if "turns" in line]
    assert len(lines) == 3 and any(line["environment_tokens"] > 0 for line in lines)
    assert all(line["mismatch_max"] < 1e-4 for line in lines)
    rollouts = trainer.rollouts
    assert all(r.reward == pytest.approx(float(r.token_rewards.sum())) for r in rollouts)
    targets = sum(batch.mask.sum() for update in trainer.make_dataset() for batch in update.policy)
    assert targets == sum(r.is_sampled.sum() for r in rollouts) < sum(len(r.response_ids) for r in rollouts)


@pytest.mark.slow
def test_unfinished_answers_go_on_in_the_next_step(make_trainer):
    """And a run that was resumed in between is bit-equal."""
    options = {"rollout__partial_tokens": 3, "rollout__slots": 16, "trainer__steps": 5, "algorithm__kl_coef": 0,
               "algorithm__learning_rate": 5e-3}  # fmt: skip
    straight = make_trainer(output="straight", **options)
    straight.fit()
    lines = [line for line in metrics_of(straight) if "groups" in line]
    assert lines[0]["groups"] < 2 and max(line["groups"] for line in lines) >= 2
    # Tokens of older weights: what has been rescored differs from what was sampled.
    assert max(line["mismatch_max"] for line in lines if line["groups"]) > 1e-3
    make_trainer(output="resumed", **{**options, "trainer__steps": 3}).fit()
    second = make_trainer(output="resumed", **options)
    second.fit()
    same_checkpoint(straight.checkpoints.path(5), second.checkpoints.path(5))
    assert metrics_of(straight) == metrics_of(second)


@pytest.mark.slow
def test_unfinished_answers_survive_a_reward_that_fails(make_trainer):
    """The state that is saved is of before the step, whatever the step has done to the answers since."""
    options = {"rollout__partial_tokens": 3, "rollout__slots": 16, "trainer__steps": 5, "algorithm__kl_coef": 0}
    straight = make_trainer(output="straight", **options)
    straight.fit()
    with pytest.raises(UserError, match="KeyError"):
        make_trainer(failing(2), output="resumed", **options).fit()
    resumed = make_trainer(output="resumed", **options)
    resumed.fit()
    same_checkpoint(straight.checkpoints.path(5), resumed.checkpoints.path(5))


def test_a_reward_that_fails_in_an_evaluation_stops_after_saving(make_trainer):
    options = {"algorithm__kl_coef": 0, "data__test": "[{path: PROBLEMS}]"}
    with pytest.raises(UserError, match=r"KeyError.*stopped at step 4, saved .*step-000004"):
        make_trainer(failing(6), **options).fit()
    resumed = make_trainer(**options)
    assert resumed.fit()["steps"] == 4


def test_a_loop_of_ones_own_has_a_reference(make_trainer):
    """Nobody calls `prepare`; and what a program has set stays where a run goes on."""
    trainer = make_trainer(algorithm__kl_coef=0.5)
    for _ in range(2):
        trainer.run_step()
    assert "kl" in trainer.run_step()[0] and abs(trainer.experience["kl_per_answer"]) > 1e-4
    own = trainer.scorer
    trainer.load_state(trainer.state())
    assert trainer.scorer is own


def test_dynamic_sampling_refuses_rewards_that_are_no_shares(make_trainer):
    trainer = make_trainer(lambda completions, **columns: [2.0] * len(completions), algorithm__dynamic_sampling="true")
    with pytest.raises(UserError, match=r"takes the first reward to lie in \[0, 1\], and <lambda> gave 2"):
        trainer.make_experience()


def test_a_stop_token_of_the_warm_ups_rows_ends_answers(make_trainer):
    trainer = make_trainer(algorithm__kl_coef=0)
    trainer.policy.add_stop_ids([7])
    trainer.warmed_up()
    assert 7 in trainer.collector.generator.stop_ids
    trainer.save_checkpoint()
    resumed = make_trainer(algorithm__kl_coef=0)
    resumed.load(trainer.checkpoints.path(0))
    assert 7 in resumed.collector.generator.stop_ids


def test_the_place_of_a_server_may_change_between_runs(make_trainer):
    from mindrlhf.config import config_to_yaml, difference
    from mindrlhf.trainer.loop import RESUMABLE

    here = make_trainer(None).config
    texts = []
    for urls, weight in ((["http://a"], 1.0), (["http://b"], 1.0), (["http://b"], 2.0)):
        here.rewards[0].urls, here.rewards[0].weight = urls, weight
        texts.append(config_to_yaml(here))
    assert difference(texts[0], texts[1], RESUMABLE) == ""
    assert difference(texts[0], texts[2], RESUMABLE) == "rewards[0].weight: 1.0 there, 2.0 here"


def test_averages_are_not_of_adapters(make_trainer):
    base = make_trainer(output="base", trainer__steps=1, algorithm__kl_coef=0).fit()["checkpoint"]
    options = {"model__path": base, "model__lora__rank": 2, "algorithm__kl_coef": 0}
    adapter = make_trainer(output="lora", trainer__steps=1, **options).fit()["checkpoint"]
    for path in ({"model__path": adapter}, options):
        with pytest.raises(UserError, match="algorithm.ema_decay"):
            make_trainer(**{"output": "other", "algorithm__ema_decay": 0.5, "algorithm__kl_coef": 0, **path})
