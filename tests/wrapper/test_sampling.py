"""The next token: distribution, filters and keys, against NumPy."""

import numpy as np
import pytest

from mindrlhf.wrapper.sampling import mix, uniforms

LOGITS = np.array([[2.0, 1.0, 0.0, -1.0, -3.0], [0.5, 0.5, 0.5, 3.0, -2.0]], np.float32)


def _sample(mindspore, count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, features=()):
    """`count` draws of each row of LOGITS -> tokens [rows, count] and their log-probs."""
    from tests.wrapper.cells import NextToken

    logits = np.repeat(LOGITS, count, axis=0)
    draws = uniforms(mix(3, np.arange(len(logits))))
    numbers = [mindspore.Tensor(value, mindspore.float32) for value in (temperature, top_k, top_p, min_p)]
    token, logprob = NextToken(features)(mindspore.Tensor(logits), mindspore.Tensor(draws), *numbers)
    return token.asnumpy().reshape(2, count), logprob.asnumpy().reshape(2, count)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_uniforms_are_uniform_and_below_one():
    draws = uniforms(mix(np.arange(100_000), 5))
    assert draws.dtype == np.float32 and draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, 20, (0, 1))
    assert np.abs(counts - 5000).max() < 350  # five standard deviations
    assert len(np.unique(draws)) > 99_000
    top = np.float32(1 - 2.0**-23)
    totals = np.nextafter(np.float32([0.5, 1, 1.9, 7]), np.float32(100))
    assert (top * totals < totals).all()


def test_keys_depend_on_every_word_and_on_order():
    base = mix(1, 2, 3)
    assert len({int(base), int(mix(1, 2, 4)), int(mix(2, 1, 3)), int(mix(0, 2, 3)), int(mix(1, 2))}) == 5


def test_frequencies_are_the_softmax_under_the_temperature(mindspore):
    tokens, logprobs = _sample(mindspore, 40_000, temperature=0.7)
    expected = _softmax(LOGITS / 0.7)
    for row in range(2):
        found = np.bincount(tokens[row], minlength=5) / 40_000
        np.testing.assert_allclose(found, expected[row], atol=0.012)
        np.testing.assert_allclose(logprobs[row], np.log(expected[row])[tokens[row]], atol=2e-5)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2, "features": ("top_k",)}, ([0, 1], [3, 0, 1, 2])),  # the tie at the edge stays
        ({"top_p": 0.85, "features": ("top_p",)}, ([0, 1], [3, 0, 1, 2])),
        ({"min_p": 0.3, "features": ("min_p",)}, ([0, 1], [3])),
        ({"top_k": 3, "top_p": 0.5, "features": ("top_k", "top_p")}, ([0], [3])),
    ],
)
def test_filters_keep_what_they_say_and_leave_the_logprob_alone(mindspore, filters, kept):
    tokens, logprobs = _sample(mindspore, 4000, **filters)
    full = np.log(_softmax(LOGITS))
    for row in range(2):
        assert set(tokens[row].tolist()) == set(kept[row])
        share = _softmax(LOGITS)[row][kept[row]]
        found = np.array([(tokens[row] == token).mean() for token in kept[row]])
        np.testing.assert_allclose(found, share / share.sum(), atol=0.04)
        np.testing.assert_allclose(logprobs[row], full[row][tokens[row]], atol=2e-5)


def test_greedy_is_the_largest_with_its_logprob(mindspore):
    tokens, logprobs = _sample(mindspore, 1, features=("greedy",))
    assert tokens.ravel().tolist() == [0, 3]
    np.testing.assert_allclose(logprobs.ravel(), np.log(_softmax(LOGITS))[[0, 1], [0, 3]], atol=1e-5)
