"""Objectives over whole answers: reward models, the DPO family, KTO. Numbers of sequences are [N] (see PairBatch).

Metric sums are over the pairs or answers of the micro-batch, to be divided by "pairs" or "answers".
"""

from collections.abc import Callable

import mindspore as ms
from mindspore import nn, ops

from mindrlhf.config import KTOLossConfig, PreferenceLossConfig, RewardLossConfig
from mindrlhf.models.decoder import Decoder
from mindrlhf.preference_losses import PREFERENCE_LOSSES, kto_loss, reward_model_loss
from mindrlhf.wrapper.scorer import target_logprobs

TIE = 1e-6  # a policy that is its reference has differences of rounding only


def answer_logprobs(decoder: Decoder, tokens, positions, segments, index, labels, sequence, mask):
    """Log-prob of each answer [N], summed over its tokens, and its number of tokens [N], both at the sequence's number.

    Where there is no sequence: -1 and 1, at which every loss and its gradient are finite.
    """
    logprobs, _ = target_logprobs(decoder, tokens, positions, segments, index, labels, 1.0, False)
    count = sequence.shape[0]
    sums = ops.unsorted_segment_sum(logprobs * mask, sequence, count)
    lengths = ops.unsorted_segment_sum(mask, sequence, count)
    real = lengths > 0
    return ops.select(real, sums, -ops.ones_like(sums)), ops.select(real, lengths, ops.ones_like(lengths))


def halves(x):
    """[N] by sequence -> [N/2] of the chosen and of the rejected answers."""
    pairs = x.reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def comparison_metrics(chosen, rejected, weight):
    """Sums of what is logged of rewards [P] of pairs; a tie, up to rounding, is half right."""
    real = ops.cast(weight > 0, ms.float32)
    difference = chosen - rejected
    right = 0.5 * (ops.cast(difference > TIE, ms.float32) + ops.cast(difference >= -TIE, ms.float32))
    return {
        "pairs": real.sum(),
        "accuracy": (right * real).sum(),
        "rewards_chosen": ops.stop_gradient((chosen * real).sum()),
        "rewards_rejected": ops.stop_gradient((rejected * real).sum()),
        "margin": ops.stop_gradient(((chosen - rejected) * real).sum()),
    }


class RewardObjective(nn.Cell):
    """Bradley-Terry loss of scalar scores; takes the fields of PairBatch, one target a sequence: its last token."""

    def __init__(self, decoder: Decoder, loss: RewardLossConfig):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.kind, self.centering_coef = loss.kind, loss.centering_coef

    def construct(
        self, tokens, positions, segments, index, labels, sequence, mask, weight, margin, ref_logprobs
    ):  # fmt: skip
        hidden = self.decoder.targets(tokens, positions, segments, index)
        # With one target a sequence, target n is sequence n.
        chosen, rejected = halves(self.decoder.scores(hidden) * mask)
        weight, margin = halves(weight)[0], halves(margin)[0]
        loss = reward_model_loss(chosen, rejected, margin, self.kind, self.centering_coef)
        return (loss * weight).sum(), comparison_metrics(chosen, rejected, weight)


class PreferenceObjective(nn.Cell):
    """A row of preference_losses.PREFERENCE_LOSSES; takes the fields of PairBatch."""

    def __init__(self, decoder: Decoder, loss: PreferenceLossConfig):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        row = PREFERENCE_LOSSES[loss.name]
        self.function: Callable = row.function
        self.averaged, self.needs_reference = row.averaged, row.needs_reference
        self.beta, self.label_smoothing, self.gamma = loss.beta, loss.label_smoothing, loss.gamma
        self.nll_coef = loss.nll_coef

    def construct(
        self, tokens, positions, segments, index, labels, sequence, mask, weight, margin, ref_logprobs
    ):  # fmt: skip
        sums, lengths = answer_logprobs(self.decoder, tokens, positions, segments, index, labels, sequence, mask)
        policy_chosen, policy_rejected = halves(sums)
        ref_chosen, ref_rejected = halves(ref_logprobs)
        chosen_tokens, rejected_tokens = halves(lengths)
        weight, _ = halves(weight)
        loss = self.function(
            policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
            self.beta, self.label_smoothing, self.gamma,
        )  # fmt: skip
        if self.nll_coef != 0:
            loss = loss - self.nll_coef * policy_chosen / chosen_tokens
        rewards = sums / lengths if self.averaged else sums
        if self.needs_reference:
            rewards = rewards - ref_logprobs
        chosen, rejected = halves(self.beta * rewards)
        metrics = comparison_metrics(chosen, rejected, weight)
        real = ops.cast(weight > 0, ms.float32)
        metrics["logprobs_chosen"] = ops.stop_gradient((policy_chosen * real).sum())
        metrics["logprobs_rejected"] = ops.stop_gradient((policy_rejected * real).sum())
        return (loss * weight).sum(), metrics


class JudgementObjective(nn.Cell):
    """KTO; takes the fields of JudgementBatch."""

    def __init__(self, decoder: Decoder, loss: KTOLossConfig):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.beta = loss.beta

    def construct(
        self, tokens, positions, segments, index, labels, sequence, mask, weight, sign, ref_logprobs, kl
    ):  # fmt: skip
        sums, _ = answer_logprobs(self.decoder, tokens, positions, segments, index, labels, sequence, mask)
        loss = kto_loss(sums, ref_logprobs, kl, sign, self.beta)
        rewards = ops.stop_gradient(self.beta * (sums - ref_logprobs))
        liked, disliked = ops.cast(sign > 0, ms.float32), ops.cast(sign < 0, ms.float32)
        return (loss * weight).sum(), {
            "answers": liked.sum() + disliked.sum(),
            "desirable": liked.sum(),
            "undesirable": disliked.sum(),
            "rewards_desirable": (rewards * liked).sum(),
            "rewards_undesirable": (rewards * disliked).sum(),
            "kl_baseline": (kl * (liked + disliked)).sum(),
        }
