"""The best checkpoint and the early stop: of a loop without a model, killed wherever it can be, and of a real stage."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from mindrlhf.cli.train import report
from mindrlhf.config import SFTConfig, TrainerConfig, load_config
from mindrlhf.errors import UserError
from mindrlhf.trainer.best import Best
from mindrlhf.utils.checkpoint import STATE_FILE, Checkpoints
from mindrlhf.utils.logging import RunLog

NAN = math.nan


def after(values, best_is="largest"):
    best = Best.of(TrainerConfig(best="score", best_is=best_is))
    for step, value in enumerate(values):
        best = best.after(step, {"score": value, "other": 0.0})
    return best.step, best.value, best.worse, best.seen


@pytest.mark.parametrize(
    ("values", "best_is", "expected"),
    [
        ([1.0], "largest", (0, 1.0, 0, 0)),
        ([1.0, 3.0, 2.0], "largest", (1, 3.0, 1, 2)),
        ([1.0, 3.0, 2.0], "smallest", (0, 1.0, 2, 2)),
        ([1.0, 1.0], "largest", (0, 1.0, 1, 1)),  # a tie is not better
        ([1.0, NAN, math.inf, None, 2.0, 0.0], "largest", (4, 2.0, 1, 5)),
        ([NAN, None, 5.0], "smallest", (2, 5.0, 0, 2)),
        ([NAN, NAN], "largest", (None, None, 2, 1)),
    ],
)
def test_best_of_evaluations(values, best_is, expected):
    assert after(values, best_is) == expected


def test_a_state_under_another_metric_says_nothing():
    config = TrainerConfig(best="score")
    best = Best.of(config).after(5, {"score": 2.0})
    state = json.loads(json.dumps(best.state()))
    assert Best.resumed(state, config) == best
    for other in (TrainerConfig(best="loss"), TrainerConfig(best="score", best_is="smallest")):
        assert Best.resumed(state, other) == Best.of(other)


@pytest.mark.parametrize(
    ("metric", "values", "message"),
    [
        ("acuracy", ["loss", "accuracy"], "no 'acuracy'; did you mean 'accuracy'? there are loss, accuracy"),
        ("pass@4", ["accuracy", "pass@1"], "no 'pass@4'; did you mean 'pass@1'? there are accuracy, pass@1"),
        ("x", ["loss"], "no 'x'; there are loss"),
        ("loss", [], "no 'loss'; without held-out rows there are none: set data.test"),
    ],
)
def test_an_unknown_metric(metric, values, message):
    with pytest.raises(UserError) as error:
        Best(metric).after(0, dict.fromkeys(values, 1.0))
    assert str(error.value) == f"trainer.best: the evaluations have {message}"


def test_the_marked_checkpoint_is_spared(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)

    def save(step):
        checkpoints.save(step, {"step": step}, [("moment", (1,), lambda: np.zeros(1, np.float32))], lambda path: None)

    for step in (0, 1, 2):
        save(step)
    checkpoints.mark_best(2, "loss", 0.5)
    save(3)
    save(4)
    assert checkpoints.steps() == [0, 2, 4]
    checkpoints.mark_best(4, "loss", 0.25)
    assert checkpoints.steps() == [0, 4]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 4, "metric": "loss", "value": 0.25}


# -- a loop without a model --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a signal: no `except` of the loop sees it."""


@pytest.fixture
def toy(mindspore, monkeypatch, tmp_path):
    """A function: the evaluations' values by step, overrides -> a trainer whose one weight counts its steps."""
    from mindrlhf.trainer.loop import Trainer

    monkeypatch.setattr(RunLog, "plot", lambda log: None)

    class Toy(Trainer):
        def __init__(self, values, *overrides, output="run"):
            fixed = [f"output={tmp_path / output}", "logging.tensorboard=false", "logging.progress=false"]
            run = ["trainer.steps=9", "trainer.evaluate_every=1", "trainer.save_every=3", "trainer.keep_checkpoints=1"]
            self.config = load_config(SFTConfig, None, [*fixed, *run, *overrides])
            self.values, self.weight = values, np.zeros(1, np.float32)
            self.policy = SimpleNamespace(write=self.write, load=self.load)
            self.train_step = SimpleNamespace(
                updates=0, skipped=0, state=lambda: [("moment", self.weight)], load_state=lambda *state: None
            )

        def write(self, directory):
            directory.mkdir(parents=True)
            np.save(directory / "weight.npy", self.weight)

        def load(self, directory):
            self.weight = np.load(directory / "weight.npy")

        def total_steps(self):
            return self.config.trainer.steps

        def prepare(self, log):
            pass

        def run_step(self):
            self.weight = self.weight + 1
            self.step += 1
            return {"weight": float(self.weight[0])}, []

        def evaluate(self):
            assert self.weight == self.step
            return {"loss": self.values[self.step]} if self.values else {}

        def state(self):
            return {}

        def load_state(self, state):
            pass

    return Toy


