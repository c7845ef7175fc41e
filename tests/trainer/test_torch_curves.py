"""Fifty steps of every offline stage against the losses of torch; see tests/fixtures/make_curve_fixtures.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mindrlhf
from mindrlhf.config import SourceConfig
from mindrlhf.types import Conversation, JudgedSteps, Judgement, Preference
from tests.trainer.stages import losses

FOLDER = Path(__file__).parents[1] / "fixtures" / "curves"
NAMES = {"sft": "SFT", "rm": "Reward", "dpo": "DPO", "kto": "KTO", "prm": "PRM"}
# The bar is 5e-4 and the measured error under 1e-5. Between them lie faults such as no weight decay (1.8e-4).
LIMIT = 5e-5


def conversation(example):
    return Conversation(np.array(example["ids"], np.int32), np.array(example["trained"], bool))


def example_of(stage, row):
    if stage == "sft":
        return conversation(row)
    if stage == "kto":
        return Judgement(conversation(row["answer"]), row["desirable"])
    if stage == "prm":
        judged = np.array(row["judged"], bool)
        return JudgedSteps(np.array(row["ids"], np.int32), judged, np.array(row["probabilities"], np.float32))
    return Preference(conversation(row["chosen"]), conversation(row["rejected"]), row["margin"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", NAMES)
def test_losses_are_those_of_torch(mindspore, tmp_path, monkeypatch, stage):
    from mindrlhf.data.examples import Examples
    from mindrlhf.models.decoder import Decoder
    from mindrlhf.models.model_directory import ModelDirectory
    from mindrlhf.trainer import supervised
    from mindrlhf.trainer.roles import Policy

    fixture = json.loads((FOLDER / f"{stage}.json").read_text())
    settings, rows = fixture["settings"], fixture["examples"]
    config = getattr(mindrlhf, f"{NAMES[stage]}Config")(seed=settings["seed"], output=str(tmp_path))
    for section in ("training", "optimizer", "trainer", "loss"):
        if section in settings:
            setattr(config, section, replace(getattr(config, section), **settings[section]))
    config.trainer.rows = 4
    config.data.train = [SourceConfig(path="the fixture")]
    found = ModelDirectory.read(FOLDER).with_head("score" if stage == "rm" else "logits")
    policy = Policy(Decoder(found.config, found.weights), None, {})
    ids = settings.get("steps")
    monkeypatch.setattr(supervised, "step_token_ids", lambda *_: (ids["placeholder"], ids["reward_tokens"]))

    class Trainer(getattr(mindrlhf, f"{NAMES[stage]}Trainer")):
        def read(self, sources):
            items = [example_of(stage, row) for row in rows] if sources else []
            return Examples(items, [len(items)], [1.0], {})

    trainer = Trainer(config, policy)
    if stage == "kto":
        ours = [answer for (answer,) in trainer.answers()["train_mismatched"]]
        assert [answer.ids.tolist() for answer in ours] == [row["mismatched"]["ids"] for row in rows]
    ours, theirs = losses(trainer, settings["trainer"]["steps"]), fixture["losses"]
    assert theirs[-1] < 0.5 * theirs[0]
    assert np.abs(np.array(ours) - theirs).mean() < LIMIT
