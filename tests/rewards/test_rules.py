import time
from fractions import Fraction

import numpy as np
import pytest

from mindrlhf.errors import UserError
from mindrlhf.rewards import accuracy_reward, format_reward
from mindrlhf.rewards.rules import answer_key, marked_answer, parse_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}} and a cut \boxed{3", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"} { \boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{}", ""),
        (r"<answer>5</answer> \boxed{4}", "4"),
        ("<answer>1</answer><answer> 2 </answer><answer>", "2"),
        ("</answer><answer>3", None),
        ("step #### 41\n#### 42\nI am done", "42"),
        ("####\n 42 ", "42"),
        ("no mark 42", None),
        ("", None),
    ],
)
def test_marked_answer(text, answer):
    assert marked_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-42.", -42),
        ("+3", 3),
        ("−3", -3),
        ("1,234,567", 1234567),
        ("1,234.50", Fraction(2469, 2)),
        ("10{,}000", 10000),
        (r"10\,000", 10000),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("$18", 18),
        ("-$18", -18),
        (r"\$18.00", 18),
        ("50%", 50),
        (r"50 \%", 50),
        ("3/4", Fraction(3, 4)),
        ("-3 / -4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{ 3 }{ 4 }", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\tfrac12", Fraction(1, 2)),
        (r"$\frac{0.5}{1,000}$", Fraction(1, 2000)),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("1e+22", 10**22),
        (r"\text{42}", 42),
        (r"\(42\)", 42),
        # no numbers
        ("", None),
        (".", None),
        ("-", None),
        ("e5", None),
        ("1,23", None),
        ("12,34,567", None),
        ("1 1/2", None),
        ("1 000 x", None),
        ("1/0", None),
        (r"\frac{1}{0.0}", None),
        ("1/2/3", None),
        ("1e401", None),
        ("1e999999999", None),
        ("1e-999999999", None),
        ("9" * 10_000, None),
        ("nan", None),
        ("inf", None),
        ("0x10", None),
        ("2**9", None),
        ("٣", None),
    ],
)
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("completion", "label", "reward"),
    [
        (r"so \boxed{42}", "42", 1),
        (r"so \boxed{42}", 42, 1),
        (r"so \boxed{42}", 42.0, 1),
        (r"so \boxed{42}", np.int64(42), 1),
        (r"so \boxed{0.10}", 0.1, 1),
        (r"so \boxed{0.1}", np.float32(0.1), 1),
        (r"so \boxed{41.999999999999999999}", "42", 0),
        (r"so \boxed{10000000000000001}", "10000000000000000", 0),
        (r"so \boxed{\frac{2}{4}}", "1/2", 1),
        (r"so \boxed{0.5}", r"$\dfrac{1}{2}$", 1),
        (r"so \boxed{1,234}", "1234", 1),
        (r"so \boxed{50\%}", "50", 1),
        (r"so \boxed{50\%}", "0.5", 0),
        ("#### 72", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 1),
        ("#### -1,072", "... it is\n#### -1072", 1),
        (r"\boxed{72}", r"We get $x = 72$, so $\boxed{72}$.", 1),
        ("48 + 24 = 72 clips.", "72", 1),
        ("The temperature is -7.", "-7", 1),
        ("The temperature is −7.", "-7", 1),
        ("10-7 is what is left of 10-3", "3", 1),
        ("it costs -$1,200.50!", "-1200.5", 1),
        ("it costs $-5", "-5", 1),
        ("that is 3/4 of it", "0.75", 1),
        (r"that is $\frac{3}{4}$", "0.75", 1),
        ("2, 3, 5", "5", 1),
        ("72 is not the last, 73 is", "72", 0),
        # a marked answer counts alone
        (r"\boxed{7} or 72", "72", 0),
        ("<answer>it is 72</answer>", "72", 0),
        ("<answer>72</answer>", "72", 1),
        ("<answer></answer> 72", "72", 0),
        # text
        (r"\boxed{\text{Monday}}", "monday", 1),
        (r"\boxed{x + 1}", "x+1", 1),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)", 1),
        (r"\boxed{1\ 2}", "12", 0),
        ("<answer>New York.</answer>", "New York", 1),
        ("Paris", "Paris", 1),
        ("It is Paris", "Paris", 0),
        ("x^2", "x^2", 1),
        (r"\boxed{1/0}", "1/0", 1),
        ("", "42", 0),
        ("", "", 0),
        (r"\boxed{}", "", 0),
        ("__import__('os').getcwd()", "42", 0),
    ],
)
def test_accuracy(completion, label, reward):
    assert accuracy_reward([completion], label=[label]) == [reward]


