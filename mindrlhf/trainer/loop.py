"""What every trainer's run shares: the output directory, resuming, evaluating, logging, saving, stopping."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import GRPOConfig, OfflineConfig, config_to_yaml, difference
from mindrlhf.errors import UserError
from mindrlhf.models.decoder import Decoder
from mindrlhf.models.fields import read_json
from mindrlhf.models.hf import Source
from mindrlhf.trainer.roles import Policy, open_checkpoint
from mindrlhf.utils.checkpoint import Checkpoints
from mindrlhf.utils.logging import RunLog
from mindrlhf.utils.progress import Progress
from mindrlhf.wrapper.scorer import Scorer
from mindrlhf.wrapper.train_step import TrainStep

# What may differ between the run that saved a checkpoint and the one that resumes it.
RESUMABLE = ("output", "logging.", "trainer.steps", "trainer.epochs", "trainer.save_every", "trainer.evaluate_every",
             "trainer.keep_checkpoints", "trainer.resume")  # fmt: skip


class Trainer(ABC):
    """Subclasses say what one step, one evaluation and their own state are; `fit` does the rest."""

    config: GRPOConfig | OfflineConfig
    policy: Policy
    train_step: TrainStep
    step: int = 0  # steps done
    _recorded: int | None = None  # the last step whose log lines hold; -1: none of them, None: there are none

    @abstractmethod
    def total_steps(self) -> int: ...

    @abstractmethod
    def prepare(self, log: RunLog) -> None:
        """Everything between a fresh policy and step 0."""

    @abstractmethod
    def run_step(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One step, self.step counted up at its end: metrics, and rows for the dump of completions."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data, by names without the prefix; empty where there is none."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """JSON-able: what besides weights, optimizer and step a resumed run needs."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None: ...

    @property
    def starts_at_path(self) -> bool:
        """Whether the policy, as training starts, is the checkpoint model.path."""
        return bool(self.config.model.path)

    def reference_scorer(self, fresh: bool, longest: int, temperature: float = 1.0) -> Scorer:
        """Of model.reference, or of the policy as training started; `fresh` says that it is as it was then.

        longest: tokens of the longest sequence that it will score. Raises UserError where it cannot.
        """
        model, first = self.config.model, self.checkpoints.path(0)
        if fresh and not model.reference:
            if not self.starts_at_path:
                self.save_checkpoint()  # step 0: a resumed run takes the reference from it
            return Scorer(Decoder(self.policy.decoder.config, self.policy.decoder.weights), temperature)
        directory = model.reference or (str(first) if first.is_dir() else model.path)
        if not directory:
            raise UserError(f"{first}: is gone, and with it the reference policy; start anew with another output=")
        reference = open_checkpoint(directory, head="logits").decoder
        if reference.lora:  # merged, as a fresh run has it, to the bit
            reference = Decoder(reference.config, reference.weights)
        for name, theirs, least in (
            ("logits", reference.config.vocab_size, self.policy.decoder.config.vocab_size),
            ("positions", reference.config.max_positions, longest),
        ):
            if theirs < least or (name == "logits" and theirs != least):
                raise UserError(f"model.reference: {directory} has {theirs} {name}, {least} are needed; take another")
        return Scorer(reference, temperature)

    def close(self, log: RunLog) -> dict[str, Any]:  # noqa: B027 - a hook
        """Called behind the last evaluation: more for the summary."""
        return {}

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.output / "checkpoints", self.config.trainer.keep_checkpoints)

    def save_checkpoint(self, state: dict[str, Any] | None = None) -> Path:
        """Weights, optimizer, step, data position and seed of now, as output/checkpoints/step-N."""
        state = {
            "step": self.step,
            "updates": self.train_step.updates,
            "skipped": self.train_step.skipped,
            **(self.state() if state is None else state),
        }
        return self.checkpoints.save(self.step, state, self._optimizer_sources(), self.policy.write)

    def _optimizer_sources(self) -> Iterable[Source]:
        return ((name, array.shape, lambda array=array: array) for name, array in self.train_step.state())

    def resume(self) -> bool:
        """From the newest whole checkpoint of the output directory, if there is one. Raises UserError where the
        directory holds another run."""
        steps = self.checkpoints.steps()
        recorded = self.output / "config.yaml"
        if not steps and not recorded.exists():
            return False
        if self.config.trainer.resume == "never":
            raise UserError(
                f"{self.output}: holds a run already; set output= to another directory, remove it, or go on with "
                "trainer.resume=auto"
            )
        changed = difference(recorded.read_text(encoding="utf-8"), config_to_yaml(self.config), RESUMABLE)
        if changed:
            raise UserError(
                f"{self.output}: holds a run with another configuration ({changed}); set output= to another directory, "
                "or remove it"
            )
        if not steps:  # stopped before its first checkpoint: the same again from the start
            self._recorded = -1
            return False
        state, moments = self.checkpoints.read(steps[-1])
        self.step = self._recorded = state["step"]
        self.policy.load(self.checkpoints.path(self.step))
        self.train_step.load_state(moments, state["updates"], state["skipped"])
        self.load_state(state)
        return True

    def fit(self) -> dict[str, Any]:
        """The whole run; returns what summary.json holds."""
        resumed = self.resume()
        total, logging = self.total_steps(), self.config.logging
        finished = self.output / "summary.json"
        if resumed and self.step >= total and finished.is_file():
            return read_json(finished)  # nothing to do, nothing to overwrite
        with RunLog(self.output, logging, config_to_yaml(self.config), self._recorded) as log:
            if resumed:
                print(f"resumed from {self.checkpoints.path(self.step)}")
            else:
                self.prepare(log)
            if self.step == 0 and not log.first("eval/"):
                self._evaluate(log)
            with Progress(total, self.step, self.output.name, logging.progress) as progress:
                while self.step < total:
                    self._one(log, progress, total)
            final = self._last_evaluation(log)
            path = self.save_checkpoint()
            summary = {
                "steps": self.step,
                "before": log.first("eval/"),
                "after": final,
                "skipped_updates": self.train_step.skipped,
                "seconds": round(log.seconds, 1),
                "checkpoint": str(path),
                **self.close(log),
            }
            log.summary(summary)
            log.plot()
        return summary

    def _one(self, log: RunLog, progress: Progress, total: int) -> None:
        before = self.state()
        try:
            metrics, rows = self.run_step()
        except UserError as error:  # a reward function that fails: nothing was updated in this step
            raise UserError(f"{error}; stopped at step {self.step}, saved {self.save_checkpoint(before)}") from error
        config = self.config.trainer
        if rows:
            log.completions(self.step, rows)
        if config.evaluate_every and self.step % config.evaluate_every == 0:
            metrics |= {f"eval/{name}": value for name, value in self.evaluate().items()}
        log.log(self.step, metrics)
        progress.update(metrics)
        if config.save_every and self.step % config.save_every == 0 and self.step < total:
            self.save_checkpoint()

    def _evaluate(self, log: RunLog) -> dict[str, float]:
        values = self.evaluate()
        if values:
            log.log(self.step, {f"eval/{name}": value for name, value in values.items()})
        return values

    def _last_evaluation(self, log: RunLog) -> dict[str, float]:
        last = log.last("eval/", self.step)
        return last if last else self._evaluate(log)


