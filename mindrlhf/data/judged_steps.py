"""Solutions whose steps are judged one by one: the data of process reward models."""

import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import DataConfig, SourceConfig, StepRewardConfig
from mindrlhf.data.examples import Draft, Examples, UnusableRow, read_examples
from mindrlhf.data.readers import Row
from mindrlhf.data.templates import render_prompt
from mindrlhf.data.tokenizers import encode
from mindrlhf.data.turns import Value, limit
from mindrlhf.errors import UserError
from mindrlhf.types import JudgedSteps


def read_judged_steps(
    sources: list[SourceConfig],
    data: DataConfig,
    tokenizer: Any,
    max_tokens: int,
    base: Path,
    steps: StepRewardConfig,
) -> Examples[JudgedSteps]:
    """Every row of every source as a solution with a distribution over the reward tokens at each placeholder.

    docs/data.md describes the rows. The text between placeholders is tokenised apart, so that each is its one token
    whatever stands beside it. No solution has more than `max_tokens` tokens. Paths are relative to `base`.

    Raises UserError for what the readers and templates refuse, a placeholder or reward token that is not one token, a
    label of a wrong type, a file without a usable row, and, where data.strict, an unusable row.
    """
    placeholder, _ = step_token_ids(tokenizer, steps)

    def draft(row: Row) -> Draft[JudgedSteps]:
        solution = Value.read(row, data, "steps_key")
        solution.refuse_empty("no step")
        pieces = solution.text().split(steps.placeholder)
        if len(pieces) == 1:
            fix = "put it behind each step or set steps.placeholder to what is there"
            raise UnusableRow("no step", f"column {solution.key!r} has no {steps.placeholder!r}; {fix}")
        probabilities = _probabilities(Value.read(row, data, "label_key"), pieces, steps)
        prompt = _prompt(row, data, tokenizer)
        return Draft([prompt, *pieces], lambda ids: [_join(ids, placeholder, probabilities, max_tokens)])

    return read_examples(sources, data, tokenizer, base, draft)


def step_token_ids(tokenizer: Any, steps: StepRewardConfig) -> tuple[int, list[int]]:
    """The ids of the placeholder and of the reward tokens, in their order.

    Raises UserError for a text that is not exactly one token, and for fewer than two or equal reward tokens.
    """
    if len(steps.reward_tokens) < 2:
        raise UserError(f"steps.reward_tokens: {steps.reward_tokens} leave nothing to judge; name two or more")
    options = ["steps.placeholder", *["steps.reward_tokens"] * len(steps.reward_tokens)]
    texts = [steps.placeholder, *steps.reward_tokens]
    ids = []
    for option, text, tokens in zip(options, texts, encode(tokenizer, texts), strict=True):
        if len(tokens) != 1:
            problem = f"{text!r} is {len(tokens)} tokens in this tokenizer, it must be exactly one"
            fix = "choose a text that is, such as a special token of the tokenizer that nothing else uses"
            raise UserError(f"{option}: {problem}; {fix}")
        ids.append(int(tokens[0]))
    if len(set(ids)) < len(ids):
        raise UserError(f"steps: {', '.join(map(repr, texts))} are not different tokens; choose others")
    return ids[0], ids[1:]


def _prompt(row: Row, data: DataConfig, tokenizer: Any) -> str:
    """Rendered, where the row has the column; the problem may stand in front of the first step as well."""
    if data.prompt_key not in row.values and not data.apply_chat_template:
        return ""
    prompt = Value.read(row, data, "prompt_key")
    prompt.refuse_empty("empty prompt")
    return render_prompt(prompt.value, data, tokenizer, prompt.where)


