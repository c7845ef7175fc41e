"""The tables of policy losses and the critic's loss: golden and float64 values, eager and compiled, with gradients."""

import numpy as np
import pytest
from mindspore import mint, nn

from mindrlhf.advantages import loss_weights, mismatch_weights
from mindrlhf.losses import POLICY_LOSSES, value_loss
from tests.gradients import COUNTS, INPUTS, MASK, OUTPUTS, answers, central_differences, close, run, tokens, weights

SEQUENCE = np.repeat(np.arange(len(COUNTS)), COUNTS)  # of the golden tokens


class PolicyLoss(nn.Cell):
    def __init__(self, name="ppo", eps_low=0.2, eps_high=0.2, dual_clip=0.0):
        super().__init__()
        self.function = POLICY_LOSSES[name].function
        self.constants = (eps_low, eps_high, dual_clip)

    def construct(self, policy, old, advantages, sequence, mask, weight):
        loss, clipped = self.function(policy, old, advantages, sequence, mask, *self.constants)
        return mint.sum(loss * weight), loss, clipped


class ValueLoss(nn.Cell):
    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def construct(self, values, old, returns, weight):
        loss, clipped = value_loss(values, old, returns, self.clip)
        return mint.sum(loss * weight), loss, clipped


def golden(aggregation, old="old_logp", advantages=None, **options):
    """Sum, loss, clipped and gradient over the golden tokens."""
    advantages = tokens("adv") if advantages is None else advantages
    arrays = tokens("logp"), tokens(old), advantages, SEQUENCE, np.ones(len(SEQUENCE)), weights(aggregation)
    return run(PolicyLoss(**options), *arrays)


def reference(name, policy, at, old, advantages, sequence, mask, eps_low, eps_high, dual_clip):
    """(loss, clipped) in float64. at: the policy at which a stopped ratio is taken."""
    if name == "reinforce":
        return -advantages * policy, np.zeros(len(policy))
    difference = (at if name == "cispo" else policy) - old
    if name == "gspo":
        members = (sequence[:, None] == sequence) * mask
        difference = members @ difference / np.maximum(members.sum(1), 1)
    ratio = np.exp(difference)
    clipped_ratio = np.clip(ratio, 1 - eps_low, 1 + eps_high)
    if name == "importance_sampling":
        return -ratio * advantages, np.zeros(len(policy))
    if name == "cispo":
        return -clipped_ratio * advantages * policy, (clipped_ratio != ratio).astype(float)
    gain, clipped_gain = ratio * advantages, clipped_ratio * advantages
    loss = -np.minimum(gain, clipped_gain)
    if dual_clip:
        loss = np.where(advantages < 0, np.minimum(loss, -dual_clip * advantages), loss)
    return loss, (clipped_gain < gain).astype(float)


@pytest.fixture(scope="module")
def batch():
    """policy, old, advantages, sequence, mask, weight of 24 tokens: answers of 1, 7, 3, 5 and 2 tokens, then padding.

    The second answer has a gap of two tokens that an environment wrote.
    """
    random = np.random.default_rng(3)
    lengths = [1, 7, 3, 5, 2]
    sequence = np.full(24, 23)
    sequence[:18] = np.repeat(np.arange(5), lengths)
    mask = np.where(np.isin(np.arange(24), [3, 4, *range(18, 24)]), 0.0, 1.0)
    counts = np.bincount(sequence, mask)[:5]
    weight = np.zeros(24)
    weight[:18] = np.repeat(loss_weights(counts, "sequence_mean", 8), lengths)
    old = -3 * random.random(24)
    # Answer 1 is a case for the dual clip, answers 2 and 4 are clipped on either side.
    policy = old + random.normal(0, 0.3, 24) + np.repeat([0.0, 0.5, -0.4, 0.1, 0.5, 0.0], [*lengths, 6])
    advantages = np.zeros(24)
    advantages[:18] = np.repeat([-0.4, -1.0, -0.6, 0.8, 1.0], lengths) + random.normal(0, 0.1, 18)  # KL in the reward
    arrays = policy, old, advantages * mask, sequence, mask, weight * mask
    return [np.float64(np.float32(array)) if array.dtype.kind == "f" else array for array in arrays]


