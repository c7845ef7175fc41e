"""Training on whole answers: reward models and the DPO family; KTO is in kto.py."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from mindrlhf.config import DPOConfig, KTOConfig, RewardConfig, SourceConfig
from mindrlhf.data.examples import Examples
from mindrlhf.data.preferences import read_preferences
from mindrlhf.errors import UserError
from mindrlhf.models.peft import is_adapter
from mindrlhf.preference_losses import PREFERENCE_LOSSES
from mindrlhf.trainer.offline import TEST, TRAIN, OfflineTrainer
from mindrlhf.trainer.reference import ADAPTER_OFF, CACHED, Reference
from mindrlhf.trainer.reward_model import RewardModel, ending
from mindrlhf.trainer.roles import Policy
from mindrlhf.types import Conversation, PairBatch, Preference
from mindrlhf.utils.curves import plot_scores
from mindrlhf.utils.logging import RunLog
from mindrlhf.utils.parallel import is_main
from mindrlhf.wrapper.preference_objectives import PreferenceObjective, RewardObjective
from mindrlhf.wrapper.scorer import Scorer

SMOOTHED = ("cdpo", "robust")  # the rows of the table that know label_smoothing


class PreferenceTrainer(OfflineTrainer):
    """A loss of whole answers, as the mean over the examples of each optimizer step."""

    batch_type: type
    together = 1  # answers of an example, which must lie in one micro-batch
    shift = 1  # 1: answers are predicted; 0: they are scored where they end

    def read(self, sources: list[SourceConfig]) -> Examples:
        """Pairs of answers."""
        return read_preferences(sources, self.config.data, self.policy.tokenizer, self.max_tokens, Path())

    @abstractmethod
    def fields(self, split: str, numbers: Sequence[int]) -> dict[str, Sequence[float]]:
        """What the batch type has beside the rows: one number for each answer of those examples."""

    def batches(self, split: str, numbers: Sequence[int]) -> list[tuple]:
        examples = self.examples[split].items
        packing = self.pack([s for n in numbers for s in self.sequences(examples[n])], self.together, self.shift)
        fields = {name: packing.by_sequence(values) for name, values in self.fields(split, numbers).items()}
        return [
            self.batch_type(*rows, **{name: arrays[i] for name, arrays in fields.items()})
            for i, rows in enumerate(packing.batches)
        ]


class RewardTrainer(PreferenceTrainer):
    """A reward model on the Bradley-Terry loss: a scalar at the last token.

    RewardTrainer(load_config(RewardConfig, "job.yaml")).fit()
    Ouyang et al. 2022, arXiv 2203.02155.
    """

    config: RewardConfig
    head, unit, batch_type, together, shift = "score", "pairs", PairBatch, 2, 0
    has_margins = True
    scores: np.ndarray  # held_out_scores, when a checkpoint was last saved

    def __init__(self, config: RewardConfig, policy: Policy | None = None):
        super().__init__(config, policy)
        # Answers are scored at the token that ended them in training, whatever else may end an answer.
        self.policy.generation_config["eos_token_id"] = list(self.examples[TRAIN].stop_ids)

    def sequences(self, example: Preference) -> list[Conversation]:
        return [ending(example.chosen), ending(example.rejected)]

    def make_objective(self) -> nn.Cell:
        return RewardObjective(self.policy.decoder, self.config.loss)

    def _save(self, state: dict[str, Any] | None = None) -> Path:
        """With the mean and standard deviation of the held-out answers' scores, for normalize_reward."""
        decoder = self.policy.decoder
        self.scores = self.held_out_scores()
        mean, deviation = (float(value) for value in statistics(self.scores))
        decoder.config = replace(decoder.config, score_mean=mean, score_std=deviation)
        return super()._save(state)

    def held_out_scores(self) -> np.ndarray:
        """[pairs, 2] float32, chosen and rejected; of the training pairs where none are held out."""
        split = TEST if len(self.examples[TEST]) else TRAIN
        pairs = self.examples[split].items[: self.config.trainer.evaluate_rows or None]
        answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
        return self.reward_model.scores(answers).reshape(-1, 2)

    @cached_property
    def reward_model(self) -> RewardModel:
        return RewardModel(self.policy, self.config.trainer.rows)

    def close(self, log: RunLog) -> dict[str, Any]:
        scores, config = self.scores, self.policy.decoder.config  # of the last checkpoint, just saved
        if is_main():
            plot_scores(scores[:, 0], scores[:, 1], self.output / "scores.png", self.output.name)
        return {**super().close(log), "score_mean": config.score_mean, "score_std": config.score_std}

    def fields(self, split: str, numbers: Sequence[int]) -> dict[str, Sequence[float]]:
        margins = [self.examples[split].items[number].margin for number in numbers]
        return {**pair_weights(len(numbers)), "margin": np.repeat(margins, 2), "ref_logprobs": [0.0] * 2 * len(numbers)}


