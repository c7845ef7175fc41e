"""mindrlhf/utils/curves.py: the right panels, and nothing left half-written."""

import struct

import numpy as np
import pytest

from mindrlhf.utils.curves import _panels, _smooth, plot_curves

ALL = {
    "reward/total": 1.0, "reward/accuracy": 0.9, "reward/format": 0.1, "kl": 0.01, "entropy": 1.0,
    "response_tokens": 12.0, "tokens_per_second": 3000.0,
}  # fmt: skip


def size_of(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


def panel_titles(metrics):
    from matplotlib.figure import Figure

    titles = []
    for draw in _panels(metrics):
        axes = Figure().add_subplot()
        draw(axes)
        assert axes.get_xlabel() and axes.get_ylabel()
        titles.append(axes.get_title())
    return titles


def test_everything_at_readme_width(tmp_path):
    metrics = [{"step": 0, "warmup_step": i, "warmup/loss": 1 / i} for i in range(1, 9)]
    metrics += [{"step": i, **ALL, **({"eval/accuracy": i / 9} if i % 4 == 0 else {})} for i in range(9)]
    plot_curves(metrics, tmp_path / "curves.png", "a run")
    assert 1050 <= size_of(tmp_path / "curves.png")[0] <= 1150
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert panel_titles(metrics) == [
        "Held-out accuracy", "Reward", "KL to the reference", "Entropy", "Response length", "Warm-up loss", "Speed"
    ]  # fmt: skip


def test_only_panels_with_data(tmp_path):
    assert panel_titles([{"step": 1, "kl": None, "entropy": 0.5}]) == ["Entropy"]
    assert panel_titles([{"step": 1, "reward/total": 0.5}]) == ["Reward"]
    assert panel_titles([{"step": 0, "warmup_step": 1, "warmup/loss": 0.5}]) == ["Warm-up loss"]
    plot_curves([], tmp_path / "curves.png", "nothing")
    assert not list(tmp_path.iterdir())


def test_panels_of_a_critic_conversations_and_several_answers():
    line = {"critic/explained_variance": 0.5, "turns": 2.0, "eval/pass@1": 0.5, "eval/maj@4": 0.6, "mismatch_mean": 0.1}
    rounding, stale = {**line, "mismatch_max": 1e-5}, {**line, "mismatch_max": 0.5}
    titles = ["Variance that the critic explains", "Held out, several answers", "Turns"]
    assert panel_titles([{"step": i, **rounding} for i in range(3)]) == titles
    assert panel_titles([{"step": i, **stale} for i in range(3)]) == [*titles, "Old against sampled log-probs"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_and_gaps(tmp_path, steps):
    metrics = [{"step": i, **ALL, "eval/accuracy": 0.5} for i in range(steps)]
    metrics[0]["kl"] = None
    plot_curves(metrics, tmp_path / "curves.png", "short")
    assert (tmp_path / "curves.png").exists()


def test_an_older_picture_is_replaced(tmp_path):
    (tmp_path / "curves.png").write_text("old")
    plot_curves([{"step": 1, "kl": 0.5}], tmp_path / "curves.png", "new")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_smooth_by_hand():
    np.testing.assert_allclose(_smooth(np.array([0.0, 3.0, 6.0, 3.0])), [1.5, 3.0, 4.0, 4.5])
    np.testing.assert_allclose(_smooth(np.array([5.0])), [5.0])
    np.testing.assert_allclose(_smooth(np.full(500, 2.0)), 2.0)
