"""Every offline stage: it learns, and how the work is split or interrupted changes nothing."""

import json

import numpy as np
import pytest

import mindrlhf
from mindrlhf.config import load_config
from tests.trainer.stages import DECODER, STAGES, write_rows

STEPS = 20
EVERY = list(STAGES)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("stages") / "rows.jsonl")


@pytest.fixture(scope="session")
def teacher(mindspore, rows, tmp_path_factory):
    """A random model with the vocabulary of the others."""
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build

    directory = tmp_path_factory.mktemp("teacher")
    build(BuildConfig(DECODER, 300, [str(rows)]), seed=7).write(directory)
    return directory


@pytest.fixture()
def make(mindspore, rows, teacher, tmp_path):
    """A function: stage, overrides -> a trainer that writes below tmp_path."""

    def trainer(stage, *overrides, output="run"):
        config_name, trainer_name, own = STAGES[stage]
        values = {
            "output": tmp_path / output,
            "model.build.decoder": json.dumps(DECODER),
            "model.build.tokenizer_files": f"[{rows}]",
            "model.build.vocab_size": 300,
            "data.train": f"[{{path: {rows}}}]",
            "data.test": f"[{{path: {rows}}}]",
            "data.max_rows": 16,
            "training.batch_size": 4,
            "training.learning_rate": 3e-3,
            "optimizer.epsilon": 1e-4,  # so that rounding is not blown up where a gradient is next to nothing
            "trainer.rows": 4,
            "trainer.row_tokens": 64,
            "trainer.steps": STEPS,
            "logging.tensorboard": "false",
            "logging.progress": "false",
        }
        texts = [f"{name}={value}" for name, value in values.items()]
        texts += [override.replace("TEACHER", str(teacher)) for override in (*own, *overrides)]
        config = load_config(getattr(mindrlhf, config_name), None, texts)
        return getattr(mindrlhf, trainer_name)(config)

    return trainer


def losses(trainer, steps=STEPS):
    """Of the next steps, without the run's files."""
    if trainer.step == 0:
        trainer.prepare(None)
    return [trainer.run_step()[0]["loss"] for _ in range(steps)]


def weights(trainer):
    return {name: array.copy() for name, array in trainer.policy.decoder.tensors()}


@pytest.fixture()
def whole(make):
    """Losses of one micro-batch a step, by stage."""
    known = {}

    def of(stage):
        if stage not in known:
            known[stage] = losses(make(stage, "trainer.rows=8"))
        return known[stage]

    return of


@pytest.mark.parametrize("stage", EVERY)
def test_split_and_packing_change_nothing(stage, make, whole):
    expected = whole(stage)
    assert expected[-1] < expected[0]
    # 64 tokens a row hold several examples, 32 one: the second is the batch unpacked.
    for rows, row_tokens in ((2, 64), (1, 64), (8, 32), (1, 32)):
        split = losses(make(stage, f"trainer.rows={rows}", f"trainer.row_tokens={row_tokens}"))
        assert np.abs(np.array(split) - expected).max() < 1e-6, (rows, row_tokens)


@pytest.mark.parametrize("stage", EVERY)
def test_resumed_is_uninterrupted(stage, make):
    def run(steps, output):
        trainer = make(stage, f"trainer.steps={steps}", "training.schedule=constant", output=output)
        return trainer, trainer.fit()

    whole, whole_summary = run(6, "whole")
    run(3, "parts")
    resumed, summary = run(6, "parts")
    assert summary["steps"] == 6 and summary["after"] == whole_summary["after"]
    for name, array in weights(whole).items():
        assert np.array_equal(array, weights(resumed)[name]), name
