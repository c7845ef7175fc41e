"""Experts: the grouped kernel against float64, routers and balancing against numbers by hand, counts of whole steps."""

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.config import BalanceConfig, LoraConfig, OptimizerConfig
from mindrlhf.errors import UserError
from mindrlhf.layout import ONE_PROCESS
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.decoder import Decoder, random_weights
from mindrlhf.models.experts import Experts, Router
from mindrlhf.models.hf_config import Latent
from mindrlhf.models.hf_config import Router as Routing
from mindrlhf.models.layers import Make
from mindrlhf.models.lora import Lora, random_adapter
from mindrlhf.models.shard import Shard
from mindrlhf.types import SupervisedBatch
from mindrlhf.wrapper.balance import Balancer
from mindrlhf.wrapper.objectives import SupervisedObjective
from mindrlhf.wrapper.train_step import TrainStep
from tests.gradients import central_differences
from tests.models import expert_cells as cells
from tests.models.kernel_cells import Gradients

random = np.random.default_rng(0)
COMMON = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=2, max_positions=16,
    experts_per_token=2, expert_width=12, initializer_range=0.3,
)  # fmt: skip
MIXTRAL = DecoderConfig(**COMMON, head_dim=8, num_layers=2, num_experts=4, model_type="mixtral")
DEEPSEEK = DecoderConfig(
    **COMMON, head_dim=12, num_layers=3, num_experts=8, shared_width=20, dense_layers=(0,), model_type="deepseek_v3",
    latent=Latent(0, 8, 8, 4, 8), router=Routing("sigmoid", True, 2.5, 4, 2),
)  # fmt: skip


@pytest.fixture(autouse=True)
def graph_mode(mindspore):
    return mindspore


def normal(*shape):
    return random.standard_normal(shape).astype(np.float32)


def close(ours, expected, tolerance=2e-6):
    """Within tolerance of the largest expected number, or of 1."""
    expected = np.asarray(expected)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def by_pair(x, best, shares, gate, up, down, first, g):
    """The sum over pairs of token and expert, in float64, and the gradients of sum(g * it) at all but best."""
    x, shares, gate, up, down, g = (array.astype(np.float64) for array in (x, shares, gate, up, down, g))
    out = np.zeros_like(x)
    dx, dshares, dgate, dup, ddown = map(np.zeros_like, (x, shares, gate, up, down))
    for token, choice in np.ndindex(best.shape):
        e, share = best[token, choice] - first, shares[token, choice]
        if not 0 <= e < len(gate):
            continue
        a, b = gate[e] @ x[token], up[e] @ x[token]
        open_ = 1 / (1 + np.exp(-a))
        hidden = a * open_ * b
        out[token] += share * (down[e] @ hidden)
        dshares[token, choice] = g[token] @ down[e] @ hidden
        ddown[e] += share * np.outer(g[token], hidden)
        dhidden = share * (g[token] @ down[e])
        da, db = dhidden * b * (open_ + a * open_ * (1 - open_)), dhidden * a * open_
        dgate[e] += np.outer(da, x[token])
        dup[e] += np.outer(db, x[token])
        dx[token] += da @ gate[e] + db @ up[e]
    return out, dx, dshares, dgate, dup, ddown


# tokens, width, inner, experts here, of all, the first one here, experts a token
SIZES = [(9, 40, 33, 3, 8, 2, 2), (70, 300, 130, 4, 4, 0, 4), (200, 24, 70, 6, 6, 0, 1)]


