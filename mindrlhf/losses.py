"""The losses, per token: MindSpore functions for compiled cells, elementwise on [N] (any shape does).

A cell combines them as sum(per_token_loss * loss_weight), loss_weight from advantages.loss_weights over the whole
optimizer step, so that the loss does not depend on how the step is split. float32 unless said. Arguments that are
Python numbers, strings or bools are constants of the graph: another value compiles another graph.

MindSpore's CPU exp is off by up to 8e-6 (relative), its expm1 by 2e-7: hence expm1 on [N], where it costs nothing. Over
a whole [N, V] only exp is affordable, four times faster.
"""

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
