"""KTO: answers that somebody liked or did not, without pairs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mindspore import nn

from mindrlhf.config import KTOConfig, SourceConfig
from mindrlhf.data.examples import Examples
from mindrlhf.data.judgements import mismatched, read_judgements
from mindrlhf.errors import UserError
from mindrlhf.trainer.preference import ReferencedTrainer
from mindrlhf.trainer.reference import answer_logprobs
from mindrlhf.types import Conversation, Judgement, JudgementBatch, Preference
from mindrlhf.wrapper.preference_objectives import JudgementObjective


class KTOTrainer(ReferencedTrainer):
    """Kahneman-Tversky optimisation, arXiv 2402.01306. KTOTrainer(load_config(KTOConfig, "job.yaml")).fit()

    The baseline K, the KL to the reference, is over the whole optimizer step and is data for it, without gradient.
    kto: max(mean of policy - ref over mismatched answers, 0), an answer given to another example's prompt, drawn once.
    kto_pair reads pairs: a chosen answer's K is the mean over the step's rejected ones, and the other way round.
    """

    config: KTOConfig
    unit, batch_type = "answers", JudgementBatch

    @property
    def paired(self) -> bool:
        return self.config.loss.name == "kto_pair"

    def read(self, sources: list[SourceConfig]) -> Examples[Judgement] | Examples[Preference]:
        if self.paired:
            return super().read(sources)
        examples = read_judgements(sources, self.config.data, self.policy.tokenizer, self.max_tokens, Path())
        if len(examples) == 1:
            raise UserError("data: KTO compares a prompt with another row's answer; one row is not enough")
        return examples

    def sequences(self, example: Judgement | Preference) -> list[Conversation]:
        return [example.chosen, example.rejected] if self.paired else [example.answer]

    def answers(self) -> dict[str, list[list[Conversation]]]:
        answers = super().answers()
        if not self.paired:
            for split, examples in self.examples.items():
                others = mismatched(examples.items, self.config.seed, self.longest)
                answers[_other(split)] = [[conversation] for conversation in others]
        return answers

    def make_objective(self) -> nn.Cell:
        return JudgementObjective(self.policy.decoder, self.config.loss)

    def fields(self, split: str, numbers: Sequence[int]) -> dict[str, Sequence[float]]:
        if self.paired:
            liked = np.tile([True, False], len(numbers))
        else:
            liked = np.array([self.examples[split].items[number].desirable for number in numbers])
        reference = self.reference.logprobs(split, numbers).reshape(-1)
        if self.paired:
            gains = self._gains(split, numbers, reference)
            kl = np.where(liked, baseline(gains[~liked]), baseline(gains[liked]))
        else:
            others = self.reference.logprobs(_other(split), numbers).reshape(-1)
            kl = np.full(len(liked), baseline(self._gains(_other(split), numbers, others)))
        weights = np.where(liked, self.config.loss.desirable_weight, self.config.loss.undesirable_weight) / len(liked)
        return {"weight": weights, "sign": np.where(liked, 1.0, -1.0), "ref_logprobs": reference, "kl": kl}

    def _gains(self, name: str, numbers: Sequence[int], ref_logprobs: np.ndarray) -> np.ndarray:
        """policy - ref of those examples' answers, [answers] float32."""
        answers = [answer for number in numbers for answer in self.reference.answers[name][number]]
        return answer_logprobs(self.policy_scorer, self.pack(answers)) - ref_logprobs

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Rewards are means over the answers of their kind."""
        means = {"kl_baseline": sums["kl_baseline"] / max(sums["answers"], 1.0)}
        for kind in ("desirable", "undesirable"):
            if sums[kind]:
                means[f"rewards_{kind}"] = sums[f"rewards_{kind}"] / sums[kind]
        if len(means) == 3:
            means["margin"] = means["rewards_desirable"] - means["rewards_undesirable"]
        return means


def baseline(gains: np.ndarray) -> float:
    """max(mean of policy - ref, 0); 0 where there is nothing to take the mean of."""
    return max(float(gains.mean()), 0.0) if len(gains) else 0.0


def _other(split: str) -> str:
    return f"{split}_mismatched"
