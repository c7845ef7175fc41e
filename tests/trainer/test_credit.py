"""From rewards to advantages: hand values for every row of the table, and what may not change them."""

import numpy as np
import pytest

from mindrlhf.config import AlgorithmConfig, RolloutConfig
from mindrlhf.errors import UserError
from mindrlhf.trainer.algorithms import ALGORITHMS, resolve
from mindrlhf.trainer.credit import Scores, assign, mismatch_metrics
from mindrlhf.types import Rollout

REWARDS = [1.0, 0.0, 0.5, 1.0, 3.0, 3.0]  # two groups of three
LENGTHS = [2, 1, 3, 4, 2, 2]
GREEDY = [0.25] * 3 + [2.0] * 3


def rollouts(**changes):
    return [
        Rollout(
            np.zeros(2, np.int32), np.zeros(n, np.int32), np.zeros(n, np.float32), True, i // 3, reward,
            greedy_reward=greedy, **changes,
        )
        for i, (reward, n, greedy) in enumerate(zip(REWARDS, LENGTHS, GREEDY, strict=True))
    ]  # fmt: skip


def zeros(**given):
    empty = [np.zeros(n, np.float32) for n in LENGTHS]
    return Scores(**{name: given.get(name, empty) for name in Scores._fields})


def credit(answers=None, scores=None, kl_coef=None, num_generations=3, **options):
    config = AlgorithmConfig(**{"kl_coef": kl_coef or 0.0, **options})
    algorithm = resolve(config, RolloutConfig(num_generations=num_generations))
    return assign(answers or rollouts(), scores or zeros(), algorithm, config, algorithm.kl_coef)


def firsts(result):
    return [float(array[0]) for array in result.advantages]


# Of the first group (1, 0, 0.5): mean 0.5, deviation 0.5; of the second (1, 3, 3): mean 7/3, deviation 2/sqrt(3).
BY_HAND = {
    "reinforce": REWARDS,
    "rloo": [0.75, -0.75, 0.0, -2.0, 1.0, 1.0],
    "grpo": [1.0, -1.0, 0.0, -2 / 3**0.5, 1 / 3**0.5, 1 / 3**0.5],
    "dr_grpo": [0.5, -0.5, 0.0, -4 / 3, 2 / 3, 2 / 3],
    "remax": [0.75, -0.25, 0.25, -1.0, 1.0, 1.0],
    # Length-weighted means: (2 + 0 + 1.5) / 6 and (4 + 6 + 6) / 8.
    "opo": [1 - 3.5 / 6, -3.5 / 6, 0.5 - 3.5 / 6, -1.0, 1.0, 1.0],
    "pass_at_k": [1.0, 0, 0, 0, 0, 0],  # (1 - 0.5) / 0.5; the second group's best are tied
}
BY_HAND |= dict.fromkeys(("dapo", "gspo", "cispo", "dual_clip"), BY_HAND["grpo"])
WHITENED = {"ppo": REWARDS, "reinforce++": REWARDS, "reinforce++-baseline": BY_HAND["dr_grpo"]}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_by_hand(name):
    """Without KL, at gamma 1 and without a critic's values an answer has one advantage at all of its tokens."""
    result = credit(name=name)
    expected = np.array(WHITENED.get(name) or BY_HAND[name])
    if name in WHITENED:
        tokens = np.repeat(expected, LENGTHS)
        expected = (expected - tokens.mean()) / tokens.std()
    np.testing.assert_allclose(firsts(result), expected, rtol=0, atol=5e-6)
    for array in result.advantages:
        assert (array == array[0]).all() and array.dtype == np.float32
    assert [len(array) for array in result.returns] == LENGTHS


def test_the_table_is_complete():
    assert set(BY_HAND) | set(WHITENED) == set(ALGORITHMS)
    for row in ALGORITHMS.values():
        assert "arXiv" in row.paper or "doi" in row.paper


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_order_of_the_answers_changes_nothing(name):
    """Groups mixed up, with KL and values."""
    random = np.random.default_rng(0)
    fields = {field: [random.standard_normal(n).astype(np.float32) for n in LENGTHS] for field in Scores._fields}
    answers, order = rollouts(), [4, 0, 5, 2, 1, 3]
    options = {"name": name, "kl_in_reward": True, "gae_lambda": 0.9, "gamma": 0.97}
    straight = credit(answers, Scores(**fields), 0.1, **options)
    mixed = credit(
        [answers[i] for i in order],
        Scores(**{field: [arrays[i] for i in order] for field, arrays in fields.items()}),
        0.1,
        **options,
    )
    for place, i in enumerate(order):
        np.testing.assert_allclose(mixed.advantages[place], straight.advantages[i], atol=1e-6)
        np.testing.assert_allclose(mixed.returns[place], straight.returns[i], atol=1e-6)


def test_kl_in_the_reward_is_subtracted_and_what_follows_counts():
    """The published fault is its plus sign."""
    old = [np.full(n, 0.5, np.float32) for n in LENGTHS]
    result = credit(scores=zeros(old=old), kl_coef=0.1, name="reinforce", kl_in_reward=True)
    # d = 0.5 a token: 0.05 is lost at each of the tokens from t on.
    np.testing.assert_allclose(result.advantages[2], [0.5 - 0.15, 0.5 - 0.1, 0.5 - 0.05], atol=1e-6)
    as_loss = credit(scores=zeros(old=old), kl_coef=0.1, name="reinforce", kl_in_reward=False,
                     kl_estimator="k2")  # fmt: skip
    np.testing.assert_allclose(as_loss.advantages[2], 0.5, atol=1e-6)


