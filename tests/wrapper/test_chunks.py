"""Head and loss in chunks: the same numbers as in one piece."""

from dataclasses import replace

import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.models.compute import Compute
from mindrlhf.models.decoder import Decoder, random_weights
from tests.wrapper.cells import TargetGradients

VOCABULARY = 64
WHOLE, CHUNKS = Compute(logits_at_once=0), Compute(logits_at_once=5 * VOCABULARY)


@pytest.fixture(autouse=True)
def graph_mode(mindspore):
    return mindspore


def results(config, compute, entropy_gradient=False):
    """Log-probs, entropy, and the gradients of a weighted sum of both, by parameter."""
    config = replace(config, vocab_size=VOCABULARY, compute=compute)
    decoder = Decoder(config, random_weights(replace(config, initializer_range=0.2), 0))
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (2, 16)).astype(np.int32)
    positions, segments = np.tile(np.arange(16, dtype=np.int32), (2, 1)), np.ones((2, 16), np.int32)
    index, labels = random.permutation(32)[:23].astype(np.int32), random.integers(0, VOCABULARY, 23).astype(np.int32)
    weights = random.standard_normal((2, 23)).astype(np.float32)
    cell = TargetGradients(decoder, 0.7, entropy_gradient)
    inputs = tokens, positions, segments, index, labels, *weights
    (logprobs, entropy), gradients = cell(*(Tensor(array) for array in inputs))
    names = [parameter.name for parameter in decoder.trainable()]
    found = {name: gradient.asnumpy() for name, gradient in zip(names, gradients, strict=True)}
    return decoder, {"logprobs": logprobs.asnumpy(), "entropy": entropy.asnumpy(), **found}


@pytest.mark.parametrize("kind", ["tied", "untied", "normalised", "entropy"])
def test_chunks_are_the_whole(micro_config, kind):
    config = replace(micro_config, tie_embeddings=kind not in ("untied", "normalised"))
    if kind == "normalised":
        config = replace(config, model_type="baichuan", qkv_bias=False)
    _, whole = results(config, WHOLE, kind == "entropy")
    decoder, chunked = results(config, CHUNKS, kind == "entropy")
    assert decoder.chunked.rows == 5 and decoder.is_chunked(23)  # so the last of the five chunks is of 3
    assert not decoder.is_chunked(5)
    for name, expected in whole.items():
        largest = np.abs(expected).max()
        np.testing.assert_allclose(chunked[name], expected, rtol=0, atol=3e-6 * largest, err_msg=name)
