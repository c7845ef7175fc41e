import json

import pyarrow
import pyarrow.parquet
import pytest

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.preferences import read_preferences
from mindrlhf.errors import UserError

STOP, START, END = 257, 258, 259


def read(base, rows, tokenizer, limit=128, **options):
    (base / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_preferences([SourceConfig("a.jsonl")], DataConfig(**options), tokenizer, limit, base)


def letters(text):
    return [ord(letter) - 33 for letter in text]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


ASKED = [START, *letters("user:1"), END, START, *letters("assistant:")]
CONVERSATIONS = {"chosen": [user("1"), assistant("2")], "rejected": [user("1"), assistant("3")]}


def test_text(tmp_path, tokenizer):
    row = {"prompt": "a", "chosen": "b", "rejected": "12<|endoftext|>"}
    examples = read(tmp_path, [row], tokenizer, input_template="{}1")
    (pair,) = examples.items
    assert pair.chosen.ids.tolist() == [64, 16, 65, STOP]
    assert pair.chosen.trained.tolist() == [False, False, True, True]
    assert pair.rejected.ids.tolist() == [64, 16, 16, 17, STOP]
    assert pair.rejected.trained.tolist() == [False, False, True, True, True]
    assert (pair.margin, examples.stop_ids, len(examples)) == (0.0, (STOP,), 1)


def test_text_behind_the_chat_template(tmp_path, tokenizer):
    row = {"prompt": "1", "chosen": "2", "rejected": "3"}
    (pair,) = read(tmp_path, [row], tokenizer, apply_chat_template=True).items
    assert pair.chosen.ids.tolist() == [*ASKED, 17, STOP]
    assert pair.rejected.ids.tolist() == [*ASKED, 18, STOP]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1", "prompt_id": "x", **CONVERSATIONS, "score_chosen": 8.5},  # ultrafeedback_binarized
        CONVERSATIONS,  # TRL's implicit prompt
        {"prompt": "1", "chosen": [assistant("2")], "rejected": [assistant("3")]},
        {"prompt": [user("1")], "chosen": [assistant("2")], "rejected": [assistant("3")]},
        {
            "chosen": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}],
            "rejected": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "3"}],
        },
    ],
)
def test_messages_end_with_the_templates_stop_token(tmp_path, tokenizer, row):
    examples = read(tmp_path, [row], tokenizer, apply_chat_template=True)
    (pair,) = examples.items
    for conversation, answer in ((pair.chosen, 17), (pair.rejected, 18)):
        assert conversation.ids.tolist() == [*ASKED, answer, END]
        assert conversation.ids[conversation.trained].tolist() == [answer, END]
    assert examples.stop_ids == (END,)


def test_parquet_and_earlier_turns_that_are_not_trained(tmp_path, tokenizer):
    before = [user("1"), assistant("2"), user("3")]
    row = {"chosen": [*before, assistant("4")], "rejected": [*before, assistant("5")]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    data = DataConfig(apply_chat_template=True, system_prompt="9")
    (pair,) = read_preferences([SourceConfig("a.parquet")], data, tokenizer, 128, tmp_path).items
    assert pair.chosen.ids[: len(letters("system:9")) + 2].tolist() == [START, *letters("system:9"), END]
    assert pair.chosen.ids[pair.chosen.trained].tolist() == [19, END]
    assert pair.rejected.ids[pair.rejected.trained].tolist() == [20, END]


def test_margin(tmp_path, tokenizer):
    row = {"prompt": "1", "chosen": "2", "rejected": "3", "by": 2}
    assert read(tmp_path, [row], tokenizer, margin_key="by").items[0].margin == 2.0
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,by\n1,2,3,0.5\n")
    sources, data = [SourceConfig("a.csv")], DataConfig(margin_key="by")
    assert read_preferences(sources, data, tokenizer, 16, tmp_path).items[0].margin == 0.5


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"prompt": "1", "chosen": "2", "rejected": "2"}, {}, "chosen and rejected answer are the same; remove the"),
        ({"prompt": "", "chosen": "2", "rejected": "3"}, {}, "column 'prompt' is empty; fill it"),
        ({"prompt": "1", "chosen": "2", "rejected": None}, {}, "column 'rejected' is empty; fill it"),
        ({"prompt": "1", "chosen": 2, "rejected": "3"}, {}, "column 'chosen': 2 is not text; write a string"),
        ({"prompt": "1" * 9, "chosen": "2", "rejected": "3"}, {}, "the prompt alone is 9 tokens, the limit is 9"),
        ({"prompt": "1", "chosen": "2", "rejected": "3" * 9}, {}, "prompt, response and stop token are 11 tokens"),
        (CONVERSATIONS, {}, "column 'chosen': messages need a chat template; set data.apply_chat_template: true"),
        ({"chosen": "2", "rejected": "3"}, {}, "no column 'prompt'; set data.prompt_key to one of: chosen, rejected"),
        (
            {"prompt": "1", "chosen": "2", "rejected": "3", "by": "much"},
            {"margin_key": "by"},
            "column 'by': 'much' is not a number; write one",
        ),
        (
            {"prompt": "1", "chosen": "2", "rejected": "3", "by": None},
            {"margin_key": "by"},
            "column 'by': None is not a number; write one",
        ),
        (
            {"chosen": [user("1"), assistant("2")], "rejected": [user("3"), assistant("4")]},
            {"apply_chat_template": True},
            "columns 'chosen' and 'rejected' differ before their last message; mend one",
        ),
        (
            {"chosen": [user("1"), assistant("2")], "rejected": [user("1"), user("4")]},
            {"apply_chat_template": True},
            "column 'rejected' does not end with an answer; mend it",
        ),
        (
            {"prompt": "1", "chosen": [user("1"), assistant("2")], "rejected": "3"},
            {"apply_chat_template": True},
            "column 'chosen': these messages are no answer; write text or one assistant message",
        ),
        (
            {"chosen": [user("1"), assistant("")], "rejected": [user("1"), assistant("2")]},
            {"apply_chat_template": True},
            "column 'chosen': an answer is empty; fill it",
        ),
    ],
)
def test_bad_rows_are_one_line(tmp_path, tokenizer, row, options, expected):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [row], tokenizer, limit=9, **options)
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:1: {expected}")


def test_not_strict_counts(tmp_path, tokenizer):
    rows = [
        {"prompt": "1", "chosen": "2", "rejected": "2"},
        {"prompt": "1", "chosen": "2", "rejected": "3"},
        {"prompt": "1", "chosen": "2", "rejected": "3" * 9},
        {"prompt": "1", "chosen": "", "rejected": "3"},
        {"prompt": "1" * 9, "chosen": "2", "rejected": "3"},
    ]
    examples = read(tmp_path, rows, tokenizer, limit=9, strict=False)
    assert examples.skipped == {
        "chosen equals rejected": 1,
        "conversation too long": 1,
        "empty response": 1,
        "prompt fills the window": 1,
    }
    assert examples.sizes == [1]
