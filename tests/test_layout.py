"""Layouts on the host: ranks, groups, slices, and what is refused."""

import numpy as np
import pytest

from mindrlhf.config import ParallelConfig
from mindrlhf.errors import UserError
from mindrlhf.layout import Layout, Place
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.shapes import expected_shapes

SIZES = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=4,
    max_positions=32,
)  # fmt: skip
DENSE = DecoderConfig(**SIZES, qkv_bias=True, model_type="qwen2")
EXPERTS = DecoderConfig(**SIZES, num_experts=4, experts_per_token=2, expert_width=24, model_type="mixtral")


def test_tensor_ranks_are_neighbours_then_sequence_ranks():
    layout = Layout(data=2, tensor=2, sequence=2)
    assert [layout.place(rank) for rank in (0, 1, 2, 5, 8)] == [
        Place(0, 0, 0), Place(0, 0, 1), Place(0, 1, 0), Place(1, 0, 1), None,
    ]  # fmt: skip
    assert layout.group(5, "tensor") == (4, 5)
    assert layout.group(5, "sequence") == (5, 7)
    assert layout.group(5, "data") == (1, 5)
    assert layout.group(5, "data", "sequence") == (1, 3, 5, 7)


@pytest.mark.parametrize(
    "layout, model",
    [(Layout(tensor=4), DENSE), (Layout(tensor=4, expert=2), EXPERTS), (Layout(tensor=2, expert=2), EXPERTS)],
)
def test_tensor_ranks_hold_every_element_once_or_all_of_them(layout, model):
    for name, shape in expected_shapes(model).items():
        count = np.zeros(shape, int)
        for tensor in range(layout.tensor):
            count[layout.box(name, shape, tensor)] += 1
        whole = name.endswith(("norm.weight", "layernorm.weight", "mlp.gate.weight"))
        assert (count == (layout.tensor if whole else 1)).all(), name


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("model.layers.0.self_attn.q_proj.bias", 0),
        ("model.layers.0.self_attn.o_proj.weight", 1),
        ("model.layers.0.self_attn.o_proj.bias", None),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", None),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", 0),
        ("model.layers.0.self_attn.q_a_proj.weight", None),
        ("model.layers.0.self_attn.q_b_proj.weight", 0),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", None),
        ("model.layers.0.self_attn.kv_b_proj.weight", 0),
        ("model.layers.0.self_attn.q_norm.weight", None),
        ("model.layers.0.mlp.up_proj.bias", 0),
        ("model.layers.0.mlp.down_proj.bias", None),
        ("model.layers.0.mlp.experts.gate_proj.weight", 1),
        ("model.layers.0.mlp.experts.down_proj.weight", 2),
        ("model.layers.0.mlp.shared_experts.down_proj.weight", 1),
        ("model.layers.0.mlp.down_proj.lora_A.weight", 1),
        ("model.layers.0.mlp.down_proj.lora_B.weight", None),
        ("model.embed_tokens.weight", 0),
        ("score.weight", None),
    ],
)
def test_which_axis_is_split(name, axis):
    shape = (8,) if name.endswith("bias") else (8, 8, 8) if ".experts." in name else (8, 8)
    box = Layout(tensor=2).box(name, shape, 1)
    halved = [number for number, part in enumerate(box) if part == slice(4, 8)]
    assert halved == ([] if axis is None else [axis])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(tensor=3), "parallel: tensor 3 x sequence 1 x data 1 is 3 processes, and 2 were started"),
        (dict(data=3), "parallel: tensor 1 x sequence 1 x data 3 is 3 processes, and 2 were started"),
        (dict(tensor=0), "parallel.tensor: 0 must be 1 or more"),
        (dict(tensor=2, expert=3), "parallel.expert: 3 does not divide tensor 2"),
    ],
)
def test_a_layout_that_does_not_fit_the_world(config, message):
    with pytest.raises(UserError, match=message):
        Layout.of(ParallelConfig(**config), 2, "parallel")


def test_processes_that_do_not_divide():
    with pytest.raises(UserError, match="parallel: 3 processes do not divide by tensor 2 x sequence 1"):
        Layout.of(ParallelConfig(tensor=2), 3, "parallel")


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        (Layout(tensor=8), DENSE, "parallel.tensor: the model's num_attention_heads, 4, does not divide by 8"),
        (Layout(tensor=2, expert=2), DENSE, "parallel.expert: 2, but the model has no experts; set it to 1"),
        (Layout(tensor=8, expert=8), EXPERTS, "num_attention_heads, 4, does not divide by 8"),
    ],
)
def test_a_layout_that_does_not_fit_the_model(layout, model, message):
    with pytest.raises(UserError, match=message):
        layout.check(model, "parallel")


def test_the_rest_of_the_world_is_data():
    assert Layout.of(ParallelConfig(tensor=2, zero=True), 8, "parallel") == Layout(data=4, tensor=2, zero=True)
    assert Layout(data=2, tensor=2, zero=True).describe() == "data 2, tensor 2, zero"
