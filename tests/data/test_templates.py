import pytest

from mindrlhf.config import DataConfig
from mindrlhf.data.templates import is_empty, render_prompt
from mindrlhf.errors import UserError

CHAT = DataConfig(apply_chat_template=True)
CHAT_WITH_SYSTEM = DataConfig(apply_chat_template=True, system_prompt="Be brief.")


def test_input_template_replaces_the_first_braces_and_no_others():
    data = DataConfig(input_template="Q: {} in {} A:")
    assert render_prompt(r"\frac{1}{2} {} {x}", data, None) == r"Q: \frac{1}{2} {} {x} in {} A:"


def test_chat_template_makes_a_string_one_user_message(tokenizer):
    assert render_prompt("hi", CHAT, tokenizer) == "<|im_start|>user:hi<|im_end|><|im_start|>assistant:"


def test_system_prompt_comes_first(tokenizer):
    expected = "<|im_start|>system:Be brief.<|im_end|><|im_start|>user:hi<|im_end|><|im_start|>assistant:"
    assert render_prompt("hi", CHAT_WITH_SYSTEM, tokenizer) == expected
    assert render_prompt([{"role": "user", "content": "hi"}], CHAT_WITH_SYSTEM, tokenizer) == expected


def test_messages_are_taken_as_they_are_and_keep_their_system_message(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    expected = "<|im_start|>system:S<|im_end|><|im_start|>user:U<|im_end|><|im_start|>assistant:"
    assert render_prompt(messages, CHAT_WITH_SYSTEM, tokenizer) == expected
    assert messages == [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]


def test_a_tokenizer_without_chat_template_is_an_error_with_the_fix(plain_tokenizer):
    with pytest.raises(UserError, match="no chat template; add .* or set data.apply_chat_template: false"):
        render_prompt("hi", CHAT, plain_tokenizer)


@pytest.mark.parametrize(
    ("value", "data", "expected"),
    [
        ("hi", DataConfig(input_template="Q:"), "data.input_template: 'Q:' has no \"{}\""),
        ([{"role": "user", "content": "hi"}], DataConfig(), "a.json: row 3: a list of messages needs a chat template"),
        (12, DataConfig(), "a.json: row 3: 12 is not text"),
        (12, CHAT, "a.json: row 3: 12 is neither text nor a list of messages"),
        ([], CHAT, "a.json: row 3: the list of messages is empty"),
        (["hi"], CHAT, "a.json: row 3: message 1 has no text 'role'"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], CHAT, "a.json: row 3: message 2 has no text 'content'"),
        ([{"role": "robot", "content": "a"}], CHAT, "a.json: row 3: the chat template refuses the messages: unknown"),
    ],
)
def test_bad_prompts_are_one_line_that_names_the_row(tokenizer, value, data, expected):
    with pytest.raises(UserError) as caught:
        render_prompt(value, data, tokenizer, "a.json: row 3")
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(("value", "empty"), [(None, True), (" \n", True), ([], True), ("a", False), (0, False)])
def test_is_empty(value, empty):
    assert is_empty(value) is empty
