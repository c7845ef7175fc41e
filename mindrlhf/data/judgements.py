"""Answers that somebody liked or did not."""

import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.examples import Draft, Examples, UnusableRow, read_examples
from mindrlhf.data.readers import Row
from mindrlhf.data.turns import Turns, Value, join, refuse_long
from mindrlhf.errors import UserError
from mindrlhf.types import Conversation, Judgement

_WORDS = {"true": True, "1": True, "false": False, "0": False}  # a .csv holds text only


def read_judgements(
    sources: list[SourceConfig], data: DataConfig, tokenizer: Any, max_tokens: int, base: Path
) -> Examples[Judgement]:
    """Every row of every source as an answer, with its stop token, and whether it is desirable; see docs/data.md.

    No answer has more than `max_tokens` tokens, its prompt included. Paths are relative to `base`.

    Raises UserError for what the readers and templates refuse, a label of a wrong type, a file without a usable row,
    and, where data.strict, an unusable row.
    """
    turns = Turns(data, tokenizer)
    return read_examples(sources, data, tokenizer, base, lambda row: _draft(row, turns, max_tokens))


def mismatched(judgements: list[Judgement], seed: int, max_tokens: int) -> list[Conversation]:
    """Each prompt with the answer of another judgement: what KTO measures its KL baseline on.

    Every answer is used once; with one judgement alone it is its own. An answer that would go beyond `max_tokens` is
    cut there. The same seed gives the same conversations.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(judgements))
    giver = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    conversations = []
    for number, judgement in enumerate(judgements):
        other = judgements[giver[number]].answer
        prompt, answer = judgement.answer.ids[~judgement.answer.trained], other.ids[other.trained]
        trained = np.arange(len(prompt) + len(answer)) >= len(prompt)
        ids = np.concatenate([prompt, answer])
        conversations.append(Conversation(ids=ids[:max_tokens], trained=trained[:max_tokens]))
    return conversations


def _draft(row: Row, turns: Turns, max_tokens: int) -> Draft[Judgement]:
    prompt, answer, label = (
        Value.read(row, turns.data, option) for option in ("prompt_key", "response_key", "label_key")
    )
    turn = turns.turn(prompt, answer)
    desirable = _desirable(label)

    def finish(ids: list[np.ndarray]) -> list[Judgement]:
        return [Judgement(refuse_long(join(*ids, turn.stop), max_tokens), desirable)]

    return Draft([turn.prompt, turn.answer], finish, (turn.stop,))


def _desirable(label: Value) -> bool:
    """True, false, 1 and 0, also as text. Raises UnusableRow for another number or text, UserError for a list."""
    if label.value is not None and not isinstance(label.value, bool | int | float | str):
        raise UserError(f"{label.where}: {reprlib.repr(label.value)} is no label; write true or false")
    if isinstance(label.value, str):
        desirable = _WORDS.get(label.value.strip().lower())
    else:
        desirable = {1: True, 0: False}.get(label.value)
    if desirable is None:
        problem = f"column {label.key!r}: {reprlib.repr(label.value)} is neither true (1) nor false (0); mend it"
        raise UnusableRow("label out of range", problem)
    return desirable
