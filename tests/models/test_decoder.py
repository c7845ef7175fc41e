"""The decoder against transformers + torch, and against itself: packed, cached, in either layout."""

from pathlib import Path

import numpy as np
import pytest

from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.hf import check_names, read_tensors

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = ["qwen2_tied", "qwen2_bf16_sharded", "llama_llama3_rope", "llama_attention_bias", "qwen2_yarn", "mixtral"]


def _open(name, transposed=False):
    from mindrlhf.models.decoder import Decoder

    config = DecoderConfig.read(FIXTURES / name)
    tensors = read_tensors(FIXTURES / name)
    check_names(config, tensors.shapes, FIXTURES / name)
    return Decoder(config, tensors.__getitem__, transposed), np.load(FIXTURES / name / "expected.npz")


def _rows(ids):
    """[B, T] token ids as one segment a row."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy()
    return ids.astype(np.int32), positions, np.ones_like(positions)


def _logits_cell(decoder):
    from tests.models.cells import Logits

    return Logits(decoder)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(mindspore, name, transposed):
    decoder, expected = _open(name, transposed)
    rows = [mindspore.Tensor(array) for array in _rows(expected["ids"])]
    logits = _logits_cell(decoder)(*rows).asnumpy().reshape(expected["logits"].shape)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_transformers(mindspore, name):
    from tests.models.cells import NextTokenLoss

    decoder, expected = _open(name)
    tokens, positions, segments = _rows(expected["ids"])
    index = np.arange(tokens.size, dtype=np.int32).reshape(tokens.shape)[:, :-1].reshape(-1)
    inputs = [mindspore.Tensor(a) for a in (tokens, positions, segments, index, tokens[:, 1:].reshape(-1))]
    parameters = {p.name: p for p in decoder.get_parameters()}
    wanted = [key.removeprefix("grad/") for key in expected.files if key.startswith("grad/")]
    assert len(wanted) >= 4
    gradient = mindspore.value_and_grad(NextTokenLoss(decoder), None, [parameters[name] for name in wanted])
    loss, gradients = gradient(*inputs)
    assert float(loss.asnumpy()) == pytest.approx(float(expected["loss"]), abs=1e-5)
    for one, value in zip(wanted, gradients, strict=True):
        np.testing.assert_allclose(value.asnumpy(), expected[f"grad/{one}"], atol=1e-5, err_msg=one)


@pytest.mark.parametrize("transposed", [False, True])
def test_scores_are_those_of_transformers(mindspore, transposed):
    from tests.models.cells import Scores

    decoder, expected = _open("qwen2_score", transposed)
    rows = [mindspore.Tensor(array) for array in _rows(expected["ids"])]
    last = mindspore.Tensor(np.array([11, 23], np.int32))
    np.testing.assert_allclose(Scores(decoder)(*rows, last).asnumpy(), expected["scores"], atol=1e-5)
    assert "lm_head.weight" not in decoder.by_name
    assert not decoder.tied


def test_gradients_of_a_pair_of_scores_are_those_of_transformers(mindspore):
    from tests.models.cells import PairLoss

    decoder, expected = _open("qwen2_score")
    rows = [mindspore.Tensor(array) for array in _rows(expected["ids"])]
    wanted = [key.removeprefix("grad/") for key in expected.files if key.startswith("grad/")]
    assert "score.weight" in wanted
    gradient = mindspore.value_and_grad(PairLoss(decoder), None, [decoder.by_name[name] for name in wanted])
    loss, gradients = gradient(*rows, mindspore.Tensor(np.array([11, 23], np.int32)))
    assert float(loss.asnumpy()) == pytest.approx(float(expected["loss"]), abs=1e-5)
    for one, value in zip(wanted, gradients, strict=True):
        np.testing.assert_allclose(value.asnumpy(), expected[f"grad/{one}"], atol=1e-5, err_msg=one)


def test_a_new_reward_model_is_undecided(mindspore, micro_config):
    from dataclasses import replace

    from mindrlhf.models.decoder import Decoder, random_weights
    from tests.models.cells import Scores

    config = replace(micro_config, head="score")
    decoder = Decoder(config, random_weights(config, 0))
    rows = [mindspore.Tensor(array) for array in _rows(np.arange(10).reshape(2, 5))]
    np.testing.assert_array_equal(Scores(decoder)(*rows, mindspore.Tensor(np.array([4, 9], np.int32))).asnumpy(), 0)
    language = random_weights(micro_config, 0)
    for name, array in decoder.tensors():
        np.testing.assert_array_equal(array, 0 if name == "score.weight" else language(name))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(mindspore, name):
    from mindrlhf.config import SamplingConfig
    from mindrlhf.types import Prompt
    from mindrlhf.wrapper.generator import Generator

    decoder, expected = _open(name)
    ids = expected["ids"][0].astype(np.int32)
    count = len(expected["greedy"])
    generator = Generator(decoder, slots=2, max_prompt_tokens=len(ids), max_tokens=count)
    (rollout,) = generator.generate([Prompt(ids, "", None, 0)], 1, SamplingConfig(temperature=0, max_tokens=count), 0)
    assert rollout.response_ids.tolist() == expected["greedy"].tolist()


def test_packed_equals_unpacked(mindspore, micro_decoder):
    """Three sequences in one row, between padding, give the hidden states that each gives alone."""
    from tests.models.cells import Hidden

    random = np.random.default_rng(3)
    sequences = [random.integers(0, 48, n) for n in (5, 9, 3)]
    tokens, positions, segments = (np.zeros((1, 24), np.int32) for _ in range(3))
    places, start = [], 2
    for number, ids in enumerate(sequences, 1):
        here = slice(start, start + len(ids))
        tokens[0, here], positions[0, here], segments[0, here] = ids, np.arange(len(ids)), number
        places.append(here)
        start += len(ids) + 1
    cell = Hidden(micro_decoder)
    packed = cell(*map(mindspore.Tensor, (tokens, positions, segments))).asnumpy()
    for ids, here in zip(sequences, places, strict=True):
        alone_rows = np.zeros((3, 1, 24), np.int32)
        alone_rows[0, 0, : len(ids)], alone_rows[1, 0, : len(ids)] = ids, np.arange(len(ids))
        alone_rows[2, 0, : len(ids)] = 1
        alone = cell(*map(mindspore.Tensor, alone_rows)).asnumpy()[: len(ids)]
        np.testing.assert_allclose(packed[here], alone, atol=2e-6)


def test_weights_round_trip_in_both_layouts(mindspore, micro_decoder, micro_config):
    from mindrlhf.models.decoder import Decoder, random_weights

    decoding = Decoder(micro_config, micro_decoder.weights, transposed=True)
    for (name, one), (other, two) in zip(micro_decoder.tensors(), decoding.tensors(), strict=True):
        assert name == other
        np.testing.assert_array_equal(one, two)
    fresh = random_weights(micro_config, 7)
    decoding.load(fresh)
    for name, array in decoding.tensors():
        np.testing.assert_array_equal(array, fresh(name))


def test_two_decoders_do_not_share_memory(mindspore, micro_decoder, micro_config):
    from mindrlhf.models.decoder import Decoder

    copy = Decoder(micro_config, micro_decoder.weights)
    before = copy.weights("model.norm.weight").copy()
    micro_decoder.load(lambda name: micro_decoder.weights(name) + 1)
    np.testing.assert_array_equal(copy.weights("model.norm.weight"), before)
