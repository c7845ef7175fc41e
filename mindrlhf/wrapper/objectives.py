"""What is minimised: a decoder and a loss in one Cell, from a batch's fields to (loss, metric sums)."""

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindrlhf.config import DistillationConfig
from mindrlhf.losses import (
    distillation_loss,
    generalised_divergence,
    kl_penalty,
    logprobs_and_entropy,
    ratio_policy_loss,
    step_reward_loss,
    supervised_loss,
)
from mindrlhf.models.decoder import Decoder
from mindrlhf.wrapper.scorer import target_logprobs


class SupervisedObjective(nn.Cell):
    """Weighted negative log-likelihood of the targets; takes the fields of SupervisedBatch."""

    def __init__(self, decoder: Decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, tokens, positions, segments, index, labels, sequence, mask, loss_weight):
        logprobs, entropy = target_logprobs(self.decoder, tokens, positions, segments, index, labels, 1.0, False)
        loss = (supervised_loss(logprobs) * loss_weight).sum()
        return loss, {"tokens": mask.sum(), "entropy": (entropy * mask).sum()}


class StepRewardObjective(nn.Cell):
    """Cross-entropy over the reward tokens at each placeholder; takes the fields of StepRewardBatch."""

    def __init__(self, decoder: Decoder, reward_tokens: Sequence[int]):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.reward_tokens = Tensor(list(reward_tokens), ms.int32)

    def construct(
        self, tokens, positions, segments, index, labels, sequence, mask, loss_weight, probabilities
    ):  # fmt: skip
        hidden = ops.gather(self.decoder(tokens, positions, segments), index, 0)
        logits = ops.gather(self.decoder.logits(hidden), self.reward_tokens, 1)
        loss = step_reward_loss(logits, probabilities)
        right = ops.cast(ops.argmax(logits, -1) == ops.argmax(probabilities, -1), ms.float32)
        return (loss * loss_weight).sum(), {"steps": mask.sum(), "accuracy": (right * mask).sum()}


class DistillationObjective(nn.Cell):
    """The data's tokens and a teacher's distribution over them; takes the fields of SupervisedBatch.

    The teacher runs in the same graph, so its logits [N, V] never leave it.
    """

    def __init__(self, student: Decoder, teacher: Decoder, distillation: DistillationConfig):
        super().__init__(auto_prefix=False)
        self.student, self.teacher = student, teacher
        for parameter in teacher.get_parameters():  # a graph knows its parameters by name
            parameter.name = f"teacher.{parameter.name}"
        self.generalised = distillation.name == "gkd"
        self.coef, self.beta = distillation.coef, distillation.beta
        self.temperature = distillation.temperature

    def construct(self, tokens, positions, segments, index, labels, sequence, mask, loss_weight):
        student = self.student.logits(ops.gather(self.student(tokens, positions, segments), index, 0))
        hidden = ops.gather(self.teacher(tokens, positions, segments), index, 0)
        teacher = ops.stop_gradient(self.teacher.logits(hidden))
        student_logprobs, _ = logprobs_and_entropy(student, labels)
        if self.generalised:
            loss = generalised_divergence(student, teacher, self.beta, self.temperature)
        else:
            soft = distillation_loss(student, teacher, self.temperature)
            loss = self.coef * soft + (1.0 - self.coef) * supervised_loss(student_logprobs)
        teacher_kl = generalised_divergence(ops.stop_gradient(student), teacher, 0.0)
        return (loss * loss_weight).sum(), {
            "tokens": mask.sum(),
            "nll": -ops.stop_gradient((student_logprobs * mask).sum()),
            "teacher_kl": (teacher_kl * mask).sum(),
        }


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
