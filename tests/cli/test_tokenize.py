"""`mindrlhf tokenize`: the marked tokens are those that training has as targets."""

import json
import re
import sys

import numpy as np
import pytest

from mindrlhf.cli.main import main
from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.conversations import read_conversations
from mindrlhf.data.packing import Packing
from mindrlhf.data.tokenizers import build_tokenizer, load_tokenizer
from tests.checkpoints import CHAT_TEMPLATE

TURNS = [
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "\u00e9t\u00e9?"},
    {"role": "assistant", "content": "\u4f60\u597d, summer"},
]
MARKED = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tokenizer alone."""
    directory = tmp_path_factory.mktemp("tokenize")
    (directory / "corpus.txt").write_text("ab ab summer summer", encoding="utf-8")
    build_tokenizer([directory / "corpus.txt"], 266, directory, CHAT_TEMPLATE)
    return directory


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shown(capsys, *words):
    assert main(["tokenize", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_mask_shown_is_the_mask_trained(model, tmp_path, capsys):
    """Of two conversations that share a packed row: the marked texts are the labels of the batch, in order."""
    file = write(tmp_path / "chat.jsonl", {"messages": TURNS}, {"messages": TURNS[:2]})
    text = shown(capsys, file, "--model", model, "--show-mask")
    tokenizer = load_tokenizer(model)
    data = DataConfig(format="messages")
    examples = read_conversations([SourceConfig(str(file))], data, tokenizer, 1000, tmp_path).items
    packing = Packing.of([e.ids for e in examples], [e.trained for e in examples], 1, 512)
    (batch,) = packing.batches
    labels = [batch.labels[place].tolist() for _, place in packing.slots]
    assert [tokenizer.decode(ids) for ids in labels] == [
        "2<|im_end|>\u4f60\u597d, summer<|im_end|>",
        "2<|im_end|>",
    ]
    assert ["".join(MARKED.findall(part)) for part in text.split("-- ")[1:]] == [tokenizer.decode(i) for i in labels]
    assert f"-- example 1: {len(examples[0].ids)} tokens, {len(labels[0])} trained\n" in text
    # Nothing but the marks is added.
    assert tokenizer.decode(examples[0].ids) + "\n" in text.replace("[[", "").replace("]]", "")


def test_without_the_mask(model, tmp_path, capsys):
    file = write(tmp_path / "chat.jsonl", {"messages": TURNS})
    assert "[[" not in shown(capsys, file, "--model", model)


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def reconfigure(self, **_):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize(("no_color", "expected"), [("", "1+1=\x1b[1;32m2<|endoftext|>\x1b[0m"), ("1", "1+1=[[2")])
def test_colours(model, tmp_path, monkeypatch, no_color, expected):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stdout", Terminal())
    file = write(tmp_path / "rows.jsonl", {"prompt": "1+1=", "response": "2"})
    assert main(["tokenize", str(file), "--model", str(model), "--show-mask"]) == 0
    assert expected in sys.stdout.text


def test_a_terminal_is_not_sent_control_characters(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    file = write(tmp_path / "rows.jsonl", {"prompt": "\x1b[2J", "response": "2"})
    assert main(["tokenize", str(file), "--model", str(model)]) == 0
    assert "\x1b" not in sys.stdout.text and "\ufffd[2J" in sys.stdout.text


def test_ids(model, capsys):
    text = shown(capsys, "--model", model, "--text", "ab <|im_end|>", "--ids")
    assert text.splitlines()[0] == "-- text: 3 tokens, 0 trained"
    assert [line.split()[:2] for line in text.splitlines()[2:]] == [["0", "256"], ["1", "220"], ["2", "265"]]
    assert text.endswith("'<|im_end|>'\n")


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, [], ["2<|endoftext|>"]),
        ({"text": "ab ab"}, [], [" ab<|endoftext|>"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, [], ["b<|endoftext|>", "c<|endoftext|>"]),
        ({"prompt": "a", "response": "b", "label": True}, ["--job", "kto"], ["b<|endoftext|>"]),
        ({"input": "1+1=2 <|im_start|> so", "label": [1]}, [
            "--job", "prm", "steps.placeholder=<|im_start|>",
        ], ["<|im_start|>"]),
        ({"prompt": "a"}, ["--job", "grpo"], []),
        ({"prompt": "a", "response": "b"}, ["data.apply_chat_template=true"], ["b<|endoftext|>"]),
    ],
)  # fmt: skip
def test_rows_of_every_kind(model, tmp_path, capsys, row, options, expected):
    file = write(tmp_path / "rows.jsonl", row)
    assert MARKED.findall(shown(capsys, file, "--model", model, "--show-mask", *options)) == expected


def test_a_reward_model_is_read_at_the_last_token(mindspore, model, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    text = shown(capsys, file, "--model", model, "--show-mask", "--job", "rm")
    assert MARKED.findall(text) == ["<|endoftext|>", "<|endoftext|>"]


def test_the_job_says_what_is_read(model, tmp_path, capsys):
    """Its data, its template, its added tokens and its longest sequence; --rows of each file."""
    write(tmp_path / "rows.jsonl", *({"q": f"{n} <tool>", "a": "b"} for n in range(5)))
    (tmp_path / "job.yaml").write_text(
        f"model: {{path: {model}, add_tokens: [<tool>]}}\n"
        "data: {train: [{path: rows.jsonl}], prompt_key: q, response_key: a, input_template: 'Q: {}'}\n"
    )
    text = shown(capsys, "--config", tmp_path / "job.yaml", "--show-mask", "--rows", "2")
    assert text == (
        "-- example 1: 8 tokens, 2 trained\nQ: 0 <tool>[[b<|endoftext|>]]\n"
        "-- example 2: 8 tokens, 2 trained\nQ: 1 <tool>[[b<|endoftext|>]]\n"
    )
    assert main(["tokenize", "--config", str(tmp_path / "job.yaml"), "training.max_tokens=7"]) == 2
    assert "every row was skipped: 3 conversation too long" in capsys.readouterr().err


def test_a_model_that_is_built(tmp_path, capsys):
    write(tmp_path / "rows.jsonl", {"prompt": "1+1=", "response": "2"})
    (tmp_path / "job.yaml").write_text(
        "model: {build: {tokenizer_files: [rows.jsonl], vocab_size: 260}}\ndata: {train: [{path: rows.jsonl}]}\n"
    )
    text = shown(capsys, "--config", tmp_path / "job.yaml", "--show-mask")
    assert "1+1=[[2<|endoftext|>]]" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--text", "a"], "--model: give the directory of a model, or a --config that names one"),
        (["--model", "MODEL"], "nothing to show: give FILE, --text, or a --config with data.train"),
        (["--model", "MODEL", "a.jsonl", "b.jsonl"], "a.jsonl, b.jsonl: one FILE at a time"),
        (["--model", "MODEL", "--job", "sfd"], "--job sfd: there are sft, rm, prm, dpo"),
        (["--model", "MODEL", "--rows", "-1"], "--rows -1: use 0 (all) or more"),
        (["--model", "MODEL", "FILE"], "the columns x are of no known data set; give --job, and data.format=..."),
    ],
)
def test_refused(model, tmp_path, capsys, words, expected):
    file = write(tmp_path / "rows.jsonl", {"x": 1})
    names = {"MODEL": str(model), "FILE": str(file)}
    assert main(["tokenize", *(names.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_mask_cut_in_a_character(model, tmp_path, capsys):
    """Plain text in pieces of three tokens: what is shown of each is what its tokens are."""
    file = write(tmp_path / "rows.jsonl", {"text": "\u4f60\u597d"})
    text = shown(capsys, file, "--model", model, "--show-mask", "training.max_tokens=4", "data.format=text")
    assert text.count("-- example") == 2
    assert np.array_equal(["[[" in part for part in text.split("-- ")[1:]], [True, True])