def join_steps(ids: list[np.ndarray], placeholder: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the prompt and the pieces ([n] int32 each): all in a row, a placeholder behind every piece but the last.

    Returns the tokens [N] int32 and where the placeholders are, [N] bool.
    """
    prompt, *pieces = ids
    parts, marks = [prompt], [np.zeros(len(prompt), dtype=bool)]
    for piece in pieces:
        parts += [piece, np.array([placeholder], dtype=np.int32)]
        marks += [np.zeros(len(piece), dtype=bool), np.ones(1, dtype=bool)]
    return np.concatenate(parts[:-1]), np.concatenate(marks[:-1])


def _join(ids: list[np.ndarray], placeholder: int, probabilities: np.ndarray, max_tokens: int) -> JudgedSteps:
    solution, prompt = JudgedSteps(*join_steps(ids, placeholder), probabilities), ids[0]
    if len(prompt) >= max_tokens:
        raise UnusableRow("prompt fills the window", f"the prompt alone is {len(prompt)} tokens, {limit(max_tokens)}")
    if len(solution.ids) > max_tokens:
        problem = f"prompt and steps are {len(solution.ids)} tokens, {limit(max_tokens)}"
        raise UnusableRow("conversation too long", problem)
    assert (solution.ids[solution.judged] == placeholder).all() and solution.judged.sum() == len(probabilities)
    return solution


def _probabilities(labels: Value, pieces: list[str], steps: StepRewardConfig) -> np.ndarray:
    """[K, R] float32 from the labels of the K steps: a list, or the solution with a reward token at each placeholder.

    Raises UnusableRow for labels that do not fit the steps or are out of range, UserError for a wrong type.
    """
    if isinstance(labels.value, str):
        found = _aligned(labels.value, pieces, steps.reward_tokens)
        if found is None:
            problem = f"column {labels.key!r} is not the solution with a reward token at each placeholder; mend it"
            raise UnusableRow("labels and steps differ", problem)
    elif isinstance(labels.value, list):
        found = labels.value
    else:
        problem = f"{reprlib.repr(labels.value)} is neither a list of labels nor the solution with reward tokens"
        raise UserError(f"{labels.where}: {problem}; write one of them")
    if len(found) != len(pieces) - 1:
        problem = f"column {labels.key!r} has {len(found)} labels for {len(pieces) - 1} steps; mend the row"
        raise UnusableRow("labels and steps differ", problem)
    return np.stack([_distribution(label, labels, steps.reward_tokens) for label in found])


def _aligned(text: str, pieces: list[str], reward_tokens: list[str]) -> list[str] | None:
    """The reward tokens that stand between the pieces in the text; None where it is not made of these."""
    if not text.startswith(pieces[0]):
        return None
    position = len(pieces[0])
    found = []
    for piece in pieces[1:]:
        fitting = [token for token in reward_tokens if text.startswith(token + piece, position)]
        if not fitting:
            return None
        found.append(max(fitting, key=len))
        position += len(found[-1]) + len(piece)
    return found if position == len(text) else None


def _distribution(label: Any, column: Value, reward_tokens: list[str]) -> np.ndarray:
    """[R] float32: one-hot for a reward token, and for true or 1 (the best) and false or 0 (the worst); p, 1 - p."""
    if label is not None and not isinstance(label, bool | int | float | str):
        fix = "write reward tokens, true and false, 1 and 0, or probabilities"
        raise UserError(f"{column.where}: {reprlib.repr(label)} is no label; {fix}")
    probabilities = np.zeros(len(reward_tokens), dtype=np.float32)
    if label in reward_tokens:
        probabilities[reward_tokens.index(label)] = 1.0
    elif label in (0, 1):
        probabilities[-1 if label == 0 else 0] = 1.0
    elif isinstance(label, float) and 0.0 < label < 1.0:
        if len(reward_tokens) != 2:
            fix = "name exactly two tokens, or use one of them as each label"
            problem = f"{label} could be shared by {len(reward_tokens)} reward tokens in many ways"
            raise UserError(f"{column.where}: {problem}; steps.reward_tokens: {fix}")
        probabilities[:] = label, 1.0 - label
    else:
        known = ", ".join(map(repr, reward_tokens))
        problem = f"column {column.key!r}: the label {reprlib.repr(label)} is not of {known}, nor from 0 to 1; mend it"
        raise UnusableRow("label out of range", problem)
    return probabilities
