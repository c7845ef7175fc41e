"""The policy objective: the loss and the gradients do not depend on how a step is split or packed."""

import numpy as np
import pytest

from mindrlhf.advantages import loss_weights
from mindrlhf.config import OptimizerConfig
from mindrlhf.data.packing import Packing
from mindrlhf.types import PolicyBatch

COUNTS = [1, 7, 4, 12, 3, 9, 2, 5]  # response tokens, a one-token answer among them


@pytest.fixture(scope="module")
def answers():
    """Sequences, target masks, and per answer: advantages, old and reference log-probs."""
    random = np.random.default_rng(1)
    sequences = [random.integers(0, 48, 3 + n).astype(np.int32) for n in COUNTS]
    targets = [np.arange(3 + n) >= 3 for n in COUNTS]
    advantages = [np.full(n, a, np.float32) for n, a in zip(COUNTS, random.standard_normal(8), strict=True)]
    old = [-3 - random.random(n).astype(np.float32) for n in COUNTS]
    ref = [-3 - random.random(n).astype(np.float32) for n in COUNTS]
    return sequences, targets, advantages, old, ref


def _batches(answers, rows, row_tokens, mode="token_mean", order=None):
    order = list(range(len(COUNTS))) if order is None else order
    sequences, targets, advantages, old, ref = ([field[i] for i in order] for field in answers)
    packing = Packing.of(sequences, targets, rows, row_tokens)
    counts = [COUNTS[i] for i in order]
    weights = [np.full(n, w, np.float32) for n, w in zip(counts, loss_weights(counts, mode, 16), strict=True)]
    fields = {"loss_weight": weights, "advantages": advantages, "old_logprobs": old, "ref_logprobs": ref}
    spread = {name: packing.spread(values) for name, values in fields.items()}
    return [
        PolicyBatch(*rows_, **{name: values[i] for name, values in spread.items()})
        for i, rows_ in enumerate(packing.batches)
    ]


def _gradients(micro_config, batches, loss=None):
    """Loss, metrics and the gradient of every parameter: the first moments of one step are (1 - beta1) of it."""
    from mindrlhf.models.decoder import Decoder, random_weights
    from mindrlhf.wrapper.policy_objectives import PolicyLoss, PolicyObjective
    from mindrlhf.wrapper.train_step import TrainStep

    decoder = Decoder(micro_config, random_weights(micro_config, 0))
    objective = PolicyObjective(decoder, loss or PolicyLoss(kl_coef=0.1, entropy_coef=0.01))
    step = TrainStep(objective, decoder.trainable_params(), OptimizerConfig(beta1=0.0, max_grad_norm=0))
    result = step(batches, 1e-3)
    return result, {name: array.copy() for name, array in step.state() if name.startswith("first")}


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "constant"])
def test_micro_batches_packing_and_order_change_nothing(mindspore, micro_config, answers, mode):
    whole, expected = _gradients(micro_config, _batches(answers, 8, 16, mode))
    splits = [(2, 16, None), (1, 16, [7, 2, 5, 0, 3, 1, 6, 4]), (2, 40, None)]
    for rows, row_tokens, order in splits:
        batches = _batches(answers, rows, row_tokens, mode, order)
        assert len(batches) > 1 or row_tokens == 40
        result, gradients = _gradients(micro_config, batches)
        assert result.loss == pytest.approx(whole.loss, abs=1e-6)
        for name, value in whole.metrics.items():
            assert result.metrics[name] == pytest.approx(value, abs=2e-4), name
        for name, gradient in expected.items():
            # Gradients reach 1.3, and MindSpore's own exp is good to 8e-6 of its value only.
            np.testing.assert_allclose(gradients[name], gradient, atol=3e-6, err_msg=name)


def test_a_fully_masked_step_has_loss_and_gradients_of_zero(mindspore, micro_config, answers):
    batches = [batch._replace(loss_weight=batch.loss_weight * 0) for batch in _batches(answers, 8, 16)]
    result, gradients = _gradients(micro_config, batches)
    assert result.loss == 0 and result.gradient_norm == 0 and result.skipped == ""
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_on_policy_the_ratio_is_one_and_the_gradient_is_reinforce(mindspore, micro_config, answers):
    """With old = policy nothing is clipped, the loss is -mean(A) and a finite difference confirms the gradient."""
    from mindrlhf.models.decoder import Decoder, random_weights
    from mindrlhf.wrapper.policy_objectives import PolicyLoss
    from mindrlhf.wrapper.scorer import Scorer

    decoder = Decoder(micro_config, random_weights(micro_config, 0))
    batches = _batches(answers, 8, 16)
    scored = Scorer(decoder, 1.0).score(batches)
    batches = [batch._replace(old_logprobs=old) for batch, old in zip(batches, scored, strict=True)]
    result, _ = _gradients(micro_config, batches, PolicyLoss())
    expected = -sum(float((batch.advantages * batch.loss_weight).sum()) for batch in batches)
    assert result.loss == pytest.approx(expected, abs=1e-6)
    assert result.metrics["clip_fraction"] == 0
    assert result.metrics["shift_max"] < 1e-5
    assert result.metrics["tokens"] == sum(COUNTS)
