"""The policy objective: the loss and the gradients do not depend on how a step is split or packed."""

from dataclasses import replace

import numpy as np
import pytest

from mindrlhf.advantages import loss_weights
from mindrlhf.config import OptimizerConfig
from mindrlhf.data.packing import Packing
from mindrlhf.types import ActorCriticBatch, PackedRows, PolicyBatch, ValueBatch

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


def _batches(answers, rows, row_tokens, mode="token_mean", order=None, kind=PolicyBatch):
    order = list(range(len(COUNTS))) if order is None else order
    sequences, targets, advantages, old, ref = ([field[i] for i in order] for field in answers)
    packing = Packing.of(sequences, targets, rows, row_tokens)
    counts = [COUNTS[i] for i in order]
    weights = [np.full(n, w, np.float32) for n, w in zip(counts, loss_weights(counts, mode, 16), strict=True)]
    # The critic's numbers are any numbers here.
    fields = {"loss_weight": weights, "advantages": advantages, "old_logprobs": old, "ref_logprobs": ref,
              "value_weight": weights, "old_values": ref, "returns": advantages}  # fmt: skip
    spread = {name: packing.spread(fields[name]) for name in kind._fields[len(PackedRows._fields) :]}
    return [
        kind(*rows_, **{name: values[i] for name, values in spread.items()}) for i, rows_ in enumerate(packing.batches)
    ]


def _gradients(micro_config, batches, loss=None):
    """Loss, metrics and the gradient of every parameter: the first moments of one step are (1 - beta1) of it."""
    from mindrlhf.models.decoder import Decoder, random_weights
    from mindrlhf.wrapper.policy_objectives import (
        ActorCriticObjective,
        PolicyLoss,
        PolicyObjective,
        ValueHead,
        ValueObjective,
    )
    from mindrlhf.wrapper.train_step import TrainStep

    head = "score" if isinstance(batches[0], ValueBatch) else "logits"
    config = replace(micro_config, head=head)
    decoder = Decoder(config, random_weights(config, 0))
    parameters = decoder.trainable_params()
    loss = loss or PolicyLoss(kl_coef=0.1, entropy_coef=0.01)
    if isinstance(batches[0], ValueBatch):
        objective = ValueObjective(decoder, 0.5)
    elif isinstance(batches[0], ActorCriticBatch):
        value_head = ValueHead(config.hidden_size)
        objective = ActorCriticObjective(decoder, value_head, loss, 0.5, 0.5)
        parameters.append(value_head.weight)
    else:
        objective = PolicyObjective(decoder, loss)
    step = TrainStep(objective, parameters, OptimizerConfig(beta1=0.0, max_grad_norm=0))
    result = step(batches, 1e-3)
    return result, {name: array.copy() for name, array in step.state() if name.startswith("first")}


# Every policy loss with the aggregation of a row that has it; both kinds of critic.
KINDS = [
    ("ppo", "token_mean", PolicyBatch),
    ("gspo", "sequence_mean", PolicyBatch),
    ("cispo", "constant", PolicyBatch),
    ("reinforce", "sequence_sum", PolicyBatch),
    ("importance_sampling", "token_sum", PolicyBatch),
    ("ppo", "token_mean", ActorCriticBatch),
    ("ppo", "token_mean", ValueBatch),
]


@pytest.mark.parametrize(
    ("kind", "mode", "batch"),
    [
        one if one[0] == "gspo" or one[2] is ActorCriticBatch else pytest.param(*one, marks=pytest.mark.slow)
        for one in KINDS
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_micro_batches_packing_and_order_change_nothing(mindspore, micro_config, answers, kind, mode, batch):
    from mindrlhf.wrapper.policy_objectives import PolicyLoss

    loss = PolicyLoss(kind=kind, kl_coef=0.1, entropy_coef=0.01, dual_clip=1.5)
    whole, expected = _gradients(micro_config, _batches(answers, 8, 16, mode, kind=batch), loss)
    assert whole.gradient_norm > 1e-3
    for rows, row_tokens, order in [(1, 16, [7, 2, 5, 0, 3, 1, 6, 4]), (2, 40, None)]:
        batches = _batches(answers, rows, row_tokens, mode, order, batch)
        assert len(batches) > 1 or row_tokens == 40
        result, gradients = _gradients(micro_config, batches, loss)
        assert result.loss == pytest.approx(whole.loss, abs=1e-6, rel=1e-6)
        for name, value in whole.metrics.items():
            assert result.metrics[name] == pytest.approx(value, abs=2e-4), name
        scale = max(float(np.abs(gradient).max()) for gradient in expected.values())
        for name, gradient in expected.items():
            # MindSpore's own exp is good to 8e-6 of its value only.
            np.testing.assert_allclose(gradients[name], gradient, atol=3e-6 * max(scale, 1.0), err_msg=name)


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