def answers_of(batch, numbers):
    """The micro-batch of some of the answers, in that order, renumbered and padded to as many tokens as before."""
    places = [np.flatnonzero(batch[3] == number) for number in numbers]
    chosen = np.concatenate(places)
    sequence = np.full(24, 23)
    sequence[: len(chosen)] = np.repeat(np.arange(len(places)), [len(p) for p in places])
    parts = [np.concatenate([array[chosen], np.zeros(24 - len(chosen))]) for array in batch]
    parts[3] = sequence
    return chosen, parts


def test_the_table():
    assert list(POLICY_LOSSES) == ["ppo", "gspo", "cispo", "reinforce", "importance_sampling"]
    assert all(row.paper.startswith("https://") for row in POLICY_LOSSES.values())


@pytest.mark.parametrize("dual_clip", [0.0, 1.2])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_values_and_gradients(mode, batch, name, dual_clip):
    policy, *data, weight = batch
    options = (0.2, 0.28, dual_clip)
    _, loss, clipped, gradient = run(PolicyLoss(name, *options), *batch)
    expected, expected_clipped = reference(name, policy, policy, *data, *options)
    close(loss, expected, 2e-6)
    assert (clipped == expected_clipped).all()
    assert clipped.any() == (name in ("ppo", "gspo", "cispo"))

    def total(x):
        return (weight * reference(name, x, policy, *data, *options)[0]).sum()

    close(gradient, central_differences(total, policy), 2e-6)
    if dual_clip and name in ("ppo", "gspo"):
        assert (reference(name, policy, policy, *data, 0.2, 0.28, 0.0)[0] != expected).any()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_weight_on_the_advantages_is_a_weight_on_the_loss(mode, batch, name):
    """Positive homogeneity, token by token: that is how the mismatch correction reaches every loss."""
    policy, old, advantages, sequence, mask, weight = batch
    factor = np.tile([0.0, 0.25, 0.5, 2.0], 6)
    cell = PolicyLoss(name, dual_clip=1.5)
    _, loss, clipped, _ = run(cell, *batch)
    scaled = run(cell, policy, old, factor * advantages, sequence, mask, weight)
    close(scaled[1], factor * loss)
    assert name == "cispo" or (scaled[2] == clipped * (factor > 0)).all()
    close(scaled[3], run(cell, policy, old, advantages, sequence, mask, factor * weight)[3])


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_micro_batches_and_order_change_nothing(mode, batch, name):
    """Weights are over the step, so parts add up; the mean of the parts' own means would not."""
    whole, loss, _, gradient = run(PolicyLoss(name), *batch)
    total = 0.0
    for numbers in ([4, 1], [3, 0, 2]):
        chosen, part = answers_of(batch, numbers)
        part_sum, part_loss, _, part_gradient = run(PolicyLoss(name), *part)
        total += part_sum
        close(part_loss[: len(chosen)], loss[chosen], 2e-7)
        close(part_gradient[: len(chosen)], gradient[chosen], 1e-7)
    close(total, whole, 2e-7)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_every_gradient_is_reinforce(mode, batch, name):
    _, old, advantages, sequence, mask, weight = batch
    one = np.isin(sequence, [1, 4])  # two answers with one advantage each, which GSPO's gradient spreads
    advantages = np.where(one, np.where(sequence == 1, 1.5, -0.5), 0.0)
    _, _, clipped, gradient = run(PolicyLoss(name), old, old, advantages, sequence, mask, weight)
    close(gradient, -advantages * weight, 1e-7)
    assert (clipped == 0).all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_hostile_ratios_and_masked_batches_are_finite(mode, batch, name):
    _, old, advantages, sequence, mask, weight = batch
    far = np.tile([-500.0, 500.0, 0.0, 25.0, -1e4, 1e4], 4)
    cell = PolicyLoss(name, dual_clip=3.0)
    for shift in (far, np.full(24, 500.0), np.full(24, -500.0)):
        outputs = run(cell, old + shift, old, advantages, sequence, mask, weight)
        assert all(np.isfinite(output).all() for output in outputs)
    # The packing of nothing at all: one padding sequence, mask and weights 0.
    nothing = [np.zeros(24), np.zeros(24), np.zeros(24), np.full(24, 23), np.zeros(24), np.zeros(24)]
    total, loss, clipped, gradient = run(cell, *nothing)
    assert total == 0 and (loss == 0).all() and (clipped == 0).all() and (gradient == 0).all()
    # Real tokens of which none is trained.
    total, loss, _, gradient = run(cell, old + far, old, advantages, sequence, 0 * mask, 0 * weight)
    assert total == 0 and np.isfinite(loss).all() and (gradient == 0).all()


