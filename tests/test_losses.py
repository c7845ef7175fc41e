"""Every loss against golden values, eager and compiled, with gradients."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import mint, nn, ops

from mindrlhf.advantages import loss_weights
from mindrlhf.losses import kl_penalty, logprobs_and_entropy, ratio_policy_loss, supervised_loss

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "golden.json").read_text())
INPUTS, OUTPUTS = GOLDEN["inputs"], GOLDEN["outputs"]
MASK = np.array(INPUTS["mask"], np.float32)
COUNTS = MASK.sum(1).astype(int)


class PolicyLoss(nn.Cell):
    def __init__(self, eps_high=0.2, dual_clip=0.0):
        super().__init__()
        self.eps_high = eps_high
        self.dual_clip = dual_clip

    def construct(self, policy, old, advantages, weight):
        loss, clipped = ratio_policy_loss(policy, old, advantages, 0.2, self.eps_high, self.dual_clip)
        return mint.sum(loss * weight), clipped


class KlLoss(nn.Cell):
    def __init__(self, estimator, clamp):
        super().__init__()
        self.estimator = estimator
        self.clamp = clamp

    def construct(self, policy, ref, weight):
        value = kl_penalty(policy, ref, self.estimator, self.clamp)
        return mint.sum(value * weight), value


class Head(nn.Cell):
    """sum(weight logprobs) + 0.3 sum(weight entropy): its gradient shows what flows through the entropy."""

    def __init__(self, temperature=1.0, entropy_gradient=False):
        super().__init__()
        self.temperature = temperature
        self.entropy_gradient = entropy_gradient

    def construct(self, logits, labels, weight):
        logprobs, entropy = logprobs_and_entropy(logits, labels, self.temperature, self.entropy_gradient)
        return mint.sum(logprobs * weight) + 0.3 * mint.sum(entropy * weight), logprobs, entropy


class Gradient(nn.Cell):
    def __init__(self, cell):
        super().__init__()
        self.run = ops.value_and_grad(cell, 0, has_aux=True)

    def construct(self, *arguments):
        return self.run(*arguments)


def run(cell, *arrays):
    """Value, further outputs and the gradient to the first argument, as arrays."""
    arrays = [np.asarray(a) for a in arrays]
    outputs, gradient = Gradient(cell)(
        *[ms.Tensor(a.astype(np.int32 if a.dtype.kind == "i" else "f4")) for a in arrays]
    )
    return *[output.asnumpy() for output in outputs], gradient.asnumpy()


def tokens(name):
    """A golden [B, T] input as the [N] of its real tokens."""
    return np.array(INPUTS[name], np.float32)[MASK > 0]


def weights(aggregation, max_tokens=5):
    return np.repeat(loss_weights(COUNTS, aggregation, max_tokens), COUNTS)


def policy_loss(weight, **options):
    return run(PolicyLoss(**options), tokens("logp"), tokens("old_logp"), tokens("adv"), weight)


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_policy_loss_matches_golden(mode):
    loss, clipped, gradient = policy_loss(weights("token_mean"))
    close(loss, OUTPUTS["ppo.openrlhf.token_level=True"])
    close(clipped.mean(), OUTPUTS["ppo.clipfrac.openrlhf"])
    close(gradient, np.array(OUTPUTS["grad.ppo.token-mean"])[MASK > 0])
    close((tokens("old_logp") - tokens("logp")).mean(), OUTPUTS["ppo.ppo_kl.openrlhf"])
    for aggregation, name in [
        ("sequence_mean", "ppo.openrlhf.token_level=False"),
        ("sequence_sum", "ppo.verl.seq-mean-token-sum"),
        ("constant", "agg.trl.dr_grpo.L5"),
    ]:
        close(policy_loss(weights(aggregation))[0], OUTPUTS[name])


def test_clip_higher_and_dual_clip_match_golden(mode):
    weight = weights("token_mean")
    close(policy_loss(weight, eps_high=0.28)[0], OUTPUTS["ppo.openrlhf.cliphigher0.28"])
    loss, _, gradient = policy_loss(weight, dual_clip=1.2)
    close(loss, OUTPUTS["ppo.openrlhf.dualclip1.2"])
    # Where -c A bounds the loss there is no gradient.
    bound = (tokens("adv") < 0) & (tokens("logp") - tokens("old_logp") > np.log(1.2))
    assert bound.any() and (gradient[bound] == 0).all()


def test_policy_loss_golden_in_padded_shape(mode):
    """[B, T] with padding of weight 0 is the same as [N]."""
    weight = MASK / MASK.sum()
    loss, _, gradient = run(PolicyLoss(), INPUTS["logp"], INPUTS["old_logp"], INPUTS["adv"], weight)
    close(loss, OUTPUTS["ppo.openrlhf.token_level=True"])
    close(gradient, OUTPUTS["grad.ppo.token-mean"])


def test_policy_loss_corners(mode):
    """On policy, hostile ratios, a fully masked step, one-token answers: one cell, one shape."""
    cell, n = PolicyLoss(), 6
    logprobs, advantages = np.linspace(-3, -0.1, n), np.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.25])
    one_token_answers = loss_weights([1] * n, "sequence_mean", 9)
    loss, clipped, gradient = run(cell, logprobs, logprobs, advantages, one_token_answers)
    close(loss, -advantages.mean())
    close(gradient, -advantages / n)  # the ratio is 1: the plain policy gradient
    assert (clipped == 0).all()
    far = np.array([-500.0, 500.0, 0.0, 0.0, 25.0, 1.0])
    loss, clipped, gradient = run(cell, logprobs + far, logprobs, advantages, one_token_answers)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    expected = -(np.exp(-20) - np.exp(20.0) + 0.5 + 0.0 + 2.4 - 0.25 * np.e) / n
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert list(clipped) == [0, 0, 0, 0, 1, 0]
    loss, _, gradient = run(cell, logprobs + far, logprobs, advantages, loss_weights([0] * n, "token_mean", 9))
    assert loss == 0 and (gradient == 0).all()


def test_micro_batches_sum_to_the_whole(mode):
    arrays = [tokens("logp"), tokens("old_logp"), tokens("adv"), weights("sequence_mean")]
    whole, _, gradient = run(PolicyLoss(), *arrays)
    parts = [run(PolicyLoss(), *(a[part] for a in arrays)) for part in (slice(0, 7), slice(7, 17))]
    close(sum(part[0] for part in parts), whole)
    close(np.concatenate([part[2] for part in parts]), gradient)


@pytest.mark.parametrize(("estimator", "name"), [("k1", "k1.openrlhf"), ("k2", "k2.openrlhf"), ("k3", "k3.slime")])
@pytest.mark.parametrize("clamp", [True, False])
def test_kl_matches_golden(mode, estimator, name, clamp):
    n = MASK.sum()
    _, value, gradient = run(KlLoss(estimator, clamp), tokens("logp"), tokens("ref_logp"), np.full(int(n), 1 / n))
    close(value, np.array(OUTPUTS[f"kl.{name}"])[MASK > 0])
    difference = tokens("logp") - tokens("ref_logp")
    expected = {"k1": np.ones_like(difference), "k2": difference, "k3": 1 - np.exp(-difference)}[estimator]
    close(gradient, expected / n)
    if estimator == "k3":
        close(gradient, np.array(OUTPUTS["grad.kl.k3.token-mean"])[MASK > 0])


def test_kl_clamps(mode):
    policy, ref = np.array([0.0, -30.0, -5.0, 0.0]), np.array([-30.0, 0.0, 0.0, 0.0])
    _, value, gradient = run(KlLoss("k3", True), policy, ref, np.ones(4))
    close(value, [10, 10, 10, 0])
    close(gradient, [0, 0, 0, 0])
    close(run(KlLoss("k1", True), policy, ref, np.ones(4))[1], [20, -20, -5, 0])


def head_reference(logits, labels, weight, temperature, entropy_gradient):
    """In float64: the scalar of Head with its gradient, in closed form, the log-probs and the entropy."""
    scaled = logits / temperature
    log_p = scaled - scaled.max(-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    p = np.exp(log_p)
    chosen = log_p[np.arange(len(labels)), labels]
    entropy = -(p * log_p).sum(-1)
    gradient = np.eye(logits.shape[1])[labels] - p
    if entropy_gradient:
        gradient -= 0.3 * p * (log_p + entropy[:, None])
    return (weight * (chosen + 0.3 * entropy)).sum(), chosen, entropy, gradient * weight[:, None] / temperature


@pytest.mark.parametrize(("temperature", "entropy_gradient"), [(1.0, False), (0.8, True)])
def test_logprobs_and_entropy(mode, temperature, entropy_gradient):
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (5, 11)).astype(np.float32)
    logits[3] += 1000.0  # a shift must not matter
    logits[4, 2] = 80.0  # as good as certain
    labels, weight = np.array([0, 10, 4, 7, 2]), np.array([0.5, 0.25, 0.0, 1.0, 0.125])
    outputs = run(Head(temperature, entropy_gradient), logits, labels, weight)
    expected = head_reference(logits.astype(np.float64), labels, weight, temperature, entropy_gradient)
    for actual, target in zip(outputs, expected, strict=True):
        # A logit near 1000 has a float32 step of 6e-5 once it is divided by the temperature.
        close(actual, target, 1e-5 if temperature == 1.0 else 2e-4)


def test_logprobs_and_entropy_finite_differences(mode):
    """float32 at step 1e-2: the difference quotient is good to about 1e-4."""
    random = np.random.default_rng(1)
    logits, labels, weight = random.normal(size=(2, 4)), np.array([3, 0]), np.array([0.5, 1.0])
    cell = Head(0.7, True)
    gradient = run(cell, logits, labels, weight)[-1]
    step = 1e-2
    for i, j in [(0, 3), (0, 1), (1, 0), (1, 2)]:
        moved = np.zeros_like(logits)
        moved[i, j] = step
        up, down = run(cell, logits + moved, labels, weight)[0], run(cell, logits - moved, labels, weight)[0]
        assert (up - down) / (2 * step) == pytest.approx(gradient[i, j], abs=3e-4)


def test_half_precision_logits_and_uniform_entropy():
    logprobs, entropy = logprobs_and_entropy(ms.Tensor(np.zeros((2, 8), np.float16)), ms.Tensor([1, 7], ms.int32))
    assert logprobs.dtype == entropy.dtype == ms.float32
    close(logprobs.asnumpy(), -np.log(8), 5e-6)
    close(entropy.asnumpy(), np.log(8), 5e-6)


def test_supervised_loss():
    close(supervised_loss(ms.Tensor([-0.5, 0.0], ms.float32)).asnumpy(), [0.5, 0.0], 0)


def test_unknown_estimator():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_penalty(ms.Tensor([0.0]), ms.Tensor([0.0]), "k4")
