import json
import logging

import numpy as np
import pytest

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.conversations import read_conversations
from mindrlhf.data.tokenizers import encode
from mindrlhf.errors import UserError

STOP = 257  # <|endoftext|>, which is the padding token too
START, END = 258, 259  # <|im_start|> and <|im_end|>
QUESTION, ANSWER = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}


def read(base, rows, tokenizer, limit=16, **options):
    (base / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_conversations([SourceConfig("a.jsonl")], DataConfig(**options), tokenizer, limit, base)


def read_chat(base, messages, tokenizer, limit=128, **options):
    return read(base, [{"messages": messages}], tokenizer, limit, format="messages", **options)


def trained(conversation):
    return conversation.ids[conversation.trained].tolist()


def letters(text):
    """Their ids; see conftest.py."""
    return [ord(letter) - 33 for letter in text]


# -- prompt ----------------------------------------------------------------------------------------------------------


def test_response_and_stop_token_are_trained_and_tokenised_apart_from_the_prompt(tmp_path, tokenizer):
    # "a" + "b" would be the one token 256 if joined as text.
    rows = [{"prompt": "a", "response": "b1"}, {"prompt": "12", "response": "3"}]
    examples = read(tmp_path, rows, tokenizer)
    first, second = examples.items
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == STOP
    assert first.ids.tolist() == [64, 65, 16, STOP]
    assert first.trained.tolist() == [False, True, True, True]
    assert (first.ids.dtype, first.trained.dtype) == (np.int32, np.bool_)
    assert second.ids.tolist() == [16, 17, 18, STOP]
    assert second.trained.tolist() == [False, False, True, True]
    assert examples.stop_ids == (STOP,)


def test_the_stop_token_is_not_doubled(tmp_path, tokenizer):
    (conversation,) = read(tmp_path, [{"prompt": "a", "response": "b<|endoftext|>"}], tokenizer).items
    assert conversation.ids.tolist() == [64, 65, STOP]
    assert conversation.trained.tolist() == [False, True, True]


def test_prompt_goes_through_the_chat_template(tmp_path, tokenizer):
    rows = [{"prompt": "1", "response": "2"}]
    (conversation,) = read(tmp_path, rows, tokenizer, limit=32, apply_chat_template=True).items
    assert conversation.ids.tolist() == [START, *letters("user:1"), END, START, *letters("assistant:2"), STOP]
    assert conversation.trained.sum() == 2


def test_alpaca(tmp_path, tokenizer):
    rows = [
        {"instruction": "1", "input": "2", "output": "3"},
        {"instruction": "1", "input": "", "output": "3"},
        {"instruction": "1", "input": None, "output": "3"},
        {"instruction": "1", "output": "3"},
    ]
    examples = read(tmp_path, rows, tokenizer, format="alpaca", input_template="Q{}A")
    question, line_end, answer = letters("Q")[0], 198, letters("A")[0]
    assert [c.ids.tolist() for c in examples.items] == [
        [question, 16, line_end, 17, answer, 18, STOP],
        *[[question, 16, answer, 18, STOP]] * 3,
    ]
    assert all(trained(c) == [18, STOP] for c in examples.items)


# -- messages --------------------------------------------------------------------------------------------------------


def test_every_assistant_turn_is_trained_with_its_stop_token_and_nothing_else(tmp_path, tokenizer):
    messages = [QUESTION, ANSWER, {"role": "user", "content": "3"}, {"role": "assistant", "content": "45"}]
    examples = read_chat(tmp_path, messages, tokenizer)
    (conversation,) = examples.items
    opened = [END, START, *letters("assistant:")]
    expected = [START, *letters("user:1"), *opened, 17, END, START, *letters("user:3"), *opened, 19, 20, END]
    assert conversation.ids.tolist() == expected
    assert trained(conversation) == [17, END, 19, 20, END]
    assert conversation.ids[-1] == END and conversation.trained[-1]
    assert examples.stop_ids == (END,)


def test_what_follows_the_stop_token_is_not_trained(tmp_path, plain_tokenizer):
    plain_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (conversation,) = read_chat(tmp_path, [QUESTION, ANSWER, QUESTION, ANSWER], plain_tokenizer).items
    assert trained(conversation) == [17, END, 17, END]
    text = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n" * 2
    assert conversation.ids.tolist() == encode(plain_tokenizer, [text])[0].tolist()[:-1]  # but the last line end


def test_sharegpt_system_prompt_and_trailing_turns(tmp_path, tokenizer):
    spoken = [("system", "9"), ("human", "1"), ("gpt", "2"), ("human", "5")]
    messages = [{"from": speaker, "value": value} for speaker, value in spoken]
    (own,) = read_chat(tmp_path, messages, tokenizer, system_prompt="8").items
    (given,) = read_chat(tmp_path, messages[1:], tokenizer, system_prompt="8").items
    rest = [END, START, *letters("user:1"), END, START, *letters("assistant:2"), END]
    assert own.ids.tolist() == [START, *letters("system:9"), *rest]
    assert given.ids.tolist() == [START, *letters("system:8"), *rest]


def test_a_template_without_stop_token_gets_the_tokenizers_and_an_example_a_turn(tmp_path, plain_tokenizer):
    """Generation would not see a stop token behind the first answer when it gives the second one."""
    plain_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    examples = read_chat(tmp_path, [QUESTION, ANSWER, QUESTION, ANSWER], plain_tokenizer)
    first, second = examples.items
    assert first.ids.tolist() == [*encode(plain_tokenizer, ["u1 a"])[0], 17, STOP]
    assert second.ids.tolist() == [*encode(plain_tokenizer, ["u1 a2 u1 a"])[0], 17, STOP]
    assert trained(first) == trained(second) == [17, STOP]
    assert (examples.sizes, examples.stop_ids) == ([2], (STOP,))


def test_a_template_that_strips_earlier_answers_gives_an_example_a_turn(tmp_path, plain_tokenizer):
    plain_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:"
        "{{ m.content if loop.last else m.content.split('/')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    answer = {"role": "assistant", "content": "7/2"}
    examples = read_chat(tmp_path, [QUESTION, answer, QUESTION, answer], plain_tokenizer)
    assert [trained(conversation) for conversation in examples.items] == [[*letters("7/2"), END]] * 2
    assert letters("7")[0] not in examples.items[1].ids[~examples.items[1].trained]


def test_turns_that_tokenise_otherwise_together_are_not_joined(tmp_path, plain_tokenizer):
    """ "a" + "b" is one token where both are text, so the second prompt does not hold what the first answer trains."""
    plain_tokenizer.chat_template = (
        "{% for m in messages %}{{ 'a' if m.role == 'assistant' }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    answer = {"role": "assistant", "content": "b"}
    first, second = read_chat(tmp_path, [QUESTION, answer, QUESTION, answer], plain_tokenizer).items
    assert first.ids.tolist() == [16, END, 64, 65, END]
    assert second.ids.tolist() == [16, END, 256, END, 16, END, 64, 65, END]
    assert second.trained.nonzero()[0].tolist() == [7, 8]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([QUESTION], "column 'messages' has no assistant turn; add one"),
        ([], "column 'messages' is empty; fill it"),
        ([ANSWER, QUESTION, ANSWER], "column 'messages' begins with an answer; put its question first"),
        ([QUESTION, {"role": "assistant", "content": " "}], "column 'messages': an answer is empty; fill it"),
        ([QUESTION, {"role": "assistant"}], "column 'messages': message 2 has no text 'content'"),
        ([QUESTION, {"from": 1, "value": "2"}], "column 'messages': message 2 has no text 'role'"),
        ("hi", "column 'messages': 'hi' is text, not a list of messages; write one"),
    ],
)
def test_bad_messages_are_one_line(tmp_path, tokenizer, messages, expected):
    with pytest.raises(UserError) as caught:
        read_chat(tmp_path, messages, tokenizer)
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:1: {expected}")


