import json

import numpy as np
import pytest

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.judgements import mismatched, read_judgements
from mindrlhf.errors import UserError
from mindrlhf.types import Conversation, Judgement

STOP, END = 257, 259


def read(base, rows, tokenizer, limit=64, **options):
    (base / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_judgements([SourceConfig("a.jsonl")], DataConfig(**options), tokenizer, limit, base)


def conversation(prompt, answer):
    ids = np.array([*prompt, *answer], np.int32)
    return Conversation(ids, np.arange(len(ids)) >= len(prompt))


@pytest.mark.parametrize(
    ("label", "desirable"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("true", True), ("False", False), (" 0", False)],
)
def test_labels(tmp_path, tokenizer, label, desirable):
    examples = read(tmp_path, [{"prompt": "1", "response": "2", "label": label}], tokenizer)
    (judgement,) = examples.items
    assert judgement.desirable is desirable
    assert judgement.answer.ids.tolist() == [16, 17, STOP]
    assert judgement.answer.trained.tolist() == [False, True, True]
    assert examples.stop_ids == (STOP,)


def test_csv_and_messages(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("prompt,response,label\n1,2,true\n1,3,0\n")
    examples = read_judgements([SourceConfig("a.csv")], DataConfig(), tokenizer, 9, tmp_path)
    assert [judgement.desirable for judgement in examples.items] == [True, False]
    row = {"prompt": [{"role": "user", "content": "1"}], "label": True}
    row["response"] = [{"role": "assistant", "content": "2"}]
    (judgement,) = read(tmp_path, [row], tokenizer, apply_chat_template=True).items
    assert judgement.answer.ids[judgement.answer.trained].tolist() == [17, END]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1", "response": "2", "label": 2}, "column 'label': 2 is neither true (1) nor false (0); mend it"),
        ({"prompt": "1", "response": "2", "label": None}, "column 'label': None is neither true (1) nor false (0)"),
        ({"prompt": "1", "response": "2", "label": "good"}, "column 'label': 'good' is neither true (1) nor false"),
        ({"prompt": "1", "response": "2", "label": [1]}, "column 'label': [1] is no label; write true or false"),
        ({"prompt": "1", "response": "", "label": 1}, "column 'response' is empty; fill it"),
        ({"prompt": "1", "response": "2" * 9, "label": 1}, "prompt, response and stop token are 11 tokens"),
    ],
)
def test_bad_rows_are_one_line(tmp_path, tokenizer, row, expected):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [row], tokenizer, limit=9)
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:1: {expected}")


def test_not_strict_counts(tmp_path, tokenizer):
    rows = [{"prompt": "1", "response": "2", "label": label} for label in (1, 2, None, 0)]
    examples = read(tmp_path, rows, tokenizer, strict=False)
    assert (examples.skipped, examples.sizes) == ({"label out of range": 2}, [2])


def test_mismatched_gives_every_prompt_another_answer():
    judgements = [Judgement(conversation([n], [10 + n, 20 + n, STOP]), True) for n in range(5)]
    conversations = mismatched(judgements, 1, 3)
    assert [int(c.ids[0]) for c in conversations] == list(range(5))
    givers = [int(c.ids[1]) - 10 for c in conversations]
    assert sorted(givers) == list(range(5)) and all(giver != n for n, giver in enumerate(givers))
    assert all(c.ids[2] == 20 + giver for c, giver in zip(conversations, givers, strict=True))
    assert all(c.trained.tolist() == [False, True, True] for c in conversations)  # cut to three tokens
    again = mismatched(judgements, 1, 3)
    assert all((a.ids == b.ids).all() for a, b in zip(again, conversations, strict=True))
    (own,) = mismatched(judgements[:1], 1, 9)
    assert own.ids.tolist() == [0, 10, 20, STOP]
    assert mismatched([], 1, 9) == []
