"""The optimizer step against NumPy in float64, and the invariances of the policy objective."""

import numpy as np
import pytest

from mindrlhf.config import OptimizerConfig


def _adamw(values, gradients, steps, rate, config, decay):
    """torch.optim.AdamW, written from its documentation."""
    first = second = np.zeros_like(values)
    for step in range(1, steps + 1):
        gradient = gradients(values)
        values = values * (1 - rate * decay)
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        scale = np.sqrt(second / (1 - config.beta2**step)) + config.epsilon
        values = values - rate * first / (1 - config.beta1**step) / scale
    return values


def _quadratic(mindspore, config):
    from mindspore import Parameter, Tensor

    from mindrlhf.wrapper.train_step import TrainStep
    from tests.wrapper.cells import Quadratic

    random = np.random.default_rng(0)
    matrix, vector = random.standard_normal((3, 4)).astype(np.float32), random.standard_normal(5).astype(np.float32)
    cell = Quadratic(Parameter(Tensor(matrix), name="matrix"), Parameter(Tensor(vector), name="vector"))
    return TrainStep(cell, [cell.matrix, cell.vector], config), matrix, vector


SCALE = np.linspace(0.5, 2, 12).reshape(3, 4).astype(np.float32)
SLOPE = np.linspace(-1, 1, 5).astype(np.float32)


def test_adamw_is_torchs_with_decay_on_matrices_only(mindspore):
    config = OptimizerConfig(beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.3, max_grad_norm=0)
    step, matrix, vector = _quadratic(mindspore, config)
    for _ in range(10):
        result = step([(SCALE, SLOPE)], 0.05)
    expected = _adamw(matrix.astype(np.float64), lambda v: v * SCALE, 10, 0.05, config, 0.3)
    np.testing.assert_allclose(step.parameters[0].asnumpy(), expected, atol=2e-6)
    expected = _adamw(vector.astype(np.float64), lambda v: SLOPE.astype(np.float64), 10, 0.05, config, 0.0)
    np.testing.assert_allclose(step.parameters[1].asnumpy(), expected, atol=2e-6)
    assert result.skipped == "" and step.updates == 10


def test_the_clip_is_by_the_global_norm(mindspore):
    config = OptimizerConfig(max_grad_norm=0.5, epsilon=1.0)
    step, matrix, _ = _quadratic(mindspore, config)
    norm = np.sqrt(((matrix * SCALE) ** 2).sum() + (SLOPE**2).sum())
    result = step([(SCALE, SLOPE)], 0.1)
    assert result.gradient_norm == pytest.approx(norm, rel=1e-5)
    clipped = matrix.astype(np.float64) * SCALE * 0.5 / (norm + 1e-6)
    expected = matrix - 0.1 * clipped / (np.abs(clipped) + 1.0)
    np.testing.assert_allclose(step.parameters[0].asnumpy(), expected, atol=1e-6)


def test_micro_batches_add_up_and_maxima_do_not(mindspore):
    config = OptimizerConfig(max_grad_norm=0)
    whole, _, _ = _quadratic(mindspore, config)
    split, _, _ = _quadratic(mindspore, config)
    one = whole([(SCALE, SLOPE)], 0.1)
    parts = split([(SCALE * 0.25, SLOPE * 0.5), (SCALE * 0.75, SLOPE * 0.5)], 0.1)
    assert parts.loss == pytest.approx(one.loss, rel=1e-5)
    assert parts.metrics["seen"] == pytest.approx(one.metrics["seen"], rel=1e-6)
    assert parts.metrics["largest_max"] == pytest.approx(0.5)
    np.testing.assert_allclose(split.parameters[0].asnumpy(), whole.parameters[0].asnumpy(), atol=1e-6)


@pytest.mark.parametrize(("bad", "name"), [("matrix", "matrix"), ("vector", "vector")])
def test_what_is_not_finite_is_skipped_and_named(mindspore, bad, name):
    step, matrix, vector = _quadratic(mindspore, OptimizerConfig())
    broken = (np.where(SCALE > 1.9, np.inf, SCALE), SLOPE) if bad == "matrix" else (SCALE, SLOPE * np.nan)
    result = step([broken], 0.1)
    assert result.skipped == name and step.skipped == 1 and step.updates == 0
    np.testing.assert_array_equal(step.parameters[0].asnumpy(), matrix)
    np.testing.assert_array_equal(step.parameters[1].asnumpy(), vector)
    good = step([(SCALE, SLOPE)], 0.1)  # nothing of the bad gradients is left
    assert good.skipped == "" and np.isfinite(step.parameters[0].asnumpy()).all() and step.updates == 1


def test_state_round_trip_continues_bit_equal(mindspore):
    config = OptimizerConfig(weight_decay=0.1)
    straight, _, _ = _quadratic(mindspore, config)
    for _ in range(4):
        straight([(SCALE, SLOPE)], 0.1)
    first, _, _ = _quadratic(mindspore, config)
    for _ in range(2):
        first([(SCALE, SLOPE)], 0.1)
    state = {name: array.copy() for name, array in first.state()}
    resumed, _, _ = _quadratic(mindspore, config)
    for parameter, old in zip(resumed.parameters, first.parameters, strict=True):
        parameter.set_data(mindspore.Tensor(old.asnumpy().copy()))
    resumed.load_state(state.__getitem__, first.updates)
    for _ in range(2):
        resumed([(SCALE, SLOPE)], 0.1)
    for one, two in zip(straight.parameters, resumed.parameters, strict=True):
        np.testing.assert_array_equal(one.asnumpy(), two.asnumpy())
