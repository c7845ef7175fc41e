"""Losses as the tests see them: golden values, a loss with its gradient, and what a float64 difference says of it."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindrlhf.advantages import loss_weights

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "golden.json").read_text())
INPUTS, OUTPUTS = GOLDEN["inputs"], GOLDEN["outputs"]
MASK = np.array(INPUTS["mask"], np.float32)
COUNTS = MASK.sum(1).astype(int)


class Gradient(nn.Cell):
    def __init__(self, cell):
        super().__init__()
        self.run = ops.value_and_grad(cell, 0, has_aux=True)

    def construct(self, *arguments):
        return self.run(*arguments)


def run(cell, *arrays):
    """Value, further outputs and the gradient to the first argument, as arrays."""
    arrays = [np.asarray(a) for a in arrays]
    outputs, gradient = Gradient(cell)(
        *[ms.Tensor(a.astype(np.int32 if a.dtype.kind == "i" else "f4")) for a in arrays]
    )
    return *[output.asnumpy() for output in outputs], gradient.asnumpy()


def central_differences(function, x, step=1e-6):
    """The gradient at x [N] of a function of float64 to a scalar."""
    gradient = np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        moved = np.zeros(x.shape)
        moved[place] = step
        gradient[place] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


def tokens(name):
    """A golden [B, T] input as the [N] of its real tokens."""
    return np.array(INPUTS[name], np.float32)[MASK > 0]


def answers(name):
    """A golden [B, T] input or output as a list of [R] float64, one an answer."""
    return [np.array(row)[mask > 0] for row, mask in zip({**INPUTS, **OUTPUTS}[name], MASK, strict=True)]


def weights(aggregation, max_tokens=5):
    """The weight of each real token of the golden inputs."""
    return np.repeat(loss_weights(COUNTS, aggregation, max_tokens), COUNTS)


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
