"""The host's mathematics: golden and hand values, identities, corners."""

import numpy as np
import pytest

from mindrlhf import advantages
from mindrlhf.errors import UserError
from tests.gradients import COUNTS, INPUTS, MASK, OUTPUTS, answers, close

GROUPED = INPUTS["groups"]
RFPPB = "grp.rfppb.openrlhf (ddof=0 whiten)"


def lists_close(actual, expected, tolerance=1e-12):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, tolerance)


@pytest.mark.parametrize(
    ("function", "name"),
    [(advantages.group_normalized, "grp.grpo.verl (ddof=1, +1e-6)"), (advantages.group_centered, "grp.drgrpo")],
)
def test_group_advantages_match_golden_in_any_order(function, name):
    rewards, groups = np.array(GROUPED["rewards"]), np.array(GROUPED["group"])
    close(function(rewards, groups), OUTPUTS[name], 1e-12)
    order = np.array([4, 0, 5, 1, 7, 3, 2, 6])
    close(function(rewards[order], 7 - 3 * groups[order]), np.array(OUTPUTS[name])[order], 1e-12)


def opo(rewards, groups):
    """optimal_baseline at lengths 1, 2, ..."""
    return advantages.optimal_baseline(rewards, groups, np.arange(1, len(rewards) + 1))


def test_group_advantages_by_hand():
    """Two groups, mixed, of three and two: the means of the others, the length-weighted means, the leads."""
    rewards, groups = np.array([1.0, 4.0, 0.0, 0.0, 0.5]), np.array([7, 3, 7, 3, 7])
    close(advantages.leave_one_out(rewards, groups), [0.75, 4.0, -0.75, -4.0, 0.0], 1e-15)
    close(advantages.optimal_baseline(rewards, groups, [2, 1, 5, 3, 1]), [0.6875, 3.0, -0.3125, -1.0, 0.1875], 1e-15)
    close(advantages.best_of_group(rewards, groups, 0.5), [0.5, 4 / (8**0.5 + 0.5), 0, 0, 0], 1e-15)


@pytest.mark.parametrize("function", [advantages.leave_one_out, advantages.best_of_group, opo])
def test_group_advantages_ignore_a_shift_and_the_order(function):
    random = np.random.default_rng(0)
    rewards, groups = random.normal(size=12), np.array([0, 1, 2, 2, 1, 0] * 2)
    expected = function(rewards, groups)
    close(function(rewards + 5, groups), expected, 1e-12)
    if function is not opo:  # its lengths stand in the order of the answers
        order = random.permutation(12)
        close(function(rewards[order], 9 - 2 * groups[order]), expected[order], 1e-12)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards, groups = np.array(GROUPED["rewards"]), np.array(GROUPED["group"])
    others = [rewards[(groups == g) & (np.arange(8) != i)].mean() for i, g in enumerate(groups)]
    close(advantages.leave_one_out(rewards, groups), rewards - others, 1e-12)


def test_the_optimal_baseline_of_equal_lengths_is_the_mean():
    rewards, groups = np.array(GROUPED["rewards"]), np.array(GROUPED["group"])
    close(advantages.optimal_baseline(rewards, groups, np.full(8, 9)), OUTPUTS["grp.drgrpo"], 1e-12)
    # Advantages weighted by the lengths sum to 0 in every group: what an answer's tokens add up to is unbiased.
    weighted = advantages.optimal_baseline(rewards, groups, GROUPED["lengths"]) * GROUPED["lengths"]
    close([weighted[:4].sum(), weighted[4:].sum()], 0, 1e-12)
    assert np.isfinite(advantages.optimal_baseline(rewards, groups, np.zeros(8))).all()


def test_best_of_group_pays_one_answer():
    result = advantages.best_of_group(np.array(GROUPED["rewards"]), np.array(GROUPED["group"]))
    assert list(np.flatnonzero(result)) == [0]  # the second group has two best answers
    close(result[0], 0.5 / (np.std([1.0, 0.0, 0.0, 0.5], ddof=1) + 1e-6), 1e-12)
    # With binary rewards only the one right answer of a group is paid.
    assert np.count_nonzero(advantages.best_of_group([0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1])) == 1


