import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mindrlhf.errors import UserError
from mindrlhf.rewards import math_equality
from mindrlhf.rewards.rules import accuracy_reward, format_reward
from mindrlhf.rewards.user import BUILTINS, call_reward_function, load_reward_function
from mindrlhf.types import Prompt

ROOT = Path(__file__).parents[2]


def prompts(*labels, **columns):
    rows = [{key: values[i] for key, values in columns.items() if i < len(values)} for i in range(len(labels))]
    return [Prompt(None, f"p{i}", label, i, row) for i, (label, row) in enumerate(zip(labels, rows, strict=True))]


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


def test_builtin_names(tmp_path):
    assert load_reward_function("accuracy", tmp_path) is accuracy_reward
    assert load_reward_function("format", tmp_path) is format_reward
    assert load_reward_function("math", tmp_path).func is math_equality.math_reward
    for name in BUILTINS:
        arguments = {"maximum": 9} if name == "length" else {}
        assert callable(load_reward_function(name, tmp_path, arguments))


def test_builtins_are_imported_when_used():
    code = (
        "import sys, mindrlhf.rewards.user\n"
        "heavy = {'math_verify', 'sympy', 'mindrlhf.rewards.math_equality', 'mindrlhf.rewards.style'}\n"
        "sys.exit(bool(heavy & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_builtin_whose_package_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(math_equality.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mindrlhf\[math\]'"):
        load_reward_function("math", tmp_path)


def test_function_of_a_file_relative_to_base(tmp_path):
    source = """
        from dataclasses import dataclass
        @dataclass
        class Score:
            value: float
        def mine(completions):
            return [Score(len(text)).value for text in completions]
        """
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "reward.py", source)
    write(tmp_path / "reward.py", "def mine(completions): return 'other'")
    assert load_reward_function("a/reward.py:mine", tmp_path)(["ab"]) == [2]
    assert load_reward_function("reward.py:mine", tmp_path)(["ab"]) == "other"
    assert load_reward_function(f"{tmp_path}/a/reward.py:mine", tmp_path / "nowhere")(["ab"]) == [2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", r"'acuracy': no such name; did you mean 'accuracy'\? .*path.py:function"),
        ("helpfulness", "known: accuracy, math, format, .*knights_and_knaves. Your own is"),
        ("good.py", "known: accuracy, math"),
        ("absent.py:mine", r"no such file /.*/absent.py"),
        ("good.py:mien", r"good.py has no 'mien'; did you mean 'mine'\?"),
        ("good.py:other", "it defines mine"),
        ("good.py:number", "number in .*good.py is a int, not a function"),
        ("broken.py:mine", r"importing it: .*broken.py:3: ZeroDivisionError: division by zero"),
        ("syntax.py:mine", r"importing it: .*syntax.py:2: SyntaxError: "),
        ("exits.py:mine", r"importing it: .*exits.py:1: SystemExit: 3"),
        ("text.txt:mine", r"must end in .py"),
    ],
)
def test_errors_are_one_line(tmp_path, spec, message):
    write(tmp_path / "good.py", "number = 3\ndef mine(completions): pass")
    write(tmp_path / "broken.py", "import os\n\nnumber = 1 / 0\ndef mine(): pass")
    write(tmp_path / "syntax.py", "def mine():\n    return (1\n")
    write(tmp_path / "exits.py", "raise SystemExit(3)")
    write(tmp_path / "text.txt", "hello")
    with pytest.raises(UserError, match=message) as caught:
        load_reward_function(spec, tmp_path)
    assert "\n" not in str(caught.value)


def test_openrlhf_form():
    seen = {}

    def reward_func(queries, prompts, labels, **kwargs):
        seen.update(queries=queries, prompts=prompts, labels=labels, kwargs=kwargs)

    call_reward_function(reward_func, prompts("1", "2", level=[3, 4]), ["a", "b"])
    kwargs = {"level": [3, 4], "completions": ["a", "b"], "label": ["1", "2"]}
    assert seen == {"queries": ["p0a", "p1b"], "prompts": ["p0", "p1"], "labels": ["1", "2"], "kwargs": kwargs}


