"""Our CPU kernels against the composed forms and float64 NumPy: outputs and gradients, awkward sizes included."""

import numpy as np
import pytest

from mindrlhf.utils.parallel import prepare_environment

prepare_environment()

import mindspore as ms  # noqa: E402
from mindspore import Parameter, Tensor, ops  # noqa: E402

from mindrlhf.models import cpu_kernels, kernels  # noqa: E402
from tests.models import kernel_cells as cells  # noqa: E402

pytestmark = pytest.mark.skipif(cpu_kernels.PRIMITIVES is None, reason=str(cpu_kernels.available()))
own = cpu_kernels.PRIMITIVES
random = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return Tensor((random.standard_normal(shape) * scale).astype(np.float32))


def close(ours, expected, tolerance=1e-5):
    """Within tolerance of the largest expected number, where that is not tiny itself."""
    ours, expected = (x.asnumpy() if isinstance(x, Tensor) else np.asarray(x) for x in (ours, expected))
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * max(0.1, np.abs(expected).max()))


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def agree(cell_type, inputs, *settings, weights=None):
    """The cell with our kernels and with the composed form: outputs, and gradients of a weighted sum of them."""
    results = []
    for with_own in (True, False):
        cell = cell_type(with_own, *settings)
        outputs = cell(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = weights or tuple(normal(*out.shape) for out in outputs)
        places = tuple(i for i, x in enumerate(inputs) if x.dtype == ms.float32)
        results.append((outputs, cells.Gradients(cell, places)(weights, *inputs)))
    for ours, expected in zip(*results, strict=True):
        for one, other in zip(ours, expected, strict=True):
            close(one, other)


@pytest.fixture(autouse=True)
def graph_mode(mindspore):
    return mindspore


@pytest.mark.parametrize("rows, width", [(1, 8), (3, 77), (200, 256)])
def test_rms_norm(rows, width):
    agree(cells.RmsNorm, (normal(rows, width), normal(width)))


@pytest.mark.parametrize("rows, width", [(1, 5), (7, 33), (100, 1024)])
def test_swiglu(rows, width):
    agree(cells.Swiglu, (normal(rows, width, scale=8.0), normal(rows, width)))


@pytest.mark.parametrize("rows, width", [(1, 3), (130, 77), (50, 256)])
def test_bias(rows, width):
    agree(cells.Bias, (normal(rows, width), normal(width)))


@pytest.mark.parametrize("heads, width", [(1, 8), (3, 40), (2, 128)])
def test_rotate(heads, width):
    angles = random.uniform(0, 6, (5, 1, width // 2))
    cos, sin = (Tensor(np.tile(f(angles), 2).astype(np.float32)) for f in (np.cos, np.sin))
    inputs = normal(5, heads, width), Tensor(cos.asnumpy()), Tensor(sin.asnumpy())
    ours, expected = (cells.Rotate(with_own, cos, sin) for with_own in (True, False))
    close(ours(inputs[0]), expected(inputs[0]))
    weights = (normal(5, heads, width),)
    close(*(cells.Gradients(cell, (0,))(weights, inputs[0])[0] for cell in (ours, expected)))


@pytest.mark.parametrize("rows", [1, 8, 11, 64])
@pytest.mark.parametrize("inner, outer", [(8, 5), (300, 256), (64, 1100)])
def test_few_rows(rows, inner, outer):
    x, weight, bias, residual = normal(rows, inner), normal(inner, outer), normal(outer), normal(rows, outer)
    product = x.asnumpy().astype(np.float64) @ weight.asnumpy()
    close(cells.Call(own.projection)(x, weight), product)
    close(cells.Call(own.projection)(x, weight, bias), product + bias.asnumpy())
    close(cells.Call(own.residual_projection)(x, weight, residual), product + residual.asnumpy())
    expected = product + residual.asnumpy() + bias.asnumpy()
    close(cells.Call(own.residual_projection)(x, weight, residual, bias), expected)


@pytest.mark.parametrize("biased", [False, True])
def test_projections_and_gate(biased):
    x, weights = normal(9, 70), [normal(70, outer, scale=0.3) for outer in (40, 33, 300)]
    biases = [normal(weight.shape[1]) for weight in weights]
    expected = [x.asnumpy().astype(np.float64) @ weight.asnumpy() for weight in weights]
    inputs = [part for pair in zip(weights, biases, strict=True) for part in pair] if biased else weights
    for ours, product, bias in zip(cells.Call(own.three_projections)(x, *inputs), expected, biases, strict=True):
        close(ours, product + bias.asnumpy() * biased)
    up = normal(70, 40)
    gated = expected[0] / (1 + np.exp(-expected[0])) * (x.asnumpy().astype(np.float64) @ up.asnumpy())
    close(cells.Call(own.gated_projection)(x, weights[0], up), gated)


def test_a_row_does_not_depend_on_the_others():
    x, weight = normal(16, 300), normal(300, 70)
    whole = cells.Call(own.projection)(x, weight).asnumpy()
    for first, last in ((0, 1), (3, 8), (5, 16)):
        part = cells.Call(own.projection)(Tensor(x.asnumpy()[first:last]), weight)
        np.testing.assert_array_equal(part.asnumpy(), whole[first:last])


SHAPES = [(1, 1, 1, 1, 8), (2, 9, 2, 1, 8), (2, 70, 6, 2, 40), (1, 64, 4, 4, 64), (3, 100, 4, 2, 128)]


@pytest.mark.parametrize("batch, length, heads, kv_heads, width", SHAPES)
def test_attention(batch, length, heads, kv_heads, width):
    """Rows of two packed sequences and padding, each row cut elsewhere."""
    segments = np.zeros((batch, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    for row in range(batch):
        cut, end = (row + 1) * length // (batch + 2), length - 2 * row
        segments[row, :cut], segments[row, cut:end] = 1, 2
        positions[row, cut:] -= cut
    inputs = normal(batch * length, heads, width), normal(batch * length, kv_heads, width)
    inputs += (normal(batch * length, kv_heads, width),)
    agree(cells.Attention, inputs, Tensor(positions), Tensor(segments), width**-0.5)


@pytest.mark.parametrize(
    "slots, length, heads, kv_heads, width", [(1, 8, 1, 1, 8), (3, 33, 6, 2, 40), (4, 64, 4, 4, 64)]
)
def test_decode_attention(slots, length, heads, kv_heads, width):
    positions = random.integers(0, length, slots).astype(np.int32)
    positions[0] = length - 1
    angles = random.uniform(0, 6, (slots, 1, width // 2))
    cos, sin = (Tensor(np.tile(f(angles), 2).astype(np.float32)) for f in (np.cos, np.sin))
    inputs = normal(slots, heads * width), normal(slots, kv_heads * width), normal(slots, kv_heads * width)
    filled = [normal(slots * kv_heads * length, width) for _ in range(2)]
    results = []
    for with_own in (True, False):
        caches = [Parameter(Tensor(x.asnumpy().copy()), name=f"cache{i}") for i, x in enumerate(filled)]
        cell = cells.DecodeAttention(with_own, caches, positions, length, kv_heads, cos, sin)
        results.append((cell(*inputs), *caches))
    for ours, expected in zip(*results, strict=True):
        close(ours, expected)


@pytest.mark.parametrize("rows, vocabulary", [(1, 3), (5, 1001), (2, 152064)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_target_logprobs(rows, vocabulary, temperature):
    """Against float64: over a large vocabulary the composed form is off by more than the kernel."""
    logits, labels = normal(rows, vocabulary, scale=4.0), random.integers(0, vocabulary, rows).astype(np.int32)
    cell = cells.TargetLogprobs(True, temperature)
    logprobs = log_softmax(logits.asnumpy().astype(np.float64) / temperature)
    shares = np.exp(logprobs)
    entropy = -(shares * logprobs).sum(1)
    ours = cell(logits, Tensor(labels))
    for one, expected in zip(ours, (logprobs[np.arange(rows), labels], entropy), strict=True):
        np.testing.assert_allclose(one.asnumpy(), expected, rtol=2e-6, atol=2e-6)
    weights = normal(rows), normal(rows)
    of_logprob, of_entropy = (weight.asnumpy()[:, None].astype(np.float64) for weight in weights)
    hot = np.arange(vocabulary) == labels[:, None]
    expected = of_logprob * (hot - shares) - of_entropy * shares * (logprobs + entropy[:, None])
    close(cells.Gradients(cell, (0,))(weights, logits, Tensor(labels))[0], expected / temperature)


def test_target_logprobs_as_composed():
    labels = Tensor(random.integers(0, 300, 40).astype(np.int32))
    agree(cells.TargetLogprobs, (normal(40, 300), labels), 0.7)


def test_target_logprobs_with_logits_that_are_not_seen():
    logits = np.array([[0.0, -1e9, 1.0], [500.0, -500.0, 499.0]], np.float32)
    logprobs, entropy = cells.TargetLogprobs(True, 1.0)(Tensor(logits), Tensor(np.array([2, 0], np.int32)))
    expected = -np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(logprobs.asnumpy(), [expected, expected], rtol=1e-6)
    np.testing.assert_allclose(entropy.asnumpy(), 0.5822031, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [3, 1024, 5000])
def test_sample(vocabulary):
    """The token is the first whose cumulative probability is over the uniform number."""
    logits = random.standard_normal((64, vocabulary)).astype(np.float32) * 3
    logits[:, 1] = -1e9
    uniform = random.random(64).astype(np.float32)
    uniform[:2] = 0, 1 - 2**-23
    token, logprob = cells.Call(own.sample)(Tensor(logits), Tensor(uniform), Tensor(0.8, ms.float32))
    logprobs = log_softmax(logits.astype(np.float64) / 0.8)
    cumulative = np.exp(logprobs).cumsum(1)
    rows = np.arange(64)
    token = token.asnumpy()
    assert (token != 1).all()
    assert (cumulative[rows, token] > uniform - 1e-5).all()
    assert (cumulative[rows, token] - np.exp(logprobs[rows, token]) < uniform + 1e-5).all()
    close(logprob, logprobs[rows, token])


def test_adamw_and_squared_sum():
    for shape in ((7,), (130, 300)):
        before = [normal(*shape).asnumpy() for _ in range(4)]
        before[2] = np.abs(before[2])
        close(cells.Call(own.squared_sum)(Tensor(before[3])), [np.sum(before[3].astype(np.float64) ** 2)], 1e-6)
        values = [Parameter(Tensor(x.copy()), name=f"value{i}") for i, x in enumerate(before)]
        numbers = scale, rate, beta1, beta2, epsilon, decay = 0.5, 0.1, 0.9, 0.99, 1e-6, 0.2
        cells.OnParameters(own.adamw, values)(*(Tensor(number, ms.float32) for number in numbers))
        parameter, first, second, gradient = (x.astype(np.float64) for x in before)
        first = first * beta1 + gradient * scale * (1 - beta1)
        second = second * beta2 + (gradient * scale) ** 2 * (1 - beta2)
        parameter -= rate * (first / (np.sqrt(second) + epsilon) + decay * parameter)
        for ours, expected in zip(values, (parameter, first, second, 0 * gradient), strict=True):
            close(ours, expected)


def test_the_same_again_bit_for_bit():
    inputs = normal(3 * 50, 4, 32), normal(3 * 50, 2, 32), normal(3 * 50, 2, 32)
    positions = Tensor(np.tile(np.arange(50, dtype=np.int32), (3, 1)))
    cell = cells.Attention(True, positions, ops.ones_like(positions), 0.2)
    gradients, weights = cells.Gradients(cell, (0, 1, 2)), (normal(150, 128),)
    first = [x.asnumpy() for x in gradients(weights, *inputs)]
    for _ in range(3):
        for before, again in zip(first, gradients(weights, *inputs), strict=True):
            np.testing.assert_array_equal(before, again.asnumpy())


def test_off(monkeypatch):
    monkeypatch.setenv("MINDRLHF_CPU_KERNELS", "0")
    assert cpu_kernels._load() == (None, "MINDRLHF_CPU_KERNELS=0 turned them off")


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert cpu_kernels._load() == (None, f"{broken} failed: no such thing")


def test_kernels_are_in_use():
    assert kernels._has_own and cpu_kernels.available() is None