@pytest.mark.parametrize(
    "function",
    [
        advantages.group_normalized,
        advantages.group_centered,
        advantages.leave_one_out,
        advantages.best_of_group,
        opo,
    ],
)
def test_equal_rewards_give_exactly_zero(function):
    rewards = np.array([0.1, 0.1, 0.1, 1 / 3, 0.7, 0.7], np.float32)
    assert (function(rewards, np.array([0, 0, 0, 5, 2, 2])) == 0).all()
    assert (function(np.array([0.3, 7.0]), np.array([4, 1])) == 0).all()  # groups of one
    assert function(np.array([]), np.array([], int)).shape == (0,)


def test_epsilon_zero_and_unequal_groups():
    result = advantages.group_normalized([1, 0, 3, 3, 3, 0, 1, 2], [0, 0, 1, 1, 1, 2, 2, 2], epsilon=0.0)
    close(result, [0.5**0.5, -(0.5**0.5), 0, 0, 0, -1, 0, 1], 1e-12)


def test_rewards_and_groups_of_different_length():
    with pytest.raises(ValueError, match=r"\(3,\) rewards and \(3,\) lengths for \(4,\) groups"):
        advantages.group_centered(np.zeros(3), np.zeros(4, int))
    with pytest.raises(ValueError, match=r"\(4,\) rewards and \(1,\) lengths"):
        advantages.optimal_baseline(np.zeros(4), np.zeros(4, int), [3])


@pytest.mark.parametrize(("estimator", "name"), [("k1", "k1.openrlhf"), ("k2", "k2.openrlhf"), ("k3", "k3.slime")])
def test_kl_matches_golden(estimator, name):
    for clamp in (True, False):
        value = advantages.kl(INPUTS["logp"], INPUTS["ref_logp"], estimator, clamp=clamp)
        close(value * MASK, OUTPUTS[f"kl.{name}"])


def test_kl_clamps():
    policy, ref = np.array([0.0, -30.0, -5.0]), np.array([-30.0, 0.0, 0.0])
    close(advantages.kl(policy, ref, "k1"), [20, -20, -5], 0)
    close(advantages.kl(policy, ref, "k2"), [200, 200, 12.5], 0)
    close(advantages.kl(policy, ref, "k3"), [10, 10, 10], 0)
    close(advantages.kl(policy, ref, "k3", clamp=False), [np.exp(-30) + 29, np.exp(30) - 31, np.exp(5) - 6], 1e-2)
    with pytest.raises(UserError, match="k1, k2, k3"):
        advantages.kl(policy, ref, "k4")


def test_token_rewards_match_golden():
    for i, count in enumerate(COUNTS):
        policy, ref = np.array(INPUTS["logp"][i][:count]), np.array(INPUTS["ref_logp"][i][:count])
        rewards = advantages.token_rewards(INPUTS["seq_rewards"][i], policy, ref, 0.1, "k1")
        close(rewards, OUTPUTS["reward.kl_shaped.openrlhf"][i][:count])


def test_token_rewards_clip_and_one_token_answer():
    close(advantages.token_rewards(25.0, np.array([-1.0]), np.array([-3.0]), 0.5), [9.0], 1e-12)
    close(advantages.token_rewards(-25.0, np.array([-1.0]), np.array([-3.0]), 0.5, clip=5.0), [-6.0], 1e-12)
    assert advantages.token_rewards(1.0, np.array([]), np.array([]), 0.5).shape == (0,)


def test_kl_is_subtracted_from_the_reward():
    """The published fault is a plus: a policy that leaves the reference would be paid for it."""
    policy, ref = np.array([-0.5, -1.0]), np.array([-2.5, -1.0])
    close(advantages.token_rewards(1.0, policy, ref, 0.1), [-0.2, 1.0], 1e-15)
    for estimator in ("k2", "k3"):
        assert advantages.token_rewards(1.0, policy, ref, 0.1, estimator)[0] < 0


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_gae_matches_golden(lam):
    rewards, values = answers("reward.kl_shaped.openrlhf"), answers("values")
    result, returns = advantages.gae(rewards, values, 1.0, lam)
    lists_close(result, answers(f"gae.openrlhf.g1.0.l{lam}.adv"))
    lists_close(returns, [a + v for a, v in zip(answers(f"gae.openrlhf.g1.0.l{lam}.adv"), values, strict=True)])
    if lam == 1.0:
        lists_close(returns, answers("gae.openrlhf.g1.0.l1.0.ret"))


def random_answers(lengths=(6, 1, 4, 0, 9)):
    random = np.random.default_rng(2)
    return [random.normal(size=n) for n in lengths], [random.normal(size=n).astype(np.float32) for n in lengths]


