"""A conversation with a checkpoint: the messages so far, and the generator that answers them."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mindrlhf.config import DataConfig, InferenceConfig, SamplingConfig
from mindrlhf.data.templates import render_prompt
from mindrlhf.data.tokenizers import TextStream, encode
from mindrlhf.errors import UserError
from mindrlhf.types import Prompt, Rollout
from mindrlhf.utils.parallel import start

# Of history, where max_prompt_tokens does not say otherwise: every decode step reads the whole cache, so the 128k
# positions of a large window would be slow and take gigabytes.
HISTORY_TOKENS = 4096
LEAST_WIDTH = 64  # tokens that a prompt is padded to at least: each width is compiled once


class Screen(Protocol):
    """What a dialogue needs of a terminal."""

    interactive: bool  # Ctrl-C stops the answer, not the program

    def show(self, piece: str) -> None: ...

    def end_answer(self) -> None: ...

    def note(self, text: str) -> None: ...


class Dialogue:
    """Messages of one conversation and the model that answers the last of them.

    With a chat template the model reads the rendered messages, without one their plain text.
    Raises UserError for what open_checkpoint refuses and for sampling parameters out of range.
    """

    def __init__(self, model: str, config: InferenceConfig, system: str, screen: Screen):
        start()
        from mindrlhf.trainer.roles import open_checkpoint
        from mindrlhf.wrapper.generator import Generator
        from mindrlhf.wrapper.sampling import check_sampling

        self.screen, self.sampling, self.seed = screen, config.sampling, config.seed
        check_sampling(self.sampling)
        policy = open_checkpoint(model, head="logits")
        self.tokenizer = policy.tokenizer
        self.templated = bool(getattr(self.tokenizer, "chat_template", None))
        self.window = _divide_window(config, policy.decoder.config.max_positions)
        self.generator = Generator(
            policy.decoder,
            slots=1,
            max_prompt_tokens=self.window,
            max_tokens=self.sampling.max_tokens,
            stop_ids=policy.stop_ids(self.sampling.stop),
            least_width=LEAST_WIDTH,
        )
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0  # messages behind the system message that no longer fit
        self.answers = 0  # sampled so far; keys the sampler, so that another try gives another answer
        self.widths: set[int] = set()  # of prompts, those that are compiled
        self.set_system(system)

    def say(self, text: str) -> None:
        """A user message and the answer to it, shown as it comes.

        Raises UserError for a message that does not fit; the conversation is then as before.
        """
        self._answer([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("/retry: there is no answer yet")
        if self.sampling.temperature == 0:
            self.screen.note("sampling.temperature is 0: every try gives the same answer")
        self._answer(self.messages[:-1])

    def clear(self) -> None:
        self.messages, self.forgotten = self.messages[: self._system_messages(self.messages)], 0

    def set_system(self, text: str) -> None:
        """Replace the system message; an empty text removes it."""
        turns = self.messages[self._system_messages(self.messages) :]
        self.messages = [{"role": "system", "content": text}, *turns] if text else turns

    def _answer(self, messages: list[dict[str, str]]) -> None:
        """The conversation becomes `messages` and an answer; stopped before there is any text, it stays as it is."""
        ids, stream = self._fit(messages), TextStream(self.tokenizer)
        rollout = self._sample(ids, stream)
        self.screen.show(stream.finish())
        self.screen.end_answer()
        if rollout is None:
            self.screen.note("stopped" if stream.text else "stopped before the answer began: nothing is kept of it")
        elif not rollout.finished:
            self.screen.note(f"cut at sampling.max_tokens {self.sampling.max_tokens}")
        if stream.text or rollout is not None:
            self.messages = [*messages, {"role": "assistant", "content": stream.text}]

    def _sample(self, ids: np.ndarray, stream: TextStream) -> Rollout | None:
        """Tokens go into the stream and on the screen as they come. None: Ctrl-C stopped them."""
        prompt, width = Prompt(ids, "", None, self.answers), self.generator.prompt_width(len(ids))
        self.answers += 1
        held = contextlib.ExitStack()

        def on_token(_: int, token: int) -> None:
            self.screen.show(stream.add(token))
            self.widths.add(width)
            held.close()

        try:
            with held:
                if width not in self.widths:
                    held.enter_context(_interrupts_held_back())
                    if sys.stderr.isatty():
                        self.screen.note("compiling...")
                (rollout,) = self.generator.generate([prompt], 1, self.sampling, self.seed, on_token)
        except KeyboardInterrupt:
            if not self.screen.interactive:
                raise
            return None
        return rollout

    def _fit(self, messages: list[dict[str, str]]) -> np.ndarray:
        """What the model reads, [n] int32: without the oldest turns where all of them do not fit."""
        first, forgotten = self._system_messages(messages), self.forgotten
        while True:
            (ids,) = encode(self.tokenizer, [self._render(messages[:first] + messages[first + forgotten :])])
            if len(ids) <= self.window:
                break
            forgotten += 2  # a question and its answer
            if first + forgotten >= len(messages):
                raise UserError(
                    f"the message is {len(ids)} tokens with what goes before it; the window takes {self.window}; "
                    "shorten it or the system message, or lower sampling.max_tokens"
                )
        if forgotten > self.forgotten:
            self.screen.note(f"the window is full: the oldest turns are left out, {forgotten // 2} by now")
        self.forgotten = forgotten
        return ids

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self.templated:
            return render_prompt(messages, DataConfig(apply_chat_template=True), self.tokenizer, "conversation")
        text = ""
        for message in messages:
            if text and message["role"] == "user" and not text[-1].isspace():
                text += "\n"
            text += message["content"]
        return text

    @staticmethod
    def _system_messages(messages: list[dict[str, str]]) -> int:
        """1 where the conversation begins with a system message, else 0."""
        return int(bool(messages) and messages[0]["role"] == "system")


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits for the end: in the midst of a compilation MindSpore answers it with a page and files."""
    pending = []
    numbers = (signal.SIGINT, signal.SIGTERM)  # SIGTERM is what MindSpore makes of Ctrl-C while a graph runs
    before = [signal.signal(number, lambda *_: pending.append(True)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if pending:
        raise KeyboardInterrupt


def _divide_window(config: InferenceConfig, positions: int) -> int:
    """Tokens for the history; the answer gets config.sampling.max_tokens, lowered where the default is too long."""
    sampling = config.sampling
    if sampling.max_tokens == SamplingConfig().max_tokens:  # nobody asked for it
        sampling.max_tokens = min(sampling.max_tokens, positions // 2)
    if sampling.max_tokens >= positions:
        problem = f"{sampling.max_tokens} leaves no room for a question in the model's window of {positions} positions"
        raise UserError(f"sampling.max_tokens: {problem}; lower it")
    asked = config.max_prompt_tokens
    history = HISTORY_TOKENS if asked == InferenceConfig().max_prompt_tokens else asked
    return min(history, positions - sampling.max_tokens)
