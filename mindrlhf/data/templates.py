"""From a data set's column to the text that the model reads."""

import reprlib
from typing import Any

from mindrlhf.config import DataConfig
from mindrlhf.errors import UserError

# ShareGPT's names of the speakers, as in {"from": "human", "value": "text"}.
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def render_prompt(value: str | list[dict], data_config: DataConfig, tokenizer: Any, where: str = "prompt") -> str:
    """The prompt as text, ready to be tokenised without adding special tokens.

    With `apply_chat_template` the tokenizer's jinja template (Hugging Face runs it in a sandbox) renders the
    conversation and opens the assistant's turn: a string is one user message, a list of messages is taken as it is.
    `system_prompt` goes before both, unless the list starts with a system message of its own.
    Otherwise `input_template` with its first "{}" replaced by the string.

    Raises UserError; `where` is the row that its message names.
    """
    if not data_config.apply_chat_template:
        return _fill_input_template(value, data_config.input_template, where)
    messages = prompt_messages(value, data_config.system_prompt, where)
    return render_messages(messages, tokenizer, where, answer_follows=True)


def prompt_messages(value: Any, system_prompt: str, where: str) -> list[dict]:
    """A string as one user message or a list of messages, checked, behind `system_prompt` if there is one."""
    messages = checked_messages([{"role": "user", "content": value}] if isinstance(value, str) else value, where)
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return messages


def render_messages(messages: list[dict], tokenizer: Any, where: str, answer_follows: bool) -> str:
    """The messages through the tokenizer's chat template; `answer_follows`: the assistant's turn is opened.

    Raises UserError for a tokenizer without a template and for messages that it refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "data.apply_chat_template: the tokenizer has no chat template; add chat_template to its "
            "tokenizer_config.json or model.build.chat_template, or set data.apply_chat_template: false"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)
    except TemplateError as error:  # the template's own checks, such as roles that must alternate
        raise UserError(f"{where}: the chat template refuses the messages: {error}; mend the row") from None


def is_empty(value: Any) -> bool:
    """True for null, blank text and a list without elements."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def checked_messages(value: Any, where: str) -> list[dict]:
    """The list of messages, each with a text "role" and "content"; ShareGPT's "from" and "value" become these.

    Raises UserError that names the message.
    """
    if not isinstance(value, list):
        kind = "text, not" if isinstance(value, str) else "neither text nor"
        raise UserError(f"{where}: {reprlib.repr(value)} is {kind} a list of messages; write one")
    if not value:
        raise UserError(f"{where}: the list of messages is empty; add a user message")
    messages = [_from_sharegpt(message) for message in value]
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                form = '{"role": "user", "content": "text"}'
                raise UserError(f"{where}: message {number} has no text {key!r}; write it as {form}")
    return messages


def _from_sharegpt(message: Any) -> Any:
    if not isinstance(message, dict) or "role" in message or "from" not in message:
        return message
    speaker = message["from"]
    role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
    return {"role": role, "content": message.get("value")}


def _fill_input_template(value: Any, template: str, where: str) -> str:
    if "{}" not in template:
        raise UserError(f'data.input_template: {template!r} has no "{{}}"; write "{{}}" where the prompt goes')
    if isinstance(value, list):
        raise UserError(f"{where}: a list of messages needs a chat template; set data.apply_chat_template: true")
    if not isinstance(value, str):
        raise UserError(f"{where}: {reprlib.repr(value)} is not text; write it as a string")
    return template.replace("{}", value, 1)  # str.format would trip over braces in the prompt's mathematics