def test_gae_is_the_sum_of_discounted_errors():
    """The definition, term by term: A_t = sum over k of (gamma lam)^k delta_{t+k}."""
    gamma, lam = 0.9, 0.7
    rewards, values = random_answers()
    result, returns = advantages.gae(rewards, values, gamma, lam)
    for r, v, a, g in zip(rewards, values, result, returns, strict=True):
        delta = r + gamma * np.append(v, 0)[1:] - v
        expected = [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(r))]
        close(a, expected, 1e-12)
        close(g, a + v, 1e-12)


def test_gae_without_values_is_the_discounted_return_to_go():
    rewards, _ = random_answers()
    result, returns = advantages.gae(rewards, [np.zeros(len(r)) for r in rewards], 0.8, 1.0)
    for r, a in zip(rewards, result, strict=True):
        close(a, [sum(0.8**k * x for k, x in enumerate(r[t:])) for t in range(len(r))], 1e-12)
    lists_close(returns, result, 0)


def test_gae_does_not_depend_on_the_other_answers():
    rewards, values = random_answers()
    result, _ = advantages.gae(rewards, values, 0.9, 0.7)
    for r, v, a in zip(rewards, values, result, strict=True):
        assert (advantages.gae([r], [v], 0.9, 0.7)[0][0] == a).all()
    assert advantages.gae([], [], 1.0, 1.0) == ([], [])


def test_gae_of_different_lengths():
    with pytest.raises(ValueError, match="answer 1: 2 rewards and 3 values"):
        advantages.gae([np.zeros(1), np.zeros(2)], [np.zeros(1), np.zeros(3)], 1.0, 1.0)


def test_whiten_matches_golden():
    expected = answers("gae.openrlhf.g1.0.l0.95.adv_norm")
    lists_close(advantages.whiten(answers("gae.openrlhf.g1.0.l0.95.adv")), expected, 1e-9)


def test_reinforce_plus_plus_baseline_matches_golden():
    centered = advantages.group_centered(GROUPED["rewards"], GROUPED["group"])
    spread = [np.full(n, a) for n, a in zip(GROUPED["lengths"], centered, strict=True)]
    whitened = advantages.whiten(spread)
    lists_close(whitened, [np.full(n, a) for n, a in zip(GROUPED["lengths"], OUTPUTS[RFPPB], strict=True)], 1e-9)


def test_whitening_is_over_the_step():
    """Mean 0 and deviation 1 over all tokens; the parts' own whitening, the published fault, is another number."""
    values, _ = random_answers()
    whole = advantages.whiten(values)
    tokens = np.concatenate(whole)
    close([tokens.mean(), tokens.std()], [0, 1], 1e-12)
    parts = [*advantages.whiten(values[:2]), *advantages.whiten(values[2:])]
    assert np.abs(np.concatenate(parts) - tokens).max() > 0.1
    close(np.concatenate(advantages.whiten(values, ddof=1)).std(ddof=1), 1, 1e-12)
    order = [4, 0, 3, 2, 1]
    lists_close(advantages.whiten([values[i] for i in order]), [whole[i] for i in order])


def test_whitening_of_little():
    close(advantages.whiten([np.array([3.0, 5.0])])[0], [-1, 1], 1e-12)
    same = np.full(3, 0.1, np.float32)
    close(np.concatenate(advantages.whiten([same, same])), 0, 1e-9)
    for ddof in (0, 1):
        assert advantages.whiten([np.array([7.0])], ddof=ddof)[0] == [0.0]
    assert [a.shape for a in advantages.whiten([np.zeros(0), np.zeros(0)])] == [(0,), (0,)]
    # The variance is bounded below: noise of rounding is not blown up to deviation 1.
    close(advantages.whiten([np.array([1e-9, -1e-9])])[0], [1e-5, -1e-5], 1e-12)


def test_mismatch_weights_by_hand():
    """w = 0.2, 2, 1 in one answer, of geometric mean 0.4^(1/3) = 0.737, and w = 8 in the other."""
    old = [np.log([0.2, 1.0, 0.5]), np.log([0.8])]
    sampled = [np.log([1.0, 0.5, 0.5]), np.log([0.1])]

    def weights(correction, low=0.5, high=5.0):
        return advantages.mismatch_weights(old, sampled, correction, low, high)

    lists_close(weights("none"), [[1, 1, 1], [1]], 0)
    lists_close(weights("truncated"), [[0.5, 2, 1], [5]])
    lists_close(weights("icepop"), [[0, 2, 1], [0]])
    lists_close(weights("sequence_mask"), [[0.2, 2, 1], [0]])
    lists_close(weights("sequence_mask", low=0.74, high=8.1), [[0, 0, 0], [8]])
    lists_close(weights("truncated", low=0.0, high=8.0), [[0.2, 2, 1], [8]])


