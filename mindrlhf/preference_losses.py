"""The losses of whole answers: reward models, the DPO family, KTO. MindSpore functions for compiled cells.

Log-probs are summed over an answer, scores stand at its last token. The caller weights the losses and sums them.
float32; arguments that are Python numbers or strings are constants of the graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mindspore import Tensor, mint, ops


def reward_model_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor, kind: str = "sigmoid", centering_coef: float = 0.0
) -> Tensor:
    """Bradley-Terry loss of a reward model, -log sigmoid(chosen - rejected - margin). Scores and margin [P] to [P].

    InstructGPT, https://arxiv.org/abs/2203.02155; the margin is Llama 2's, https://arxiv.org/abs/2307.09288. kind
    "log_exp" is the same number under its other name, log(1 + exp(-d)). centering_coef (chosen + rejected)^2 is added,
    which keeps the scores around 0: https://arxiv.org/abs/2312.09244.
    """
    if kind not in ("sigmoid", "log_exp"):
        raise ValueError("kind must be sigmoid or log_exp")
    loss = -_log_sigmoid(chosen - rejected - margin)
    if centering_coef != 0:
        loss = loss + centering_coef * (chosen + rejected) * (chosen + rejected)
    return loss


# The preference losses. Log-probs [P] are summed over an answer, *_tokens [P] float32 are the numbers of its tokens;
# D = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected). Gradients flow to the policy's log-probs. A pair
# of zeros (padding) is finite, with finite gradients.


def dpo_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
    beta, label_smoothing, gamma,
):  # fmt: skip
    """-log sigmoid(beta D): ln 2 where policy and reference agree."""
    return -_log_sigmoid(beta * _preference(policy_chosen, policy_rejected, ref_chosen, ref_rejected))


def cdpo_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
    beta, label_smoothing, gamma,
):  # fmt: skip
    """Conservative DPO: the cross-entropy where the share label_smoothing of the pairs is swapped."""
    logit = beta * _preference(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return -(1.0 - label_smoothing) * _log_sigmoid(logit) - label_smoothing * _log_sigmoid(-logit)


def robust_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
    beta, label_smoothing, gamma,
):  # fmt: skip
    """DPO's loss on the true labels, without bias, from labels of which the share label_smoothing < 0.5 is swapped."""
    logit = beta * _preference(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    noisy = -(1.0 - label_smoothing) * _log_sigmoid(logit) + label_smoothing * _log_sigmoid(-logit)
    return noisy / (1.0 - 2.0 * label_smoothing)


def ipo_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
    beta, label_smoothing, gamma,
):  # fmt: skip
    """(D - 1 / (2 beta))^2."""
    error = _preference(policy_chosen, policy_rejected, ref_chosen, ref_rejected) - 0.5 / beta
    return error * error


def ipo_mean_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
    beta, label_smoothing, gamma,
):  # fmt: skip
    """IPO with every log-prob divided by the number of its tokens, as TRL computes it."""
    chosen = _average(policy_chosen - ref_chosen, chosen_tokens)
    rejected = _average(policy_rejected - ref_rejected, rejected_tokens)
    error = chosen - rejected - 0.5 / beta
    return error * error


def hinge_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
    beta, label_smoothing, gamma,
):  # fmt: skip
    """max(1 - beta D, 0)."""
    return ops.relu(1.0 - beta * _preference(policy_chosen, policy_rejected, ref_chosen, ref_rejected))


def simpo_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
    beta, label_smoothing, gamma,
):  # fmt: skip
    """-log sigmoid(beta (average chosen - average rejected) - gamma), without a reference."""
    difference = _average(policy_chosen, chosen_tokens) - _average(policy_rejected, rejected_tokens)
    return -_log_sigmoid(beta * difference - gamma)


def orpo_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
    beta, label_smoothing, gamma,
):  # fmt: skip
    """Mean NLL of the chosen answer's tokens - beta log sigmoid(log odds ratio), without a reference.

    odds = p / (1 - p), p = exp(average log-prob). The 1 - p of an average nearer to 0 than 1e-6 is taken there.
    """
    chosen, rejected = _average(policy_chosen, chosen_tokens), _average(policy_rejected, rejected_tokens)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * _log_sigmoid(log_odds)


@dataclass(frozen=True)
class PreferenceLoss:
    """A row of the table of preference losses."""

    paper: str
    function: Callable[..., Tensor]
    needs_reference: bool = True  # False: ref_chosen and ref_rejected are not looked at
    averaged: bool = False  # the implicit rewards are those of length-averaged log-probs


PREFERENCE_LOSSES = {
    "dpo": PreferenceLoss("https://arxiv.org/abs/2305.18290", dpo_loss),
    "cdpo": PreferenceLoss("https://ericmitchell.ai/cdpo.pdf", cdpo_loss),
    "robust": PreferenceLoss("https://arxiv.org/abs/2403.00409", robust_loss),
    "ipo": PreferenceLoss("https://arxiv.org/abs/2310.12036", ipo_loss),
    "ipo_mean": PreferenceLoss("https://arxiv.org/abs/2310.12036", ipo_mean_loss),
    "hinge": PreferenceLoss("https://arxiv.org/abs/2305.10425", hinge_loss),
    "simpo": PreferenceLoss("https://arxiv.org/abs/2405.14734", simpo_loss, needs_reference=False, averaged=True),
    "orpo": PreferenceLoss("https://arxiv.org/abs/2403.07691", orpo_loss, needs_reference=False, averaged=True),
}


def kto_loss(policy_logprobs: Tensor, ref_logprobs: Tensor, kl: Tensor, sign: Tensor, beta: float) -> Tensor:
    """1 - sigmoid(beta sign (policy - ref - kl)), sign 1 for a desirable answer and -1 for an undesirable one.

    https://arxiv.org/abs/2402.01306. [N] to [N]. Log-probs are summed over the answer; kl is KTO's baseline, which the
    caller passes as data. The weight of either side is the caller's.
    """
    logit = beta * sign * (policy_logprobs - ref_logprobs - kl)
    # 1 - sigmoid(x) = 1 / (1 + exp(x)); beyond 40 it is 0 or 1 to float32.
    return 1.0 / (mint.expm1(mint.clamp(logit, -40.0, 40.0)) + 2.0)


def _preference(policy_chosen, policy_rejected, ref_chosen, ref_rejected):
    return (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)


def _average(logprobs, tokens):
    """0 for an answer without tokens, which is padding."""
    return logprobs / mint.clamp(tokens, 1.0, None)


def _log_sigmoid(x):
    """Not ops.logsigmoid: on CPU that is -inf below -88. min(x, 0) is written so that its gradient at 0 is one half."""
    magnitude = ops.abs(x)
    return 0.5 * (x - magnitude) - mint.log1p(mint.expm1(-magnitude) + 1.0)


def _log1mexp(x):
    """log(1 - exp(x)), x < 0; taken at -1e-6 above that, without gradient.

    Near 0 the error of MindSpore's expm1 is as large as its value: there its series stands in for it.
    """
    near = mint.clamp(x, -0.25, -1e-6)
    series = near * (1 + near / 2 * (1 + near / 3 * (1 + near / 4 * (1 + near / 5 * (1 + near / 6)))))
    return mint.log(-mint.where(x > -0.25, series, mint.expm1(mint.clamp(x, None, -0.25))))
