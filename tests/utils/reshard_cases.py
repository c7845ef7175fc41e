"""Shapes, layouts and values for the tests of resharding and for their processes."""

import math

import numpy as np

from mindrlhf.layout import Layout

LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (64, 12),
    f"{LAYER}.input_layernorm.weight": (12,),
    f"{LAYER}.self_attn.q_proj.weight": (24, 12),
    f"{LAYER}.self_attn.q_proj.bias": (24,),
    f"{LAYER}.self_attn.o_proj.weight": (12, 24),
    f"{LAYER}.self_attn.o_proj.bias": (12,),
    f"{LAYER}.self_attn.q_proj.lora_A.weight": (3, 12),
    f"{LAYER}.self_attn.q_proj.lora_B.weight": (24, 3),
    f"{LAYER}.self_attn.o_proj.lora_A.weight": (3, 24),
    f"{LAYER}.self_attn.o_proj.lora_B.weight": (12, 3),
    f"{LAYER}.mlp.down_proj.weight": (12, 200),
    f"{LAYER}.mlp.gate.weight": (4, 12),
    f"{LAYER}.mlp.experts.gate_proj.weight": (4, 16, 12),
    f"{LAYER}.mlp.experts.up_proj.weight": (4, 16, 12),
    f"{LAYER}.mlp.experts.down_proj.weight": (4, 12, 16),
    "lm_head.weight": (64, 12),
}


def layouts(world: int) -> list[Layout]:
    """Every layout of at most so many ranks, subsets among them; the whole world's first, the most split first."""
    counts = [count for count in range(1, world + 1) if count != 3]  # 3 does not divide the shapes
    found = [
        Layout(data, tensor, expert, sequence)
        for tensor in counts
        for expert in counts
        for sequence in counts
        for data in range(1, world + 1)
        if data * tensor * sequence <= world and tensor % expert == 0
    ]
    return sorted(found, key=lambda layout: (-layout.size, -layout.tensor, layout.data, layout.expert))


def whole(name: str) -> np.ndarray:
    """The tensor's values: random bits, so NaNs with payloads too; the first is -0.0 and the last a NaN."""
    shape = SHAPES[name]
    values = np.random.default_rng(len(name)).integers(0, 2**32, math.prod(shape), np.uint32)
    values[0], values[-1] = 0x80000000, 0x7FC12345
    return values.view(np.float32).reshape(shape)


def filled(layout: Layout, rank: int) -> dict[str, np.ndarray]:
    """What the rank holds; matrices lie transposed in memory, as a generator's do."""
    place = layout.place(rank)
    boxes = {name: place and layout.box(name, shape, place.tensor) for name, shape in SHAPES.items()}
    return {name: np.array(whole(name)[box].T, order="C").T for name, box in boxes.items() if box is not None}


def empty(layout: Layout, rank: int) -> dict[str, np.ndarray]:
    return {name: np.ones_like(array) for name, array in filled(layout, rank).items()}


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32)
