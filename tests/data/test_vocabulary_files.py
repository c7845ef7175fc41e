"""Tokenizers from SentencePiece models and tiktoken's ranks, against SentencePiece and tiktoken themselves."""

import base64
import json
import random
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tiktoken

from mindrlhf.data.tokenizers import TextStream, build_tokenizer, decode, encode, load_tokenizer
from mindrlhf.data.vocabulary_files import ONE_DIGIT, THREE_DIGITS, byte_level_bpe, has_ranks, read_ranks
from mindrlhf.errors import UserError

CORPUS = "the cat sat on the mat with 12 hats\na dog and the cat ran 345 miles\nZw\u00f6lf Boxk\u00e4mpfer jagen\n" * 20
TEXTS = [
    "the cat  sat\n on 1234 mats",
    "it's I'LL\r\n\n  x  ",
    "\u00e9 e\u0301 \u4f60\u597d \U0001f600",
    " the hat ",
]
USER, ASSISTANT = "<reserved_106>", "<reserved_107>"
# As Baichuan2's says it: a class that only comes with the checkpoint.
BAICHUAN = {
    "tokenizer_class": "BaichuanTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False},
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "chat_template": "{{ messages[0].content }}",
}


def ids_of(tokenizer, text):
    return encode(tokenizer, [text])[0].tolist()