def mean(values) -> float:
    """Of any numbers; 0 where there are none, so that metrics of an empty batch stay finite."""
    values = np.asarray(values, np.float64)
    return float(values.mean()) if values.size else 0.0


def check_numbers(config: GRPOConfig | OfflineConfig, checks: Iterable[tuple[str, Any, bool, str]]) -> None:
    """Those of the job and those that every job has: (name, value, whether it holds, what it must be).

    Raises UserError.
    """
    trainer, optimizer = config.trainer, config.optimizer
    common = (
        ("seed", config.seed, config.seed >= 0, "0 or more"),
        ("trainer.rows", trainer.rows, trainer.rows > 0, "1 or more"),
        ("trainer.row_tokens", trainer.row_tokens, trainer.row_tokens >= 0, "0 (as needed) or more"),
        ("trainer.steps", trainer.steps, trainer.steps >= 0, "0 (by epochs) or more"),
        ("trainer.epochs", trainer.epochs, trainer.epochs > 0, "1 or more"),
        ("trainer.evaluate_rows", trainer.evaluate_rows, trainer.evaluate_rows >= 0, "0 (all) or more"),
        ("trainer.evaluate_every", trainer.evaluate_every, trainer.evaluate_every >= 0, "0 (at the ends) or more"),
        ("trainer.save_every", trainer.save_every, trainer.save_every >= 0, "0 (at the end) or more"),
        ("optimizer.beta1", optimizer.beta1, 0 <= optimizer.beta1 < 1, "at least 0 and under 1"),
        ("optimizer.beta2", optimizer.beta2, 0 <= optimizer.beta2 < 1, "at least 0 and under 1"),
        ("optimizer.epsilon", optimizer.epsilon, optimizer.epsilon > 0, "over 0"),
    )
    for name, value, holds, expected in (*checks, *common):
        if not holds:
            raise UserError(f"{name}: {value} must be {expected}")
