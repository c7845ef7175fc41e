"""mindrlhf/utils/progress.py: a bar on a terminal, plain lines elsewhere."""

import io
import sys

import pytest

from mindrlhf.utils.progress import Progress

STEP = {
    "reward/total": -12.3456, "kl": 0.00123, "eval/accuracy": 0.875, "tokens_per_second": 31234.5, "loss": 3.0
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_about_every_tenth(capsys):
    with Progress(40, 0, "demo") as progress:
        progress.update(STEP)
        for _ in range(39):
            progress.update({"reward/total": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("demo 4/40, reward 1.000, KL 0.0012, accuracy 87.5%, 31234 tokens/s, ")
    assert lines[-1].endswith("00:00 left")
    assert all(len(line) < 110 for line in lines)


def test_plain_lines_of_a_resumed_run(capsys):
    with Progress(1000, 995, "demo") as progress:
        for _ in range(5):
            progress.update(STEP)
    assert capsys.readouterr().err.splitlines()[-1].startswith("demo 1000/1000, ")


def test_fewer_steps_than_lines(capsys):
    with Progress(2, 0, "") as progress:
        progress.update({})
        progress.update({})
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["1/2", "2/2"]


def test_off_is_silent_but_writes(capsys):
    with Progress(2, 0, "demo", enabled=False) as progress:
        progress.update(STEP)
        progress.write("hello")
    assert capsys.readouterr() == ("hello\n", "")


@pytest.mark.parametrize("width", ["80", "200"])
def test_bar_is_one_line(monkeypatch, capsys, width):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", width)
    with Progress(100000, 99990, "a-rather-long-name") as progress:
        for _ in range(10):
            progress.update(STEP)
        progress.write("a message")
    drawn = [line for line in terminal.getvalue().replace("\n", "\r").split("\r") if line.strip()]
    assert all(len(line) <= min(int(width), 109) for line in drawn)
    if width == "200":
        assert "100%" in drawn[-1]
        assert "reward -12.346, KL 0.0012, accuracy 87.5%, 31234 tokens/s" in drawn[-1]
    assert capsys.readouterr().out == "a message\n"
