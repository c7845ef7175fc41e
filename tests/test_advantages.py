import json
from pathlib import Path

import numpy as np
import pytest

from mindrlhf import advantages
from mindrlhf.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "golden.json").read_text())
INPUTS, OUTPUTS = GOLDEN["inputs"], GOLDEN["outputs"]
MASK = np.array(INPUTS["mask"])
COUNTS = MASK.sum(1)


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("function", "name"),
    [(advantages.group_normalized, "grp.grpo.verl (ddof=1, +1e-6)"), (advantages.group_centered, "grp.drgrpo")],
)
def test_group_advantages_match_golden_in_any_order(function, name):
    rewards, groups = np.array(INPUTS["groups"]["rewards"]), np.array(INPUTS["groups"]["group"])
    close(function(rewards, groups), OUTPUTS[name], 1e-12)
    order = np.array([4, 0, 5, 1, 7, 3, 2, 6])
    close(function(rewards[order], 7 - 3 * groups[order]), np.array(OUTPUTS[name])[order], 1e-12)


@pytest.mark.parametrize("function", [advantages.group_normalized, advantages.group_centered])
def test_equal_rewards_give_exactly_zero(function):
    rewards = np.array([0.1, 0.1, 0.1, 1 / 3, 0.7, 0.7], np.float32)
    assert (function(rewards, np.array([0, 0, 0, 5, 2, 2])) == 0).all()
    assert function(np.array([]), np.array([], int)).shape == (0,)


def test_epsilon_zero_and_unequal_groups():
    result = advantages.group_normalized([1, 0, 3, 3, 3, 0, 1, 2], [0, 0, 1, 1, 1, 2, 2, 2], epsilon=0.0)
    close(result, [0.5**0.5, -(0.5**0.5), 0, 0, 0, -1, 0, 1], 1e-12)


def test_rewards_and_groups_of_different_length():
    with pytest.raises(ValueError, match="rewards for"):
        advantages.group_centered(np.zeros(3), np.zeros(4, int))


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


def test_kl_shaped_advantages_are_the_return_to_go():
    shaped = advantages.kl_shaped_advantages(2.0, np.array([-1.0, -2.0, -3.0]), np.array([-1.5, -1.0, -3.25]), 0.1)
    close(shaped, [2.0 - 0.1 * (0.5 - 1.0 + 0.25), 2.0 - 0.1 * (-1.0 + 0.25), 2.0 - 0.1 * 0.25], 1e-12)
    # An advantage is not a reward: it is not clipped.
    close(advantages.kl_shaped_advantages(30.0, np.zeros(2), np.zeros(2), 0.1), [30.0, 30.0], 0)


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
