import json
from collections import Counter

import numpy as np
import pytest

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.prompts import PromptDataset, PromptOrder, PromptSource
from mindrlhf.errors import UserError


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(base, names, tokenizer, limit=8, probabilities=(1.0, 1.0), **options):
    sources = [SourceConfig(name, share) for name, share in zip(names, probabilities, strict=False)]
    return PromptDataset.read(sources, DataConfig(**options), tokenizer, limit, base)


@pytest.fixture
def two_files(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": "12", "label": 3}, {"prompt": "a b", "label": None}])
    write_rows(tmp_path / "b.jsonl", [{"prompt": "ab", "label": "x", "level": 5}])
    return tmp_path


def test_prompts_of_all_files_with_hand_computed_ids(two_files, tokenizer):
    dataset = read(two_files, ["a.jsonl", "b.jsonl"], tokenizer, probabilities=(1.0, 3.0), input_template="{}=")
    assert [prompt.ids.tolist() for prompt in dataset.prompts] == [[16, 17, 28], [64, 220, 65, 28], [256, 28]]
    assert all(prompt.ids.dtype == np.int32 for prompt in dataset.prompts)
    assert [prompt.text for prompt in dataset.prompts] == ["12=", "a b=", "ab="]
    assert [prompt.label for prompt in dataset.prompts] == [3, None, "x"]
    assert [prompt.key for prompt in dataset.prompts] == [0, 1, 2]
    assert dataset[2].row == {"prompt": "ab", "label": "x", "level": 5}
    assert dataset.sources == [PromptSource(range(0, 2), 0.25), PromptSource(range(2, 3), 0.75)]
    assert (len(dataset), dataset.skipped) == (3, {})


def test_special_tokens_of_the_chat_template_are_single_ids_and_none_are_added(two_files, tokenizer):
    dataset = read(two_files, ["b.jsonl"], tokenizer, limit=64, apply_chat_template=True)
    user, assistant = ([ord(letter) - 33 for letter in word] for word in ("user:", "assistant:"))
    assert dataset[0].ids.tolist() == [258, *user, 256, 259, 258, *assistant]


def test_without_label_key_no_label_is_read(two_files, tokenizer):
    assert [prompt.label for prompt in read(two_files, ["a.jsonl"], tokenizer, label_key="").prompts] == [None, None]
    with pytest.raises(UserError, match=r"a.jsonl:1: no column 'answer'; set data.label_key \(\"\": none\) to one of"):
        read(two_files, ["a.jsonl"], tokenizer, label_key="answer")


def test_a_long_prompt_is_an_error_with_counts_and_fix(two_files, tokenizer):
    with pytest.raises(UserError) as caught:
        read(two_files, ["a.jsonl"], tokenizer, limit=2)
    assert str(caught.value) == (
        f"{two_files / 'a.jsonl'}:2: the prompt has 3 tokens, the limit is 2; raise max_prompt_tokens to 3 "
        "if the model's window holds it, "
        "shorten the prompt, or set data.strict: false to skip such rows"
    )


def test_an_empty_prompt_is_an_error(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", [{"prompt": " ", "label": 1}])
    with pytest.raises(UserError, match=r"a.jsonl:1: column 'prompt' is empty; fill it, or set data.strict: false"):
        read(tmp_path, ["a.jsonl"], tokenizer)


def test_not_strict_skips_counts_and_keeps_keys_without_gaps(tmp_path, tokenizer):
    prompts = ["1", "", "111", "2", None, "222", "333"]
    write_rows(tmp_path / "a.jsonl", [{"prompt": prompt, "label": 0} for prompt in prompts])
    dataset = read(tmp_path, ["a.jsonl"], tokenizer, limit=2, strict=False)
    assert [(prompt.key, prompt.text) for prompt in dataset.prompts] == [(0, "1"), (1, "2")]
    assert dataset.skipped == {"empty prompt": 2, "prompt too long": 3}
    with pytest.raises(UserError, match="a.jsonl: every row was skipped: 2 empty .*, 5 .* long; .* max_prompt_tokens"):
        read(tmp_path, ["a.jsonl"], tokenizer, limit=0, strict=False)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((-1.0, 1.0), "-1.0 is not a share"), ((0.0, 0.0), "all are 0"), ((float("nan"), 1.0), "nan")],
)
def test_wrong_probabilities(two_files, tokenizer, shares, expected):
    with pytest.raises(UserError, match=f"a.jsonl.*: probability: {expected}"):
        read(two_files, ["a.jsonl", "b.jsonl"], tokenizer, probabilities=shares)


def test_one_source_gives_every_row_once_an_epoch_in_a_new_order():
    order = PromptOrder([50], [1.0], seed=3)
    epochs = [order.take(50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert PromptOrder([50], [1.0], seed=3).take(50) == epochs[0]
    assert PromptOrder([50], [1.0], seed=4).take(50) != epochs[0]


def test_sources_are_drawn_by_their_probabilities_and_each_by_epochs():
    order = PromptOrder([7, 5, 4], [0.75, 0.25, 0.0], seed=1)
    drawn = order.take(4000)
    first, second = ([index for index in drawn if index in rows] for rows in (range(7), range(7, 12)))
    assert len(first) + len(second) == 4000  # the source of probability 0 gives none
    # Binomial(4000, 0.75) has a standard deviation of 27.
    assert abs(len(first) - 3000) < 110
    for draws, size in ((first, 7), (second, 5)):
        counts = Counter(draws)
        assert len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(("sizes", "shares"), [([6], [1.0]), ([4, 3], [0.5, 0.5])])
def test_resumed_equals_uninterrupted_at_every_point(sizes, shares):
    whole = PromptOrder(sizes, shares, seed=5).take(30)
    for stop in range(26):  # 6, 12, ...: an epoch's end of the single source
        before = PromptOrder(sizes, shares, seed=5)
        assert before.take(stop) == whole[:stop]
        after = PromptOrder(sizes, shares, seed=5)
        after.load_state(json.loads(json.dumps(before.state())))
        assert after.take(30 - stop) == whole[stop:]


def test_loading_a_state_rewinds_an_order_that_went_on():
    order = PromptOrder([4, 3], [0.5, 0.5], seed=5)
    order.take(3)
    state = order.state()
    expected = order.take(10)
    order.load_state(state)
    assert order.take(10) == expected


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (PromptOrder([4, 4], [0.5, 0.5], 5), r"sizes was \[4, 3\] in the checkpoint and is \[4, 4\] now"),
        (PromptOrder([4, 3], [0.4, 0.6], 5), "probabilities was"),
        (PromptOrder([4, 3], [0.5, 0.5], 6), "seed was 5 in the checkpoint and is 6 now"),
    ],
)
def test_a_state_of_another_order_is_an_error(other, expected):
    with pytest.raises(UserError, match=expected):
        other.load_state(PromptOrder([4, 3], [0.5, 0.5], 5).state())


def test_orders_that_cannot_be():
    with pytest.raises(UserError, match="no prompts to draw from"):
        PromptOrder([], [], 1)
    with pytest.raises(UserError, match="seed: -1 is negative"):
        PromptOrder([2], [1.0], -1)
