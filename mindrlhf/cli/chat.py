"""`mindrlhf chat`: a conversation with a checkpoint, in a terminal or through pipes."""

import argparse
import contextlib
import difflib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mindrlhf.errors import UserError

if TYPE_CHECKING:
    from mindrlhf.cli.dialogue import Dialogue

HELP = """commands:
  /help         this list
  /clear        begin a new conversation; the system message stays
  /system TEXT  set the system message; without TEXT there is none
  /retry        sample the last answer again with another seed
  /save FILE    write the conversation as a line of JSON that `mindrlhf sft` reads with data.format: messages
  /exit         leave, as Ctrl-D does
Ctrl-C stops an answer and keeps what came so far. A line that begins with a space is never a command."""

GREY, BOLD, PLAIN = "\x1b[90m", "\x1b[1m", "\x1b[0m"
# A model may sample what moves the cursor or worse; a terminal gets it as U+FFFD.
UNPRINTABLE = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mindrlhf.cli import inference

    parser.description = "Talk with a checkpoint. Lines piped in are answered one by one."
    parser.epilog = HELP
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message of the conversation")
    inference.add_arguments(parser, data=False)


def run(arguments: argparse.Namespace) -> int:
    from mindrlhf.cli import inference

    config = inference.read_config(arguments)
    from mindrlhf.cli.dialogue import Dialogue

    terminal = Terminal()
    dialogue = Dialogue(arguments.model, config, arguments.system or config.data.system_prompt, terminal)
    if not dialogue.templated:
        terminal.note("no chat template in this checkpoint: it continues the text, turn after turn")
    if terminal.interactive:
        terminal.note(f"{dialogue.window} tokens of history; /help lists the commands, Ctrl-D leaves")
    _converse(dialogue, terminal)
    return 0


class Terminal:
    """Where lines come from and where answers go: standard output. Everything else is a note on standard error."""

    def __init__(self) -> None:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # of bytes and characters that the locale does not have
        self.interactive = sys.stdin.isatty()
        self.printed = ""  # the last piece of the answer
        self.tidy = sys.stdout.isatty()
        self.coloured = self.tidy and not os.environ.get("NO_COLOR")
        self.prompt = "> " if self.interactive and self.tidy else ""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - input() edits lines and has a history once it is imported

                if self.coloured:  # between \1 and \2 is what takes no room on the line
                    self.prompt = f"\1{BOLD}\2> \1{PLAIN}\2"

    def read(self) -> str | None:
        """The next line; None at the end."""
        try:
            return input(self.prompt)
        except EOFError:
            if self.prompt:
                print()
            return None

    def show(self, piece: str) -> None:
        """The next piece of an answer."""
        if piece:
            print(piece.translate(UNPRINTABLE) if self.tidy else piece, end="", flush=True)
            self.printed = piece

    def end_answer(self) -> None:
        if not self.printed.endswith("\n"):
            print(flush=True)
        self.printed = ""

    def note(self, text: str) -> None:
        coloured = self.coloured and sys.stderr.isatty()
        print(f"{GREY}{text}{PLAIN}" if coloured else text, file=sys.stderr, flush=True)


def _converse(dialogue: "Dialogue", terminal: Terminal) -> None:
    """Until the end of the input or /exit. A mistake in a pipe ends it, in a terminal it is one line."""
    commands = _Commands(dialogue, terminal)
    while (line := terminal.read()) is not None:
        try:
            if line.rstrip() == "/exit":
                return
            if line.startswith("/"):
                commands.run(line)
            elif line.strip():
                dialogue.say(line.strip())
        except UserError as error:
            if not terminal.interactive:
                raise
            terminal.note(str(error))


class _Commands:
    """What a line with a slash does; each takes the rest of the line."""

    def __init__(self, dialogue: "Dialogue", terminal: Terminal):
        self.dialogue, self.terminal = dialogue, terminal
        self.table = {
            "/help": lambda _: terminal.note(HELP),
            "/clear": lambda _: dialogue.clear(),
            "/system": dialogue.set_system,
            "/retry": lambda _: dialogue.retry(),
            "/save": self._save,
        }

    def run(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if name not in self.table:
            near = difflib.get_close_matches(name, self.table, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            raise UserError(f"unknown command {name}; {hint}")
        self.table[name](rest.strip())

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save: name a file, for example /save chat.jsonl")
        messages = self.dialogue.messages
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError("/save: there is no answer yet")
        path = Path(name).expanduser()
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise UserError(f"/save {name}: exists already; name another file") from None
        except OSError as error:
            raise UserError(f"/save {name}: {error.strerror}; name another file") from None
        self.terminal.note(f"{len(messages)} messages in {path}")
