"""`mindrlhf compare-loss`: the mean error of two curves, and what can be wrong with the files."""

import json

import pytest

from mindrlhf.cli.main import main


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a file of the current directory: its text, or objects one a line."""
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        text = content if isinstance(content, str) else "".join(json.dumps(values) + "\n" for values in content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write


def curve(values, key="loss", first=1):
    return [{"step": step, key: value} for step, value in enumerate(values, first)]


def test_mean_error_and_the_largest_difference(file, capsys):
    """Matched by step, whatever the order; lines of an evaluation and empty ones do not count."""
    evaluation = {"step": 2, "eval/accuracy": 0.5}
    file("a.jsonl", [{"step": 0, "time": 1.0}, *curve([4.0, 3.0, 2.0]), evaluation])
    file("b.jsonl", "\n".join(json.dumps(line) for line in reversed(curve([4.01, 3.0, 1.96]))) + "\n\n")
    assert main(["compare-loss", "a.jsonl", "b.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "steps               3",
        "mean error          0.0166667 (1.667%)",
        "largest difference  0.04 at step 3",
        "limit               2%: within",
    ]


def test_beyond_the_limit(file, capsys):
    a, b = file("a.jsonl", curve([1.0, 1.0])), file("b.jsonl", curve([1.0, 1.5]))
    assert main(["compare-loss", a, b]) == 1
    assert capsys.readouterr().out.endswith("2%: exceeded\n")
    assert main(["compare-loss", a, b, "--limit", "25"]) == 0
    assert main(["compare-loss", a, a, "--limit", "0"]) == 0


def test_another_metric(file, capsys):
    a, b = file("a.jsonl", curve([0, 1], "accuracy")), file("b.jsonl", curve([0.01, 1.01], "accuracy"))
    assert main(["compare-loss", a, b, "--key", "accuracy"]) == 0
    assert "0.01 (1%)" in capsys.readouterr().out


GOOD = curve([1.0, 2.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "b.jsonl: no line has 'loss'; choose a metric that it has with --key"),
        (GOOD[:1] + curve([1], "x"), "a.jsonl has 1 step that b.jsonl lacks, the first is 2; run both for"),
        ([*GOOD, *curve([1, 1], first=3)], "b.jsonl has 2 steps that a.jsonl lacks, the first is 3; run both for"),
        (curve([1, 1], first=11), "a.jsonl and b.jsonl have no step in common: 1 to 2 and 11 to 12; count both"),
        ('{"step": 1, "loss": 1}\n{"step": 2,\n', "b.jsonl:2: not JSON: Expecting property name"),
        ("[1, 2]\n", 'b.jsonl:1: not an object; write {"step": 1, "loss": 0.5}'),
        ('{"loss": 1}\n', 'b.jsonl:1: step: null is not a whole number; every loss needs its "step"'),
        ([*GOOD, GOOD[0]], "b.jsonl:3: step 1 a second time; leave one line with loss a step"),
        ([GOOD[0], {"step": 2, "loss": None}], "b.jsonl:2: loss: null is not a finite number; a run that diverged"),
        ([GOOD[0], {"step": 2, "loss": float("nan")}], "b.jsonl:2: loss: NaN is not a finite number"),
        ([{"step": 1, "loss": "x"}], 'b.jsonl:1: loss: "x" is not a finite number'),
    ],
)
def test_wrong_files(file, capsys, content, message):
    file("a.jsonl", GOOD)
    file("b.jsonl", content)
    assert main(["compare-loss", "a.jsonl", "b.jsonl"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith(f"mindrlhf: error: {message}")


def test_missing_and_binary_files(file, tmp_path, capsys):
    a = file("a.jsonl", GOOD)
    assert main(["compare-loss", a, "none.jsonl"]) == 2
    assert capsys.readouterr().err == "mindrlhf: error: none.jsonl: no such file; give the metrics.jsonl of a run\n"
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    assert main(["compare-loss", a, "b.jsonl"]) == 2
    assert "b.jsonl: not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["-1", "nan"])
def test_wrong_limit(file, capsys, limit):
    a = file("a.jsonl", GOOD)
    assert main(["compare-loss", a, a, "--limit", limit]) == 2
    assert "must be a percentage of 0 or more" in capsys.readouterr().err
