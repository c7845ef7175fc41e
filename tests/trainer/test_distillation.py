"""Distillation: the teacher is reached, on the data and on the student's own answers."""

import numpy as np
import pytest

from mindrlhf.errors import UserError
from tests.trainer.stages import losses, weights

GKD = ("distillation.name=gkd", "distillation.beta=0.5")


@pytest.mark.parametrize(
    "options",
    [
        GKD,
        pytest.param(("distillation.coef=1",), marks=pytest.mark.slow),
        pytest.param(("distillation.name=gkd", "distillation.beta=1"), marks=pytest.mark.slow),
    ],
)
def test_the_student_comes_closer(options, make_stage):
    trainer = make_stage("kd", *options, "training.learning_rate=1e-2")
    before = trainer.evaluate()["teacher_kl"]
    losses(trainer, 40)
    assert trainer.evaluate()["teacher_kl"] < 0.5 * before


def test_a_copy_of_the_teacher_has_no_distance(make_stage):
    trainer = make_stage("kd", "model.path=TEACHER", *GKD)
    values = trainer.evaluate()
    assert values["loss"] == pytest.approx(0, abs=1e-6) and values["teacher_kl"] == pytest.approx(0, abs=1e-5)


def test_the_teacher_stays_as_it_is(make_stage):
    trainer = make_stage("kd", "training.learning_rate=1e-2")
    teacher = trainer.objective.teacher
    before = [parameter.asnumpy().copy() for parameter in teacher.get_parameters()]
    losses(trainer, 3)
    assert all(np.array_equal(a, p.asnumpy()) for a, p in zip(before, teacher.get_parameters(), strict=True))


def test_on_policy_steps_train_on_the_students_answers(make_stage, monkeypatch):
    from mindrlhf.trainer.distillation import KDTrainer

    seen = []
    answered = KDTrainer._answered

    def spy(self, numbers):
        conversations = answered(self, numbers)
        seen.append(conversations)
        return conversations

    monkeypatch.setattr(KDTrainer, "_answered", spy)
    options = (*GKD, "distillation.on_policy=0.5", "sampling.max_tokens=8", "training.learning_rate=1e-2")
    trainer = make_stage("kd", *options)
    before = trainer.evaluate()["teacher_kl"]
    losses(trainer, 40)
    assert 10 < len(seen) < 30
    assert trainer.evaluate()["teacher_kl"] < 0.7 * before
    for conversation in seen[0]:
        prompt = conversation.ids[~conversation.trained]
        assert any(np.array_equal(prompt, item.ids[~item.trained]) for item in trainer.examples["train"].items)
        assert 1 <= conversation.trained.sum() <= 8
    again = make_stage("kd", *options, output="again")
    again.prepare(None)
    losses(again, 40)
    assert all(np.array_equal(array, weights(again)[name]) for name, array in weights(trainer).items())


def test_answers_that_do_not_fit_the_window(make_stage):
    """Told before the first step."""
    with pytest.raises(UserError, match="sampling.max_tokens: 64, with the longest prompt of . tokens, is more than"):
        make_stage("kd", *GKD, "distillation.on_policy=1", "sampling.max_tokens=64", "trainer.row_tokens=0")
    with pytest.raises(UserError, match="sampling.temperature: -1"):
        make_stage("kd", *GKD, "distillation.on_policy=1", "sampling.max_tokens=8", "sampling.temperature=-1")


def test_a_teacher_with_a_shorter_window(make_stage, tmp_path, stage_rows):
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build
    from tests.trainer.stages import DECODER

    build(BuildConfig({**DECODER, "max_position_embeddings": 4}, 300, [str(stage_rows)]), 7).write(tmp_path / "short")
    with pytest.raises(UserError, match="distillation.teacher: has 4 positions, .* are needed"):
        make_stage("kd", f"distillation.teacher={tmp_path / 'short'}")
    with pytest.raises(UserError, match="short has 4 positions, .* are needed"):
        make_stage("dpo", f"model.reference={tmp_path / 'short'}").prepare(None)


def test_a_teacher_with_another_vocabulary(make_stage, tmp_path, stage_rows):
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build
    from tests.trainer.stages import DECODER

    build(BuildConfig(DECODER, 280, [str(stage_rows)]), seed=7).write(tmp_path / "other")
    with pytest.raises(UserError, match="has another vocabulary than the student"):
        make_stage("kd", f"distillation.teacher={tmp_path / 'other'}")
