"""Tokenizers of checkpoints whose class is code of their own, which is never run: from the vocabulary alone.

- SentencePiece's model (a protobuf): Baichuan2's tokenizer.model and others of Llama 2's kind. SentencePiece encodes.
- tiktoken's ranks (text, a line `base64 rank` a token): Qwen-1's qwen.tiktoken, GLM4's and Llama 3's tokenizer.model.
  They become a byte-level BPE of the `tokenizers` library, which tokenizer.json holds from then on.
- tokenizer.json, where only the class around it is unknown.

Sources: tokenization_qwen.py and tokenization_chatglm.py of those checkpoints and llama_models' tokenizer.py for the
patterns and special tokens; tiktoken's `_educational.py` for what encoding by ranks is.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf.config.reading import read_json
from mindrlhf.errors import UserError

# Contractions, words, digits, punctuation, line ends, spaces; how many digits go together differs.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ONE_DIGIT, THREE_DIGITS = WORD_PATTERN.format(digits=""), WORD_PATTERN.format(digits="{1,3}")

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OPTIONS = ("additional_special_tokens", "chat_template", "model_max_length", "padding_side", "truncation_side")
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")


class Ranks(NamedTuple):
    """What a file of ranks does not say: a row of RANKS."""

    pattern: str  # what texts are split by before anything is merged
    special: tuple[str, ...]  # behind the ranks, where tokenizer_config.json does not name them
    composed: bool = False  # texts are brought into Unicode's NFC first
    options: Mapping[str, str] = {}  # where tokenizer_config.json does not say


_QWEN = Ranks(
    ONE_DIGIT,
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))),
    composed=True,
    options={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
)
_GLM4 = Ranks(
    THREE_DIGITS,
    (
        "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
        "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    ),
    options={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
)  # fmt: skip
_LLAMA3_NAMED = (  # of Llama 3.1; Llama 3.0 has reserved ones at the places of three of them
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
_LLAMA3 = Ranks(
    THREE_DIGITS,
    (*_LLAMA3_NAMED, *(f"<|reserved_special_token_{number}|>" for number in range(3, 248))),  # 256 in all
    options={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
)
# tokenizer_class of tokenizer_config.json -> how its ranks are read; "": Meta's own directories have no such file
RANKS = {
    "QWenTokenizer": _QWEN,
    "ChatGLM4Tokenizer": _GLM4,
    **dict.fromkeys(("", "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"), _LLAMA3),
}


def vocabulary_file(directory: Path) -> Path | None:
    """tokenizer.model, or the one file whose name ends in .tiktoken. Raises UserError where there are several."""
    if (directory / "tokenizer.model").is_file():
        return directory / "tokenizer.model"
    found = sorted(directory.glob("*.tiktoken"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{directory}: several vocabularies, {names}; keep the one that the model was trained with")
    return found[0] if found else None


def open_vocabulary(directory: Path) -> Any | None:
    """The tokenizer of a directory whose class transformers does not have; None where transformers reads it itself.

    Raises UserError for files that are broken or of an unknown kind.
    """
    import transformers

    config = settings_of(directory / "tokenizer_config.json")
    name = config.get("tokenizer_class") or ""
    is_known = bool(name) and hasattr(transformers, name)
    if (directory / "tokenizer.json").is_file():
        return _of_json(directory, config) if name and not is_known else None
    path = vocabulary_file(directory)
    if path is None:
        return None
    if has_ranks(path):
        return _of_ranks(path, config)
    return None if is_known else _of_sentencepiece(path, config)


def has_ranks(path: Path) -> bool:
    """Whether the file is tiktoken's text; else it is taken for SentencePiece's protobuf."""
    with path.open("rb") as file:
        return _RANK_LINE.fullmatch(file.readline(4096)) is not None


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a file of ranks: bytes -> id, all 256 bytes among them. Raises UserError naming the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: not a token in base64 and its rank; download the file again") from None
    if len(ranks) != number or sorted(ranks.values()) != list(range(number)):
        raise UserError(f"{path}: its {number} lines are not the ranks 0 to {number - 1}, each once; download it again")
    missing = next((value for value in range(256) if bytes([value]) not in ranks), None)
    if missing is not None:
        raise UserError(f"{path}: lacks the byte {missing}, so not every text has tokens; download it again")
    return ranks


def recover_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that encode as the ranks do.

    By ranks the neighbours are joined that come to the token of the lowest rank, whatever they are. So every way to
    cut a token into two tokens is a merge, and merges stand in the order of what they make.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        known = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def byte_level_bpe(ranks: Mapping[bytes, int], pattern: str, composed: bool) -> Any:
    """A tokenizers.Tokenizer without special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    letters = bytes_to_unicode()  # each byte as a character that can be printed

    def spelled(token: bytes) -> str:
        return "".join(letters[value] for value in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [(spelled(left), spelled(right)) for left, right in recover_merges(ranks)]
    # A word that is a token stays one, even where no merges lead to it.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _of_ranks(path: Path, config: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    name = config.get("tokenizer_class") or ""
    if not name and path.name != "tokenizer.model":  # which is how Meta names it
        raise UserError(
            f"{path}: of which model? put the checkpoint's tokenizer_config.json, with its tokenizer_class, beside it"
        )
    if name not in RANKS:
        known = ", ".join(filter(None, RANKS))
        problem = f"how {name} splits texts before it merges is unknown (known: {known})"
        raise UserError(f"{path}: {problem}; make a tokenizer.json with the checkpoint's own code and put it here")
    form = RANKS[name]
    tokenizer = byte_level_bpe(read_ranks(path), form.pattern, form.composed)
    first = tokenizer.get_vocab_size()
    added = _added_tokens(config) or {first + number: special(token) for number, token in enumerate(form.special)}
    for number, token in sorted(added.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            problem = f"{token.content!r} cannot get the id {number}: {first} ranks and the tokens before end elsewhere"
            raise UserError(f"{path}: {problem}; use the tokenizer_config.json that belongs to it")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{**form.options, **_options(path.parent, config)},
    )


def _of_sentencepiece(path: Path, config: dict[str, Any]) -> Any:
    """transformers' tokenizer that leaves encoding to SentencePiece; its faster one differs around special tokens."""
    import sentencepiece
    from transformers import LlamaTokenizer

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path}: neither a SentencePiece model nor tiktoken's ranks; download it again") from None
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    own = {name: model.id_to_piece(number) if number >= 0 else None for name, number in ids.items()}
    return LlamaTokenizer(
        str(path),
        legacy=True,
        add_prefix_space=model.encode("a", out_type=str)[0].startswith("\N{LOWER ONE EIGHTH BLOCK}"),
        add_bos_token=bool(config.get("add_bos_token", False)),
        add_eos_token=bool(config.get("add_eos_token", False)),
        added_tokens_decoder=_added_tokens(config),
        **{**own, **_options(path.parent, config)},
    )


