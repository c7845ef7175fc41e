"""Checkpoints: Hugging Face directories with what training needs beside the weights.

Every one is written into a hidden directory beside its place, flushed, and renamed: a kill at any moment leaves either
the whole checkpoint or none.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config.reading import read_json
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import Source
from mindrlhf.models.hf import flush_path, read_tensors, write_tensors
from mindrlhf.utils.parallel import from_main, is_main

STATE_FILE = "trainer_state.json"
OPTIMIZER = "optimizer"  # a directory inside the checkpoint, tensors in the same format
PARTIAL = ".partial-"
BEST_FILE = "best.json"  # beside the checkpoints: which of them is kept as the best


def write_model(
    directory: Path,
    config: DecoderConfig,
    tensors: Iterable[Source],
    tokenizer: Any,
    generation_config: dict[str, Any],
    shard_bytes: float = 5e9,
) -> None:
    """config.json, safetensors, tokenizer files and generation_config.json: what transformers loads."""
    write_json(directory / "config.json", config.to_hf())
    write_json(directory / "generation_config.json", generation_config)
    write_tensors(directory, tensors, shard_bytes)
    write_tokenizer(directory, tokenizer)


def write_tokenizer(directory: Path, tokenizer: Any) -> None:
    """By the main process alone."""
    if is_main():
        tokenizer.save_pretrained(str(directory))


def write_json(path: Path, values: Any) -> None:
    """Written beside, flushed and renamed; by the main process alone."""
    if not is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(PARTIAL + path.name)
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Checkpoints:
    """The checkpoints step-000000, step-000100, ... of one run."""

    def __init__(self, directory: Path, keep: int = 0):
        self.directory, self.keep = directory, keep

    def steps(self) -> list[int]:
        """Whole checkpoints, oldest first; the same in every process, and all have to ask."""
        return from_main(self.own_steps)

    def own_steps(self) -> list[int]:
        """As this process sees them."""
        names = [path.name for path in self.directory.glob("step-*") if (path / STATE_FILE).is_file()]
        return sorted(int(name.removeprefix("step-")) for name in names)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def save(
        self, step: int, state: dict[str, Any], optimizer: Iterable[Source], write: Callable[[Path], None]
    ) -> Path:
        """`write` puts the model into the directory that it is given. An existing checkpoint of that step stays.

        All processes call it, since they bring tensors together; the main one writes.
        """
        final = self.path(step)
        partial = self.directory / f"{PARTIAL}step-{step:06d}"
        if from_main(lambda: self._is_there(final, partial)):
            return final
        write(partial)
        write_tensors(partial / OPTIMIZER, optimizer)
        write_json(partial / STATE_FILE, state)
        from_main(lambda: self._finish(partial, final))
        return final

    def _is_there(self, final: Path, partial: Path) -> bool:
        if final.exists():
            return True
        self.directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        return False

    def _finish(self, partial: Path, final: Path) -> None:
        for path in [*partial.rglob("*"), partial]:
            flush_path(path)
        os.replace(partial, final)
        flush_path(self.directory)
        self._remove_old()

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """That checkpoint stays, whatever `keep` says; the one that was marked before is like the others again."""
        write_json(self.directory / BEST_FILE, {"step": step, "metric": metric, "value": value})
        if is_main():
            self._remove_old()

    def _remove_old(self) -> None:
        """The best and the first stay: the policy as training started is the reference that a resumed run needs."""
        best = self.directory / BEST_FILE
        spared = {0, read_json(best).get("step")} if best.is_file() else {0}
        if self.keep:
            for step in [step for step in self.own_steps() if step > 0][: -self.keep]:
                if step not in spared:
                    shutil.rmtree(self.path(step))
        for partial in self.directory.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)

    def read(self, step: int) -> tuple[dict[str, Any], Callable[[str], np.ndarray]]:
        """(state, optimizer tensors by name) of a whole checkpoint."""
        path = self.path(step)
        state = read_json(path / STATE_FILE)
        if not isinstance(state, dict):
            raise UserError(f"{path / STATE_FILE}: not a JSON object; remove {path} to resume from the one before")
        return state, read_tensors(path / OPTIMIZER).__getitem__