@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("own", [True, False], ids=["kernel", "composed"])
@pytest.mark.parametrize("tokens, width, inner, here, count, first, chosen", SIZES)
def test_values_and_gradients(tokens, width, inner, here, count, first, chosen, own, transposed):
    best = np.argsort(random.random((tokens, count)), 1)[:, :chosen].astype(np.int32)
    if chosen == 1 and count > 1:
        best[best == 1] = 0  # an expert without tokens, whose gradient is 0
    if here < count:
        best[0] = [0, 1]  # a token without an expert here
    weights = normal(here, inner, width), normal(here, inner, width), normal(here, width, inner)
    x, shares, g = normal(tokens, width), random.random((tokens, chosen)).astype(np.float32), normal(tokens, width)
    expected = by_pair(x, best, shares, *weights, first, g)

    def turned(array):
        return np.ascontiguousarray(array.swapaxes(1, 2)) if transposed and array.ndim == 3 else array

    inputs = [Tensor(turned(array)) for array in (x, best, shares, *weights)]
    cell = cells.ExpertMlp(own, first, transposed)
    gradients = Gradients(cell, (0, 2, 3, 4, 5))((Tensor(g),), *inputs)
    for ours, theirs in zip((cell(*inputs), *gradients), expected, strict=True):
        close(turned(ours.asnumpy()), theirs)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_token_does_not_depend_on_the_others(transposed):
    """Three alone and among 90, where a weight in the generator's layout is read another way."""
    shapes = (300, 70), (300, 70), (70, 300)
    weights = [Tensor(normal(4, *(shape if transposed else shape[::-1]))) for shape in shapes]
    x, shares = normal(90, 300), random.random((90, 2)).astype(np.float32)
    best = np.tile(np.array([[1, 2]], np.int32), (90, 1))
    cell = cells.ExpertMlp(True, 0, transposed)
    whole, part = (
        cell(*(Tensor(array[rows]) for array in (x, best, shares)), *weights).asnumpy()
        for rows in (slice(None), slice(7, 10))
    )
    np.testing.assert_array_equal(part, whole[7:10])


# -- routers ----------------------------------------------------------------------------------------------------------


def make_of(weights, transposed=False):
    return Make(weights.__getitem__, Shard(ONE_PROCESS), transposed, lambda name: None)


def router_of(count, chosen, routing, bias=None):
    """Its logits are its inputs."""
    weights = {"r.weight": np.eye(count, dtype=np.float32), "r.e_score_correction_bias": bias}
    config = SimpleNamespace(router=routing, num_experts=count, experts_per_token=chosen)
    return Router(config, "r", make_of(weights))


def routed(router, logits):
    """Expert -> share, of one token."""
    best, shares = (array.asnumpy()[0].tolist() for array in router(Tensor(np.float32(logits)), None))
    return dict(zip(best, shares, strict=True))


def test_softmax_routers():
    """Of exp 1, 2, 4, 1 the best two are 4 and 2: 2/3 and 1/3, or without renormalising 4/8 and 2/8."""
    logits = np.log([[1.0, 2.0, 4.0, 1.0]])
    assert routed(router_of(4, 2, Routing()), logits) == pytest.approx({2: 2 / 3, 1: 1 / 3})
    plain = router_of(4, 2, Routing(renormalise=False))
    assert routed(plain, logits) == pytest.approx({2: 4 / 8, 1: 2 / 8})


def test_sigmoid_router_chooses_by_groups_and_biases_and_weights_by_scores():
    """Scores .9 .1 | .6 .55 | .2 .8 | .5 .5 in four groups. By the sums of the groups' two, 1.0, 1.15, 1.0, 1.0, and
    the bias of .2 on the second last expert, groups 1 and 3 are open, where .6 and .5 + .2 are best, weighted .6 to .5.
    """
    scores = np.array([[0.9, 0.1, 0.6, 0.55, 0.2, 0.8, 0.5, 0.5]])
    bias = np.zeros(8, np.float32)
    bias[6] = 0.2
    logits = np.log(scores / (1 - scores))
    routing = Routing("sigmoid", True, 2.5, 4, 2)
    expected = {2: 2.5 * 0.6 / 1.1, 6: 2.5 * 0.5 / 1.1}
    assert routed(router_of(8, 2, routing, bias), logits) == pytest.approx(expected)
    plain = routing._replace(renormalise=False, scale=1.0, groups=1, top_groups=1)
    assert routed(router_of(8, 2, plain, bias), logits) == pytest.approx({0: 0.9, 5: 0.8})


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_with_shared_experts(transposed):
    name, hidden, count = "m", DEEPSEEK.hidden_size, DEEPSEEK.num_experts
    shapes = {
        "gate.weight": (count, hidden), "gate.e_score_correction_bias": (count,),
        "experts.gate_proj.weight": (count, 12, hidden), "experts.up_proj.weight": (count, 12, hidden),
        "experts.down_proj.weight": (count, hidden, 12), "shared_experts.gate_proj.weight": (20, hidden),
        "shared_experts.up_proj.weight": (20, hidden), "shared_experts.down_proj.weight": (hidden, 20),
    }  # fmt: skip
    weights = {f"{name}.{kind}": normal(*shape) for kind, shape in shapes.items()}
    experts = Experts(DEEPSEEK, name, make_of(weights, transposed))
    x = normal(11, hidden)
    best, shares = (array.asnumpy() for array in experts.router(Tensor(x), None))
    routed_weights, shared = (
        [weights[f"{name}.{kind}.{part}_proj.weight"] for part in ("gate", "up", "down")]
        for kind in ("experts", "shared_experts")
    )
    expected = by_pair(x, best, shares, *routed_weights, 0, x)[0]
    everyone, one = np.zeros((11, 1), np.int32), np.ones((11, 1), np.float32)
    expected += by_pair(x, everyone, one, *(array[None] for array in shared), 0, x)[0]
    close(cells.Layer(experts)(Tensor(x)).asnumpy(), expected)


