"""Preference pairs: a prompt, the better answer and the worse one."""

import math
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.examples import Draft, Examples, UnusableRow, read_examples
from mindrlhf.data.readers import Row
from mindrlhf.data.templates import checked_messages
from mindrlhf.data.turns import Turns, Value, join, refuse_long
from mindrlhf.errors import UserError
from mindrlhf.types import Preference


def read_preferences(
    sources: list[SourceConfig], data: DataConfig, tokenizer: Any, max_tokens: int, base: Path
) -> Examples[Preference]:
    """Every row of every source as two answers to one prompt, each with its stop token; see docs/data.md.

    The answers are text, one assistant message, or whole conversations that differ in their last message. No answer
    has more than `max_tokens` tokens, its prompt included. Paths are relative to `base`.

    Raises UserError for what the readers and templates refuse, a margin that is not a number, a file without a usable
    row, and, where data.strict, an unusable row.
    """
    turns = Turns(data, tokenizer)
    return read_examples(sources, data, tokenizer, base, lambda row: _draft(row, turns, max_tokens))


def _draft(row: Row, turns: Turns, max_tokens: int) -> Draft[Preference]:
    answers = [Value.read(row, turns.data, option) for option in ("chosen_key", "rejected_key")]
    for answer in answers:
        answer.refuse_empty("empty response")
    if all(_is_conversation(answer) for answer in answers):
        prompt, answers = _split(*answers)
    else:
        prompt = Value.read(row, turns.data, "prompt_key")
    chosen, rejected = (turns.turn(prompt, answer) for answer in answers)
    if chosen.answer == rejected.answer:
        raise UnusableRow("chosen equals rejected", "chosen and rejected answer are the same; remove the row")
    margin = _margin(row, turns.data)

    def finish(ids: list[np.ndarray]) -> list[Preference]:
        pair = (join(ids[0], ids[1], chosen.stop), join(ids[0], ids[2], rejected.stop))
        return [Preference(*(refuse_long(conversation, max_tokens) for conversation in pair), margin)]

    return Draft([chosen.prompt, chosen.answer, rejected.answer], finish, (chosen.stop, rejected.stop))


def _is_conversation(answer: Value) -> bool:
    return isinstance(answer.value, list) and len(answer.value) > 1


def _split(chosen: Value, rejected: Value) -> tuple[Value, list[Value]]:
    """The prompt that two conversations share, and their last messages.

    Raises UnusableRow where the last message is not the assistant's, or the messages before it differ.
    """
    prompts, answers = [], []
    for conversation in (chosen, rejected):
        *prompt, answer = checked_messages(conversation.value, conversation.where)
        if answer["role"] != "assistant":
            raise UnusableRow("no assistant turn", f"column {conversation.key!r} does not end with an answer; mend it")
        prompts.append(Value(prompt, conversation.row, conversation.key))
        answers.append(Value([answer], conversation.row, conversation.key))
    spoken = [[(message["role"], message["content"]) for message in prompt.value] for prompt in prompts]
    if spoken[0] != spoken[1]:
        problem = f"columns {chosen.key!r} and {rejected.key!r} differ before their last message; mend one"
        raise UnusableRow("prompts differ", problem)
    return prompts[0], answers


def _margin(row: Row, data: DataConfig) -> float:
    if not data.margin_key:
        return 0.0
    margin = Value.read(row, data, "margin_key")
    try:
        number = math.nan if isinstance(margin.value, bool) else float(margin.value)  # of a .csv it is text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{margin.where}: {reprlib.repr(margin.value)} is not a number; write one")
    return number
