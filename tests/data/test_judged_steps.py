import json

import numpy as np
import pytest

from mindrlhf.config import DataConfig, SourceConfig, StepRewardConfig
from mindrlhf.data.judged_steps import read_judged_steps, step_token_ids
from mindrlhf.errors import UserError

STEPS = StepRewardConfig(placeholder="#")
HASH, PLUS, MINUS = (ord(letter) - 33 for letter in "#+-")


def read(base, rows, tokenizer, limit=64, steps=STEPS, **options):
    (base / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_judged_steps([SourceConfig("a.jsonl")], DataConfig(**options), tokenizer, limit, base, steps)


def labelled(base, tokenizer, label, steps=STEPS):
    (solution,) = read(base, [{"input": "1#2#", "label": label}], tokenizer, steps=steps).items
    assert solution.probabilities.dtype == np.float32
    return solution.probabilities.tolist()


def test_placeholders_are_judged_where_they_stand(tmp_path, tokenizer):
    examples = read(tmp_path, [{"input": "a#b#3", "label": ["+", "-"]}], tokenizer)
    (solution,) = examples.items
    assert solution.ids.tolist() == [64, HASH, 65, HASH, 18]
    assert solution.judged.tolist() == [False, True, False, True, False]
    assert solution.probabilities.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert (solution.ids.dtype, solution.judged.dtype) == (np.int32, np.bool_)
    assert examples.stop_ids == ()


def test_math_shepherd_rows(tmp_path, tokenizer):
    row = {
        "input": "What is 1+1-1? Step 1: 1+1=2 #\nStep 2: 2-1=1 #\nThe answer is: 3 #",
        "label": "What is 1+1-1? Step 1: 1+1=2 +\nStep 2: 2-1=1 +\nThe answer is: 3 -",
        "task": "GSM8K",
    }
    (solution,) = read(tmp_path, [row], tokenizer, limit=128).items
    assert (solution.ids[solution.judged] == HASH).all()
    assert solution.probabilities.tolist() == [[1, 0], [1, 0], [0, 1]]


def test_a_special_token_as_placeholder_and_a_prompt(tmp_path, tokenizer):
    steps = StepRewardConfig(placeholder="<|im_end|>", reward_tokens=["+", "-"])
    row = {"prompt": "a", "input": "b<|im_end|>", "label": [True]}
    (solution,) = read(tmp_path, [row], tokenizer, steps=steps, input_template="{}a").items
    assert solution.ids.tolist() == [64, 64, 65, 259]
    assert solution.judged.tolist() == [False, False, False, True]
    (solution,) = read(tmp_path, [row], tokenizer, steps=steps, apply_chat_template=True).items
    assert solution.ids[0] == 258 and solution.judged.sum() == 1  # the prompt's own <|im_end|> is none


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (["-", "+"], [[0, 1], [1, 0]]),
        ([True, False], [[1, 0], [0, 1]]),
        ([0, 1], [[0, 1], [1, 0]]),
        ([0.75, 1.0], [[0.75, 0.25], [1, 0]]),
        ("1+2-", [[1, 0], [0, 1]]),
    ],
)
def test_labels(tmp_path, tokenizer, label, expected):
    assert labelled(tmp_path, tokenizer, label) == expected


def test_three_reward_tokens(tmp_path, tokenizer):
    three = StepRewardConfig(placeholder="#", reward_tokens=["+", "/", "-"])
    assert labelled(tmp_path, tokenizer, ["/", 0], three) == [[0, 1, 0], [0, 0, 1]]
    with pytest.raises(UserError, match=":1: column 'label': 0.5 could be shared by 3 reward tokens .* name exactly"):
        labelled(tmp_path, tokenizer, [0.5, 1], three)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input": "12", "label": []}, "column 'input' has no '#'; put it behind each step or set steps.placeholder"),
        ({"input": "", "label": []}, "column 'input' is empty; fill it"),
        ({"input": 5, "label": []}, "column 'input': 5 is not text; write a string"),
        ({"input": "1#2#", "label": ["+"]}, "column 'label' has 1 labels for 2 steps; mend the row"),
        ({"input": "1#2#", "label": "1+3-"}, "column 'label' is not the solution with a reward token at each placeh"),
        ({"input": "1#2#", "label": "1+2-3"}, "column 'label' is not the solution with a reward token at each placeh"),
        ({"input": "1#", "label": "2+"}, "column 'label' is not the solution with a reward token at each placeholder"),
        ({"input": "1#", "label": ["?"]}, "column 'label': the label '?' is not of '+', '-', nor from 0 to 1; mend it"),
        ({"input": "1#", "label": [1.5]}, "column 'label': the label 1.5 is not of '+', '-', nor from 0 to 1; mend it"),
        ({"input": "1#", "label": [-1]}, "column 'label': the label -1 is not of '+', '-', nor from 0 to 1; mend it"),
        ({"input": "1#", "label": [None]}, "column 'label': the label None is not of '+', '-', nor from 0 to 1; mend"),
        ({"input": "1#", "label": [[1]]}, "column 'label': [1] is no label; write reward tokens, true and false, 1"),
        ({"input": "1#", "label": 1}, "column 'label': 1 is neither a list of labels nor the solution with reward"),
        ({"input": "1" * 9 + "#", "label": [1]}, "prompt and steps are 10 tokens, the limit is 9 tokens (training.max"),
        ({"prompt": "1" * 9, "input": "1#", "label": [1]}, "the prompt alone is 9 tokens, the limit is 9 tokens"),
        ({"prompt": "", "input": "1#", "label": [1]}, "column 'prompt' is empty; fill it"),
    ],
)
def test_bad_rows_are_one_line(tmp_path, tokenizer, row, expected):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [row], tokenizer, limit=9)
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:1: {expected}")


def test_not_strict_counts(tmp_path, tokenizer):
    rows = [
        {"input": "1#", "label": ["+"]},
        {"input": "1#", "label": []},
        {"input": "1", "label": []},
        {"input": "1#", "label": [7]},
        {"input": "1" * 9 + "#", "label": [1]},
    ]
    examples = read(tmp_path, rows, tokenizer, limit=9, strict=False)
    assert examples.skipped == {
        "labels and steps differ": 1,
        "no step": 1,
        "label out of range": 1,
        "conversation too long": 1,
    }


def test_token_ids(tokenizer):
    assert step_token_ids(tokenizer, STEPS) == (HASH, [PLUS, MINUS])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (StepRewardConfig(), "steps.placeholder: '<|step|>' is 8 tokens in this tokenizer, it must be exactly one; ch"),
        (StepRewardConfig("#", ["+", "--"]), "steps.reward_tokens: '--' is 2 tokens in this tokenizer, it must be"),
        (StepRewardConfig("#", ["+"]), "steps.reward_tokens: ['+'] leave nothing to judge; name two or more"),
        (StepRewardConfig("+", ["+", "-"]), "steps: '+', '+', '-' are not different tokens; choose others"),
    ],
)
def test_wrong_tokens_are_one_line(tokenizer, steps, expected):
    with pytest.raises(UserError) as caught:
        step_token_ids(tokenizer, steps)
    assert str(caught.value).startswith(expected)
