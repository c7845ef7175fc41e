"""KL, log-probs and entropy against golden and float64 values, eager and compiled, with gradients."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import mint, nn

from mindrlhf.losses import kl_penalty, logprobs_and_entropy, supervised_loss
from tests.gradients import MASK, OUTPUTS, close, run, tokens


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