@pytest.mark.parametrize("correction", advantages.MISMATCH_CORRECTIONS)
def test_mismatch_weights_without_mismatch(correction):
    """On one engine nothing is corrected; and no ratio is out of float's range."""
    logprobs = [np.array([-0.5, -3.0], np.float32), np.array([], np.float32)]
    lists_close(advantages.mismatch_weights(logprobs, logprobs, correction, 0.5, 5.0), [[1, 1], []], 0)
    far = advantages.mismatch_weights([np.full(2, 800.0)], [np.zeros(2)], correction, 0.5, 5.0)
    assert np.isfinite(far[0]).all()


def test_unknown_correction():
    with pytest.raises(UserError, match="algorithm.mismatch.correction: 'tis' is not one of none, truncated, icepop"):
        advantages.mismatch_weights([], [], "tis", 0.5, 5.0)


def test_adaptive_kl_matches_golden():
    """A KL under the target lowers the coefficient, one above raises it; the published fault only ever lowers it."""
    coefficient, values = 0.2, []
    for kl in (3.0, 6.0, 12.0):
        coefficient = advantages.adaptive_kl_coef(coefficient, kl, 6.0, 10000, 256)
        values.append(coefficient)
    close(values, OUTPUTS["adaptive_kl(init0.2,target6,h10000,n256; kl=3,6,12)"], 1e-15)
    close(advantages.adaptive_kl_coef(0.2, 6.6, 6.0, 100, 10), 0.2 * 1.01, 1e-15)


def test_explained_variance():
    returns = np.array([1.0, 2.0, 3.0, 6.0], np.float32)
    assert advantages.explained_variance(returns, returns) == 1
    assert advantages.explained_variance(returns + 7, returns) == 1  # a bias is not variance
    assert advantages.explained_variance(np.full(4, 3.0), returns) == 0
    close(advantages.explained_variance(np.zeros(4), returns), 0, 0)
    close(advantages.explained_variance(returns / 2, returns), 0.75, 1e-12)
    assert advantages.explained_variance(-returns, returns) == -3
    # Constant returns explain nothing, though the variance of three times 0.1 is not exactly 0.
    assert advantages.explained_variance(np.array([0.0, 1.0, 2.0]), np.full(3, 0.1)) == 0
    assert advantages.explained_variance(np.array([]), np.array([])) == 0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", [1 / 6, 0, 1 / 6, 1 / 6]),
        ("sequence_mean", [1 / 3, 0, 1 / 6, 1 / 9]),
        ("sequence_sum", [1 / 3, 0, 1 / 3, 1 / 3]),
        ("constant", [1 / 20, 0, 1 / 20, 1 / 20]),
        ("token_sum", [1, 0, 1, 1]),
    ],
)
def test_loss_weights(mode, expected):
    close(advantages.loss_weights([1, 0, 2, 3], mode, 5), expected, 1e-15)
    assert (advantages.loss_weights([0, 0], mode, 5) == 0).all()
    assert advantages.loss_weights([], mode, 5).shape == (0,)


def test_unknown_aggregation():
    with pytest.raises(UserError, match="'mean' is not one of token_mean"):
        advantages.loss_weights([1], "mean", 5)


def test_overlong_penalty():
    penalties = [advantages.overlong_penalty(length, 100, 20) for length in (50, 80, 90, 100, 110)]
    close(penalties, OUTPUTS["overlong.openrlhf(max100,buf20): L=50,80,90,100,110"], 0)
    assert advantages.overlong_penalty(85, 100, 20, factor=0.4) == pytest.approx(-0.1)
    assert advantages.overlong_penalty(100, 100, 0) == 0.0


def test_keep_group_is_strict():
    assert advantages.keep_group([1, 0, 0, 0])
    assert not advantages.keep_group([1.0, 1.0, 1.0])
    assert not advantages.keep_group([0.0, 0.0])
    assert not advantages.keep_group([0.2, 0.4], low=0.1, high=0.3)
    assert advantages.keep_group(np.array([-1, 1, 1], np.float32), low=-1.0, high=1.0)
