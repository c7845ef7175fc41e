"""Qwen2's tokenizer from a vocabulary and merges, as the published programs make it."""

from pathlib import Path
from typing import Any

import transformers

from mindrlhf.data.tokenizers import END_OF_TEXT, SPECIAL_TOKENS
from mindrlhf.data.vocabulary_files import settings_of, special
from mindrlhf.errors import UserError


class Qwen2Tokenizer(transformers.Qwen2TokenizerFast):
    """Qwen2Tokenizer("vocab.json", "merges.txt", add_bos_token=False, add_eos_token=False).

    vocab.json holds no control tokens: <|endoftext|>, <|im_start|> and <|im_end|> get the ids behind it in this order,
    which are Qwen2's own. transformers' class of this name adds the first alone and would take a chat apart into
    letters; it also fails at ids without a token, which Qwen2's padded embedding has. The fast one passes over them.
    """

    def __init__(
        self,
        vocab_file: str | Path,
        merges_file: str | Path,
        *,
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        **options: Any,
    ):
        for name, path in (("vocabulary", vocab_file), ("merges", merges_file)):
            if not Path(path).is_file():
                raise UserError(f"Qwen2Tokenizer: {path}: no such {name} file; give vocab.json and merges.txt")
        if add_bos_token or add_eos_token:
            raise UserError(
                "Qwen2Tokenizer: add_bos_token and add_eos_token must be False; Qwen2 has no token that begins a text, "
                f"and a prompt that ends in {END_OF_TEXT} is not gone on with"
            )
        # By their ids: where one of them is the padding or the unknown token, transformers would add that one first.
        first = len(settings_of(Path(vocab_file)))
        control = {first + number: special(token) for number, token in enumerate(SPECIAL_TOKENS)}
        options["added_tokens_decoder"] = control | options.get("added_tokens_decoder", {})
        options.setdefault("additional_special_tokens", SPECIAL_TOKENS[1:])
        super().__init__(str(vocab_file), str(merges_file), **options)