def test_a_critics_values_are_subtracted_and_returns_are_what_they_should_have_been():
    values = [np.full(n, 0.25, np.float32) for n in LENGTHS]
    result = credit(scores=zeros(values=values), name="ppo", whiten=False)
    for advantages, returns, reward in zip(result.advantages, result.returns, REWARDS, strict=True):
        np.testing.assert_allclose(advantages, reward - 0.25, atol=1e-6)
        np.testing.assert_allclose(returns, reward, atol=1e-6)


def test_rewards_are_clipped_before_the_baseline():
    result = credit(name="dr_grpo", reward_clip=1.0)
    np.testing.assert_allclose(firsts(result)[3:], 0, atol=1e-12)


def test_an_environments_rewards_stand_where_they_were_earned():
    """Without a baseline; a baseline is of whole answers, so there all of it stands at the end. Tokens of the
    environment are none of the S tokens that all arrays here are over."""
    sampled = np.array([True, True, False, False, True])
    earned = np.array([0, 2.0, 0, 0, 1.0], np.float32)
    answer = Rollout(
        np.zeros(1, np.int32), np.zeros(5, np.int32), np.zeros(5, np.float32), True, 0, 3.5, {}, sampled, earned
    )
    three = Scores(*([np.zeros(3, np.float32)] * 2 for _ in Scores._fields))
    result = credit([answer, answer], three, name="reinforce")
    np.testing.assert_allclose(result.advantages[0], [3.5, 3.5, 1.5])
    other = credit([answer, answer], three, name="ppo", whiten=False, gamma=0.5)
    np.testing.assert_allclose(other.advantages[0], [1.375, 2.75, 1.5])
    assert firsts(credit([answer, answer], three, name="dr_grpo", num_generations=2)) == [0, 0]


def test_the_clip_shrinks_what_was_earned():
    """And does not let the last token pay for the difference."""
    earned = np.array([15.0, 0, 0], np.float32)
    answer = Rollout(
        np.zeros(1, np.int32), np.zeros(3, np.int32), np.zeros(3, np.float32), True, 0, 15.0, {}, None, earned
    )
    result = credit([answer], Scores(*([np.zeros(3, np.float32)] for _ in Scores._fields)), name="reinforce")
    np.testing.assert_allclose(result.advantages[0], [10, 0, 0], atol=1e-6)


def test_a_mismatch_is_measured_and_corrected():
    random = np.random.default_rng(1)
    old = [random.uniform(-3, -1, n).astype(np.float32) for n in LENGTHS]
    sampled = [array - np.float32(0.1) for array in old]
    sampled[0] = old[0] - np.float32(3.0)
    scores = zeros(old=old, sampled=sampled)
    metrics = mismatch_metrics(scores)
    assert metrics["mismatch_max"] == pytest.approx(3.0, abs=1e-5)
    assert metrics["mismatch_mean"] == pytest.approx((6 + 0.1 * 12) / 14, abs=1e-5)
    plain = credit(scores=scores, name="grpo")

    def weights(correction):
        from mindrlhf.config import MismatchConfig

        corrected = credit(scores=scores, name="grpo", mismatch=MismatchConfig(correction=correction))
        pairs = zip(corrected.advantages, plain.advantages, strict=True)
        return [float(c[0] / p[0]) for c, p in pairs if p[0]]

    assert weights("truncated") == pytest.approx([5.0] + [np.exp(0.1)] * 4, rel=1e-5)
    assert weights("icepop") == pytest.approx([0.0] + [np.exp(0.1)] * 4, rel=1e-5)
    assert weights("sequence_mask") == pytest.approx([0.0] + [np.exp(0.1)] * 4, rel=1e-5)
    assert weights("none") == [1.0] * 5


def test_stale_answers_are_rescored_and_corrected():
    def resolved(**rollout):
        return resolve(AlgorithmConfig(), RolloutConfig(**rollout))

    assert (resolved().correction, resolved().rescore) == ("none", False)
    assert (resolved(asynchronous=True).correction, resolved(partial_tokens=4).rescore) == ("truncated", True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "grp"}, "algorithm.name: 'grp' is unknown; there are ppo, reinforce"),
        ({"policy_loss": "clip"}, "algorithm.policy_loss: 'clip' is unknown; there are ppo, gspo"),
        ({"kl_coef": -0.1}, "algorithm.kl_coef: -0.1 must be 0"),
        ({"eps_low": -0.2}, "algorithm.eps_low: -0.2 must be 0 or more"),
        ({"dual_clip": 0.5}, r"algorithm.dual_clip: 0.5 must be 0 \(off\) or over 1"),
        ({"kl_target": 6.0}, "algorithm.kl_target: the controller steers a KL in the reward"),
    ],
)
def test_contradictions_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        credit(**options)


def test_k1_as_a_loss_warns():
    with pytest.warns(UserWarning, match="gradient 1 whatever the reference says"):
        resolve(AlgorithmConfig(kl_estimator="k1"), RolloutConfig())
