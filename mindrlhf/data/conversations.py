"""Supervised examples: a prompt, the answer to imitate and the stop token."""

import logging
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.readers import Row, UnusableRows, column
from mindrlhf.data.templates import is_empty, render_rows
from mindrlhf.data.tokenizers import encode
from mindrlhf.errors import UserError
from mindrlhf.types import Conversation

logger = logging.getLogger(__name__)


def read_conversations(
    sources: list[SourceConfig], data: DataConfig, tokenizer: Any, max_tokens: int, base: Path
) -> list[Conversation]:
    """Every row of every source as prompt + response + stop token, of which the last two are trained.

    Prompt and response are tokenised apart, so that the prompt's tokens are those that generation sees. The stop token
    is the tokenizer's end of sequence; it is trained even where it is the padding token too, and not doubled where
    the response already ends with it. Paths are relative to `base`; the sources' probabilities are not used.

    Raises UserError for what the readers and templates refuse, a tokenizer without a stop token, a file without a
    usable row, and, where data.strict, an empty prompt or response or a conversation of more than `max_tokens` tokens.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no stop token; set eos_token in its tokenizer_config.json")
    unusable = UnusableRows(data.strict)
    conversations = []
    for source in sources:
        path = Path(base) / source.path
        usable = _read_source(path, data, tokenizer, max_tokens, unusable)
        if not usable:
            raise UserError(f"{path}: every row was skipped: {unusable.skipped}; mend the rows or remove the file")
        conversations += usable
    if unusable.skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in unusable.skipped.items())
        logger.warning("supervised data: skipped rows (data.strict is false): %s", reasons)
    return conversations


def _read_source(
    path: Path, data: DataConfig, tokenizer: Any, max_tokens: int, unusable: UnusableRows
) -> list[Conversation]:
    answered: list[tuple[Row, str, str]] = []
    for row, prompt in render_rows(path, data, tokenizer, unusable):
        response = column(row, data.response_key, "data.response_key")
        if is_empty(response):
            unusable.refuse(row, "empty response", f"column {data.response_key!r} is empty; fill it")
        elif not isinstance(response, str):
            raise UserError(
                f"{row.where}: column {data.response_key!r}: {reprlib.repr(response)} is not text; write a string"
            )
        else:
            answered.append((row, prompt, response))
    prompts = encode(tokenizer, [prompt for _, prompt, _ in answered])
    responses = encode(tokenizer, [response for _, _, response in answered])
    conversations = []
    for (row, _, _), prompt_ids, response_ids in zip(answered, prompts, responses, strict=True):
        conversation = _join(prompt_ids, response_ids, tokenizer.eos_token_id)
        if len(conversation.ids) > max_tokens:
            problem = f"prompt, response and stop token are {len(conversation.ids)} tokens, the limit is {max_tokens}"
            fix = f"raise trainer.row_tokens to {len(conversation.ids)}, shorten the row"
            unusable.refuse(row, "conversation too long", f"{problem}; {fix}")
        else:
            conversations.append(conversation)
    return conversations


def _join(prompt_ids: np.ndarray, response_ids: np.ndarray, stop_id: int) -> Conversation:
    if stop_id not in response_ids[-1:]:
        response_ids = np.append(response_ids, np.int32(stop_id))
    trained = np.zeros(len(prompt_ids) + len(response_ids), dtype=bool)
    trained[len(prompt_ids) :] = True
    return Conversation(ids=np.concatenate([prompt_ids, response_ids]), trained=trained)
