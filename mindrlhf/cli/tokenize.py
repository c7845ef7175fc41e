"""`mindrlhf tokenize`: what a model reads of a data set, and which tokens of it are trained."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindrlhf.errors import UserError

if TYPE_CHECKING:
    from mindrlhf.types import Conversation

GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"
OPEN, CLOSE = "[[", "]]"  # around trained tokens where there are no colours
ROWS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show rows of a data set as the model reads them, and with --show-mask which tokens are trained: coloured in a "
        f"terminal, in {OPEN} {CLOSE} elsewhere. The rows are read, rendered and packed as in training."
    )
    parser.add_argument(
        "words", nargs="*", metavar="FILE or section.key=value",
        help="a data set, else --config's data.train; and overrides, for example data.apply_chat_template=true",
    )  # fmt: skip
    parser.add_argument("--text", help="show the tokens of this text instead")
    parser.add_argument("--model", default="", help="a directory with a tokenizer; else --config's model")
    parser.add_argument("--config", help="the YAML of the job that trains on the data")
    parser.add_argument("--job", default="", help="sft, rm, prm, dpo, kto, kd, grpo or ppo; else by FILE's columns")
    parser.add_argument("--show-mask", action="store_true", help="mark the trained tokens")
    parser.add_argument("--ids", action="store_true", help="list every token with its id")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of each file, 0 for all; default {ROWS}")


def run(arguments: argparse.Namespace) -> int:
    import mindrlhf.config as configurations
    from mindrlhf.cli.train import JOBS

    if arguments.job and arguments.job not in JOBS:
        raise UserError(f"--job {arguments.job}: there are {', '.join(JOBS)}")
    if arguments.rows < 0:
        raise UserError(f"--rows {arguments.rows}: use 0 (all) or more")
    overrides = [word for word in arguments.words if "=" in word]
    file, *others = [word for word in arguments.words if "=" not in word] or [""]
    if others:
        raise UserError(f"{file}, {others[0]}: one FILE at a time")
    job = arguments.job or "sft"
    if file and not (arguments.job or arguments.config):
        job, form = _guess(file)
        overrides = [f"data.format={form}", *overrides] if form else overrides
    config = configurations.load_config(getattr(configurations, JOBS[job].config), arguments.config, overrides)
    tokenizer = _tokenizer(arguments, config.model)
    screen = _Screen(arguments.show_mask, arguments.ids, tokenizer)
    if arguments.text is not None:
        screen.show("text", _untrained(tokenizer, arguments.text))
        return 0
    if file:
        config.data.train = [configurations.SourceConfig(path=str(Path(file).resolve()))]
    if not config.data.train:
        raise UserError("nothing to show: give FILE, --text, or a --config with data.train")
    config.data.max_rows = arguments.rows
    for title, sequence in _sequences(job, config, tokenizer, _window(arguments, config)):
        screen.show(title, sequence)
    return 0


def _guess(file: str) -> tuple[str, str]:
    """(job, data.format) by the columns of the first row; no format: the default."""
    from mindrlhf.config import DataConfig
    from mindrlhf.data.readers import read_rows

    names, data = set(read_rows(file, 1)[0].values), DataConfig()
    if {data.chosen_key, data.rejected_key} <= names:
        return "dpo", ""
    for form, columns in (
        ("messages", {data.messages_key}),
        ("alpaca", {"instruction", "output"}),
        ("prompt", {data.prompt_key, data.response_key}),
        ("text", {data.text_key}),
    ):
        if columns <= names:
            return "sft", form
    fix = "give --job, and data.format=... or the keys of its columns"
    raise UserError(f"{file}: the columns {', '.join(sorted(names))} are of no known data set; {fix}")


def _tokenizer(arguments: argparse.Namespace, model: Any) -> Any:
    """--model's, or the one that the job would have."""
    from mindrlhf.data.tokenizers import add_special_tokens, load_tokenizer, train_tokenizer

    directory = arguments.model or model.tokenizer or model.path
    if directory:
        tokenizer = load_tokenizer(directory)
    elif model.build.tokenizer_files:
        tokenizer = train_tokenizer(model.build)
    else:
        raise UserError("--model: give the directory of a model, or a --config that names one")
    add_special_tokens(tokenizer, model.add_tokens)
    return tokenizer


def _window(arguments: argparse.Namespace, config: Any) -> int:
    """The most tokens of a sequence: what the job says, or the model's window, or none."""
    from mindrlhf.models.config import DecoderConfig

    training = getattr(config, "training", None)
    if training and training.max_tokens:
        return training.max_tokens
    directory = Path(arguments.model or config.model.path or ".")
    if (arguments.model or config.model.path) and (directory / "config.json").is_file():
        return DecoderConfig.read(directory).max_positions
    return config.model.build.decoder.get("max_position_embeddings", sys.maxsize)


