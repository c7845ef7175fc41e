"""Tokenizers: train one, load one, tokenise texts, which tokens end an answer, and its text as they come."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import BuildConfig
from mindrlhf.data.readers import read_rows
from mindrlhf.data.vocabulary_files import ONE_DIGIT, open_vocabulary, vocabulary_file
from mindrlhf.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
SMALLEST_VOCABULARY = 260  # 256 bytes, the special tokens, one merge

_FAST_FILES = ("tokenizer.json", "vocab.json")  # what transformers' fast tokenizers are made from
_ROW_FILES = (".json", ".jsonl", ".csv", ".parquet")


def build_tokenizer(files: list[str | Path], vocab_size: int, directory: str | Path, chat_template: str = "") -> None:
    """Train a byte-level BPE of Qwen2's form on the files and write it into `directory`.

    Of data set files (.json, .jsonl, .csv, .parquet) all strings of the rows are read, of any other file its text.
    Ids: 256 bytes, merges, then the special tokens. There are `vocab_size` of them, or fewer where the text has too
    few merges. The same files give the same bytes. Writes what transformers.AutoTokenizer loads
    (tokenizer.json, tokenizer_config.json, special_tokens_map.json) and what Qwen2Tokenizer does (vocab.json,
    merges.txt).

    Raises UserError for a vocabulary below 260, no files, a missing file and text that is not UTF-8.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        problem = f"{vocab_size} is too small for 256 bytes and the special tokens"
        raise UserError(f"model.build.vocab_size: {problem}; use {SMALLEST_VOCABULARY} or more")
    if not files:
        raise UserError("model.build.tokenizer_files: no files; list at least one to train the tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(ONE_DIGIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for file in files for text in _texts(Path(file)))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    _write(tokenizer, Path(directory), chat_template)


def train_tokenizer(build: BuildConfig) -> Any:
    """The tokenizer of a model that is built from nothing. Raises UserError."""
    if not build.tokenizer_files:
        raise UserError("model.build.tokenizer_files: name at least one file of text for the tokenizer to learn from")
    with tempfile.TemporaryDirectory() as directory:
        build_tokenizer(build.tokenizer_files, build.vocab_size, directory, build.chat_template)
        return load_tokenizer(directory)


def add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Those that it does not know get ids behind all others. Raises UserError for an empty one."""
    if not all(token.strip() for token in tokens):
        raise UserError("model.add_tokens: one of the tokens is empty; remove it")
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_additional_special_tokens=False)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a vocabulary of any kind."""
    in_json = any((directory / name).is_file() for name in _FAST_FILES)
    return in_json or vocabulary_file(directory) is not None


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a local directory, as a Hugging Face one; code that comes with a checkpoint is never run.

    Read are tokenizer.json, vocab.json with merges.txt, SentencePiece's tokenizer.model, and tiktoken's ranks
    (tokenizer.model or *.tiktoken). Raises UserError for a directory without them and for files that are broken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        fix = "run the job whose output it is, download it there, or correct the path"
        raise UserError(f"{directory}: no such directory; {fix}")
    if not has_tokenizer(directory):
        expected = "tokenizer.json, vocab.json and merges.txt, tokenizer.model, or a .tiktoken file"
        raise UserError(f"{directory}: no tokenizer here; expected {expected}; set model.tokenizer to their directory")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else: "PyTorch was not found" at import
    tokenizer = open_vocabulary(directory)
    if tokenizer is not None:
        return tokenizer
    from transformers import AutoTokenizer

    # Of a SentencePiece model the slow class, which leaves encoding to SentencePiece: the fast one is not quite equal.
    use_fast = any((directory / name).is_file() for name in _FAST_FILES)
    options = {"use_fast": use_fast, "local_files_only": True, "trust_remote_code": False}
    try:
        found = AutoTokenizer.from_pretrained(str(directory), **options)
    except Exception as error:  # whatever a broken file makes of transformers' code
        found, problem = False, str(error)
    else:
        problem = "tokenizer.model is no SentencePiece model"
    if not found:  # False is what transformers makes of such a file
        fix = "download its files again (git lfs pull, if they are pointers)"
        raise UserError(f"{directory}: transformers cannot read the tokenizer: {problem}; {fix}")
    return found


def encode(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Each text as [n] int32 ids; special tokens are those that the text itself holds, none are added."""
    if not texts:
        return []
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array(row, dtype=np.int32) for row in rows]


def decode(tokenizer: Any, ids: list[int], skip_special_tokens: bool) -> str:
    """The text of the tokens and nothing else: no space is put in or taken out, which would change what is before."""
    options = {"clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **options)


def stop_ids(tokenizer: Any, generation_config_eos: list[int] | None, stop: list[str]) -> tuple[int, ...]:
    """Ids of the tokens that end an answer: the tokenizer's, the generation config's, the configured; each once.

    Raises UserError for a configured string that is not exactly one token.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids += generation_config_eos or []
    for text, tokens in zip(stop, encode(tokenizer, stop), strict=True):
        if len(tokens) != 1:
            problem = f"{text!r} is {len(tokens)} tokens in this tokenizer, a stop is exactly one"
            raise UserError(f"sampling.stop: {problem}; use a token such as {tokenizer.eos_token!r}")
        ids.append(int(tokens[0]))
    return tuple(dict.fromkeys(ids))


class TextStream:
    """Text of tokens that come one by one; the pieces joined are the text of all of them, special tokens left out.

    A token may hold a part of a character, and what it looks like may depend on the one before (SentencePiece drops
    the first space of what it decodes). So a few tokens are decoded again together, and a piece is held back until it
    ends with a whole character. This is how vLLM and TGI stream. Costs the same for every token.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.text = ""  # of all tokens so far, but for what is held back
        self._shown: list[int] = []  # tokens of the last piece
        self._held: list[int] = []  # tokens behind it

    def add(self, token: int) -> str:
        """The text that this token completes, or nothing."""
        self._held.append(token)
        piece = self._piece()
        return "" if piece.endswith("\N{REPLACEMENT CHARACTER}") else self._take(piece)

    def finish(self) -> str:
        """What is held back, as it is: U+FFFD where a character was cut."""
        return self._take(self._piece())

    def _piece(self) -> str:
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]

    def _take(self, piece: str) -> str:
        if piece:
            self.text += piece
            self._shown, self._held = self._held, []
        return piece

    def _decode(self, ids: list[int]) -> str:
        return decode(self.tokenizer, ids, skip_special_tokens=True)


def _texts(file: Path) -> Iterator[str]:
    if file.suffix.lower() in _ROW_FILES:
        for row in read_rows(file):
            yield from _strings(row.values)
        return
    if not file.is_file():
        raise UserError(f"{file}: no such file; mend model.build.tokenizer_files")
    try:
        yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and objects, such as a column of chat messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _write(tokenizer: Any, directory: Path, chat_template: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt, without the special tokens, as Qwen2's
    special = {
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
    }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "split_special_tokens": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in SPECIAL_TOKENS
        },
        **special,
    }
    if chat_template:
        config["chat_template"] = chat_template
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")