def test_accuracy_in_keyword_form():
    rewards = accuracy_reward(completions=["#### 1", "#### 2"], label=["1", "1"], prompts=["a", "b"], level=[1, 2])
    assert rewards == [1.0, 0.0] and all(isinstance(reward, float) for reward in rewards)


def test_accuracy_without_labels():
    with pytest.raises(UserError, match="data.label_key"):
        accuracy_reward(["#### 1"], label=[None])


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "hostile",
    [
        r"\boxed{" * (MEGABYTE // 7),
        r"\boxed{" * (MEGABYTE // 14) + "}" * (MEGABYTE // 14),
        r"\boxed" + " " * MEGABYTE,
        "{" * MEGABYTE,
        "\\" * MEGABYTE,
        "9" * MEGABYTE,
        "1," * (MEGABYTE // 2),
        "1,111" * (MEGABYTE // 5),
        "111,111," * (MEGABYTE // 8) + "1111",
        "<answer>" * (MEGABYTE // 8),
        "#" * MEGABYTE,
        r"\frac{1}{" * (MEGABYTE // 9),
        r"\boxed{" + r"\text{" * (MEGABYTE // 6) + "}",
        r"\boxed{1" + " " * MEGABYTE + "2}",
        r"\boxed{" + "1 " * (MEGABYTE // 2) + "}",
        r"\boxed{1e999999999}",
        r"\boxed{\frac{1e400}{1e-400}}",
        r"\boxed{" + "1/" * (MEGABYTE // 2) + "}",
        "-" * MEGABYTE,
        "1e" * (MEGABYTE // 2),
        "$" * MEGABYTE,
    ],
    ids=range(21),
)
def test_hostile_completions_are_quick(hostile):
    start = time.process_time()
    assert accuracy_reward([hostile], label=["42"]) == [0.0]
    assert accuracy_reward([r"\boxed{42}"], label=[hostile]) == [0.0]
    format_reward([hostile])
    # Quadratic would take minutes at this length.
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>a\nb</think>\n\n<answer>\nb\n</answer>\n", 1),
        ("<think></think><answer>b</answer>", 1),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> done", 0),
        ("well <think>a</think><answer>b</answer>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer></think>b</answer>", 0),
        (r"so \boxed{42}", 1),
        (r"so $\boxed{\frac{1}{2}}$." + "\n", 1),
        (r"so \[ \boxed{42}. \]", 1),
        (r"so \(\boxed{42}\) .", 1),
        (r"\boxed{42}..", 0),
        (r"\boxed{42} is it", 0),
        (r"\boxed{1} \boxed{42}", 0),
        (r"\boxed{1 \boxed{42}", 0),
        (r"\boxed{\boxed{42}}", 0),
        (r"\boxed{ }", 0),
        (r"\boxed{42", 0),
        ("42", 0),
        ("", 0),
    ],
)
def test_format(completion, reward):
    assert format_reward([completion], label=["x"]) == [reward]


@pytest.mark.parametrize(
    ("completion", "key"),
    [
        (r"so \boxed{42}", "42"),
        ("#### 1,042.0", "1042"),
        ("so it is -3/4.", "-3/4"),
        (r"\boxed{\frac{6}{8}}", "3/4"),
        ("<answer>0.75</answer>", "3/4"),
        ("  7\n", "7"),
        ("50%", "50"),
        ("1e3 or 1e-2", "1/100"),
        (r"\boxed{ \text{New} York. }", "newyork"),
        (r"\boxed{7} or 8", "7"),
        ("I do not know", "idonotknow"),
        (r"\boxed{} 42", ""),
        ("", ""),
        (r"\boxed{1/0}", "1/0"),
    ],
)
def test_answer_key(completion, key):
    assert answer_key(completion) == key


def test_answers_have_equal_keys_where_they_are_equal():
    answers = [
        "1/2",
        "0.5",
        r"\frac12",
        ".50",
        "50/100",
        "2",
        "2.0",
        "x+1",
        "X + 1",
        r"x\,+1",
        "x-1",
        "1 1/2",
        "11/2",
        "",
    ]
    for a in answers:
        for b in answers:
            equal = accuracy_reward([f"\\boxed{{{a}}}"], label=[b]) == [1.0]
            assert equal == (answer_key(f"\\boxed{{{a}}}") == answer_key(f"\\boxed{{{b}}}") != ""), (a, b)
