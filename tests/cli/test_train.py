"""The report at a run's end."""

from mindrlhf.cli.train import report

SUMMARY = {
    "steps": 20, "before": {"loss": 0.6931, "accuracy": -0.0001}, "after": {"loss": 0.1, "accuracy": 0.9, "new": 1.0},
    "skipped_updates": 0, "seconds": 12.4, "checkpoint": "runs/rm/checkpoints/step-000020",
}  # fmt: skip


def test_before_and_after():
    lines = report(SUMMARY, "runs/rm").splitlines()
    assert lines[1].split() == ["held", "out", "before", "after"]
    assert [line.split() for line in lines[2:5]] == [
        ["loss", "0.693", "0.100"], ["accuracy", "0.000", "0.900"], ["new", "-", "1.000"]
    ]  # fmt: skip
    assert lines[-2:] == [
        "20 steps in 12 s; metrics, curves.png and tb/ in runs/rm/",
        "checkpoint: runs/rm/checkpoints/step-000020",
    ]


def test_what_only_some_runs_have():
    more = {
        "skipped_rows": {"train": {"empty response": 2, "no assistant turn": 1}},
        "score_mean": 0.25, "score_std": 1.5, "skipped_updates": 3,
    }  # fmt: skip
    text = report(SUMMARY | more, "runs/rm")
    assert "skipped rows of data.train: 2 empty response, 1 no assistant turn\n" in text
    assert "scores: mean 0.250, deviation 1.500; see scores.png\n" in text
    assert "3 updates were skipped" in text
    assert "held out" not in report(SUMMARY | {"after": {}}, "runs/rm")


def test_values_that_are_not_finite():
    text = report(SUMMARY | {"before": {"loss": None}, "after": {"loss": float("inf")}}, "runs/rm")
    assert text.splitlines()[2].split() == ["loss", "nan", "nan"]
