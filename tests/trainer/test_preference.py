"""Reward models, the DPO family and KTO: where they begin, their references, what they leave behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.errors import UserError
from mindrlhf.preference_losses import PREFERENCE_LOSSES
from tests.trainer.stages import DECODER, losses, weights

# At the start policy and reference are one, so D = 0. simpo and orpo have no reference and begin anywhere.
FIRST = {
    "dpo": np.log(2), "cdpo": np.log(2), "robust": np.log(2), "hinge": 1.0, "ipo": 25.0, "ipo_mean": 25.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name if name in ("dpo", "orpo") else pytest.param(name, marks=pytest.mark.slow) for name in PREFERENCE_LOSSES],
)
def test_a_row_of_the_table_learns(name, make_stage):
    smoothed = ["loss.label_smoothing=0.1"] if name in ("cdpo", "robust") else []
    trainer = make_stage("dpo", f"loss.name={name}", "loss.nll_coef=0", *smoothed)
    trainer.prepare(None)
    before = trainer.evaluate()
    if name in FIRST:
        assert before["loss"] == pytest.approx(FIRST[name], abs=2e-5)
        assert abs(before["margin"]) < 1e-5
    taken = losses(trainer, 30)
    after = trainer.evaluate()
    assert taken[-1] < taken[0] and after["accuracy"] > 0.9 and after["margin"] > before["margin"]


def test_a_reward_model_begins_undecided(make_stage):
    values = make_stage("rm", "data.margin_key=", "loss.centering_coef=0").evaluate()
    assert values["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert values["accuracy"] == 0.5 and values["rewards_chosen"] == 0.0


def test_both_forms_of_the_reward_loss_are_one(make_stage):
    assert losses(make_stage("rm"), 5) == pytest.approx(losses(make_stage("rm", "loss.kind=log_exp"), 5), abs=1e-6)


def test_kto_begins_at_a_half(make_stage):
    trainer = make_stage("kto", "loss.undesirable_weight=1")
    trainer.prepare(None)
    values = trainer.evaluate()
    assert values["loss"] == pytest.approx(0.5, abs=1e-5) and values["kl_baseline"] < 1e-5


@pytest.mark.parametrize(
    "stage", ["dpo", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("kto", "kto_pair"))]
)
def test_references_agree(stage, make_stage):
    options = ("model.path=TEACHER", "model.lora.rank=2", "training.learning_rate=1e-2")
    cached, live, off = (
        losses(make_stage(stage, *options, f"loss.reference={mode}", output=mode), 8)
        for mode in ("cached", "live", "adapter_off")
    )
    assert abs(cached[-1] - cached[0]) > 1e-3, "nothing was learnt, so nothing was tested"
    assert cached == pytest.approx(live, abs=1e-5) and cached == pytest.approx(off, abs=1e-5)


def test_another_reference_is_used(make_stage):
    trainer = make_stage("dpo", "model.reference=TEACHER", "loss.nll_coef=0")
    trainer.prepare(None)
    assert abs(trainer.evaluate()["loss"] - np.log(2)) > 1e-3


@pytest.mark.parametrize("mode", ["cached", pytest.param("live", marks=pytest.mark.slow)])
def test_a_resumed_run_keeps_its_reference(mode, make_stage):
    """Of a model that was built, so that only the run itself knows how it began."""
    options = (f"loss.reference={mode}", "training.schedule=constant")
    make_stage("dpo", *options, "trainer.steps=3").fit()
    first = make_stage("dpo", *options, "trainer.steps=3", output="first")
    first.prepare(None)
    resumed = make_stage("dpo", *options, "trainer.steps=6")
    assert resumed.resume() and resumed.step == 3
    numbers = range(4)
    assert resumed.reference.logprobs("train", numbers) == pytest.approx(
        first.reference.logprobs("train", numbers), abs=1e-5
    )


def test_a_cache_of_other_answers_is_refused(make_stage):
    make_stage("dpo", "trainer.steps=2").fit()
    second = make_stage("dpo", "trainer.steps=4")
    second.reference.answers["train"][0][0].ids[0] += 1  # as if the file had been edited
    with pytest.raises(UserError, match="reference_logprobs.npz: is of other answers than the data files hold now"):
        second.fit()


@pytest.mark.parametrize("whole", [b"not a cache", None])
def test_a_broken_cache(whole, make_stage, tmp_path):
    make_stage("dpo", "trainer.steps=2").fit()
    path = tmp_path / "run" / "reference_logprobs.npz"
    if whole is None:
        path.unlink()
    else:
        path.write_bytes(whole)
    with pytest.raises(UserError, match="is not whole; remove it" if whole else "is gone, and with it the reference"):
        make_stage("dpo", "trainer.steps=4").fit()


def test_the_cache_is_filled_in_parts(make_stage, monkeypatch):
    from mindrlhf.trainer import reference

    whole, parts = make_stage("dpo", output="a"), make_stage("dpo", output="b")
    whole.prepare(None)
    monkeypatch.setattr(reference, "SCORED_TOGETHER", 3)
    parts.prepare(None)
    for name, values in whole.reference.cache.items():
        assert values.shape == (20, 2) and parts.reference.cache[name] == pytest.approx(values, abs=1e-5)


@pytest.mark.slow
def test_a_live_reference_of_an_adapter_is_resumed_to_the_bit(make_stage):
    lora = ("model.path=TEACHER", "model.lora.rank=2", "training.learning_rate=1e-2")
    adapter = make_stage("sft", *lora, "data.response_key=chosen", "trainer.steps=5", output="adapter").fit()
    options = (f"model.path={adapter['checkpoint']}", "loss.reference=live", "training.schedule=constant")
    whole = make_stage("dpo", *options, "trainer.steps=4", output="whole")
    whole.fit()
    make_stage("dpo", *options, "trainer.steps=2").fit()
    resumed = make_stage("dpo", *options, "trainer.steps=4")
    resumed.fit()
    for name, array in weights(whole).items():
        assert np.array_equal(array, weights(resumed)[name]), name
    with pytest.raises(UserError, match="adapter_off is the base, but model.path is an adapter"):
        make_stage("dpo", options[0], "loss.reference=adapter_off")


@pytest.mark.slow
def test_the_stop_token_that_was_trained_ends_answers(make_stage, tmp_path):
    """Of a chat template that ends turns with another token than the tokenizer's end of text."""
    from tests.checkpoints import CHAT_TEMPLATE

    rows = tmp_path / "chats.jsonl"
    asked = {"role": "user", "content": "1="}
    pair = {
        name: [asked, {"role": "assistant", "content": text}] for name, text in (("chosen", "a"), ("rejected", "b"))
    }
    rows.write_text(json.dumps(pair) + "\n")
    options = (
        f"model.build.chat_template={json.dumps(CHAT_TEMPLATE)}", f"data.train=[{{path: {rows}}}]", "data.test=[]",
        "data.apply_chat_template=true", "trainer.steps=1", "trainer.row_tokens=0", "model.build.decoder="
        + json.dumps({**DECODER, "max_position_embeddings": 512}),
    )  # fmt: skip
    for stage, own in (("dpo", ["loss.name=orpo"]), ("rm", ["data.margin_key="])):
        trainer = make_stage(stage, *options, *own, output=stage)
        end = trainer.policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
        written = json.loads((Path(trainer.fit()["checkpoint"]) / "generation_config.json").read_text())
        assert end in written["eos_token_id"]
        if stage == "rm":
            assert written["eos_token_id"] == [end]


