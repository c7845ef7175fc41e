"""The objectives of online training: a policy's, a critic's, and both on one trunk."""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.losses import POLICY_LOSSES, kl_penalty, value_loss
from mindrlhf.models.decoder import Decoder
from mindrlhf.models.kernels import linear
from mindrlhf.wrapper.graph import Graph
from mindrlhf.wrapper.scorer import hidden_logprobs, target_logprobs


@dataclass(frozen=True)
class PolicyLoss:
    """The numbers of a policy loss; what an algorithm's row and the config decide."""

    kind: str = "ppo"  # of losses.POLICY_LOSSES
    temperature: float = 1.0
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0


class PolicyTerms(nn.Cell):
    """Policy loss, KL to the reference and entropy bonus of given log-probs, as (loss sum, metric sums).

    Metric sums are over real response tokens, to be divided by "tokens".
    """

    def __init__(self, loss: PolicyLoss):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.function = POLICY_LOSSES[loss.kind].function

    def construct(
        self, policy_logprobs, entropy, sequence, mask, loss_weight, advantages, old_logprobs, ref_logprobs
    ):  # fmt: skip
        loss = self.loss
        per_token, clipped = self.function(
            policy_logprobs, old_logprobs, advantages, sequence, mask, loss.eps_low, loss.eps_high, loss.dual_clip
        )
        kl = kl_penalty(policy_logprobs, ref_logprobs, loss.kl_estimator)
        if loss.kl_coef != 0:
            per_token = per_token + loss.kl_coef * kl
        if loss.entropy_coef != 0:
            per_token = per_token - loss.entropy_coef * entropy
        difference = ops.stop_gradient((old_logprobs - policy_logprobs) * mask)
        metrics = {
            "tokens": mask.sum(),
            "clip_fraction": ops.stop_gradient((clipped * mask).sum()),
            "kl": ops.stop_gradient((kl * mask).sum()),
            "entropy": ops.stop_gradient((entropy * mask).sum()),
            "policy_kl": difference.sum(),
            "shift": ops.abs(difference).sum(),
            "shift_max": ops.ReduceMax()(ops.abs(difference)),
        }
        return (per_token * loss_weight).sum(), metrics


class PolicyObjective(nn.Cell):
    """Takes the fields of PolicyBatch."""

    def __init__(self, decoder: Decoder, loss: PolicyLoss):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.terms = PolicyTerms(loss)
        self.temperature, self.entropy_gradient = loss.temperature, loss.entropy_coef != 0

    def construct(
        self, tokens, positions, segments, index, labels, sequence, mask, loss_weight, advantages, old_logprobs,
        ref_logprobs,
    ):  # fmt: skip
        policy_logprobs, entropy = target_logprobs(
            self.decoder, tokens, positions, segments, index, labels, self.temperature, self.entropy_gradient
        )
        return self.terms(policy_logprobs, entropy, sequence, mask, loss_weight, advantages, old_logprobs, ref_logprobs)


def value_terms(values, old_values, returns, mask, value_weight, clip: float):
    """Clipped value loss as (loss sum, metric sums)."""
    per_token, clipped = value_loss(values, old_values, returns, clip)
    metrics = {
        "value_tokens": mask.sum(),
        "value_clip_fraction": ops.stop_gradient((clipped * mask).sum()),
        "value": ops.stop_gradient((values * mask).sum()),
    }
    return (per_token * value_weight).sum(), metrics


class ValueObjective(nn.Cell):
    """A critic with its own decoder, which has a score head; takes the fields of ValueBatch.

    The value of a token is read before it, where it is predicted: at the state in which it was chosen.
    """

    def __init__(self, decoder: Decoder, clip: float):
        super().__init__(auto_prefix=False)
        self.decoder, self.clip = decoder, clip

    def construct(
        self, tokens, positions, segments, index, labels, sequence, mask, value_weight, old_values, returns
    ):  # fmt: skip
        values = self.decoder.scores(self.decoder.targets(tokens, positions, segments, index))
        return value_terms(values, old_values, returns, mask, value_weight, self.clip)


class ValueHead(nn.Cell):
    """A linear value on the policy's own hidden states, 0 at first; no sigmoid."""

    def __init__(self, hidden_size: int):
        super().__init__(auto_prefix=False)
        self.weight = Parameter(Tensor(np.zeros((1, hidden_size), np.float32), ms.float32), name="value_head.weight")

    def construct(self, hidden):
        """[M, H] -> [M] float32."""
        return linear(hidden, self.weight, None, False).reshape(-1)


class ActorCriticObjective(nn.Cell):
    """Policy and critic on one trunk; takes the fields of ActorCriticBatch."""

    def __init__(self, decoder: Decoder, head: ValueHead, loss: PolicyLoss, coef: float, clip: float):
        super().__init__(auto_prefix=False)
        self.decoder, self.head = decoder, head
        self.terms = PolicyTerms(loss)
        self.temperature, self.entropy_gradient = loss.temperature, loss.entropy_coef != 0
        self.coef, self.clip = coef, clip

    def construct(
        self, tokens, positions, segments, index, labels, sequence, mask, loss_weight, advantages, old_logprobs,
        ref_logprobs, value_weight, old_values, returns,
    ):  # fmt: skip
        hidden = self.decoder.targets(tokens, positions, segments, index)
        policy_logprobs, entropy = hidden_logprobs(
            self.decoder, hidden, labels, self.temperature, self.entropy_gradient
        )
        loss, metrics = self.terms(
            policy_logprobs, entropy, sequence, mask, loss_weight, advantages, old_logprobs, ref_logprobs
        )
        error, more = value_terms(self.head(hidden), old_values, returns, mask, value_weight, self.clip)
        for name in more:
            metrics[name] = more[name]
        metrics["value_loss"] = ops.stop_gradient(error)
        return loss + self.coef * error, metrics


class TrunkValues(Graph):
    """The values [N] of a micro-batch under a policy with a value head."""

    def __init__(self, decoder: Decoder, head: ValueHead):
        super().__init__(auto_prefix=False)
        self.decoder, self.head = decoder, head

    def construct(self, tokens, positions, segments, index):
        return self.head(self.decoder.targets(tokens, positions, segments, index))
