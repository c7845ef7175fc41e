"""What every trainer's run shares: the output directory, resuming, evaluating, logging, saving, stopping."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import OfflineConfig, OnlineConfig, config_to_yaml, difference
from mindrlhf.config.reading import read_json
from mindrlhf.errors import CommonError, UserError
from mindrlhf.models.decoder import Decoder
from mindrlhf.models.hf import Source
from mindrlhf.trainer.best import Best
from mindrlhf.trainer.layouts import described
from mindrlhf.trainer.roles import Policy, check_same_tokens, open_checkpoint
from mindrlhf.utils.checkpoint import Checkpoints
from mindrlhf.utils.logging import RunLog
from mindrlhf.utils.parallel import from_main, is_main, world
from mindrlhf.utils.progress import Progress
from mindrlhf.wrapper.scorer import Scorer
from mindrlhf.wrapper.train_step import TrainStep

# What may differ between the run that saved a checkpoint and the one that resumes it.
RESUMABLE = ("output", "logging.", "memory.", "parallel.", "rollout.parallel.", "rollout.check_sync", "trainer.steps",
             "trainer.epochs", "trainer.save_every", "trainer.evaluate_every", "trainer.keep_checkpoints",
             "trainer.best", "trainer.best_is", "trainer.patience", "trainer.resume", "rewards[].urls",
             "rewards[].timeout", "rewards[].retries")  # fmt: skip


class Trainer(ABC):
    """Subclasses say what one step, one evaluation and their own state are; `fit` does the rest."""

    config: OnlineConfig | OfflineConfig
    policy: Policy
    train_step: TrainStep
    step: int = 0  # steps done
    best = Best()  # of the evaluations so far
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
        model = self.config.model
        return bool(model.path) and not model.add_tokens

    def reference_scorer(self, fresh: bool, longest: int, temperature: float = 1.0) -> Scorer:
        """Of model.reference, or of the policy as training started; `fresh` says that it is as it was then.

        longest: tokens of the longest sequence that it will score. Raises UserError where it cannot.
        """
        model, first = self.config.model, self.checkpoints.path(0)
        if fresh and not model.reference:
            if not self.starts_at_path:
                self._save()  # step 0: a resumed run takes the reference from it
            return self.copy_scorer(temperature)
        directory = model.reference or (str(first) if first.is_dir() else model.path)
        if not directory:
            raise UserError(f"{first}: is gone, and with it the reference policy; start anew with another output=")
        decoder = self.policy.decoder
        make = decoder.config.compute.applied_to(Decoder)
        opened = open_checkpoint(directory, head="logits", layout=decoder.layout, make=make)
        check_same_tokens(self.policy.tokenizer, opened.tokenizer, f"model.reference: {directory}")
        reference = opened.decoder
        if reference.lora:  # merged, as a fresh run has it, to the bit
            reference = Decoder(reference.config, reference.weights, layout=reference.layout)
        for name, theirs, least in (
            ("logits", reference.config.vocab_size, self.policy.decoder.config.vocab_size),
            ("positions", reference.config.max_positions, longest),
        ):
            if theirs < least or (name == "logits" and theirs != least):
                raise UserError(f"model.reference: {directory} has {theirs} {name}, {least} are needed; take another")
        return Scorer(reference, temperature)

    def copy_scorer(self, temperature: float) -> Scorer:
        """Of the policy as it is now, adapters merged."""
        decoder = self.policy.decoder
        return Scorer(Decoder(decoder.config, decoder.weights, layout=decoder.layout), temperature)

    def close(self, log: RunLog) -> dict[str, Any]:  # noqa: B027 - a hook
        """Called behind the last evaluation: more for the summary."""
        return {}

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.output / "checkpoints", self.config.trainer.keep_checkpoints)

    def save_checkpoint(self, rank_id: int = 0, epoch: int | None = None) -> Path:
        """Weights, optimizer, step, data position and seed of now, as output/checkpoints/step-N.

        rank_id is the process's number. epoch is the program's own count, which the
        checkpoint does not need: N is the step. All processes call it.
        """
        check_rank(rank_id)
        return self._save()

    def _save(self, state: dict[str, Any] | None = None) -> Path:
        """state: what `state()` gave when the weights were as they are; None: now."""
        state = {
            "step": self.step,
            "updates": self.train_step.updates,
            "skipped": self.train_step.skipped,
            "best": self.best.state(),
            **(self.state() if state is None else state),
        }
        return self.checkpoints.save(self.step, state, self._sources(), self.write)

    def _sources(self) -> Iterable[Source]:
        return ((name, array.shape, lambda array=array: array) for name, array in self.tensors())

    def write(self, directory: Path) -> None:
        """The models of a checkpoint, into its directory."""
        self.policy.write(directory)

    def load(self, directory: Path) -> None:
        """The inverse of `write`."""
        self.policy.load(directory)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """What else a checkpoint holds: the optimizer's tensors by name."""
        yield from self.train_step.state()

    def load_tensors(self, read: Callable[[str], np.ndarray], state: dict[str, Any]) -> None:
        """The inverse of `tensors`; state is what was saved beside them."""
        self.train_step.load_state(read, state["updates"], state["skipped"])

    def resume(self) -> bool:
        """From the newest whole checkpoint of the output directory, if there is one. Raises UserError where the
        directory holds another run."""
        steps = self.checkpoints.steps()
        recorded = self.output / "config.yaml"
        known = from_main(lambda: recorded.read_text(encoding="utf-8") if recorded.exists() else None)
        if not steps and known is None:
            return False
        if self.config.trainer.resume == "never":
            raise UserError(
                f"{self.output}: holds a run already; set output= to another directory, remove it, or go on with "
                "trainer.resume=auto"
            )
        changed = difference(known, config_to_yaml(self.config), RESUMABLE)
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
        self.load(self.checkpoints.path(self.step))
        self.load_tensors(moments, state)
        self.best = Best.resumed(state["best"], self.config.trainer)
        self.load_state(state)
        return True

    def fit(self) -> dict[str, Any]:
        """The whole run; returns what summary.json holds."""
        self.best = Best.of(self.config.trainer)
        resumed = self.resume()
        total, logging = self.total_steps(), self.config.logging
        finished = self.output / "summary.json"
        if resumed and (self.step >= total or self._is_stopped) and from_main(finished.is_file):
            return from_main(lambda: read_json(finished))  # nothing to do, nothing to overwrite
        with RunLog(self.output, logging, config_to_yaml(self.config), self._recorded) as log:
            if is_main() and world().size > 1:
                print(described(self.config, self.policy.decoder.layout), flush=True)
            if not resumed:
                self.prepare(log)
            elif is_main():
                print(f"resumed from {self.checkpoints.path(self.step)}")
            self._start_best(log)
            with Progress(total, self.step, self.output.name, logging.progress) as progress:
                while self.step < total and not self._is_stopped:
                    self._one(log, progress, total)
            final = log.last("eval/", self.step) or self._evaluate(log)
            path = self._save()
            summary = {
                "steps": self.step,
                "before": log.first("eval/"),
                "after": final,
                "skipped_updates": self.train_step.skipped,
                "seconds": round(log.seconds, 1),
                "checkpoint": str(path),
                **self._best_summary(total),
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
            if not can_save(error):
                raise
            raise UserError(f"{error}; stopped at step {self.step}, saved {self._save(before)}") from error
        config = self.config.trainer
        if rows:
            log.completions(self.step, rows)
        evaluated = bool(config.evaluate_every) and self.step % config.evaluate_every == 0
        values = self._evaluated() if evaluated else {}
        metrics |= {f"eval/{name}": value for name, value in values.items()}
        log.log(self.step, metrics)
        progress.update(metrics)
        if evaluated:
            self._judge(values)
        if config.save_every and self.step % config.save_every == 0 and self.step < total:
            self._save()

    def _evaluate(self, log: RunLog) -> dict[str, float]:
        values = self._evaluated()
        if values:
            log.log(self.step, {f"eval/{name}": value for name, value in values.items()})
        self._judge(values)
        return values

    def _evaluated(self) -> dict[str, float]:
        """What `evaluate` says; a reward function that fails in it costs nothing of what was trained."""
        try:
            return self.evaluate()
        except UserError as error:
            if self.step == 0 or not can_save(error):
                raise
            raise UserError(f"{error}; stopped at step {self.step}, saved {self._save()}") from error

    # -- the best checkpoint ----------------------------------------------------------------------------------------

    @property
    def _is_stopped(self) -> bool:
        """Whether trainer.patience is used up."""
        return 0 < self.config.trainer.patience <= self.best.worse

    def _start_best(self, log: RunLog) -> None:
        """With the evaluation at step 0, or, where a run goes on under another metric, the one at its step."""
        logged, best = log.last("eval/", self.step), self.best
        if logged and best.seen < self.step:  # the checkpoint was saved before this evaluation
            self._judge(logged)
        elif not logged and (self.step == 0 or (best.metric and best.seen < 0)):
            self._evaluate(log)
        elif best.step is not None:  # the run may have been killed between a checkpoint and its mark
            self.checkpoints.mark_best(best.step, best.metric, best.value)

    def _judge(self, values: dict[str, float | None]) -> None:
        """Where this evaluation is the best so far, its checkpoint is saved, and kept instead of the best before."""
        if not self.best.metric:
            return
        self.best = self.best.after(self.step, values)
        if self.best.step == self.step:
            self._save()
            self.checkpoints.mark_best(self.step, self.best.metric, self.best.value)

    def _best_summary(self, total: int) -> dict[str, Any]:
        best = self.best
        if not best.metric:
            return {}
        path = None if best.step is None else str(self.checkpoints.path(best.step))
        found = {"metric": best.metric, "step": best.step, "value": best.value, "checkpoint": path}
        return {"best": {**found, "evaluations_since": best.worse}, "stopped_early": self.step < total}


def can_save(error: UserError) -> bool:
    """Behind a mistake that this process met: saving needs all of them."""
    return world().size == 1 or isinstance(error, CommonError)


def check_rank(rank_id: int) -> None:
    """Raises UserError where that is not this process's number."""
    if rank_id not in (0, world().rank):
        raise UserError(
            f"rank_id {rank_id}: this is process {world().rank} of {world().size}; pass its number, or none"
        )


def prefixed(prefix: str, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same under "prefix.name"."""
    return ((f"{prefix}.{name}", array) for name, array in tensors)


def mean(values) -> float:
    """Of any numbers; 0 where there are none, so that metrics of an empty batch stay finite."""
    values = np.asarray(values, np.float64)
    return float(values.mean()) if values.size else 0.0


def check_numbers(config: OnlineConfig | OfflineConfig, checks: Iterable[tuple[str, Any, bool, str]]) -> None:
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
        ("trainer.patience", trainer.patience, trainer.patience >= 0, "0 (off) or more"),
        ("trainer.patience", trainer.patience, not trainer.patience or bool(trainer.best),
         "0 (off) without trainer.best; set that to a metric of the evaluations, loss for example"),
        ("trainer.patience", trainer.patience, not trainer.patience or trainer.evaluate_every > 0,
         "0 (off) without evaluations on the way; set trainer.evaluate_every"),
        ("optimizer.beta1", optimizer.beta1, 0 <= optimizer.beta1 < 1, "at least 0 and under 1"),
        ("optimizer.beta2", optimizer.beta2, 0 <= optimizer.beta2 < 1, "at least 0 and under 1"),
        ("optimizer.epsilon", optimizer.epsilon, optimizer.epsilon > 0, "over 0"),
    )  # fmt: skip
    for name, value, holds, expected in (*checks, *common):
        if not holds:
            raise UserError(f"{name}: {value} must be {expected}")
