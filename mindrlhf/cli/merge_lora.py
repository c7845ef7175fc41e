"""Add an adapter's weights to its base model's, and write them as one Hugging Face checkpoint."""

import argparse
import os
import shutil
from pathlib import Path

from mindrlhf.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="a directory with adapter_config.json")
    parser.add_argument("--output", required=True, help="where the checkpoint goes; must not exist")
    parser.add_argument("--base", default="", help="the base model's directory; else what adapter_config.json names")


def run(arguments: argparse.Namespace) -> int:
    from mindrlhf.data.tokenizers import load_tokenizer
    from mindrlhf.models.conversion import to_stored
    from mindrlhf.models.model_directory import ModelDirectory
    from mindrlhf.models.peft import CONFIG_FILE, is_adapter
    from mindrlhf.utils.checkpoint import PARTIAL, write_model

    output = Path(arguments.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already; remove it or name another directory")
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: no such directory to write it into; make {output.resolve().parent} first")
    if not is_adapter(Path(arguments.adapter)):
        raise UserError(f"--adapter {arguments.adapter}: has no {CONFIG_FILE}; give a PEFT adapter's directory")
    model = ModelDirectory.read(arguments.adapter, arguments.base)
    tokenizer = load_tokenizer(model.tokenizer)
    sources = to_stored(model.config, model.merged())
    # Beside its place and renamed: there is a whole checkpoint or none.
    partial = output.resolve().with_name(PARTIAL + output.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_model(partial, model.config, sources, tokenizer, model.generation_config())
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{model.base} with {arguments.adapter} in {output}")
    return 0
