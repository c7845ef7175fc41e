"""mindrlhf/models/rope.py against the tables that transformers computed (tests/fixtures/make_hf_fixtures.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.rope import rope_tables

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz") if "cos" in np.load(path))


def plain_config(**changes):
    values = dict(vocab_size=8, hidden_size=32, intermediate_size=8, num_layers=1, num_heads=4, num_kv_heads=4)
    return DecoderConfig(**{**values, "head_dim": 8, "max_positions": 16, **changes})


@pytest.mark.parametrize("name", MODELS)
def test_tables_of_the_models(name):
    """What is not rotated is at the end of either half."""
    config = DecoderConfig.read(FIXTURES / name)
    expected = np.load(FIXTURES / name / "expected.npz")
    width, half = (config.rotated if config.latent else config.head_dim) // 2, config.rotated // 2
    for kind, table, still in zip(("cos", "sin"), rope_tables(config), (1, 0), strict=True):
        assert table.shape == (config.max_positions, 2 * width) == (64, 2 * width)
        assert table.dtype == np.float32
        moved = np.concatenate([table[:, :half], table[:, width : width + half]], 1)
        np.testing.assert_allclose(moved, expected[kind], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(table[:, half:width], still)
        np.testing.assert_array_equal(table[:, width + half :], still)


@pytest.mark.parametrize("number", range(7))
def test_tables_of_the_variants(number):
    """Real sizes, up to position 131071, where a table that is exact instead of float32 would be 0.004 off.

    Of the seven, one power of torch is not the nearest float32 (theta 1e6, dimension 37 of 64): its last bit is what
    the wider tolerance of the farthest positions lets through.
    """
    variants = np.load(FIXTURES / "rope_variants.npz")
    values = {"model_type": "llama", "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    values.update(json.loads(str(variants[f"config_{number}"])))
    config = DecoderConfig.from_hf(values)
    positions = variants[f"positions_{number}"]
    cos, sin = rope_tables(config)
    for table, wanted in ((cos[positions], variants[f"cos_{number}"]), (sin[positions], variants[f"sin_{number}"])):
        near = positions <= 32768
        np.testing.assert_allclose(table[near], wanted[near], rtol=0, atol=1e-6)
        np.testing.assert_allclose(table[~near], wanted[~near], rtol=0, atol=4e-6)


def test_by_hand():
    cos, sin = rope_tables(plain_config(rope_theta=16.0))
    angles = 3 * np.array([1, 1 / 2, 1 / 4, 1 / 8] * 2)
    np.testing.assert_allclose(cos[3], np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin[3], np.sin(angles), atol=1e-7)
    np.testing.assert_array_equal(cos[0], np.ones(8))
    np.testing.assert_array_equal(sin[0], np.zeros(8))


def test_fewer_positions():
    config = plain_config(rope_scaling={"rope_type": "yarn", "factor": 2.0})
    whole, short = rope_tables(config), rope_tables(config, 5)
    assert short[0].shape == (5, 8)
    np.testing.assert_array_equal(whole[0][:5], short[0])
    np.testing.assert_array_equal(whole[1][:5], short[1])
