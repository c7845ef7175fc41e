"""The losses, per token: MindSpore functions for compiled cells, on [N].

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

# The policy losses, one signature: log-probs, advantages and mask [N] float32, mask 0 at tokens that do not count;
# sequence [N] int32 is the number of each token's sequence in the micro-batch (see PackedRows). Gradients flow to
# policy_logprobs, the caller passes the others as data. eps_low, eps_high and dual_clip are constants of the graph.
# Each returns (per_token_loss [N], clipped [N]); the mean of clipped is the clip fraction. Every loss is positively
# homogeneous in the advantages, so that a weight on them is a weight on the loss. Log-ratios are clamped to [-20, 20]
# before exp, without gradient beyond.


def ratio_policy_loss(
    policy_logprobs, old_logprobs, advantages, sequence, mask, eps_low, eps_high, dual_clip,
):  # fmt: skip
    """PPO: -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(policy - old).

    eps_high > eps_low is DAPO's clip-higher, https://arxiv.org/abs/2503.14476. dual_clip c > 1 bounds the loss by -c A
    where A < 0 (https://arxiv.org/abs/1912.09729); 0 is off. clipped is 1 where the clipped term is the smaller one.
    """
    return _clipped(_ratio(policy_logprobs - old_logprobs), advantages, eps_low, eps_high, dual_clip)


def sequence_ratio_loss(
    policy_logprobs, old_logprobs, advantages, sequence, mask, eps_low, eps_high, dual_clip,
):  # fmt: skip
    """GSPO: PPO's loss with one ratio a sequence, exp(mean over its tokens of policy - old).

    The tokens of a sequence with one advantage have one loss; summed with the weights of sequence_mean that is the
    paper's. The ratio is nearer to 1 than a token's, so the paper clips at 3e-4 and 4e-4. clipped counts tokens.
    """
    count = sequence.shape[0]
    sums = ops.unsorted_segment_sum((policy_logprobs - old_logprobs) * mask, sequence, count)
    lengths = ops.unsorted_segment_sum(mask, sequence, count)
    # A number without tokens, that of padding for example, has the ratio 1.
    ratio = ops.gather(_ratio(sums / mint.clamp(lengths, 1.0, None)), sequence, 0)
    return _clipped(ratio, advantages, eps_low, eps_high, dual_clip)


def clipped_weight_loss(
    policy_logprobs, old_logprobs, advantages, sequence, mask, eps_low, eps_high, dual_clip,
):  # fmt: skip
    """CISPO: -stop(clip(r, 1 - eps_low, 1 + eps_high)) A policy, so that a clipped token keeps its gradient.

    The bounds are relative to 1; eps_low of 1 or more is no lower bound, as in the paper. clipped is 1 where the clip
    acted, whatever the sign of A. No dual clip.
    """
    ratio = ops.stop_gradient(_ratio(policy_logprobs - old_logprobs))
    weight = mint.clamp(ratio, 1.0 - eps_low, 1.0 + eps_high)
    return -weight * advantages * policy_logprobs, ops.cast(weight != ratio, mstype.float32)


def reinforce_loss(
    policy_logprobs, old_logprobs, advantages, sequence, mask, eps_low, eps_high, dual_clip,
):  # fmt: skip
    """REINFORCE: -A policy. Nothing is clipped, and updates after the first do not correct for the older policy."""
    return -advantages * policy_logprobs, ops.zeros_like(advantages)


def importance_sampling_loss(
    policy_logprobs, old_logprobs, advantages, sequence, mask, eps_low, eps_high, dual_clip,
):  # fmt: skip
    """-r A, r = exp(policy - old): TRPO's surrogate, PPO's loss without its clip."""
    return -_ratio(policy_logprobs - old_logprobs) * advantages, ops.zeros_like(advantages)


@dataclass(frozen=True)
class PolicyLossRow:
    """A row of the table of policy losses."""

    paper: str
    function: Callable[..., tuple[Tensor, Tensor]]


POLICY_LOSSES = {
    "ppo": PolicyLossRow("https://arxiv.org/abs/1707.06347", ratio_policy_loss),
    "gspo": PolicyLossRow("https://arxiv.org/abs/2507.18071", sequence_ratio_loss),
    "cispo": PolicyLossRow("https://arxiv.org/abs/2506.13585", clipped_weight_loss),
    "reinforce": PolicyLossRow("https://doi.org/10.1007/BF00992696", reinforce_loss),
    "importance_sampling": PolicyLossRow("https://arxiv.org/abs/1502.05477", importance_sampling_loss),
}


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The critic's loss, 0.5 max((v - R)^2, (old + clip(v - old, -clip, clip) - R)^2); clip 0 is off.

    OpenAI's implementation of PPO, described in https://arxiv.org/abs/2005.12729. All [N] float32; gradients flow to
    values. Returns (per_token_loss [N], clipped [N]): clipped is 1 where the clipped term is the larger one, and there
    the gradient is 0.
    """
    error = (values - returns) * (values - returns)
    if clip == 0:
        return 0.5 * error, ops.zeros_like(error)
    # Not old + clip(v - old): inside the range that is v but for rounding, which would count as clipped.
    moved = ops.minimum(ops.maximum(values, old_values - clip), old_values + clip)
    clipped_error = (moved - returns) * (moved - returns)
    return 0.5 * ops.maximum(error, clipped_error), ops.cast(clipped_error > error, mstype.float32)


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


def _ratio(log_ratio):
    return mint.expm1(mint.clamp(log_ratio, -20.0, 20.0)) + 1.0


def _clipped(ratio, advantages, eps_low, eps_high, dual_clip):
    """PPO's clipped loss of a given ratio, and 1 where the clipped term is the smaller one."""
    unclipped_gain = ratio * advantages
    clipped_gain = mint.clamp(ratio, 1.0 - eps_low, 1.0 + eps_high) * advantages
    loss = -ops.minimum(unclipped_gain, clipped_gain)
    if dual_clip > 0:
        loss = mint.where(advantages < 0, ops.minimum(loss, -dual_clip * advantages), loss)
    return loss, ops.cast(clipped_gain < unclipped_gain, mstype.float32)


def _tempered(logits, temperature):
    logits = ops.cast(logits, mstype.float32)
    return logits if temperature == 1.0 else logits / temperature
