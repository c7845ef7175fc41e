import json
import logging

import numpy as np
import pytest

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.conversations import read_conversations
from mindrlhf.errors import UserError

STOP = 257  # <|endoftext|>, which is the padding token too


def read(base, rows, tokenizer, limit=16, **options):
    (base / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_conversations([SourceConfig("a.jsonl")], DataConfig(**options), tokenizer, limit, base)


def test_response_and_stop_token_are_trained_and_tokenised_apart_from_the_prompt(tmp_path, tokenizer):
    # "a" + "b" would be the one token 256 if joined as text.
    rows = [{"prompt": "a", "response": "b1"}, {"prompt": "12", "response": "3"}]
    first, second = read(tmp_path, rows, tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == STOP
    assert first.ids.tolist() == [64, 65, 16, STOP]
    assert first.trained.tolist() == [False, True, True, True]
    assert (first.ids.dtype, first.trained.dtype) == (np.int32, np.bool_)
    assert second.ids.tolist() == [16, 17, 18, STOP]
    assert second.trained.tolist() == [False, False, True, True]


def test_the_stop_token_is_not_doubled(tmp_path, tokenizer):
    (conversation,) = read(tmp_path, [{"prompt": "a", "response": "b<|endoftext|>"}], tokenizer)
    assert conversation.ids.tolist() == [64, 65, STOP]
    assert conversation.trained.tolist() == [False, True, True]


def test_prompt_goes_through_the_chat_template(tmp_path, tokenizer):
    (conversation,) = read(tmp_path, [{"prompt": "1", "response": "2"}], tokenizer, limit=32, apply_chat_template=True)
    user, assistant = ([ord(letter) - 33 for letter in word] for word in ("user:", "assistant:"))
    assert conversation.ids.tolist() == [258, *user, 16, 259, 258, *assistant, 17, STOP]
    assert conversation.trained.sum() == 2


def test_every_source_is_read_whatever_its_probability(tmp_path, tokenizer):
    for name in ("b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name[0], "response": "1"}), encoding="utf-8")
    sources = [SourceConfig("c.jsonl", 0.1), SourceConfig("b.jsonl", 5.0)]
    conversations = read_conversations(sources, DataConfig(), tokenizer, 8, tmp_path)
    assert [conversation.ids[0] for conversation in conversations] == [66, 65]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "1234", "response": "56"},
            ":1: prompt, response and stop token are 7 tokens, the limit is 6; raise",
        ),
        ({"prompt": "1", "response": ""}, ":1: column 'response' is empty; fill it, or set data.strict: false"),
        ({"prompt": "", "response": "1"}, ":1: column 'prompt' is empty; fill it, or set data.strict: false"),
        ({"prompt": "1", "response": 7}, ":1: column 'response': 7 is not text; write a string"),
        ({"prompt": "1", "respons": "7"}, ":1: no column 'response'; did you mean 'respons'? set data.response_key"),
    ],
)
def test_bad_rows_are_one_line(tmp_path, tokenizer, row, expected):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [row], tokenizer, limit=6)
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}{expected}")


def test_not_strict_skips_and_says_so(tmp_path, tokenizer, caplog):
    rows = [
        {"prompt": "1234", "response": "56"},
        {"prompt": "1", "response": None},
        {"prompt": "1", "response": "2"},
        {"prompt": "", "response": "2"},
    ]
    with caplog.at_level(logging.WARNING):
        (conversation,) = read(tmp_path, rows, tokenizer, limit=6, strict=False)
    assert conversation.ids.tolist() == [16, 17, STOP]
    for reason in ("empty prompt: 1", "empty response: 1", "conversation too long: 1"):
        assert reason in caplog.text
    with pytest.raises(UserError, match="a.jsonl: every row was skipped"):
        read(tmp_path, rows[:2], tokenizer, limit=6, strict=False)


def test_a_tokenizer_without_stop_token_is_an_error(tmp_path, plain_tokenizer):
    plain_tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no stop token; set eos_token in its tokenizer_config.json"):
        read(tmp_path, [{"prompt": "1", "response": "2"}], plain_tokenizer)
