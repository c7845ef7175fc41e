"""Convert a checkpoint between Hugging Face, MindSpore and MindFormers, one tensor in memory at a time."""

import argparse
import os
import re
import shutil
from pathlib import Path

from mindrlhf.errors import UserError

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint's directory, or one .ckpt or .safetensors file")
    parser.add_argument("target", metavar="TARGET", help="the directory to write; must not exist")
    parser.add_argument("--to", required=True, choices=("hf", "mindspore", "mindformers"), help="whose names and files")
    parser.add_argument("--files", choices=("safetensors", "ckpt"), default="", help="of MindSpore and MindFormers")
    parser.add_argument("--shard-size", default="5GB", help="of one file at most, such as 500MB; default 5GB")
    parser.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="of the weights"
    )
    parser.add_argument("--qkv-concat", action="store_true", help="MindFormers: fused, for a model with qkv_concat")
    parser.add_argument("--config", default="", metavar="DIR", help="where config.json is, if it is not in SOURCE")
    parser.add_argument("--check", action="store_true", help="write nothing: compare TARGET, which exists, with SOURCE")


def run(arguments: argparse.Namespace) -> int:
    from mindrlhf.models.checkpoint_formats import Conversion, compare, convert
    from mindrlhf.utils.checkpoint import PARTIAL

    source, target = Path(arguments.source), Path(arguments.target)
    asked = Conversion(
        source, arguments.to, _described(arguments), arguments.dtype, arguments.files, arguments.qkv_concat,
        _bytes(arguments.shard_size),
    )  # fmt: skip
    if arguments.check:
        report = compare(asked, target)
        print(f"{report.tensors} tensors of {target} have the bytes of {source}'s")
        _print_left_out(report.left_out)
        return 0
    if target.exists():
        raise UserError(f"TARGET {target}: exists already; remove it, name another directory, or --check it")
    if not target.resolve().parent.is_dir():
        raise UserError(f"TARGET {target}: no such directory to write it into; make {target.resolve().parent} first")
    # Beside its place and renamed: there is a whole checkpoint or none.
    partial = target.resolve().with_name(PARTIAL + target.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        report = convert(asked, partial)
        os.replace(partial, target.resolve())
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = f"{report.files} files" if report.files > 1 else "one file"
    print(f"{report.tensors} tensors, {report.bytes / 1e9:.3f} GB, in {files} of {target}")
    print("read back: every tensor has the SHA-256 of what was written; checksums.json holds them")
    _print_left_out(report.left_out)
    return 0


def _described(arguments: argparse.Namespace) -> Path:
    """The directory with config.json."""
    from mindrlhf.models.peft import is_adapter

    source = Path(arguments.source)
    if is_adapter(source):
        raise UserError(f"{source}: an adapter without its model; merge them first (mindrlhf merge-lora)")
    directory = Path(arguments.config or (source.parent if source.is_file() else source))
    if source.exists() and not (directory / "config.json").is_file():
        fix = "give --config with the directory of the model's Hugging Face config.json and tokenizer"
        raise UserError(f"{directory}: no config.json here; {fix}")
    return directory


def _bytes(text: str) -> float:
    """Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b?", text.strip().lower())
    if not found or float(found[1]) == 0:
        raise UserError(f"--shard-size {text}: not a size; write it as 5GB or 500MB")
    return float(found[1]) * _UNITS[found[2]]


def _print_left_out(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"left out: {', '.join(names[:3])}{more}")
