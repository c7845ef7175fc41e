import math

import pytest

from mindrlhf.errors import UserError
from mindrlhf.rewards.style import cosine_length_reward, length_reward, repetition_reward


def test_length():
    texts = ["x" * n for n in (0, 5, 10, 15, 20, 25, 100)]
    assert length_reward(texts, maximum=20, minimum=10, buffer=10) == [-1, -0.5, 0, 0, 0, -0.5, -1]
    assert length_reward(texts, maximum=20, level=[1] * 7) == [0, 0, 0, 0, 0, -0.25, -1]
    assert length_reward(["a b c", " a  b\n", ""], maximum=1, buffer=4, unit="words") == [-0.5, -0.25, 0]
    assert length_reward([], maximum=1) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maximum": 0}, "maximum: 0 is not a number over 0"),
        ({"maximum": "9"}, "maximum: '9' is not a number over 0"),
        ({"maximum": float("inf")}, "maximum: inf is not"),
        ({"maximum": True}, "maximum: True is not"),
        ({"maximum": 9, "buffer": 0}, "buffer: 0 is not a number over 0"),
        ({"maximum": 9, "minimum": 10}, "minimum: 10 is not a number from 0 to maximum = 9"),
        ({"maximum": 9, "unit": "tokens"}, "unit: 'tokens' is neither 'characters' nor 'words'"),
    ],
)
def test_length_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        length_reward(["x"], **arguments)


def test_cosine_length():
    right = [f"<answer>7</answer>{' ' * n}" for n in (100 - 18, 50 - 18, 1000)]
    wrong = [text.replace("7", "8") for text in right]
    assert cosine_length_reward(right, ["7"] * 3, max_len=100) == pytest.approx([0.5, 0.75, 0.5])
    assert cosine_length_reward(wrong, ["7"] * 3, max_len=100) == pytest.approx([-0.5, -0.75, -0.5])
    # 18 of 100 characters, values of one's own: end + (start - end) (1 + cos(0.18 pi)) / 2
    values = {"max_len": 100, "min_value_correct": 1, "max_value_correct": 2}
    share = (1 + math.cos(0.18 * math.pi)) / 2
    assert cosine_length_reward(["<answer>7</answer>"], ["7"], **values) == pytest.approx([1 + share])
    assert cosine_length_reward(["7"], ["7"], max_len=2, unit="words") == pytest.approx([0.75])
    assert cosine_length_reward(["", "7"], ["7", ""]) == pytest.approx([-1, -1], abs=1e-5)


def test_cosine_length_with_the_math_reward():
    text = r"\boxed{\sqrt{8}}"
    assert cosine_length_reward([text], [r"2\sqrt{2}"], max_len=1) == [-0.5]
    assert cosine_length_reward([text], [r"2\sqrt{2}"], max_len=1, correct="math") == [0.5]
    with pytest.raises(UserError, match="correct: 'exact' is neither 'accuracy' nor 'math'"):
        cosine_length_reward([text], ["1"], correct="exact")
    with pytest.raises(UserError, match="max_len: -1 is not a number over 0"):
        cosine_length_reward([text], ["1"], max_len=-1)


def test_repetition():
    # a b c, b c a, c a b, a b c: three of four are distinct
    texts = ["a b c A B c", "a b c d", "a a a a a", "a b", "", "a b c"]
    assert repetition_reward(texts) == [pytest.approx(-1 / 3 + 1 / 12), 0, pytest.approx(-2 / 3), 0, 0, 0]
    assert repetition_reward(["a a a"], ngram_size=1, max_penalty=-3) == [pytest.approx(-2)]
    assert repetition_reward(["aaaa"], ngram_size=2, unit="characters") == [pytest.approx(-2 / 3)]
    assert repetition_reward(["a a a"], max_penalty=0) == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ngram_size": 0}, "ngram_size: 0 is not a whole number over 0"),
        ({"ngram_size": 2.5}, "ngram_size: 2.5 is not a whole"),
        ({"max_penalty": 1}, "max_penalty: 1 is not a number of at most 0"),
        ({"unit": "letters"}, "unit: 'letters'"),
    ],
)
def test_repetition_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        repetition_reward(["x"], **arguments)
