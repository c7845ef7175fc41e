"""mindrlhf/utils/logging.py: what a run leaves behind, and what a resumed run keeps of it."""

import json
import sys
import types

import numpy as np
import pytest

from mindrlhf.config import LoggingConfig
from mindrlhf.errors import UserError
from mindrlhf.utils.logging import RunLog

QUIET = LoggingConfig(tensorboard=False)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_files_of_a_run(tmp_path):
    with RunLog(tmp_path / "run", QUIET, "seed: 1\n") as log:
        log.log(1, {"reward/total": np.float32(0.5), "tokens": np.int64(3)})
        log.completions(1, [{"prompt": "1+1=", "answer": "zwei ü", "reward": 1.0}, {"ids": np.arange(2)}])
        log.summary({"accuracy": {"before": np.float32(0.25), "after": float("nan")}})
    assert names(tmp_path / "run") == ["completions.jsonl", "config.yaml", "metrics.jsonl", "summary.json"]
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line.pop("time") >= 0
    assert line == {"step": 1, "reward/total": 0.5, "tokens": 3}
    assert lines(tmp_path / "run" / "completions.jsonl") == [
        {"step": 1, "prompt": "1+1=", "answer": "zwei ü", "reward": 1.0},
        {"step": 1, "ids": [0, 1]},
    ]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"accuracy": {"before": 0.25, "after": None}}


def test_a_line_is_on_the_disk_at_once_and_not_finite_is_null(tmp_path):
    with RunLog(tmp_path, QUIET, "") as log:
        log.log(1, {"kl": float("inf"), "entropy": np.float32("nan"), "reward/total": 1.0})
        text = (tmp_path / "metrics.jsonl").read_text()
        assert text.endswith("\n")
        assert "NaN" not in text and "Infinity" not in text
        (line,) = lines(tmp_path / "metrics.jsonl")
        assert (line["kl"], line["entropy"], line["reward/total"]) == (None, None, 1.0)


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    with RunLog(tmp_path, QUIET, "a: 1\n") as log:
        log.log(0, {"warmup_step": 50, "warmup/loss": 2.0})
        for step in range(1, 6):
            log.log(step, {"kl": float(step)})
            log.completions(step, [{"answer": f"{step}-{i}"} for i in range(2)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "ti')  # what a kill leaves
    with RunLog(tmp_path, QUIET, "a: 2\n", resumed_step=3) as log:
        log.log(4, {"kl": 40.0})
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line.get("kl")) for line in metrics] == [(0, None), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    kept = [line["answer"] for line in lines(tmp_path / "completions.jsonl")]
    assert kept == ["1-0", "1-1", "2-0", "2-1", "3-0", "3-1"]
    assert (tmp_path / "config.yaml").read_text() == "a: 2\n"
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_time_goes_on_where_the_kept_lines_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 100.0}\n{"step": 2, "time": 900.0}\n')
    with RunLog(tmp_path, QUIET, "", resumed_step=1) as log:
        log.log(2, {})
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first["time"] == 100.0
    assert 100.0 <= second["time"] < 200.0


