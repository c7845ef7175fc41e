import textwrap

import pytest

from mindrlhf.errors import UserError
from mindrlhf.rewards.rules import accuracy_reward, format_reward
from mindrlhf.rewards.user import call_reward_function, load_reward_function
from mindrlhf.types import Prompt


def prompts(*labels, **columns):
    rows = [{key: values[i] for key, values in columns.items() if i < len(values)} for i in range(len(labels))]
    return [Prompt(None, f"p{i}", label, i, row) for i, (label, row) in enumerate(zip(labels, rows, strict=True))]


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


def test_builtin_names(tmp_path):
    assert load_reward_function("accuracy", tmp_path) is accuracy_reward
    assert load_reward_function("format", tmp_path) is format_reward


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
        ("helpfulness", "known: accuracy, format"),
        ("good.py", "known: accuracy, format"),
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
