"""What a run leaves behind: config, metrics, sampled answers, curves, a summary; TensorBoard, wandb and swanlab too."""

import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import LoggingConfig
from mindrlhf.errors import UserError
from mindrlhf.utils.checkpoint import PARTIAL, write_json
from mindrlhf.utils.parallel import from_main, is_main

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"


class RunLog:
    """The files of one run, in its output directory. A context manager.

    Lines of the warm-up carry `warmup_step`, which is then their axis in TensorBoard, wandb and swanlab. Of several
    processes the main one writes, and all may ask.
    """

    def __init__(
        self, directory: Path, logging: LoggingConfig, config_text: str, resumed_step: int | None = None
    ) -> None:
        """resumed_step: the step of the checkpoint that the run goes on from; what was logged after it is dropped.

        Raises UserError for a package that `logging` asks for and that is not installed, for a broken metrics file,
        and, on a fresh start, for a directory that holds a run already.
        """
        for package in ("wandb", "swanlab"):
            if getattr(logging, package) and importlib.util.find_spec(package) is None:
                raise UserError(f"logging.{package}: {package} is not installed; pip install {package}")
        self.directory, self.logging, self.writes = Path(directory), logging, is_main()
        self.start = time.monotonic()
        self.writers: dict[str, Any] = {}  # TensorBoard, by folder; opened when first written to
        self.purge_step = None if resumed_step is None else resumed_step + 1
        from_main(lambda: self._open(config_text, resumed_step))

    def _open(self, config_text: str, resumed_step: int | None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        paths = [self.directory / METRICS, self.directory / COMPLETIONS]
        seconds = 0.0
        for path in paths:
            if resumed_step is None and path.exists():
                raise UserError(f"{path} is there, but no checkpoint to go on from; remove it or set output= elsewhere")
            if resumed_step is not None and path.exists():
                last = _drop_lines_after(path, resumed_step)
                seconds = max(seconds, last.get("time", 0.0))
        # A resumed run's clock goes on where the kept lines end.
        self.start -= seconds
        _write_text(self.directory / "config.yaml", config_text)
        self.metrics_file = open(paths[0], "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self.completions_file = open(paths[1], "a", encoding="utf-8")  # noqa: SIM115
        self.trackers = _start_trackers(self.directory, self.logging, config_text)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between an interruption and going on."""
        return time.monotonic() - self.start

    def log(self, step: int, metrics: dict[str, float | str]) -> None:
        """One line of metrics.jsonl, on the disk when this returns; a value that is not finite is written as null."""
        if not self.writes:
            return
        values = _plain(metrics)
        _write_line(self.metrics_file, {"step": step, "time": round(self.seconds, 3), **values})
        # A text, such as the name of a tensor that was not finite, has no curve.
        finite = {name: value for name, value in values.items() if isinstance(value, int | float)}
        axis = finite.pop("warmup_step", None)
        if self.logging.tensorboard:
            self._tensorboard(step if axis is None else int(axis), finite, warmup=axis is not None)
        for tracker in self.trackers:
            tracker(step, axis, finite)

    def completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Sampled answers: one line each in completions.jsonl."""
        for row in rows if self.writes else ():
            _write_line(self.completions_file, {"step": step, **_plain(row)})

    def first(self, prefix: str) -> dict[str, float]:
        """The metrics that begin with `prefix`, without it, of the first line that has any; {} where none has."""
        return from_main(lambda: next(self._having(prefix), {}))

    def last(self, prefix: str, step: int) -> dict[str, float]:
        """The same of the last line of that step which has any; {} where none has."""
        return from_main(lambda: next(iter(list(self._having(prefix, step))[::-1]), {}))

    def _having(self, prefix: str, step: int | None = None) -> Iterator[dict[str, float]]:
        lines = (line for line, _ in _lines(self.directory / METRICS) if step in (None, line["step"]))
        return filter(None, (_with_prefix(line, prefix) for line in lines))

    def summary(self, values: dict[str, Any]) -> None:
        """The numbers that the run ends with, as summary.json."""
        write_json(self.directory / "summary.json", _plain(values))

    def plot(self) -> None:
        """All metrics so far as curves.png."""
        if not self.writes:
            return
        from mindrlhf.utils.curves import plot_curves

        metrics = [line for line, _ in _lines(self.directory / METRICS)]
        plot_curves(metrics, self.directory / "curves.png", self.directory.resolve().name)

    def close(self) -> None:
        if not self.writes:
            return
        for file in (self.metrics_file, self.completions_file, *self.writers.values()):
            file.close()
        for tracker in self.trackers:
            tracker.close()
        self.writers, self.trackers = {}, []

    def _tensorboard(self, step: int, values: dict[str, float], warmup: bool) -> None:
        # The warm-up counts its own steps. In one folder with the others, resuming would purge it by their count.
        folder = "tb/warmup" if warmup else "tb"
        if folder not in self.writers:
            from tensorboardX import SummaryWriter

            purge_step = None if warmup else self.purge_step
            # Without the suffix, files opened within the same second overwrite one another.
            suffix = f".from-{purge_step or 0}"
            logdir = str(self.directory / folder)
            self.writers[folder] = SummaryWriter(logdir, purge_step=purge_step, filename_suffix=suffix)
        for name, value in values.items():
            self.writers[folder].add_scalar(name, value, step)


class _Wandb:
    def __init__(self, directory: Path, project: str, config: dict[str, Any]):
        import wandb

        self.run = wandb.init(project=project, name=directory.resolve().name, dir=str(directory), config=config)
        # wandb's own step only rises by one a call; these two are the axes that mean something.
        self.run.define_metric("*", step_metric="step")
        self.run.define_metric("warmup/*", step_metric="warmup_step")

    def __call__(self, step: int, warmup_step: float | None, values: dict[str, float]) -> None:
        axis = {"step": step} if warmup_step is None else {"warmup_step": warmup_step}
        self.run.log({**values, **axis})

    def close(self) -> None:
        self.run.finish()


class _Swanlab:
    def __init__(self, directory: Path, project: str, config: dict[str, Any]):
        import swanlab

        self.swanlab = swanlab
        logs = str(directory / "swanlog")
        swanlab.init(project=project, experiment_name=directory.resolve().name, logdir=logs, config=config)

    def __call__(self, step: int, warmup_step: float | None, values: dict[str, float]) -> None:
        self.swanlab.log(values, step=step if warmup_step is None else int(warmup_step))

    def close(self) -> None:
        self.swanlab.finish()


def _start_trackers(directory: Path, logging: LoggingConfig, config_text: str) -> list[Any]:
    import yaml

    kinds = [kind for kind, wanted in ((_Wandb, logging.wandb), (_Swanlab, logging.swanlab)) if wanted]
    return [kind(directory, logging.project, yaml.safe_load(config_text) or {}) for kind in kinds]


def _with_prefix(line: dict[str, Any], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}


def _plain(value: Any) -> Any:
    """As JSON can hold it: NumPy values as Python's, a number that is not finite as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_line(file: Any, values: dict[str, Any]) -> None:
    file.write(json.dumps(values, ensure_ascii=False) + "\n")
    file.flush()


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(PARTIAL + path.name)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each line parsed and as it stands. A last line that a kill has cut off is left out."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                yield json.loads(text), text
            except json.JSONDecodeError:
                if text.endswith("\n"):
                    raise UserError(f"{path}:{number}: not a line of JSON; remove the line") from None


def _drop_lines_after(path: Path, step: int) -> dict[str, Any]:
    """Rewrite the file, beside and renamed, with the lines up to that step only; returns the last of them."""
    last: dict[str, Any] = {}
    temporary = path.with_name(PARTIAL + path.name)
    with open(temporary, "w", encoding="utf-8") as file:
        for values, text in _lines(path):
            if values["step"] <= step:
                last = values
                file.write(text.rstrip("\n") + "\n")
    os.replace(temporary, path)
    return last
