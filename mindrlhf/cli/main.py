"""The command line: `mindrlhf COMMAND ...`.

A command's module is imported when that command is used, and imports nothing heavy itself before its `run`, so that
every `--help` is instant.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence

from mindrlhf.errors import UserError
from mindrlhf.utils.parallel import prepare_environment, world

TRAINING = "mindrlhf.cli.train"

# name, help, module with add_arguments(parser) and run(arguments) -> exit code
COMMANDS = (
    ("sft", "fine-tune a model on answers", "mindrlhf.cli.train"),
    ("rm", "train a reward model on pairs of answers", "mindrlhf.cli.train"),
    ("prm", "train a process reward model on judged steps", "mindrlhf.cli.train"),
    ("dpo", "train a policy on pairs of answers: DPO and its kin", "mindrlhf.cli.train"),
    ("kto", "train a policy on answers that were liked or not", "mindrlhf.cli.train"),
    ("kd", "distil a teacher into a student", "mindrlhf.cli.train"),
    ("grpo", "train a policy online: GRPO and its kin", "mindrlhf.cli.train"),
    ("ppo", "train a policy online with a critic", "mindrlhf.cli.train"),
    ("generate", "answer prompts with a model; make data sets of the best answers", "mindrlhf.cli.generate"),
    ("eval", "score a model on held-out prompts", "mindrlhf.cli.eval"),
    ("score", "score answers with a reward model", "mindrlhf.cli.score"),
    ("serve-rm", "serve a reward model by HTTP, for the rewards of runs", "mindrlhf.cli.serve_rm"),
    ("chat", "talk with a model", "mindrlhf.cli.chat"),
    ("merge-lora", "write a model with an adapter merged into it", "mindrlhf.cli.merge_lora"),
    ("convert", "convert a checkpoint: Hugging Face, MindSpore, MindFormers", "mindrlhf.cli.convert"),
    ("tokenize", "show which tokens of a data set are trained", "mindrlhf.cli.tokenize"),
    ("compare-loss", "compare the losses of two runs", "mindrlhf.cli.compare_loss"),
    ("plan", "what a job needs of each device, and its best layouts", "mindrlhf.cli.plan"),
    ("bench", "measure what the KV cache is worth on this machine", "mindrlhf.cli.bench"),
    ("env", "show versions and hardware, and what is missing", "mindrlhf.cli.env"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a user's mistake, 130 interrupted, else the command's own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # While a graph runs, MindSpore's own handler turns Ctrl-C into SIGTERM.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        prepare_environment()
        return _run(arguments)
    except UserError as error:
        print(f"mindrlhf: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `mindrlhf env | head`: nobody reads any more, and Python's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        print("; ".join(["mindrlhf: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130


def package_version() -> str:
    try:
        return importlib.metadata.version("mindrlhf")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from the source tree


def _run(arguments: list[str]) -> int:
    modules = {name: module for name, _, module in COMMANDS}
    if not arguments or arguments[0].startswith("-"):
        parser = _top_parser()
        parser.parse_args(arguments)  # prints and leaves for --help, --version and what is unknown
        parser.print_help(sys.stderr)
        return 2
    name = arguments[0]
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(modules)
        raise UserError(f"unknown command {name!r}; {hint}")
    if world().size > 1 and modules[name] != TRAINING:
        raise UserError(f"mindrlhf {name} runs in one process; start it without msrun or mindrlhf.launch (RANK_SIZE)")
    module = importlib.import_module(modules[name])
    parser = argparse.ArgumentParser(
        prog=f"mindrlhf {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=name)
    module.add_arguments(parser)
    # Intermixed: `a.b=c` overrides may stand before and after the options.
    parsed = parser.parse_intermixed_args(arguments[1:])
    from mindrlhf.utils import compile_cache  # behind --help, which it would slow down

    compile_cache.start("\0".join(arguments))
    return module.run(parsed)


def _top_parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<14}{text}" for name, text, _ in COMMANDS]
    parser = argparse.ArgumentParser(
        prog="mindrlhf",
        usage="mindrlhf COMMAND ...",
        description="Post-training of language models on MindSpore.",
        epilog="\n".join(["commands:", *lines, "", "mindrlhf COMMAND --help tells more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mindrlhf {package_version()}")
    return parser