def test_whole_last_line_without_its_line_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0}')
    with RunLog(tmp_path, QUIET, "", resumed_step=1) as log:
        log.log(2, {})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_last_line_cut_inside_a_character_is_dropped(tmp_path):
    cut = '{"step": 2, "answer": "ü'.encode()[:-1]
    (tmp_path / "completions.jsonl").write_bytes('{"step": 1, "answer": "ö"}\n'.encode() + cut)
    RunLog(tmp_path, QUIET, "", resumed_step=1).close()
    assert lines(tmp_path / "completions.jsonl") == [{"step": 1, "answer": "ö"}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a line of JSON; remove the line"):
        RunLog(tmp_path, QUIET, "", resumed_step=2)


def test_fresh_start_refuses_another_run(tmp_path):
    RunLog(tmp_path, QUIET, "seed: 1").close()
    with pytest.raises(UserError, match="metrics.jsonl is there, but no checkpoint to go on from"):
        RunLog(tmp_path, QUIET, "seed: 2")
    assert (tmp_path / "config.yaml").read_text() == "seed: 1"


def test_first_and_last(tmp_path):
    with RunLog(tmp_path, QUIET, "") as log:
        assert (log.first("eval/"), log.last("eval/", 0)) == ({}, {})
        log.log(0, {"eval/accuracy": 0.1, "eval/format": 0.5})
        log.log(1, {"kl": 0.0})
        log.log(2, {"kl": 0.0, "eval/accuracy": 0.7})
        assert log.first("eval/") == {"accuracy": 0.1, "format": 0.5}
        assert log.last("eval/", 2) == {"accuracy": 0.7}
        assert log.last("eval/", 1) == {}


def read_events(directory):
    """(step, tag, value) of the TensorBoard files of one folder, and the steps of their purge marks."""
    from tensorboardX.proto.event_pb2 import Event

    points, purges = [], []
    for path in sorted(directory.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")  # length, its checksum, the record, its checksum
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):
                purges.append(event.step)
    return points, purges


def test_tensorboard(tmp_path):
    with RunLog(tmp_path, LoggingConfig(), "") as log:
        log.log(0, {"warmup_step": 9, "warmup/loss": 2.0})
        log.log(1, {"kl": 0.5, "entropy": float("nan")})
    with RunLog(tmp_path, LoggingConfig(), "", resumed_step=1) as log:
        log.log(2, {"kl": 0.25})
    assert read_events(tmp_path / "tb") == ([(1, "kl", 0.5), (2, "kl", 0.25)], [2])
    assert read_events(tmp_path / "tb" / "warmup") == ([(9, "warmup/loss", 2.0)], [])


@pytest.mark.parametrize("package", ["wandb", "swanlab"])
def test_missing_package(tmp_path, monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"logging.{package}: {package} is not installed; pip install {package}"):
        RunLog(tmp_path / "run", LoggingConfig(**{package: True}), "")
    assert not (tmp_path / "run").exists()


def test_wandb_and_swanlab_get_the_same_numbers(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append(("axis", name, step_metric)),
        log=lambda values: calls.append(("wandb", values)),
        finish=lambda: calls.append("wandb finished"),
    )
    wandb, swanlab = types.ModuleType("wandb"), types.ModuleType("swanlab")
    wandb.init = lambda **keywords: calls.append(("init", keywords["project"], keywords["config"])) or run
    swanlab.init = lambda **keywords: calls.append(("init", keywords["project"], keywords["config"]))
    swanlab.log = lambda values, step: calls.append(("swanlab", step, values))
    swanlab.finish = lambda: calls.append("swanlab finished")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    logging = LoggingConfig(tensorboard=False, wandb=True, swanlab=True, project="p")
    with RunLog(tmp_path, logging, "seed: 1\n") as log:
        log.log(0, {"warmup_step": 3, "warmup/loss": 2.0})
        log.log(1, {"kl": 0.5, "entropy": float("nan")})
    assert calls == [
        ("init", "p", {"seed": 1}),
        ("axis", "*", "step"),
        ("axis", "warmup/*", "warmup_step"),
        ("init", "p", {"seed": 1}),
        ("wandb", {"warmup/loss": 2.0, "warmup_step": 3}),
        ("swanlab", 3, {"warmup/loss": 2.0}),
        ("wandb", {"kl": 0.5, "step": 1}),
        ("swanlab", 1, {"kl": 0.5}),
        "wandb finished",
        "swanlab finished",
    ]


def test_plot(tmp_path):
    with RunLog(tmp_path, QUIET, "") as log:
        log.plot()
        assert not (tmp_path / "curves.png").exists()  # nothing to draw yet
        log.log(1, {"kl": 0.5})
        log.plot()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
