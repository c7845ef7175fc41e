"""What kernels.py gives on this device, in every precision that it has, against the composed form in float32.

On a CPU these are our own kernels; with MINDRLHF_DEVICE=Ascend the fused ones of ascend_kernels.py.
"""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.models import ascend_kernels, kernels
from mindrlhf.utils.parallel import device_target
from tests.models.kernel_cells import Apply, Gradients, rotation

IS_ASCEND = device_target() == "Ascend"
PRECISE = 1e-3 if IS_ASCEND else 2e-5  # of the largest number
ROUGH = {"float32": PRECISE, "float16": 5e-3, "bfloat16": 4e-2}
DTYPES = ["float32", "float16", *(["bfloat16"] if IS_ASCEND else [])]
random = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def graph_mode(mindspore):
    return mindspore


def normal(*shape):
    return Tensor(random.standard_normal(shape).astype(np.float32))


def agree(function, composed, inputs, limit=PRECISE):
    """Outputs, and the gradients of a weighted sum of them, at all inputs."""
    places = tuple(range(len(inputs)))
    weights = (Tensor(random.standard_normal(composed(*inputs).shape).astype(np.float32)),)
    found, expected = ([cell(*inputs), *Gradients(cell, places)(weights, *inputs)] for cell in (function, composed))
    for one, other in zip(found, expected, strict=True):
        other = other.asnumpy()
        np.testing.assert_allclose(one.asnumpy(), other, rtol=0, atol=limit * np.abs(other).max())


def test_the_fused_kernels_are_asked_for_where_they_are():
    assert kernels._fused == ascend_kernels.in_use() == IS_ASCEND


def test_rms_norm():
    agree(Apply(kernels.rms_norm, 1e-6), Apply(kernels.composed_rms_norm, 1e-6), (normal(40, 64), normal(64)))


def test_swiglu():
    agree(Apply(kernels.swiglu), Apply(kernels.composed_swiglu), (normal(40, 64), normal(40, 64)))


def test_rotate():
    angles = np.tile(random.uniform(0, 6, (40, 1, 16)), 2)
    tables = Tensor(np.cos(angles).astype(np.float32)), Tensor(np.sin(angles).astype(np.float32)), rotation(32)
    agree(Apply(kernels.rotate, *tables), Apply(kernels.composed_rotate, *tables), (normal(40, 4, 32),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype):
    constants = None, False
    agree(
        Apply(kernels.linear, *constants, getattr(ms, dtype)), Apply(kernels.linear, *constants),
        (normal(40, 64), normal(48, 64)), ROUGH[dtype],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype):
    """Two rows of two packed sequences and padding."""
    positions, segments = np.tile(np.arange(32, dtype=np.int32), (2, 1)), np.ones((2, 32), np.int32)
    positions[:, 20:] -= 20
    segments[:, 20:], segments[1, 29:] = 2, 0
    positions, segments = Tensor(positions), Tensor(segments)
    mask = kernels.visible(positions, segments)
    agree(
        Apply(kernels.attention, positions, segments, mask, 0.25, getattr(ms, dtype)),
        Apply(kernels.composed_attention, mask, 0.25),
        (normal(64, 4, 16), normal(64, 2, 16), normal(64, 2, 16)), ROUGH[dtype],
    )  # fmt: skip
