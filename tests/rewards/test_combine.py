import functools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mindrlhf.rewards
from mindrlhf.errors import UserError
from mindrlhf.rewards import Rewards, accuracy_reward, format_reward
from mindrlhf.types import Prompt

PROMPTS = [Prompt(None, "p", label, i, {}) for i, label in enumerate(["1", "2", "3"])]
COMPLETIONS = [
    r"\boxed{1}",
    "#### 2",
    "what a long completion, of which only the beginning matters to the reader of it",
]


class Tensor:
    """What OpenRLHF's functions return, without torch."""

    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


def returning(value):
    def reward(completions, **columns):
        return value

    return Rewards.from_functions(reward)


def test_weighted_sum_and_parts():
    rewards = Rewards.from_functions([accuracy_reward, format_reward], weights=[1.0, 0.25])
    total, parts = rewards(PROMPTS, COMPLETIONS)
    assert total.dtype == np.float32 and total.tolist() == [1.25, 1.0, 0.0]
    assert {name: part.tolist() for name, part in parts.items()} == {
        "accuracy_reward": [1, 1, 0],
        "format_reward": [1, 0, 0],
    }
    assert all(part.dtype == np.float32 for part in parts.values())
    assert Rewards.from_functions(accuracy_reward)(PROMPTS, COMPLETIONS)[0].tolist() == [1, 1, 0]
    assert rewards([], [])[0].shape == (0,)


def test_names():
    class Judge:
        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

    partial = functools.partial(accuracy_reward)
    parts = Rewards.from_functions([Judge(), partial, lambda completions: [0, 0, 0]]).parts
    assert [name for name, _, _ in parts] == ["Judge", "accuracy_reward", "<lambda>"]


@pytest.mark.parametrize(
    "value",
    [
        [0.5, None, True],
        (0.5, 0, 1),
        np.array([0.5, 0, 1], np.float16),
        [np.float32(0.5), np.int64(0), Tensor(1.0)],
        Tensor([0.5, 0.0, 1.0]),
        {"rewards": Tensor([0.5, 0.0, 1.0])},
    ],
)
def test_what_functions_may_return(value):
    assert returning(value)(PROMPTS, COMPLETIONS)[0].tolist() == [0.5, 0, 1]


def test_openrlhf_dict_with_scores_and_logs():
    logs = {"length": np.array([1, 2, 3]), "rate": 0.5}
    total, parts = returning({"rewards": [1, 2, 3], "scores": [1, 0, 1], "extra_logs": logs})(PROMPTS, COMPLETIONS)
    assert total.tolist() == [1, 2, 3]
    assert {name: part.tolist() for name, part in parts.items()} == {
        "reward": [1, 2, 3],
        "reward/length": [1, 2, 3],
        "reward/rate": [0.5] * 3,
        "reward/scores": [1, 0, 1],
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned a NoneType instead of a list of numbers"),
        (1.0, "returned a float instead of a list"),
        (np.float32(1.0), "returned a float32 instead of a list"),
        ([1.0], "returned 1 numbers for 3 completions"),
        ([1.0, "1.0", 0], "returned '1.0', which is not a number, at index 1, .* begins '#### 2'"),
        (np.zeros((3, 1)), r"returned \[0.0\], which is not a number, at index 0"),
        (
            [0, 0, float("nan")],
            r"returned nan, which is not a finite number, at index 2, .* begins 'what .{55}'$",
        ),
        ([0, float("-inf"), 0], "returned -inf, which is not a finite"),
        ([10**400, 0, 0], "which is not a finite"),
        ({"scores": [1, 2, 3]}, "without 'rewards'; it has scores"),
        ({"rewards": [1, 2, 3], "scores": [1]}, "reward 'reward/scores' .* returned 1 numbers for 3"),
    ],
)
def test_bad_returns_name_the_function(value, message):
    with pytest.raises(UserError, match=message) as caught:
        returning(value)(PROMPTS, COMPLETIONS)
    assert str(caught.value).startswith("reward 'reward") and f"({__file__}:" in str(caught.value)


def test_a_function_that_raises():
    import json

    def parse(completions, **columns):
        return [json.loads(text) for text in completions]

    with pytest.raises(UserError) as caught:
        Rewards.from_functions(parse)(PROMPTS, COMPLETIONS)
    # the line in the user's file, not the one in json
    line = parse.__code__.co_firstlineno + 1
    assert str(caught.value).startswith(f"reward 'parse': {__file__}:{line}: JSONDecodeError: Expecting value")


def test_what_an_error_calls_a_part_by():
    class Judge:
        place = "http://judge:1"

        def __call__(self, completions, **columns):
            return [1.0]

    with pytest.raises(UserError, match=r"^reward 'Judge' \(http://judge:1\) returned 1 numbers for 3 completions$"):
        Rewards.from_functions(Judge())(PROMPTS, COMPLETIONS)


def test_concurrent_parts_run_beside_the_others():
    """Each of the two waits until the other one runs, too."""
    both = threading.Barrier(2, timeout=60)

    class Remote:
        concurrent = True

        def __call__(self, completions, **columns):
            both.wait()
            return [1.0] * len(completions)

    def local(completions, **columns):
        both.wait()
        return [2.0] * len(completions)

    total, parts = Rewards.from_functions([Remote(), local])(PROMPTS, COMPLETIONS)
    assert total.tolist() == [3.0] * 3 and list(parts) == ["Remote", "local"]


def test_a_concurrent_part_that_raises():
    class Remote:
        concurrent = True

        def __call__(self, completions, **columns):
            raise KeyError("key")

    with pytest.raises(UserError, match="^reward 'Remote': .*test_combine.py:[0-9]+: KeyError: 'key'"):
        Rewards.from_functions([Remote(), accuracy_reward])(PROMPTS, COMPLETIONS)


def test_a_builtin_without_labels():
    with pytest.raises(UserError, match="^reward 'accuracy_reward': the accuracy reward needs a label"):
        Rewards.from_functions(accuracy_reward)([Prompt(None, "p", None, 0)], ["1"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rewards([]), "at least one"),
        (lambda: Rewards.from_functions([accuracy_reward], [1.0, 2.0]), "2 reward weights for 1 reward functions"),
        (lambda: Rewards.from_functions(["accuracy"]), "'str' is a str, not a function"),
        (lambda: Rewards.from_functions([accuracy_reward], [float("nan")]), "weight nan is not a finite number"),
    ],
)
def test_bad_construction(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_host_files_do_not_import_mindspore():
    code = "import sys, mindrlhf.rewards, mindrlhf.advantages, mindrlhf.schedules; sys.exit('mindspore' in sys.modules)"
    root = Path(mindrlhf.rewards.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
