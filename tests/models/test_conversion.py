"""mindrlhf/models/conversion.py: the orders by hand, and both directions undo each other to the last bit."""

from pathlib import Path

import numpy as np
import pytest

from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import from_stored, is_stored_as_it_is, rotary_order, stored_shapes, to_stored
from mindrlhf.models.hf import read_tensors
from mindrlhf.models.shapes import expected_shapes

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz") if path.with_name("config.json").exists())


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    config, tensors = DecoderConfig.read(FIXTURES / name), read_tensors(FIXTURES / name)
    weights = from_stored(config, tensors.__getitem__)
    for ours, shape in expected_shapes(config).items():
        assert weights(ours).shape == shape
        assert weights(ours).dtype == np.float32
    names = []
    for stored, shape, getter in to_stored(config, weights, lambda ours, number: weights(ours)[number]):
        names.append(stored)
        assert getter().shape == shape
        assert np.ascontiguousarray(getter()).tobytes() == tensors[stored].tobytes()
    assert set(names) == set(tensors) and len(names) == len(set(names))


def test_rotary_order_by_hand():
    assert rotary_order(8, 8, False) is None
    assert rotary_order(8, 8, True) == (0, 2, 4, 6, 1, 3, 5, 7)  # pairs (0, 1), (2, 3)... four apart
    assert rotary_order(8, 4, True) == (0, 2, 4, 5, 1, 3, 6, 7)  # pairs (0, 1), (2, 3); 4 to 7 are not turned
    assert rotary_order(8, 4, False) == (0, 1, 4, 5, 2, 3, 6, 7)  # pairs (0, 2), (1, 3)


def test_fused_turned_and_stacked_tensors_by_hand():
    gpt2 = DecoderConfig.read(FIXTURES / "gpt2")
    hidden = gpt2.hidden_size
    fused = np.arange(hidden * 3 * hidden, dtype=np.float32).reshape(hidden, 3 * hidden)
    weights = from_stored(gpt2, lambda name: fused)
    np.testing.assert_array_equal(weights("model.layers.0.self_attn.k_proj.weight"), fused.T[hidden : 2 * hidden])
    mixtral = DecoderConfig.read(FIXTURES / "mixtral")
    numbers = {name: np.full(shape, number) for number, (name, shape) in enumerate(stored_shapes(mixtral).items())}
    stacked = from_stored(mixtral, numbers.__getitem__)("model.layers.1.mlp.experts.down_proj.weight")
    for expert in range(mixtral.num_experts):
        stored = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        np.testing.assert_array_equal(stacked[expert], numbers[stored])


def test_a_head_of_glm_is_ordered_and_its_value_is_not():
    config = DecoderConfig.read(FIXTURES / "glm4")
    rows = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            for name, shape in stored_shapes(config).items()}  # fmt: skip
    weights = from_stored(config, rows.__getitem__)
    order = list(rotary_order(config.head_dim, config.rotated, True))
    bias = "model.layers.0.self_attn.k_proj.bias"
    heads = rows[bias].reshape(config.num_kv_heads, config.head_dim)
    np.testing.assert_array_equal(weights(bias).reshape(heads.shape), heads[:, order])
    value = "model.layers.0.self_attn.v_proj.weight"
    np.testing.assert_array_equal(weights(value), rows[value])
    up = weights("model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(up, rows["model.layers.1.mlp.gate_up_proj.weight"][config.intermediate_size :])


def test_which_projections_an_adapter_file_can_name():
    def plain(name):
        config = DecoderConfig.read(FIXTURES / name)
        modules = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
        return [module for module in modules if is_stored_as_it_is(config, module)]

    assert plain("qwen3") == ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    assert plain("glm4") == ["v_proj", "o_proj", "down_proj"]
    assert plain("qwen3_moe_every_second") == ["q_proj", "v_proj", "o_proj"]  # PEFT would adapt each expert
    assert plain("deepseek_v3") == ["o_proj"]
    assert plain("gpt2") == []
