"""Layers computed once more in the backward pass: the same numbers as if what is inside of them had been kept."""

from dataclasses import replace

import numpy as np
import pytest

from mindrlhf.config import BalanceConfig, LoraConfig, OptimizerConfig
from mindrlhf.models.compute import Compute
from mindrlhf.models.decoder import Decoder, random_weights
from mindrlhf.models.lora import Lora, random_adapter
from mindrlhf.wrapper.balance import Balancer
from mindrlhf.wrapper.objectives import SupervisedObjective
from mindrlhf.wrapper.train_step import TrainStep
from tests.models.test_experts import MIXTRAL, batches_of

RECOMPUTED = Compute(recompute=True)


@pytest.fixture(autouse=True)
def graph_mode(mindspore):
    return mindspore


def course(config, lora=None):
    """Loss, gradient norm and routing of each of three steps; with dropout where there are adapters."""
    adapter = None
    if lora:
        lora = Lora.of(lora, config)
        adapter = random_adapter(lora, config, 1)
    decoder = Decoder(config, random_weights(config, 0), lora=lora, adapter=adapter)
    balancer = Balancer.of(decoder, BalanceConfig(auxiliary_coef=0.1) if config.num_experts else BalanceConfig())
    step = TrainStep(
        SupervisedObjective(decoder), decoder.trainable(), OptimizerConfig(), decoder.set_dropout, balancer=balancer
    )
    results = [step(batches_of(4, 2), 1e-2) for _ in range(3)]
    return [(one.loss, one.gradient_norm, *one.routing.values()) for one in results]


@pytest.mark.slow  # two compilations
def test_adapters_leave_out_the_same_inputs(micro_config):
    """The mask is a hash of a seed that stays the same from the forward to the backward pass."""
    lora = LoraConfig(rank=4, dropout=0.5, target_modules=["all-linear"])
    plain, again = course(micro_config, lora), course(replace(micro_config, compute=RECOMPUTED), lora)
    np.testing.assert_allclose(again, plain, rtol=1e-6)
    assert plain[0] != plain[1]


@pytest.mark.slow  # two compilations
def test_experts_are_counted_once():
    np.testing.assert_allclose(course(replace(MIXTRAL, compute=RECOMPUTED)), course(MIXTRAL), rtol=1e-5)