# -- ppo ---------------------------------------------------------------------------------------------------------------


def test_ppo_matches_golden(mode):
    total, _, clipped, gradient = golden("token_mean")
    close(total, OUTPUTS["ppo.openrlhf.token_level=True"])
    close(clipped.mean(), OUTPUTS["ppo.clipfrac.openrlhf"])
    close(gradient, np.array(OUTPUTS["grad.ppo.token-mean"])[MASK > 0])
    close((tokens("old_logp") - tokens("logp")).mean(), OUTPUTS["ppo.ppo_kl.openrlhf"])
    for aggregation, name in [
        ("sequence_mean", "ppo.openrlhf.token_level=False"),
        ("sequence_sum", "ppo.verl.seq-mean-token-sum"),
        ("constant", "agg.trl.dr_grpo.L5"),
    ]:
        close(golden(aggregation)[0], OUTPUTS[name])
    close(golden("token_sum", old="rollout_logp")[0], OUTPUTS["tinker.ppo 0.8/1.2"])


def test_clip_higher_and_dual_clip_match_golden(mode):
    close(golden("token_mean", eps_high=0.28)[0], OUTPUTS["ppo.openrlhf.cliphigher0.28"])
    total, _, _, gradient = golden("token_mean", dual_clip=1.2)
    close(total, OUTPUTS["ppo.openrlhf.dualclip1.2"])
    # Where -c A bounds the loss there is no gradient.
    bound = (tokens("adv") < 0) & (tokens("logp") - tokens("old_logp") > np.log(1.2))
    assert bound.any() and (gradient[bound] == 0).all()


def test_the_truncated_correction_matches_golden(mode):
    """OpenRLHF weighs the loss, we weigh the advantages."""
    old, sampled = answers("old_logp"), answers("rollout_logp")
    weight = np.concatenate(mismatch_weights(old, sampled, "truncated", 0.0, 2.0))
    assert weight.max() == 2.0
    close(golden("token_mean", advantages=tokens("adv") * weight)[0], OUTPUTS["is.tis.openrlhf"])


def test_ppo_in_padded_shape(mode):
    """[B, T] with padding of weight 0 is the same as [N]."""
    weight = MASK / MASK.sum()
    arrays = INPUTS["logp"], INPUTS["old_logp"], INPUTS["adv"], np.zeros(MASK.shape, int), MASK, weight
    total, _, _, gradient = run(PolicyLoss(), *arrays)
    close(total, OUTPUTS["ppo.openrlhf.token_level=True"])
    close(gradient, OUTPUTS["grad.ppo.token-mean"])


def test_ppo_corners(mode):
    """On policy, and at log-ratios beyond the clamp."""
    n = 6
    logprobs, advantages = np.linspace(-3, -0.1, n), np.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.25])
    rest = logprobs, advantages, np.arange(n), np.ones(n), np.full(n, 1 / n)
    total, _, _, gradient = run(PolicyLoss(), logprobs, *rest)
    close(total, -advantages.mean())
    close(gradient, -advantages / n)
    far = np.array([-500.0, 500.0, 0.0, 0.0, 25.0, 1.0])
    total, _, clipped, _ = run(PolicyLoss(), logprobs + far, *rest)
    expected = -(np.exp(-20) - np.exp(20.0) + 0.5 + 0.0 + 2.4 - 0.25 * np.e) / n
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert list(clipped) == [0, 0, 0, 0, 1, 0]


# -- gspo --------------------------------------------------------------------------------------------------------------


def test_gspo_is_the_loss_of_the_paper(mode):
    """1/G sum over answers of min(s A, clip(s) A), s the geometric mean of the answer's ratios."""
    advantage = -np.array([row[0] for row in INPUTS["adv"]])
    mean = [np.mean(p - o) for p, o in zip(answers("logp"), answers("old_logp"), strict=True)]
    gain = np.minimum(np.exp(mean) * advantage, np.clip(np.exp(mean), 0.96, 1.04) * advantage)
    total, loss, clipped, _ = golden(
        "sequence_mean", advantages=-tokens("adv"), name="gspo", eps_low=0.04, eps_high=0.04
    )
    close(total, -gain.mean())
    close(loss, np.repeat(-gain, COUNTS))
    assert 0 < clipped.mean() < 1