def test_openrlhf_form_by_position_and_by_name():
    def three(queries, questions, answers, level=None):
        return queries, questions, answers, level

    def two(labels, queries):
        return labels, queries

    data = prompts("1", level=[3])
    assert call_reward_function(three, data, ["a"]) == (["p0a"], ["p0"], ["1"], [3])
    assert call_reward_function(two, data, ["a"]) == (["1"], ["p0a"])


def test_trl_form():
    def everything(prompts, completions, **columns):
        return prompts, completions, columns

    def named(completions, answer, *, level=None, absent=7):
        return completions, answer, level, absent

    data = prompts("1", "2", answer=["1", "2"], level=[5])
    columns = {"answer": ["1", "2"], "level": [5, None], "label": ["1", "2"], "labels": ["1", "2"]}
    assert call_reward_function(everything, data, ["a", "b"]) == (["p0", "p1"], ["a", "b"], columns)
    assert call_reward_function(named, data, ["a", "b"]) == (["a", "b"], ["1", "2"], [5, None], 7)


def test_the_label_column_wins_over_a_column_of_that_name():
    def reward(completions, label):
        return label

    assert call_reward_function(reward, prompts("1", label=["other"]), ["a"]) == ["1"]
    assert call_reward_function(reward, prompts(None, label=["other"]), ["a"]) == ["other"]


def test_a_missing_column_is_named():
    def reward(completions, solution):
        pass

    with pytest.raises(UserError, match="asks for 'solution', .* prompts, completions, label, labels, level"):
        call_reward_function(reward, prompts("1", level=[3]), ["a"])


def test_arguments_of_a_builtin_win_over_columns(tmp_path):
    length = load_reward_function("length", tmp_path, {"maximum": 2})
    # A column that is called as an argument is another thing, set or not.
    data = prompts("1", "2", maximum=[100, 100], unit=["cm", "m"])
    assert call_reward_function(length, data, ["ab", "abc"]) == [0, -0.5]
    repetition = load_reward_function("repetition", tmp_path)
    assert call_reward_function(repetition, prompts("1", ngram_size=[1]), ["a a b"]) == [0]


def test_arguments_of_ones_own_function(tmp_path):
    source = """
        def keyword(completions, *, scale=1, **columns):
            return [scale * len(text) for text in completions], columns
        def named(completions, level, scale=1):
            return level, scale
        def openrlhf(queries, prompts, labels, scale=1, **columns):
            return queries, scale, columns
        """
    write(tmp_path / "mine.py", source)
    data = prompts("1", scale=[7], level=[3])

    def call(name, arguments):
        return call_reward_function(load_reward_function(f"mine.py:{name}", tmp_path, arguments), data, ["ab"])

    columns = {"level": [3], "label": ["1"], "labels": ["1"]}
    assert call("keyword", {"scale": 2}) == ([4], {**columns, "prompts": ["p0"]})
    assert call("keyword", {"other": 5})[1]["other"] == 5  # **columns takes any
    assert call("named", {"scale": 2}) == ([3], 2)
    assert call("named", {"level": 1}) == (1, [7])
    assert call("openrlhf", {"scale": 2}) == (["p0ab"], 2, {"level": [3], "label": ["1"], "completions": ["ab"]})
    assert call("openrlhf", {"scale": 2, "level": 9})[2]["level"] == 9


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("length", {"maximun": 3}, "'length' has no argument 'maximun'; did you mean 'maximum'"),
        ("length", {"zzz": 3}, "has no argument 'zzz'; it takes maximum, minimum, buffer, unit$"),
        ("length", {}, "'length' needs a value for 'maximum' in its arguments"),
        ("accuracy", {"completions": 3}, "'accuracy' has no argument 'completions'; it takes none"),
        ("mine.py:mine", {"scales": 3}, "has no argument 'scales'; did you mean 'scale'"),
        ("mine.py:mine", {3: 3}, "has no argument '3'; it takes completions, scale"),
    ],
)
def test_bad_arguments(tmp_path, spec, arguments, message):
    write(tmp_path / "mine.py", "def mine(completions, scale=1): pass")
    with pytest.raises(UserError, match=message):
        load_reward_function(spec, tmp_path, arguments)