def _untrained(tokenizer: Any, text: str) -> "Conversation":
    import numpy as np

    from mindrlhf.data.tokenizers import encode
    from mindrlhf.types import Conversation

    (ids,) = encode(tokenizer, [text])
    return Conversation(ids, np.zeros(len(ids), bool))


def _sequences(job: str, config: Any, tokenizer: Any, window: int) -> Iterator[tuple[str, "Conversation"]]:
    """(what it is, tokens and the trained ones among them) of every sequence that the job would put into its rows."""
    from mindrlhf.data.conversations import read_conversations
    from mindrlhf.data.judged_steps import read_judged_steps
    from mindrlhf.data.judgements import read_judgements
    from mindrlhf.data.preferences import read_preferences
    from mindrlhf.types import Conversation

    data, base = config.data, Path()
    sources = data.train
    if job in ("grpo", "ppo"):
        yield from _prompts(config, tokenizer)
    elif job == "prm":
        for number, steps in enumerate(read_judged_steps(sources, data, tokenizer, window, base, config.steps).items):
            yield f"example {number + 1}", _packed(Conversation(steps.ids, steps.judged), shift=0)
    elif job in ("rm", "dpo") or (job == "kto" and config.loss.name == "kto_pair"):
        for number, pair in enumerate(read_preferences(sources, data, tokenizer, window, base).items):
            for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                yield f"example {number + 1} {name}", _scored(answer) if job == "rm" else _packed(answer)
    elif job == "kto":
        for number, judgement in enumerate(read_judgements(sources, data, tokenizer, window, base).items):
            name = "desirable" if judgement.desirable else "undesirable"
            yield f"example {number + 1} {name}", _packed(judgement.answer)
    else:
        for number, conversation in enumerate(read_conversations(sources, data, tokenizer, window, base).items):
            yield f"example {number + 1}", _packed(conversation)


def _prompts(config: Any, tokenizer: Any) -> Iterator[tuple[str, "Conversation"]]:
    import numpy as np

    from mindrlhf.data.prompts import PromptDataset
    from mindrlhf.types import Conversation

    data = config.data
    data.label_key = ""
    prompts = PromptDataset.read(data.train, data, tokenizer, config.rollout.max_prompt_tokens, Path()).prompts
    for prompt in prompts:
        yield f"prompt {prompt.key + 1}", Conversation(prompt.ids, np.zeros(len(prompt.ids), bool))


def _scored(answer: "Conversation") -> "Conversation":
    from mindrlhf.trainer.reward_model import ending

    return _packed(ending(answer), shift=0)


def _packed(sequence: "Conversation", shift: int = 1) -> "Conversation":
    """The same, marked where the packed batch has targets; shift as in Packing."""
    import numpy as np

    from mindrlhf.data.packing import Packing, row_width
    from mindrlhf.types import Conversation

    width = row_width(len(sequence.ids))
    (batch,) = Packing.of([sequence.ids], [sequence.trained], 1, width, shift=shift).batches
    trained = np.zeros(len(sequence.ids), bool)
    trained[batch.index[batch.mask > 0] + shift] = True
    return Conversation(batch.tokens[0, : len(trained)], trained)


class _Screen:
    """Where sequences are shown: standard output, coloured in a terminal unless NO_COLOR is set."""

    def __init__(self, show_mask: bool, ids: bool, tokenizer: Any):
        sys.stdout.reconfigure(errors="replace")
        self.show_mask, self.ids, self.tokenizer = show_mask, ids, tokenizer
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.marks = (GREEN, PLAIN) if coloured else (OPEN, CLOSE)

    def show(self, title: str, sequence: "Conversation") -> None:
        from mindrlhf.data.tokenizers import decode

        begin, end = self.marks
        print(f"-- {title}: {len(sequence.ids)} tokens, {int(sequence.trained.sum())} trained")
        print("".join(f"{begin}{text}{end}" if on and self.show_mask else text for on, text in self._runs(sequence)))
        if not self.ids:
            return
        for number, (token, on) in enumerate(zip(sequence.ids.tolist(), sequence.trained.tolist(), strict=True)):
            line = f"{number:>6}{token:>9}  {decode(self.tokenizer, [token], False)!r}"
            print((f"{begin}{line}{end}" if begin == GREEN else f"{line}  trained") if on else line)

    def _runs(self, sequence: "Conversation") -> Iterator[tuple[bool, str]]:
        """Texts of neighbours that are alike trained or not; decoded with what is before them, which may matter."""
        import numpy as np

        from mindrlhf.data.tokenizers import decode

        ids, trained = sequence.ids, sequence.trained
        edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        before = ""
        for first, last in zip(edges, edges[1:], strict=False):
            text = decode(self.tokenizer, ids[:last].tolist(), False)
            yield bool(trained[first]) if len(trained) else False, self._printable(text[len(before) :])
            before = text

    def _printable(self, text: str) -> str:
        from mindrlhf.cli.chat import UNPRINTABLE

        return text.translate(UNPRINTABLE) if sys.stdout.isatty() else text