def test_gspo_does_not_see_gaps(mode, batch):
    policy, old, advantages, sequence, mask, weight = batch
    _, loss, _, gradient = run(PolicyLoss("gspo"), *batch)
    moved = np.where(mask > 0, policy, -1e3)
    _, other, _, moved_gradient = run(PolicyLoss("gspo"), moved, old, advantages, sequence, mask, weight)
    assert (other == loss).all() and (moved_gradient == gradient).all()
    assert (gradient[mask == 0] == 0).all() and (gradient[sequence == 1] != 0).any()


# -- cispo -------------------------------------------------------------------------------------------------------------


def test_cispo_keeps_the_gradient_of_clipped_tokens(mode):
    """Ratios 2, 0.1 and 1: the first two are clipped, but for the lower bound of the paper, which there is none."""
    difference, advantages = np.log([2.0, 0.1, 1.0]), np.array([1.0, -2.0, 4.0])
    arrays = difference - 1, np.full(3, -1.0), advantages, np.arange(3), np.ones(3), np.ones(3)
    _, loss, clipped, gradient = run(PolicyLoss("cispo", 0.2, 0.28), *arrays)
    weight = np.array([1.28, 0.8, 1.0])
    close(loss, -weight * advantages * (difference - 1), 2e-6)
    close(gradient, -weight * advantages, 2e-6)
    assert list(clipped) == [1, 1, 0]
    _, _, clipped, gradient = run(PolicyLoss("cispo", 1.0, 0.28), *arrays)
    close(gradient, [-1.28, 0.2, -4.0], 2e-6)
    assert list(clipped) == [1, 0, 0]


# -- the critic --------------------------------------------------------------------------------------------------------


def value_reference(values, old, returns, clip):
    error = (values - returns) ** 2
    clipped = (old + np.clip(values - old, -clip, clip) - returns) ** 2 if clip else error
    return 0.5 * np.maximum(error, clipped)


def test_value_loss_matches_golden(mode):
    returns = tokens("adv") + tokens("values")
    arrays = tokens("new_values"), tokens("values"), returns, weights("token_mean")
    for clip in (0.2, 0.0):
        total, loss, clipped, gradient = run(ValueLoss(clip), *arrays)
        values, old, returns, weight = (np.float64(array) for array in arrays)
        close(loss, value_reference(values, old, returns, clip))
        assert clipped.any() == (clip > 0)

        def mean(x, clip=clip, old=old, returns=returns, weight=weight):
            return (weight * value_reference(x, old, returns, clip)).sum()

        smooth = np.abs(np.abs(values - old) - clip) > 1e-3  # 0.3 against 0.1 stands at the edge of the range
        close(gradient[smooth], central_differences(mean, values)[smooth])
        if clip:
            close(total, OUTPUTS["value.openrlhf.clip0.2"])


def test_value_clip_stops_what_has_moved_far(mode):
    """Beyond the range there is no gradient towards the returns further out, but there is one back."""
    values, old = np.array([1.0, 1.0, -0.4, 0.1, 0.5]), np.zeros(5)
    returns = np.array([0.2, 2.0, -3.0, 3.0, 0.5])
    _, loss, clipped, gradient = run(ValueLoss(0.5), values, old, returns, np.ones(5))
    close(loss, [0.32, 1.125, 3.38, 4.205, 0.0])
    assert list(clipped) == [0, 1, 0, 0, 0]
    close(gradient, [0.8, 0.0, 2.6, -2.9, 0.0])


def test_values_inside_the_range_never_count_as_clipped(mode):
    """old + (values - old) is not always values in float32."""
    random = np.random.default_rng(5)
    values, old, returns = random.uniform(-0.24, 0.24, (3, 500))
    _, _, clipped, gradient = run(ValueLoss(0.5), values, old, returns, np.ones(500))
    assert (clipped == 0).all()
    close(gradient, values - returns)


def test_padding_has_no_value_loss(mode):
    zeros = np.zeros(4)
    total, loss, clipped, gradient = run(ValueLoss(0.2), np.array([3.0, -1.0, 0.0, 0.0]), zeros, zeros, zeros)
    assert total == 0 and np.isfinite(loss).all() and (gradient == 0).all() and list(clipped[2:]) == [0, 0]
