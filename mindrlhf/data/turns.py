"""A prompt, an answer and the stop token: rendered as text, and put together as tokens. The one place for both."""

import re
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindrlhf.config import DataConfig
from mindrlhf.data.examples import UnusableRow
from mindrlhf.data.readers import Row, column
from mindrlhf.data.templates import checked_messages, is_empty, prompt_messages, render_messages, render_prompt
from mindrlhf.errors import UserError
from mindrlhf.types import Conversation


@dataclass(frozen=True, slots=True)
class Value:
    """What a row has in one column."""

    value: Any
    row: Row
    key: str  # the column's name

    @classmethod
    def read(cls, row: Row, data: DataConfig, option: str) -> "Value":
        """In the column that the key `option` of the section data chooses. Raises UserError without that column."""
        key = getattr(data, option)
        return cls(column(row, key, f"data.{option}"), row, key)

    @property
    def where(self) -> str:
        return f"{self.row.where}: column {self.key!r}"

    def refuse_empty(self, reason: str) -> None:
        if is_empty(self.value):
            raise UnusableRow(reason, f"column {self.key!r} is empty; fill it")

    def text(self) -> str:
        """Raises UserError for another type."""
        if not isinstance(self.value, str):
            raise UserError(f"{self.where}: {reprlib.repr(self.value)} is not text; write a string")
        return self.value


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer and what comes before it, as text. They are tokenised apart: generation sees the prompt's tokens."""

    prompt: str  # what the model has read when it answers, chat template applied
    answer: str  # what it is to write, without the stop token
    stop: int  # id of the token that ends the answer


class Turns:
    """Renders turns as the configuration and the tokenizer's chat template say."""

    def __init__(self, data: DataConfig, tokenizer: Any):
        self.data, self.tokenizer = data, tokenizer
        # Llama 3's end of turn is in the second list only.
        special = {*tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!): matches nothing

    def turn(self, prompt: Value, answer: Value) -> Turn:
        """A prompt (text or messages) and its answer: text, which the tokenizer's end of sequence ends, or a list of
        one assistant message, which the chat template ends.

        Raises UnusableRow where one of them is empty, and UserError.
        """
        prompt.refuse_empty("empty prompt")
        answer.refuse_empty("empty response")
        if not isinstance(answer.value, list):
            rendered = render_prompt(prompt.value, self.data, self.tokenizer, prompt.where)
            return Turn(rendered, answer.text(), end_of_sequence(self.tokenizer))
        if not self.data.apply_chat_template:
            raise UserError(f"{answer.where}: messages need a chat template; set data.apply_chat_template: true")
        messages = checked_messages(answer.value, answer.where)
        if [message["role"] for message in messages] != ["assistant"]:
            problem = f"column {answer.key!r}: these messages are no answer; write text or one assistant message"
            raise UnusableRow("no assistant turn", problem)
        before = prompt_messages(prompt.value, self.data.system_prompt, prompt.where)
        return self.reply([*before, *messages], answer)

    def reply(self, messages: list[dict], origin: Value) -> Turn:
        """The last of the messages as the answer to the others; `origin` is the column that holds it.

        The answer is what the chat template writes behind its generation prompt, up to the first special token behind
        the content: that is the stop token. Where the template writes none it is the tokenizer's end of sequence.

        Raises UnusableRow for empty content, and UserError for a template that writes an answer otherwise than behind
        its generation prompt, or another text than the content.
        """
        content = messages[-1]["content"].strip()  # templates may trim it
        if not content:
            raise UnusableRow("empty response", f"column {origin.key!r}: an answer is empty; fill it")
        prompt = render_messages(messages[:-1], self.tokenizer, origin.where, answer_follows=True)
        whole = render_messages(messages, self.tokenizer, origin.where, answer_follows=False)
        written = whole.removeprefix(prompt)
        if not whole.startswith(prompt) or content not in written:
            problem = f"the chat template does not write {reprlib.repr(content)} as it is behind its generation prompt"
            raise UserError(f"{origin.where}: {problem}; give the tokenizer a chat_template that does")
        end = written.index(content) + len(content)
        stop = self._special.search(written, end)
        if stop:
            return Turn(prompt, written[: stop.start()], self.tokenizer.convert_tokens_to_ids(stop[0]))
        return Turn(prompt, written.rstrip(), end_of_sequence(self.tokenizer))


def end_of_sequence(tokenizer: Any) -> int:
    """The id of the tokenizer's stop token. Raises UserError where it has none."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no stop token; set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


def join(prompt_ids: np.ndarray, answer_ids: np.ndarray, stop: int) -> Conversation:
    """Prompt + answer + stop token, of which the last two are trained.

    The stop token is trained even where it is the padding token too, and is not doubled where the answer already ends
    with it. Raises UnusableRow for a prompt without tokens: the answer's first one would have nothing before it.
    """
    if not len(prompt_ids):
        raise UnusableRow("empty prompt", "the prompt has no token; fill it")
    if stop not in answer_ids[-1:]:
        answer_ids = np.append(answer_ids, np.int32(stop))
    trained = np.zeros(len(prompt_ids) + len(answer_ids), dtype=bool)
    trained[len(prompt_ids) :] = True
    conversation = Conversation(ids=np.concatenate([prompt_ids, answer_ids]), trained=trained)
    assert conversation.ids[-1] == stop and conversation.trained[-1] and not conversation.trained[0]
    return conversation


def refuse_long(conversation: Conversation, max_tokens: int) -> Conversation:
    """The conversation itself, if it has at most `max_tokens` tokens. Raises UnusableRow, also naming the prompt."""
    length, prompt = len(conversation.ids), int(np.argmax(conversation.trained))
    if length <= max_tokens:
        return conversation
    if prompt >= max_tokens:
        raise UnusableRow("prompt fills the window", f"the prompt alone is {prompt} tokens, {limit(max_tokens)}")
    problem = f"prompt, response and stop token are {length} tokens, {limit(max_tokens)}"
    raise UnusableRow("conversation too long", problem)


def limit(max_tokens: int) -> str:
    """The end of a message about a row that is too long."""
    set_by = "training.max_tokens where that is set, else the model's window"
    return f"the limit is {max_tokens} tokens ({set_by}); shorten the row or raise the limit"