@pytest.mark.parametrize("template", ["{{ 'x' if add_generation_prompt else 'y2' }}", "x"])
def test_a_template_that_hides_the_answer_is_an_error(tmp_path, plain_tokenizer, template):
    plain_tokenizer.chat_template = template
    with pytest.raises(UserError, match="a.jsonl:1: column 'messages': the chat template does not write '2' as it is"):
        read_chat(tmp_path, [QUESTION, ANSWER], plain_tokenizer)


def test_messages_need_a_chat_template(tmp_path, plain_tokenizer):
    with pytest.raises(UserError, match="data.format: messages needs a chat template, .*; add chat_template to"):
        read_chat(tmp_path, [QUESTION, ANSWER], plain_tokenizer)


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", [[16, 17, STOP]]),
        ("123", [[16, 17, 18, STOP]]),
        ("1234", [[16, 17, 18, 19], [19, STOP]]),  # a stop token alone has nothing to be predicted from
        ("12345", [[16, 17, 18, 19], [20, STOP]]),
        ("123456789", [[16, 17, 18, 19], [20, 21, 22, 23], [24, STOP]]),
        ("1<|endoftext|>", [[16, STOP]]),
    ],
)
def test_text_is_trained_but_for_the_first_token_and_cut_into_pieces(tmp_path, tokenizer, text, expected):
    examples = read(tmp_path, [{"text": text}], tokenizer, limit=4, format="text")
    assert [piece.ids.tolist() for piece in examples.items] == expected
    assert all(not piece.trained[0] and piece.trained[1:].all() for piece in examples.items)
    assert (examples.sizes, examples.stop_ids) == ([len(expected)], (STOP,))