# -- balancing --------------------------------------------------------------------------------------------------------


def probabilities_of(logits, kind):
    scores = np.exp(logits) if kind == "softmax" else 1 / (1 + np.exp(-logits))
    return scores / scores.sum(-1, keepdims=True)


def auxiliary_loss(probabilities, best, real):
    """Of the tokens with real 1: experts * sum over them of mean count * mean probability."""
    count = probabilities.shape[1]
    loads = np.array([(best[real > 0] == e).sum() for e in range(count)])
    return count * (loads / real.sum() * probabilities[real > 0].mean(0)).sum(), loads


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_auxiliary_loss_and_its_gradient(kind):
    logits, real = normal(6, 5), np.array([1, 1, 0, 1, 1, 0], np.float32)
    router = router_of(5, 2, Routing(kind, False), np.zeros(5, np.float32))
    router.is_balanced = True
    router.coef.set_data(Tensor(0.25, router.coef.dtype))
    inputs = Tensor(logits), Tensor(real)
    weights = (Tensor(np.zeros((6, 2), np.float32)),)  # no other gradient
    gradient = Gradients(cells.Shares(router), (0,))(weights, *inputs)[0].asnumpy()
    best = router(*inputs)[0].asnumpy()
    assert (best == np.argsort(-logits, 1)[:, :2]).all()
    probabilities = probabilities_of(logits.astype(np.float64), kind)
    loss, loads = auxiliary_loss(probabilities, best, real)

    def weighted(moved):  # coef by token, and four of them
        return 0.25 * 4 * auxiliary_loss(probabilities_of(moved, kind), best, real)[0]

    close(gradient, central_differences(weighted, logits.astype(np.float64)))
    entropy = -(probabilities * np.log(probabilities))[real > 0].sum()
    np.testing.assert_allclose(router.tally.asnumpy(), [*loads, 4, entropy, 4 * loss], rtol=1e-6)


def batches_of(rows, split, padding=3, loss_weight=1.0):
    """`rows` rows of 8 tokens, the last `padding` of each none, in `split` micro-batches."""
    draw = np.random.default_rng(5)
    tokens = draw.integers(0, 40, (rows, 8)).astype(np.int32)
    positions, segments = np.tile(np.arange(8, dtype=np.int32), (rows, 1)), np.ones((rows, 8), np.int32)
    segments[:, 8 - padding :] = 0
    found = []
    for part in np.split(np.arange(rows), split):
        index = (np.arange(len(part))[:, None] * 8 + np.arange(4)).reshape(-1).astype(np.int32)
        labels, one = tokens[part][:, 1:5].reshape(-1), np.ones(len(index), np.float32)
        weight = one * np.float32(loss_weight / (4 * rows))
        rows_ = tokens[part], positions[part], segments[part]
        found.append(SupervisedBatch(*rows_, index, labels, np.zeros_like(index), one, weight))
    return found


def step_of(model, layers=(), **balance):
    decoder = Decoder(model, random_weights(model, 0))
    balancer = Balancer.of(decoder, BalanceConfig(**balance))
    step = TrainStep(
        SupervisedObjective(decoder), decoder.trainable(layers), OptimizerConfig(max_grad_norm=0), balancer=balancer
    )
    return decoder, balancer, step


