"""Dynamic loss scale: its course, and that nothing but the range of the gradients depends on it."""

from dataclasses import replace

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from mindrlhf.config import OptimizerConfig
from mindrlhf.models.compute import Compute
from mindrlhf.models.decoder import Decoder, random_weights
from mindrlhf.wrapper.loss_scale import LossScale
from mindrlhf.wrapper.train_step import TrainStep
from tests.models.cells import NextTokenLossAndMetrics
from tests.wrapper.cells import Quadratic

SCALE, SLOPE = np.linspace(0.5, 2, 12).reshape(3, 4).astype(np.float32), np.linspace(-1, 1, 5).astype(np.float32)
OVERFLOWS = SLOPE * np.float32(3e38)  # times the smallest scale but 1 it is no float32


@pytest.fixture(autouse=True)
def graph_mode(mindspore):
    return mindspore


def quadratic(loss_scale):
    random = np.random.default_rng(0)
    matrix, vector = random.standard_normal((3, 4)).astype(np.float32), np.zeros(5, np.float32)
    cell = Quadratic(Parameter(Tensor(matrix), name="matrix"), Parameter(Tensor(vector), name="vector"))
    config = OptimizerConfig(max_grad_norm=0.5, weight_decay=0.1)
    return TrainStep(cell, [cell.matrix, cell.vector], config, loss_scale=loss_scale)


def values(step):
    return [parameter.asnumpy().copy() for parameter in step.parameters]


def test_the_course_of_the_scale():
    scale = LossScale(8.0, patience=3)
    course = []
    for finite in (True, True, False, True, True, True, False, False, False, False, False):
        may_help = True
        if finite:
            scale.count()
        else:
            may_help = scale.halve()
        course.append((scale.value, may_help))
    expected = [8, 8, 4, 4, 4, 8, 4, 2, 1, 1, 1]  # three good ones in a row double it
    assert [value for value, _ in course] == expected
    assert [number for number, (_, may_help) in enumerate(course) if not may_help] == [9, 10]  # it was 1 already


def test_the_scale_changes_nothing():
    plain, scaled = quadratic(None), quadratic(LossScale(4.0, patience=2))
    for number in range(5):
        expected, found = plain([(SCALE, SLOPE)], 0.1), scaled([(SCALE, SLOPE)], 0.1)
        assert found.routing == {"loss_scale": [4, 4, 8, 8, 16][number]} and expected.routing == {}
        assert found.loss == expected.loss and found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-6)
        for one, other in zip(values(scaled), values(plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_an_overflow_costs_one_step_and_is_no_failure():
    step = quadratic(LossScale(2.0))
    before = values(step)
    result = step([(SCALE, OVERFLOWS)], 0.1)
    assert result.skipped == "" and step.skipped == 0 and step.updates == 0 and step.loss_scale.value == 1
    assert np.isfinite(result.loss)
    for one, other in zip(values(step), before, strict=True):
        np.testing.assert_array_equal(one, other)
    step([(SCALE, SLOPE)], 0.1)
    assert step.updates == 1 and np.isfinite(np.concatenate([array.ravel() for array in values(step)])).all()
    assert step([(SCALE, np.full_like(SLOPE, np.inf))], 0.1).skipped == "vector"  # whatever the scale is
    assert step.skipped == 1


def test_resuming_goes_on_with_the_scale():
    straight, first = (quadratic(LossScale(4.0, patience=3)) for _ in range(2))
    for _ in range(5):
        straight([(SCALE, SLOPE)], 0.1)
    for _ in range(2):
        first([(SCALE, SLOPE)], 0.1)
    state = {name: array.copy() for name, array in first.state()}
    resumed = quadratic(LossScale(4.0, patience=3))
    for parameter, array in zip(resumed.parameters, values(first), strict=True):
        parameter.set_data(Tensor(array))
    resumed.load_state(state.__getitem__, first.updates)
    for _ in range(3):
        resumed([(SCALE, SLOPE)], 0.1)
    assert resumed.loss_scale.value == straight.loss_scale.value == 8
    for one, other in zip(values(resumed), values(straight), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow  # two compilations
def test_float16_on_this_device(micro_config):
    """From a scale at which float16 overflows to one at which it learns, as float32 does."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, micro_config.vocab_size, (2, 16)).astype(np.int32)
    positions, segments = np.tile(np.arange(16, dtype=np.int32), (2, 1)), np.ones((2, 16), np.int32)
    index = np.arange(30, dtype=np.int32)
    batch = (tokens, positions, segments, index, tokens.reshape(-1)[1:31])
    courses = {}
    for dtype in ("float32", "float16"):
        config = replace(micro_config, compute=Compute(dtype=dtype))
        decoder = Decoder(config, random_weights(config, 0))
        scale = LossScale.of(decoder)
        assert (scale is None) == (dtype == "float32")
        if scale:
            scale = LossScale(2.0**24)
        step = TrainStep(
            NextTokenLossAndMetrics(decoder), decoder.trainable(), OptimizerConfig(max_grad_norm=0), loss_scale=scale
        )
        courses[dtype] = []
        while step.updates < 6:
            updates, result = step.updates, step([batch], 1e-2)
            if step.updates > updates:
                courses[dtype].append(result.loss)
        assert step.skipped == 0
    assert step.loss_scale.value < 2.0**24
    np.testing.assert_allclose(courses["float16"], courses["float32"], rtol=2e-2)
    assert courses["float16"][0] != courses["float32"][0] and courses["float16"][-1] < courses["float16"][0] - 0.5