def write_config(directory, config):
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def train_sentencepiece(directory, prefix):
    """Writes tokenizer.model of Llama 2's form; prefix: a space is put before every text. Returns the processor."""
    (directory / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"), model_prefix=str(directory / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, split_digits=True, user_defined_symbols=[USER, ASSISTANT], minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@pytest.fixture(scope="module", params=[True, False], ids=["space before", "no space before"])
def sentencepiece_model(request, tmp_path_factory):
    """(directory, processor)."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    return directory, train_sentencepiece(directory, request.param)


@pytest.mark.parametrize("config", [BAICHUAN, {"tokenizer_class": "LlamaTokenizer", "legacy": True}, None])
def test_sentencepiece_encodes(sentencepiece_model, config):
    directory, processor = sentencepiece_model
    (directory / "tokenizer_config.json").unlink(missing_ok=True)
    (directory / "config.json").write_text('{"model_type": "baichuan"}', encoding="utf-8")
    if config:
        write_config(directory, config)
    tokenizer = load_tokenizer(directory)
    for text in ["", *TEXTS, f"{USER}the cat{ASSISTANT} hats"]:
        assert ids_of(tokenizer, text) == processor.encode(text), text
        # transformers drops one more space in front than SentencePiece does.
        assert tokenizer.decode(processor.encode(text)).lstrip() == processor.decode(processor.encode(text)).lstrip()
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (330, 1, 2)
    assert ids_of(tokenizer, "</s>") == [2]


def test_the_class_of_a_checkpoint_is_not_run(tmp_path):
    """Its file would raise; the tokenizer is saved as one that transformers has, and read again as it was."""
    processor = train_sentencepiece(tmp_path, False)
    (tmp_path / "tokenization_baichuan.py").write_text("raise SystemExit('was run')", encoding="utf-8")
    write_config(tmp_path, BAICHUAN)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.chat_template) == (0, BAICHUAN["chat_template"])
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    again = load_tokenizer(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert ids_of(again, f"{USER}the cat") == processor.encode(f"{USER}the cat")


def test_a_stream_of_sentencepiece(sentencepiece_model):
    directory, processor = sentencepiece_model
    write_config(directory, BAICHUAN)
    stream = TextStream(load_tokenizer(directory))
    pieces = [stream.add(token) for token in processor.encode("the cat \U0001f600</s> sat")]
    assert "".join(pieces) + stream.finish() == "the cat \U0001f600</s> sat"
    special = [stream.tokenizer.eos_token_id, *processor.encode("hats")]
    assert decode(stream.tokenizer, special, skip_special_tokens=False) == "</s>hats"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """311 tokens of a byte-level BPE: bytes -> id."""
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    directory = tmp_path_factory.mktemp("ranks")
    (directory / "corpus.txt").write_text(CORPUS + "cats 1234 4321 12 it's", encoding="utf-8")
    build_tokenizer([directory / "corpus.txt"], 403, directory)
    byte_of = {letter: value for value, letter in bytes_to_unicode().items()}
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    return {bytes(byte_of[letter] for letter in token): number for token, number in vocabulary.items()}


def write_ranks(path, ranks):
    lines = [f"{base64.b64encode(token).decode()} {number}\n" for token, number in ranks.items()]
    path.write_text("".join(lines), encoding="ascii")


@pytest.mark.parametrize(
    ("name", "kind", "pattern", "composed", "known"),
    [
        ("qwen.tiktoken", "QWenTokenizer", ONE_DIGIT, True, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        ("tokenizer.model", "ChatGLM4Tokenizer", THREE_DIGITS, False, ["<|endoftext|>", "[MASK]", "[gMASK]"]),
        ("tokenizer.model", "", THREE_DIGITS, False, ["<|begin_of_text|>", "<|end_of_text|>"]),
    ],
)
def test_ranks_encode_as_tiktoken_does(tmp_path, ranks, name, kind, pattern, composed, known):
    write_ranks(tmp_path / name, ranks)
    if kind:
        write_config(tmp_path, {"tokenizer_class": kind, "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    tokenizer = load_tokenizer(tmp_path)
    oracle = tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS:
        expected = oracle.encode(unicodedata.normalize("NFC", text) if composed else text)
        assert ids_of(tokenizer, text) == expected, text
        assert tokenizer.decode(expected) == oracle.decode(expected)
    assert ids_of(tokenizer, "".join(known)) == list(range(len(ranks), len(ranks) + len(known)))
    assert tokenizer.eos_token_id == len(ranks) + (known[0] == "<|begin_of_text|>")
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    again = load_tokenizer(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert ids_of(again, TEXTS[0]) == ids_of(tokenizer, TEXTS[0])


def test_llama3_has_its_special_tokens_in_their_places(tmp_path, ranks):
    write_ranks(tmp_path / "tokenizer.model", ranks)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == len(ranks) + 256
    places = {"<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9}
    assert {token: tokenizer.convert_tokens_to_ids(token) - len(ranks) for token in places} == places


def test_tokenizer_config_names_the_special_tokens(tmp_path, ranks):
    write_ranks(tmp_path / "tokenizer.model", ranks)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "ChatGLM4Tokenizer",
        "added_tokens_decoder": {str(len(ranks)): {"content": "<end>", **flags}},
        "eos_token": "<end>",
    }
    write_config(tmp_path, config)
    tokenizer = load_tokenizer(tmp_path)
    assert ids_of(tokenizer, "<end>") == [len(ranks)] == [tokenizer.eos_token_id]
    config["added_tokens_decoder"] = {"999": {"content": "<end>", **flags}}
    write_config(tmp_path, config)
    with pytest.raises(UserError, match="'<end>' cannot get the id 999: 311 ranks and the tokens before end elsewhere"):
        load_tokenizer(tmp_path)


def test_ranks_with_many_ways_to_cut_a_token():
    """Random ranks over three letters, where neighbours often come to the same token in several ways."""
    for seed in range(20):
        generator = random.Random(seed)
        tokens, parts = [bytes([value]) for value in range(256)], [b"a", b"b", b"c"]
        while len(tokens) < 290:
            joined = generator.choice(parts) + generator.choice(parts)
            if joined not in tokens:
                tokens.append(joined)
                parts.append(joined)
        generator.shuffle(tokens)
        ranks = {token: number for number, token in enumerate(tokens)}
        oracle = tiktoken.Encoding("oracle", pat_str=THREE_DIGITS, mergeable_ranks=ranks, special_tokens={})
        tokenizer = byte_level_bpe(ranks, THREE_DIGITS, False)
        for _ in range(20):
            text = "".join(generator.choices("abc", k=30))
            assert tokenizer.encode(text).ids == oracle.encode(text), (seed, text)


def test_a_tokenizer_json_in_a_class_of_its_own(tokenizer_directory, tokenizer, tmp_path):
    text = (tokenizer_directory / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    write_config(tmp_path, {"tokenizer_class": "OwnTokenizer", "eos_token": "<|im_end|>"})
    found = load_tokenizer(tmp_path)
    np.testing.assert_array_equal(encode(found, ["ab 12"])[0], encode(tokenizer, ["ab 12"])[0])
    assert (found.eos_token_id, found.chat_template) == (259, "{{ messages }}")
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "config", "expected"),
    [
        (b"IQ== 0\nIg== x\n", {}, r"tokenizer.model:2: not a token in base64 and its rank; download the file again"),
        (b"IQ== 0\nIg== 2\n", {}, r"its 2 lines are not the ranks 0 to 1, each once; download it again"),
        (b"IQ== 0\nIg== 1\n", {}, r"lacks the byte 0, so not every text has tokens"),
        (b"IQ== 0\n", {"tokenizer_class": "MoonTokenizer"}, r"how MoonTokenizer splits texts .* is unknown .known: QW"),
        (b"\n\x05not\x00", {}, r"neither a SentencePiece model nor tiktoken's ranks; download it again"),
        (b"IQ== 0\n", "[1]", r"tokenizer_config.json: holds a list, not a JSON object"),
    ],
)
def test_broken_files(tmp_path, content, config, expected):
    (tmp_path / "tokenizer.model").write_bytes(content)
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        load_tokenizer(tmp_path)


def test_the_content_decides(tmp_path, ranks):
    write_ranks(tmp_path / "ranks.model", ranks)
    assert has_ranks(tmp_path / "ranks.model") and read_ranks(tmp_path / "ranks.model") == ranks
    train_sentencepiece(tmp_path, True)
    assert not has_ranks(tmp_path / "tokenizer.model")
    for name in ("one.tiktoken", "two.tiktoken"):
        write_ranks(tmp_path / name, ranks)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="several vocabularies, one.tiktoken, two.tiktoken; keep the one"):
        load_tokenizer(tmp_path)
