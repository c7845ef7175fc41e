"""The losses, per token: MindSpore functions for compiled cells, elementwise on [N] (any shape does).

A cell combines them as sum(per_token_loss * loss_weight), loss_weight from advantages.loss_weights over the whole
optimizer step, so that the loss does not depend on how the step is split. float32 unless said. Arguments that are
Python numbers, strings or bools are constants of the graph: another value compiles another graph.

MindSpore's CPU exp is off by up to 8e-6 (relative), its expm1 + 1 by 2e-7: hence expm1 on [N], where it costs
nothing. Over a whole [N, V] only exp is affordable, four times faster. Its tanh is off by 1e-4.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mindspore import Tensor, mint, ops
from mindspore import dtype as mstype


def ratio_policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss, -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(policy - old).

    https://arxiv.org/abs/1707.06347; eps_high > eps_low is DAPO's clip-higher, https://arxiv.org/abs/2503.14476.
    The log-ratio is clamped to [-20, 20] before exp. dual_clip c > 1 bounds the loss by -c A where A < 0
    (https://arxiv.org/abs/1912.09729); 0 is off. All tensors [N]; gradients flow to policy_logprobs, and the caller
    passes the others as data. Returns (per_token_loss [N], clipped [N]): clipped is 1 where the clipped term is the
    smaller one, so its mean is the clip fraction.
    """
    ratio = mint.expm1(mint.clamp(policy_logprobs - old_logprobs, -20.0, 20.0)) + 1.0
    unclipped_gain = ratio * advantages
    clipped_gain = mint.clamp(ratio, 1.0 - eps_low, 1.0 + eps_high) * advantages
    loss = -ops.minimum(unclipped_gain, clipped_gain)
    if dual_clip > 0:
        loss = mint.where(advantages < 0, ops.minimum(loss, -dual_clip * advantages), loss)
    return loss, ops.cast(clipped_gain < unclipped_gain, mstype.float32)


def kl_penalty(policy_logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3", clamp: bool = True) -> Tensor:
    """Estimates of KL(policy || ref) at sampled tokens; d = policy - ref. http://joschu.net/blog/kl-approx.html.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. With clamp, the default, d is clamped to [-20, 20] first and k3 to
    [-10, 10] after: biased there and without gradient, finite everywhere. As a loss k1 has gradient 1 whatever the
    reference says, so it is no KL signal there. Both [N]; returns [N]. The same as advantages.kl.
    """
    difference = policy_logprobs - ref_logprobs
    if clamp:
        difference = mint.clamp(difference, -20.0, 20.0)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference * difference
    if estimator == "k3":
        value = mint.expm1(-difference) + difference
        return mint.clamp(value, -10.0, 10.0) if clamp else value
    raise ValueError("kl_estimator must be k1, k2 or k3")


def logprobs_and_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at labels, and the entropy of that distribution, in nats.

    logits [N, V], any float type, computed in float32; labels [N] int; temperature > 0, the one of sampling. Returns
    (logprobs [N], entropy [N]). Gradients flow through logprobs, and through entropy only with entropy_gradient:
    as a metric it need not pay for them.

    With l = log softmax(logits / temperature): logprob = l[label], entropy = -sum(exp(l) l). Of the ways to write it
    this is the fastest on CPU: at [3072, 4096] 19 ms with gradient and 33 with the entropy too, where cross_entropy or
    logsumexp alone take about 150; log-probs are good to about 5e-6 there.
    """
    logits = ops.cast(logits, mstype.float32)
    if temperature != 1.0:
        logits = logits / temperature
    log_softmax = ops.log_softmax(logits, -1)
    logprobs = ops.gather_elements(log_softmax, 1, labels.reshape(-1, 1)).reshape(-1)
    if not entropy_gradient:
        log_softmax = ops.stop_gradient(log_softmax)
    return logprobs, -mint.sum(mint.exp(log_softmax) * log_softmax, -1)


def supervised_loss(policy_logprobs: Tensor) -> Tensor:
    """Negative log-likelihood, -policy_logprobs, per token. [N] to [N]."""
    return -policy_logprobs


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


def step_reward_loss(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Cross-entropy over the R reward tokens at a placeholder. Their logits and targets [N, R] to [N].

    Here, unlike over a whole vocabulary, expm1 is affordable: good to 1e-6.
    """
    shifted = logits - ops.stop_gradient(ops.ReduceMax(keep_dims=True)(logits, -1))
    log_sum = mint.log1p(mint.sum(mint.expm1(shifted), -1, True) + (logits.shape[-1] - 1.0))
    return mint.sum(probabilities * (log_sum - shifted), -1)


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum over v of softmax(teacher)_v log_softmax(student)_v. Logits [N, V], any float type, to [N]; no gradient
    to the teacher.

    The forward KL plus the teacher's entropy. The temperature divides the logits of both; there is no factor
    temperature^2. https://arxiv.org/abs/1503.02531. Good to 5e-6, as log_softmax is.
    """
    teacher_probabilities = ops.softmax(ops.stop_gradient(_tempered(teacher_logits, temperature)), -1)
    return -mint.sum(teacher_probabilities * ops.log_softmax(_tempered(student_logits, temperature), -1), -1)


def generalised_divergence(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """GKD's divergence of student s and teacher t, https://arxiv.org/abs/2306.13649. Logits [N, V] to [N], in nats.

    beta 0 is the forward KL(t || s), 1 the reverse KL(s || t); between them beta KL(t || M) + (1 - beta) KL(s || M),
    M = (1 - beta) s + beta t. That is beta KL(t || s) for small beta, so it jumps at the ends. No gradient to the
    teacher; the temperature divides the logits of both.
    """
    student = ops.log_softmax(_tempered(student_logits, temperature), -1)
    teacher = ops.stop_gradient(ops.log_softmax(_tempered(teacher_logits, temperature), -1))
    if beta == 0:
        return mint.sum(mint.exp(teacher) * (teacher - student), -1)
    if beta == 1:
        return mint.sum(mint.exp(student) * (student - teacher), -1)
    # Where the clamp acts, the one of the two terms that it changes has a probability below exp(-60).
    ratio = mint.exp(mint.clamp(student - teacher, -60.0, 60.0))
    teacher_term = mint.sum(mint.exp(teacher) * mint.log(beta + (1.0 - beta) * ratio), -1)
    student_term = mint.sum(mint.exp(student) * mint.log((1.0 - beta) + beta / ratio), -1)
    return -(beta * teacher_term + (1.0 - beta) * student_term)


def _tempered(logits, temperature):
    logits = ops.cast(logits, mstype.float32)
    return logits if temperature == 1.0 else logits / temperature


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
