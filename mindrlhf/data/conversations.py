"""Supervised examples: prompt and answer, whole conversations, or plain text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.examples import Draft, Examples, UnusableRow, read_examples
from mindrlhf.data.readers import Row
from mindrlhf.data.templates import checked_messages, prompt_messages
from mindrlhf.data.turns import Turn, Turns, Value, end_of_sequence, join, limit, refuse_long
from mindrlhf.errors import UserError
from mindrlhf.types import Conversation


def read_conversations(
    sources: list[SourceConfig], data: DataConfig, tokenizer: Any, max_tokens: int, base: Path
) -> Examples[Conversation]:
    """Every row of every source as data.format says; docs/data.md describes the formats.

    Of a prompt with an answer the answer and its stop token are trained, of a conversation those of every assistant
    turn, of plain text all but the first token. No conversation has more than `max_tokens` tokens. Paths are relative
    to `base`.

    Raises UserError for what the readers and templates refuse, a tokenizer without a stop token, a file without a
    usable row, and, where data.strict, an unusable row: see docs/data.md.
    """
    drafts = {"prompt": _answered, "alpaca": _alpaca, "messages": _messages, "text": _text}
    if data.format == "messages" and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "data.format: messages needs a chat template, which the tokenizer has not; add chat_template to its "
            "tokenizer_config.json or model.build.chat_template"
        )
    draft: Callable[[Row, Turns, int], Draft[Conversation]] = drafts[data.format]
    turns = Turns(data, tokenizer)
    return read_examples(sources, data, tokenizer, base, lambda row: draft(row, turns, max_tokens))


def _answered(row: Row, turns: Turns, max_tokens: int) -> Draft[Conversation]:
    prompt, answer = (Value.read(row, turns.data, option) for option in ("prompt_key", "response_key"))
    return _single(turns.turn(prompt, answer), max_tokens)


def _alpaca(row: Row, turns: Turns, max_tokens: int) -> Draft[Conversation]:
    for key in ("instruction", "output"):
        if key not in row.values:
            fix = "rename the columns or set data.format to what the rows are"
            raise UserError(f"{row.where}: no column {key!r}, which data.format: alpaca needs; {fix}")
    instruction, extra, answer = (Value(row.values.get(key), row, key) for key in ("instruction", "input", "output"))
    instruction.refuse_empty("empty prompt")
    answer.refuse_empty("empty response")
    prompt = instruction.text()
    if extra.value is not None and extra.text().strip():
        prompt += "\n" + extra.text()
    return _single(turns.turn(Value(prompt, row, instruction.key), Value(answer.text(), row, answer.key)), max_tokens)


def _single(turn: Turn, max_tokens: int) -> Draft[Conversation]:
    return Draft([turn.prompt, turn.answer], lambda ids: [refuse_long(join(*ids, turn.stop), max_tokens)], (turn.stop,))


def _messages(row: Row, turns: Turns, max_tokens: int) -> Draft[Conversation]:
    column = Value.read(row, turns.data, "messages_key")
    column.refuse_empty("no assistant turn")
    messages = prompt_messages(checked_messages(column.value, column.where), turns.data.system_prompt, column.where)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UnusableRow("no assistant turn", f"column {column.key!r} has no assistant turn; add one")
    if all(message["role"] == "system" for message in messages[: answers[0]]):
        raise UnusableRow("no user turn first", f"column {column.key!r} begins with an answer; put its question first")
    replies = [turns.reply(messages[: number + 1], column) for number in answers]
    texts = [text for reply in replies for text in (reply.prompt, reply.answer)]
    stop_ids = tuple(reply.stop for reply in replies)
    return Draft(texts, lambda ids: [refuse_long(c, max_tokens) for c in _join_turns(ids, stop_ids)], stop_ids)


def _join_turns(ids: list[np.ndarray], stop_ids: tuple[int, ...]) -> list[Conversation]:
    """From the ids of each turn's prompt and answer to one conversation that trains all answers.

    Each prompt holds the turns before it as generation would see them. Where these are not, token by token, what was
    trained so far (a template that strips earlier thinking, or writes no stop token) the turn begins a conversation of
    its own.
    """
    conversations: list[Conversation] = []
    for prompt_ids, answer_ids, stop in zip(ids[::2], ids[1::2], stop_ids, strict=True):
        conversation = join(prompt_ids, answer_ids, stop)
        if conversations and np.array_equal(prompt_ids[: len(conversations[-1].ids)], conversations[-1].ids):
            before = conversations.pop()
            conversation.trained[: len(before.trained)] = before.trained
        conversations.append(conversation)
    return conversations


def _text(row: Row, turns: Turns, max_tokens: int) -> Draft[Conversation]:
    column = Value.read(row, turns.data, "text_key")
    column.refuse_empty("empty text")
    stop = end_of_sequence(turns.tokenizer)
    return Draft([column.text()], lambda ids: _pieces(ids[0], stop, max_tokens), (stop,))


def _pieces(ids: np.ndarray, stop: int, max_tokens: int) -> list[Conversation]:
    """The text and a stop token as pieces of `max_tokens` tokens, of which all but the first token are trained.

    Where the last piece would be the stop token alone, with nothing to predict it from, the token before comes again.
    """
    if stop not in ids[-1:]:
        ids = np.append(ids, np.int32(stop))
    if len(ids) < 2:
        raise UnusableRow("empty text", "the text has no token; fill it")
    if max_tokens < 2:
        raise UnusableRow("conversation too long", f"the text is {len(ids)} tokens, {limit(max_tokens)}")
    starts = [min(start, len(ids) - 2) for start in range(0, len(ids), max_tokens)]
    stops = [*range(max_tokens, len(ids), max_tokens), len(ids)]
    pieces = []
    for start, end in zip(starts, stops, strict=True):
        trained = np.ones(end - start, dtype=bool)
        trained[0] = False
        pieces.append(Conversation(ids=ids[start:end], trained=trained))
    assert pieces[-1].ids[-1] == stop and pieces[-1].trained[-1]
    return pieces