def read_state(trainer, step):
    return json.loads((trainer.checkpoints.path(step) / STATE_FILE).read_text())


def metric_lines(trainer):
    lines = [json.loads(line) for line in (trainer.output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def outcome(trainer, summary):
    """All that a run leaves behind but for times and its directory's name."""
    text = json.dumps({**summary, "seconds": 0}).replace(str(trainer.output), "run")
    steps = trainer.checkpoints.steps()
    mark = json.loads((trainer.checkpoints.directory / "best.json").read_text())
    return text, steps, [read_state(trainer, step) for step in steps], mark, metric_lines(trainer)


VALUES = [5.0, 4.0, 4.5, 2.0, 3.0, NAN, 2.0, 1.0, 0.5, 0.1]
SMALLEST = ("trainer.best=loss", "trainer.best_is=smallest")


def test_the_run_stops_and_keeps_its_best_checkpoint(toy):
    trainer = toy(VALUES, *SMALLEST, "trainer.patience=3")
    summary = trainer.fit()
    best = trainer.checkpoints.path(3)
    assert summary["best"] == {
        "metric": "loss", "step": 3, "value": 2.0, "checkpoint": str(best), "evaluations_since": 3
    }  # fmt: skip
    assert (summary["steps"], summary["stopped_early"], summary["after"]) == (6, True, {"loss": 2.0})
    assert trainer.checkpoints.steps() == [0, 3, 6] and np.load(best / "weight.npy") == 3
    lines = report(summary, "run").splitlines()
    assert lines[-3:-1] == [
        "stopped early: 3 evaluations without a better loss", f"best: loss 2.000 at step 3, {best}"
    ]  # fmt: skip


def test_started_again_it_does_nothing_and_with_more_patience_it_goes_on(toy):
    stopped = toy(VALUES, *SMALLEST, "trainer.patience=3")
    summary = stopped.fit()
    before, written = outcome(stopped, summary), (stopped.output / "summary.json").stat().st_mtime_ns
    again = toy(VALUES, *SMALLEST, "trainer.patience=3", "trainer.steps=9")
    assert outcome(again, again.fit()) == before
    assert (stopped.output / "summary.json").stat().st_mtime_ns == written
    patient = toy(VALUES, *SMALLEST, "trainer.patience=4")
    whole = toy(VALUES, *SMALLEST, "trainer.patience=4", output="whole")
    assert outcome(patient, patient.fit()) == outcome(whole, whole.fit())
    assert patient.step == 9 and read_state(patient, 9)["best"]["step"] == 9


def test_without_patience_it_never_stops_and_without_best_nothing_is_kept(toy):
    trainer = toy([1.0] * 10, *SMALLEST)
    summary = trainer.fit()
    assert (summary["steps"], summary["best"]["step"], summary["stopped_early"]) == (9, 0, False)
    plain = toy(VALUES, output="plain")
    summary = plain.fit()
    assert "best" not in summary and "best:" not in report(summary, "plain")
    assert plain.checkpoints.steps() == [9]


def test_no_finite_value(toy):
    summary = toy([NAN] * 10, *SMALLEST, "trainer.patience=4").fit()
    assert (summary["steps"], summary["best"]["checkpoint"], summary["best"]["evaluations_since"]) == (3, None, 4)
    assert "best: no evaluation had a finite loss" in report(summary, "run")


@pytest.mark.parametrize("patience", [3, 0])
def test_killed_anywhere_it_ends_as_if_uninterrupted(patience, toy, monkeypatch):
    options = (*SMALLEST, f"trainer.patience={patience}")
    whole = toy(VALUES, *options, output="whole")
    expected = outcome(whole, whole.fit())
    events, deadly = [0], [None]

    def dangerous(function):
        def counted(*arguments):
            for action in (lambda: None, lambda: function(*arguments)):  # killed before it, and behind it
                result = action()
                events[0] += 1
                if events[0] == deadly[0]:
                    raise Killed
            return result

        return counted

    for owner, name in ((Checkpoints, "save"), (Checkpoints, "mark_best"), (RunLog, "log"), (RunLog, "summary")):
        monkeypatch.setattr(owner, name, dangerous(getattr(owner, name)))
    toy(VALUES, *options, output="counted").fit()
    count = events[0]
    assert count > 30
    for number in range(1, count + 1):
        events[0], deadly[0] = 0, number
        with pytest.raises(Killed):
            toy(VALUES, *options, output=f"killed-{number}").fit()
        deadly[0] = None
        trainer = toy(VALUES, *options, output=f"killed-{number}")
        assert outcome(trainer, trainer.fit()) == expected, number


def test_a_mistaken_metric_is_mended_in_the_same_directory(toy):
    with pytest.raises(UserError, match="no 'los'; did you mean 'loss'"):
        toy(VALUES, "trainer.best=los").fit()
    assert toy(VALUES, *SMALLEST).fit()["best"]["step"] == 9


def test_another_metric_begins_where_the_run_goes_on(toy):
    toy(VALUES, "trainer.steps=4", "trainer.evaluate_every=2").fit()
    resumed = toy(VALUES, *SMALLEST, "trainer.patience=3")
    summary = resumed.fit()
    assert (summary["best"]["step"], summary["best"]["value"], summary["steps"]) == (9, 0.1, 9)
    worse = toy([5.0] * 10, *SMALLEST, "trainer.steps=3", output="worse")
    worse.fit()
    summary = toy([5.0] * 10, "trainer.best=loss", "trainer.patience=2", output="worse").fit()
    assert (summary["best"]["step"], summary["steps"]) == (3, 5)


def test_a_checkpoint_older_than_the_evaluation_of_its_step(toy):
    """Fewer steps than before: the last evaluation comes to a checkpoint that was saved without it."""
    every = (*SMALLEST, "trainer.evaluate_every=2", "trainer.save_every=3")
    killed_at_3(toy([5.0, 0, 4.0, 1.0, 3.0, 0, 2.0], *every, "trainer.steps=6"))
    short = toy([5.0, 0, 4.0, 1.0], *every, "trainer.steps=3").fit()
    assert short["best"]["step"] == 3
    longer = toy([5.0, 0, 4.0, 1.0, 3.0, 0, 2.0], *every, "trainer.steps=6")
    assert longer.fit()["best"]["step"] == 3 and longer.checkpoints.steps() == [0, 3, 6]


def test_a_metric_that_is_new_is_looked_for_before_training(toy):
    """The run goes on at step 3, which has no evaluation."""
    killed_at_3(toy(VALUES, "trainer.evaluate_every=2"))
    resumed = toy(VALUES, "trainer.evaluate_every=2", "trainer.best=los")
    with pytest.raises(UserError, match="did you mean 'loss'"):
        resumed.fit()
    assert resumed.step == 3


def killed_at_3(trainer):
    run_step = trainer.run_step

    def until_3():
        if trainer.step == 3:
            raise Killed
        return run_step()

    trainer.run_step = until_3
    with pytest.raises(Killed):
        trainer.fit()


# -- real stages -------------------------------------------------------------------------------------------------------


def test_a_stage_keeps_its_best_checkpoint_and_resumes(make_stage):
    """The learning rate is far too high: the held-out loss falls, then rises."""

    def run(steps, output):
        trainer = make_stage(
            "sft", *SMALLEST, f"trainer.steps={steps}", "trainer.evaluate_every=1", "trainer.keep_checkpoints=1",
            "trainer.patience=3", "training.learning_rate=0.2", "training.schedule=constant", output=output,
        )  # fmt: skip
        return trainer, trainer.fit()

    whole, summary = run(12, "whole")
    best = summary["best"]
    held_out = {line["step"]: line["eval/loss"] for line in metric_lines(whole) if "eval/loss" in line}
    assert best["value"] == min(held_out.values()) == held_out[best["step"]]
    assert summary["stopped_early"] and summary["steps"] == best["step"] + 3 < 12
    assert whole.checkpoints.steps() == sorted({0, best["step"], summary["steps"]})
    kept = make_stage("sft", f"model.path={best['checkpoint']}", output="kept")
    assert kept.evaluate()["loss"] == pytest.approx(best["value"], abs=1e-6)
    run(best["step"] + 1, "parts")
    resumed, summary = run(12, "parts")
    assert outcome(resumed, summary)[1:4] == outcome(whole, whole.fit())[1:4]
    assert summary["best"]["value"] == best["value"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.patience=-1"], "trainer.patience: -1 must be 0 (off) or more"),
        (["trainer.patience=2", "trainer.evaluate_every=1"], "trainer.patience: 2 must be 0 (off) without trainer.b"),
        (["trainer.patience=2", "trainer.best=loss"], "0 (off) without evaluations on the way; set trainer.eval"),
        (["trainer.best=x", "trainer.best_is=best"], "trainer.best_is"),
    ],
)
def test_mistake_is_one_line(overrides, message, make_stage):
    with pytest.raises(UserError) as error:
        make_stage("sft", *overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_save_checkpoint_as_the_published_program_calls_it(toy):
    trainer = toy(VALUES)
    trainer.run_step()
    assert trainer.save_checkpoint(0, 3) == trainer.checkpoints.path(1) == trainer.save_checkpoint()
    with pytest.raises(UserError, match="rank_id 1: this is process 0 of 1; pass its number"):
        trainer.save_checkpoint(1, 3)
