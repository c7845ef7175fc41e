import json
import subprocess
import sys

import numpy as np
import pytest

from mindrlhf.data.tokenizers import TextStream, build_tokenizer, encode, load_tokenizer, stop_ids
from mindrlhf.errors import UserError

FILES = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
TEXTS = [
    "ab 123+45=168",
    "it's  two   spaces\n\n\ttab \r\n end  ",
    "\u00e9t\u00e9 e\u0301 \u4f60\u597d \U0001f600",
    "x<|endoftext|>y",
]


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_by_hand(tokenizer):
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token) == (260, "<|endoftext|>", "<|endoftext|>")
    assert encoded(tokenizer, "ab 12\n") == [256, 220, 16, 17, 198]
    assert encoded(tokenizer, "<|endoftext|><|im_start|><|im_end|>") == [257, 258, 259]
    # Bytes e4 bd a0: printable Latin-1 from 174 on is byte - 68; the unprintable 127 to 160 are byte + 94.
    assert encoded(tokenizer, "\u4f60") == [160, 121, 254]
    assert tokenizer.decode([256, 220, 16, 17, 198]) == "ab 12\n"


def test_decoding_gives_every_text_back(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(encoded(tokenizer, text)) == text.replace("e\u0301", "\u00e9")  # NFC


def test_digits_stay_single_however_often_numbers_occur(tmp_path):
    (tmp_path / "a.txt").write_text("1234 1234 and and " * 50, encoding="utf-8")
    build_tokenizer([tmp_path / "a.txt"], 300, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(encoded(tokenizer, "1234 and")) == ["1", "2", "3", "4", "\u0120and"]
    # " and" is all there is to merge: three merges, not the 41 there is room for.
    assert len(tokenizer) == 256 + 3 + 3


def test_fast_and_slow_qwen2_tokenizers_encode_the_same(tokenizer, tokenizer_directory):
    from transformers import Qwen2Tokenizer

    vocabulary, merges = str(tokenizer_directory / "vocab.json"), str(tokenizer_directory / "merges.txt")
    bare = Qwen2Tokenizer(vocabulary, merges)
    slow = Qwen2Tokenizer.from_pretrained(str(tokenizer_directory))
    for text in TEXTS:
        assert encoded(tokenizer, text) == encoded(bare, text) == encoded(slow, text), text
    chat = "<|im_start|>user\nab<|im_end|>"
    assert encoded(tokenizer, chat) == encoded(slow, chat)
    assert len(slow) == len(tokenizer) == 260


def test_same_files_give_the_same_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("the cat that sat on the mat with that hat " * 20, encoding="utf-8")
    for out in ("one", "two"):
        build_tokenizer([tmp_path / "a.txt"], 290, tmp_path / out, "{{ messages }}")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_all_strings_of_data_set_rows_are_trained_on(tmp_path):
    row = {"prompt": [{"role": "x", "content": "uvuv uv"}], "label": "wz wz", "n": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    build_tokenizer([tmp_path / "a.jsonl"], 300, tmp_path / "out")
    merges = (tmp_path / "out" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert {"u v", "w z"} <= set(merges)


@pytest.mark.parametrize(
    ("files", "size", "expected"),
    [
        (
            ["a.txt"],
            259,
            "model.build.vocab_size: 259 is too small for 256 bytes and the special tokens; use 260 or more",
        ),
        ([], 300, "model.build.tokenizer_files: no files"),
        (["none.txt"], 300, "none.txt: no such file; mend model.build.tokenizer_files"),
        (["latin.txt"], 300, "latin.txt: not UTF-8 text"),
    ],
)
def test_what_cannot_be_trained(tmp_path, monkeypatch, files, size, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError) as caught:
        build_tokenizer(files, size, tmp_path / "out")
    assert str(caught.value).startswith(expected)
    assert not (tmp_path / "out").exists()


def test_directories_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer here; expected tokenizer.json, vocab.json and"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=f"{tmp_path}: transformers cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_encode(tokenizer):
    rows = encode(tokenizer, ["12", "", "ab<|im_end|>"])
    assert [row.tolist() for row in rows] == [[16, 17], [], [256, 259]]
    assert all(row.dtype == np.int32 for row in rows)
    assert encode(tokenizer, []) == []


def test_stop_ids_are_all_of_them_once(tokenizer):
    assert stop_ids(tokenizer, None, []) == (257,)
    assert stop_ids(tokenizer, [259, 257], ["\n", "<|im_end|>"]) == (257, 259, 198)
    with pytest.raises(UserError, match=r"^sampling.stop: '12' is 2 tokens in this tokenizer, a stop is exactly"):
        stop_ids(tokenizer, None, ["\n", "12"])


def test_importing_is_light_and_loading_prints_nothing(tokenizer_directory):
    script = (
        "import sys\n"
        "import mindrlhf.data.conversations, mindrlhf.data.packing, mindrlhf.data.prompts\n"
        "from mindrlhf.data.tokenizers import load_tokenizer\n"
        "heavy = {'transformers', 'tokenizers', 'pyarrow', 'jinja2', 'mindspore'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "load_tokenizer(sys.argv[1])\n"
        "assert 'mindspore' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, str(tokenizer_directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def streamed(tokenizer, ids):
    """The pieces, one a token and the last one of `finish`."""
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids] + [stream.finish()]
    assert stream.text == "".join(pieces)
    return pieces


def test_a_stream_holds_back_what_is_not_a_character_yet(tokenizer):
    ids = encoded(tokenizer, "ab \U0001f600\u4f60!")  # four tokens a face, three a Chinese character
    assert streamed(tokenizer, ids) == ["ab", " ", "", "", "", "\U0001f600", "", "", "\u4f60", "!", ""]


def test_a_stream_cut_in_a_character(tokenizer):
    face = encoded(tokenizer, "\U0001f600")
    assert streamed(tokenizer, [256, *face[:2]]) == ["ab", "", "", "\ufffd"]
    # The next token shows that nothing will mend it.
    assert streamed(tokenizer, [face[0], 256]) == ["", "\ufffdab", ""]
    assert streamed(tokenizer, []) == [""]


def test_special_tokens_are_left_out_of_a_stream(tokenizer):
    assert streamed(tokenizer, [258, 256, 259, 220, 256, 257]) == ["", "ab", "", " ", "ab", "", ""]


def test_a_stream_of_any_tokens_is_their_text(tokenizer):
    random = np.random.default_rng(0)
    for ids in (random.integers(0, 260, 80).tolist(), *(encoded(tokenizer, text) for text in TEXTS)):
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stream_keeps_the_spaces_of_sentencepiece():
    """Its decoder drops the space before the first word of whatever it decodes; bytes are tokens of their own."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["\u2581Hello", "\u2581world", "ly", "\u2581", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<s>"]
    model = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")
    ids = [8, 0, 1, 2, 3, 1, 4, 5, 6, 7, 2]
    pieces = ["", "Hello", " world", "ly", " ", " world", "", "", "", "\U0001f600", "ly", ""]
    assert streamed(tokenizer, ids) == pieces
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "padding", "unknown"),
    [
        ({}, 257, 257),
        ({"pad_token": "<|im_end|>", "unk_token": "<|im_end|>"}, 259, 259),
        ({"pad_token": "<|pad|>", "unk_token": None}, 260, None),
    ],
)
def test_qwen2_tokenizer_keeps_its_control_tokens(tokenizer_directory, options, padding, unknown):
    """Whichever of them pads or stands for the unknown, each has its own id; a new token comes behind them."""
    from mindrlhf import Qwen2Tokenizer

    files = tokenizer_directory / "vocab.json", tokenizer_directory / "merges.txt"
    tokenizer = Qwen2Tokenizer(*files, add_bos_token=False, add_eos_token=False, padding_side="left", **options)
    assert encoded(tokenizer, "<|endoftext|><|im_start|>ab<|im_end|>") == [257, 258, 256, 259]
    assert (tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("no token")) == (padding, unknown)
    padded = tokenizer(["ab", "ab12"], padding=True)
    assert padded["input_ids"] == [[padding, padding, 256], [256, 16, 17]]
    assert padded["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