def _of_json(directory: Path, config: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    options = {"clean_up_tokenization_spaces": bool(config.get("clean_up_tokenization_spaces", False))}
    try:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"), **options, **_options(directory, config)
        )
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{directory}: tokenizer.json cannot be read: {error}; download it again") from None


def _options(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json and the files beside it say of special tokens and the chat template."""
    values = {**settings_of(directory / "special_tokens_map.json"), **config}
    options = {name: _token(values[name]) for name in SPECIAL_NAMES if values.get(name) is not None}
    options |= {name: values[name] for name in _OPTIONS if values.get(name) is not None}
    template = directory / "chat_template.jinja"
    if template.is_file():
        options["chat_template"] = template.read_text(encoding="utf-8")
    if "additional_special_tokens" in options:
        options["additional_special_tokens"] = [_token(token) for token in options["additional_special_tokens"]]
    return options


def _added_tokens(config: Mapping[str, Any]) -> dict[int, Any]:
    return {int(number): _token(token) for number, token in (config.get("added_tokens_decoder") or {}).items()}


def _token(value: Any) -> Any:
    """A token as tokenizer_config.json writes it: its text, or an object with flags."""
    from transformers import AddedToken

    if not isinstance(value, dict):
        return value
    return AddedToken(**{key: flag for key, flag in value.items() if key != "__type"})


def special(token: str) -> Any:
    """A control token for the library, found in texts as it stands."""
    from transformers import AddedToken

    return AddedToken(token, normalized=False, special=True)


def settings_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none. Raises UserError."""
    return read_json(path) if path.is_file() else {}