def statistics(scores: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation; 0 and 1, which change nothing, where all are equal or one is not finite."""
    mean, deviation = scores.mean(), scores.std()
    return (mean, deviation) if np.isfinite(deviation) and deviation > 0 else (0.0, 1.0)


def pair_weights(pairs: int) -> dict[str, np.ndarray]:
    """The mean over pairs; the loss takes a pair's weight from its chosen answer."""
    return {"weight": np.full(2 * pairs, 1 / pairs, np.float32)}


class ReferencedTrainer(PreferenceTrainer):
    """What the DPO family and KTO share: answers that are held against a reference policy."""

    config: DPOConfig | KTOConfig
    needs_reference = True

    def __init__(self, config: DPOConfig | KTOConfig, policy: Policy | None = None):
        super().__init__(config, policy)
        if config.loss.reference == ADAPTER_OFF and self.needs_reference:
            if self.policy.decoder.lora is None:
                raise UserError("loss.reference: adapter_off needs adapters: set model.lora.rank, or use cached")
            if config.model.reference:
                raise UserError("loss.reference: adapter_off takes the base model: remove model.reference")
            if is_adapter(Path(config.model.path)):
                raise UserError("loss.reference: adapter_off is the base, but model.path is an adapter; use cached")
        self.policy_scorer = Scorer(self.policy.decoder, 1.0)
        self.reference = Reference(self.answers(), self.pack)

    def check(self) -> None:
        super().check()
        if self.config.loss.beta <= 0:
            raise UserError(f"loss.beta: {self.config.loss.beta} must be over 0")

    def answers(self) -> dict[str, list[list[Conversation]]]:
        """Lists of examples, each the answers that the reference scores."""
        return {
            split: [self.sequences(example) for example in examples.items] for split, examples in self.examples.items()
        }

    def prepare(self, log: RunLog) -> None:
        self._start_reference(fresh=True)

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._start_reference(fresh=False)

    def _start_reference(self, fresh: bool) -> None:
        mode, reference = self.config.loss.reference, self.reference
        if not self.needs_reference:
            return
        if mode == ADAPTER_OFF:
            reference.scorer, reference.context = self.policy_scorer, self.policy.decoder.adapters_off
        elif mode == CACHED and not fresh and reference.read_cache(self.output):
            pass
        elif mode == CACHED and fresh and not self.config.model.reference:
            reference.scorer = self.policy_scorer  # as training starts, they are the same
        else:
            longest = max(len(one.ids) for every in self.reference.answers.values() for some in every for one in some)
            reference.scorer = self.reference_scorer(fresh, longest)
        if mode == CACHED and reference.cache is None:
            reference.fill_cache(self.output)


class DPOTrainer(ReferencedTrainer):
    """The DPO family: a row of losses.PREFERENCE_LOSSES by loss.name.

    DPOTrainer(load_config(DPOConfig, "job.yaml")).fit()
    """

    config: DPOConfig
    unit, batch_type, together = "pairs", PairBatch, 2

    def check(self) -> None:
        super().check()
        loss = self.config.loss
        if loss.name not in PREFERENCE_LOSSES:
            raise UserError(f"loss.name: {loss.name!r} is unknown; there are {', '.join(PREFERENCE_LOSSES)}")
        if not 0 <= loss.label_smoothing < 0.5:
            raise UserError(f"loss.label_smoothing: {loss.label_smoothing} must be 0 or more and under 0.5")
        if loss.label_smoothing and loss.name not in SMOOTHED:
            raise UserError(f"loss.label_smoothing: {loss.name} has none; use {' or '.join(SMOOTHED)}, or set it to 0")

    @property
    def needs_reference(self) -> bool:
        return PREFERENCE_LOSSES[self.config.loss.name].needs_reference

    def sequences(self, example: Preference) -> list[Conversation]:
        return [example.chosen, example.rejected]

    def make_objective(self) -> nn.Cell:
        return PreferenceObjective(self.policy.decoder, self.config.loss)

    def fields(self, split: str, numbers: Sequence[int]) -> dict[str, Sequence[float]]:
        nothing = np.zeros(2 * len(numbers), np.float32)
        logprobs = self.reference.logprobs(split, numbers).reshape(-1) if self.needs_reference else nothing
        return {**pair_weights(len(numbers)), "margin": nothing, "ref_logprobs": logprobs}