def test_a_reward_model_of_equal_scores_can_be_saved(make_stage, tmp_path):
    path = make_stage("rm").save_checkpoint()
    config = json.loads((path / "config.json").read_text())
    assert (config["score_mean"], config["score_std"]) == (0.0, 1.0)


def test_a_reward_model_remembers_its_scores(make_stage, tmp_path):
    from mindrlhf.trainer.reward_model import RewardModel

    trainer = make_stage("rm")
    summary = trainer.fit()
    assert summary["after"]["accuracy"] > 0.9 and (tmp_path / "run" / "scores.png").stat().st_size > 5000
    config = json.loads((tmp_path / "run" / "checkpoints" / "step-000020" / "config.json").read_text())
    assert (config["score_mean"], config["score_std"]) == (summary["score_mean"], summary["score_std"])
    model = RewardModel.open(summary["checkpoint"])
    answers = [answer for pair in trainer.examples["test"].items for answer in (pair.chosen, pair.rejected)]
    scores = model.scores(answers)
    assert scores == pytest.approx(trainer.held_out_scores().reshape(-1), abs=1e-6)
    assert model.scores(answers[::-1])[::-1] == pytest.approx(scores, abs=1e-6)
    normalized = model.normalized(scores)
    assert normalized.mean() == pytest.approx(0, abs=1e-5) and normalized.std() == pytest.approx(1, abs=1e-4)
    with pytest.raises(UserError, match="a language model, not a reward model"):
        RewardModel.open(make_stage("sft", "trainer.steps=1", output="sft").fit()["checkpoint"])