# -- all formats -----------------------------------------------------------------------------------------------------


def test_every_source_is_read_whatever_its_probability(tmp_path, tokenizer):
    for name in ("b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name[0], "response": "1"}), encoding="utf-8")
    sources = [SourceConfig("c.jsonl", 1.0), SourceConfig("b.jsonl", 3.0)]
    examples = read_conversations(sources, DataConfig(), tokenizer, 8, tmp_path)
    assert [conversation.ids[0] for conversation in examples.items] == [66, 65]
    assert (len(examples), examples.sizes, examples.probabilities) == (2, [1, 1], [0.25, 0.75])
    assert examples.skipped == {}


def test_many_rows_are_tokenised_in_batches(tmp_path, tokenizer):
    rows = [{"prompt": str(n), "response": "" if n % 3 else "x"} for n in range(3000)]
    examples = read(tmp_path, rows, tokenizer, strict=False)
    assert [c.ids[: int(c.trained.argmax())].tolist() for c in examples.items] == [
        letters(str(n)) for n in range(0, 3000, 3)
    ]
    assert examples.skipped == {"empty response": 2000}


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (
            {"prompt": "1234", "response": "56"},
            {},
            ":1: prompt, response and stop token are 7 tokens, the limit is 6 tokens (training.max_tokens",
        ),
        ({"prompt": "123456", "response": "7"}, {}, ":1: the prompt alone is 6 tokens, the limit is 6 tokens (train"),
        ({"prompt": "1", "response": ""}, {}, ":1: column 'response' is empty; fill it, or set data.strict: false"),
        ({"prompt": "", "response": "1"}, {}, ":1: column 'prompt' is empty; fill it, or set data.strict: false"),
        ({"prompt": "1", "response": 7}, {}, ":1: column 'response': 7 is not text; write a string"),
        ({"prompt": "1", "respons": "7"}, {}, ":1: no column 'response'; did you mean 'respons'? set data.response"),
        ({"instruction": "1"}, {"format": "alpaca"}, ":1: no column 'output', which data.format: alpaca needs; rename"),
        ({"instruction": "", "output": "1"}, {"format": "alpaca"}, ":1: column 'instruction' is empty; fill it"),
        ({"instruction": "1", "output": ""}, {"format": "alpaca"}, ":1: column 'output' is empty; fill it"),
        ({"instruction": "1", "input": 3, "output": "1"}, {"format": "alpaca"}, ":1: column 'input': 3 is not text"),
        ({"text": " "}, {"format": "text"}, ":1: column 'text' is empty; fill it"),
        ({"text": 5}, {"format": "text"}, ":1: column 'text': 5 is not text; write a string"),
    ],
)
def test_bad_rows_are_one_line(tmp_path, tokenizer, row, options, expected):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [row], tokenizer, limit=6, **options)
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}{expected}")


def test_not_strict_skips_and_says_so(tmp_path, tokenizer, caplog):
    rows = [
        {"prompt": "1234", "response": "56"},
        {"prompt": "1", "response": None},
        {"prompt": "1", "response": "2"},
        {"prompt": "", "response": "2"},
        {"prompt": "123456", "response": "2"},
    ]
    with caplog.at_level(logging.WARNING):
        examples = read(tmp_path, rows, tokenizer, limit=6, strict=False)
    assert [conversation.ids.tolist() for conversation in examples.items] == [[16, 17, STOP]]
    assert examples.skipped == {
        "empty prompt": 1,
        "empty response": 1,
        "conversation too long": 1,
        "prompt fills the window": 1,
    }
    assert len(caplog.records) == 1 and "empty prompt: 1" in caplog.text
    with pytest.raises(UserError, match="a.jsonl: every row was skipped: 1 empty response, 1 conv"):
        read(tmp_path, rows[:2], tokenizer, limit=6, strict=False)
    with pytest.raises(UserError, match=":1: column 'response': 7 is not text"):
        read(tmp_path, [{"prompt": "1", "response": 7}], tokenizer, strict=False)


def test_a_tokenizer_without_stop_token_is_an_error(tmp_path, plain_tokenizer):
    plain_tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no stop token; set eos_token in its tokenizer_config.json"):
        read(tmp_path, [{"prompt": "1", "response": "2"}], plain_tokenizer)