def test_statistics_are_exact_and_do_not_depend_on_the_split():
    """20 tokens of two choices; scoring them counts nothing."""
    _, balancer, step = step_of(MIXTRAL, auxiliary_coef=0.0)
    step.evaluate(batches_of(4, 1))
    one, loads = step(batches_of(4, 1), 0.0).routing, balancer.loads
    four, others = step(batches_of(4, 4), 0.0).routing, balancer.loads
    assert [load.sum() for load in loads] == [40, 40]
    np.testing.assert_array_equal(loads, others)
    for name in ("busiest", "unused", "entropy"):
        assert one[f"experts/{name}"] == pytest.approx(four[f"experts/{name}"], rel=1e-6)
    assert one["experts/busiest"] == pytest.approx(np.mean([load.max() / 10 for load in loads]))
    assert one["experts/unused"] == np.mean([(load == 0).mean() for load in loads])
    assert 0 < one["experts/entropy"] < np.log(4)


def test_the_weight_of_the_auxiliary_loss_is_the_whole_steps():
    """Without another loss: the gradient of a micro-batch, of the same one twice, and of one with half the coef."""
    _, balancer, step = step_of(MIXTRAL, auxiliary_coef=0.5)
    batches, norms = batches_of(2, 1, loss_weight=0.0), []
    for coef, times in ((0.5, 1), (0.5, 2), (0.25, 1)):
        balancer.coef = coef
        norms.append(step(batches * times, 0.0).gradient_norm)
    assert norms[0] > 0.01
    np.testing.assert_allclose(norms[1:], [norms[0], norms[0] / 2], rtol=1e-5)


def test_biases_move_against_the_load():
    decoder, balancer, step = step_of(DEEPSEEK, bias_rate=0.125)
    before = [bias.asnumpy().copy() for bias in balancer.biases]
    assert len(before) == 2 and not any(bias.name in step.names for bias in balancer.biases)
    result = step(batches_of(4, 2), 1e-3)
    for old, bias, load in zip(before, balancer.biases, balancer.loads, strict=True):
        assert load.sum() == 40
        np.testing.assert_array_equal(bias.asnumpy(), old + 0.125 * np.sign(5 - load))
        np.testing.assert_array_equal(decoder.weights(bias.name), bias.asnumpy())  # and so it is saved
    moved = [bias.asnumpy().copy() for bias in balancer.biases]
    bad = [batch._replace(loss_weight=batch.loss_weight * np.float32(np.nan)) for batch in batches_of(4, 2)]
    skipped = step(bad, 1e-3)
    assert skipped.skipped and skipped.routing.keys() == result.routing.keys()
    for old, bias in zip(moved, balancer.biases, strict=True):
        np.testing.assert_array_equal(bias.asnumpy(), old)


def test_layers_below_the_trained_ones_are_not_counted():
    _, balancer, step = step_of(MIXTRAL, (1,))
    step(batches_of(4, 1), 0.0)
    assert [load.sum() for load in balancer.loads] == [0, 40]


def test_the_models_own_coef(micro_decoder):
    decoder = Decoder(MIXTRAL, random_weights(MIXTRAL, 0))
    assert Balancer.of(decoder, BalanceConfig()).coef == MIXTRAL.auxiliary_coef
    assert Balancer.of(micro_decoder, BalanceConfig()) is None


@pytest.mark.parametrize(
    "model, balance, message",
    [
        (None, {"bias_rate": 0.1}, "model.balance.bias_rate: 0.1, but the model has no experts; remove it"),
        (None, {"auxiliary_coef": 0.1}, "model.balance.auxiliary_coef: 0.1, but the model has no experts"),
        (MIXTRAL, {"auxiliary_coef": -1.0}, "model.balance.auxiliary_coef: -1.0 must be 0"),
        (MIXTRAL, {"bias_rate": 0.1}, "of model_type mixtral have no bias; use auxiliary_coef"),
    ],
)
def test_settings_without_an_effect(micro_decoder, model, balance, message):
    decoder = Decoder(model, random_weights(model, 0)) if model else micro_decoder
    with pytest.raises(UserError, match=message):
        Balancer.of(decoder, BalanceConfig(**balance))


def test_adapters_have_no_biases():
    lora = Lora.of(LoraConfig(rank=2, target_modules=["o_proj"]), DEEPSEEK)
    decoder = Decoder(DEEPSEEK, random_weights(DEEPSEEK, 0), lora=lora, adapter=random_adapter(lora, DEEPSEEK, 0))
    with pytest.raises(UserError, match="bias_rate: 0.1: adapters have no place for biases"):
        Balancer.of(decoder, BalanceConfig(bias_rate=0.1))
