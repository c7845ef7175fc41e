"""What is minimised: a decoder and a loss in one Cell, from a batch's fields to (loss, metric sums)."""

from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindrlhf.config import DistillationConfig
from mindrlhf.losses import (
    distillation_loss,
    generalised_divergence,
    logprobs_and_entropy,
    step_reward_loss,
    supervised_loss,
)
from mindrlhf.models.decoder import Decoder
from mindrlhf.wrapper.scorer import target_logprobs
from mindrlhf.wrapper.step_scorer import step_logits


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
        logits = step_logits(self.decoder, tokens, positions, segments, index, self.reward_tokens)
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
        student = self.student.logits(self.student.targets(tokens, positions, segments, index))
        hidden = self.teacher.targets(tokens, positions, segments, index)
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
