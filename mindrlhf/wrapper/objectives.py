"""What is minimised: a decoder and a loss in one Cell, from a batch's fields to (loss, metric sums)."""

from dataclasses import dataclass

from mindspore import nn, ops

from mindrlhf.losses import kl_penalty, ratio_policy_loss
from mindrlhf.models.decoder import Decoder
from mindrlhf.wrapper.scorer import target_logprobs


class SupervisedObjective(nn.Cell):
    """Weighted negative log-likelihood of the targets; takes the fields of SupervisedBatch."""

    def __init__(self, decoder: Decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, tokens, positions, segments, index, labels, sequence, mask, loss_weight):
        logprobs, entropy = target_logprobs(self.decoder, tokens, positions, segments, index, labels, 1.0, False)
        return -(logprobs * loss_weight).sum(), {"tokens": mask.sum(), "entropy": (entropy * mask).sum()}


@dataclass(frozen=True)
class PolicyLoss:
    """The numbers of a policy loss; what an algorithm's row and the config decide."""

    temperature: float = 1.0
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0


class PolicyObjective(nn.Cell):
    """Clipped policy loss, KL to the reference and entropy bonus; takes the fields of PolicyBatch.

    Metric sums are over real response tokens, to be divided by "tokens".
    """

    def __init__(self, decoder: Decoder, loss: PolicyLoss):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.loss = loss

    def construct(
        self, tokens, positions, segments, index, labels, sequence, mask, loss_weight, advantages, old_logprobs,
        ref_logprobs,
    ):  # fmt: skip
        loss = self.loss
        policy_logprobs, entropy = target_logprobs(
            self.decoder, tokens, positions, segments, index, labels, loss.temperature, loss.entropy_coef != 0
        )
        per_token, clipped = ratio_policy_loss(
            policy_logprobs, old_logprobs, advantages, loss.eps_low, loss.eps_high, loss.dual_clip
        )
        kl = kl_penalty(policy_logprobs, ref_logprobs, loss.kl_estimator)
        if loss.kl_coef != 0:
            per_token = per_token + loss.kl_coef * kl
        if loss.entropy_coef != 0:
            per_token = per_token - loss.entropy_coef * entropy
        difference = ops.stop_gradient((old_logprobs - policy_logprobs) * mask)
        metrics = {
            "tokens": mask.sum(),
            "clip_fraction": (clipped * mask).sum(),
            "kl": ops.stop_gradient((kl * mask).sum()),
            "entropy": ops.stop_gradient((entropy * mask).sum()),
            "policy_kl": difference.sum(),
            "mismatch_max": ops.ReduceMax()(ops.abs(difference)),
        }
        return (per_token * loss_weight).sum(), metrics
