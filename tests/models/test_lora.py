"""Adapters inside the decoder: against merged weights, PEFT, each other; dropout, switching off, what is trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.config import LoraConfig
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.lora import MODULES, Lora, random_adapter
from mindrlhf.models.model_directory import ModelDirectory

FIXTURES = Path(__file__).parent.parent / "fixtures"
ALL = ["all-linear"]
# Subsets on which each of the fused kernels has adapters on some and on all of its weights.
SUBSETS = [ALL, ["q_proj", "v_proj"], ["k_proj", "o_proj", "up_proj"], ["gate_proj", "down_proj"]]


@pytest.fixture()
def adapted(mindspore, micro_config):
    """A function: LoraConfig's fields -> a decoder whose A and B are both random."""
    from mindrlhf.models.decoder import Decoder, random_weights

    def make(transposed=False, head="logits", **fields):
        config = replace(micro_config, head=head)
        lora = Lora.of(LoraConfig(**{"rank": 3, "alpha": 6, **fields}), config)
        shapes, random = lora.shapes(config), np.random.default_rng(5)
        values = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
        return Decoder(config, random_weights(config, 0), transposed, lora, values.__getitem__)

    return make


def rows(mindspore, config, width=10):
    """Two sequences in packed rows."""
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, width)).astype(np.int32)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), ids.shape).copy()
    return [mindspore.Tensor(array) for array in (ids, positions, np.ones_like(ids))]


def targets(mindspore, inputs):
    tokens = inputs[0].asnumpy()
    index = np.arange(tokens.size, dtype=np.int32).reshape(tokens.shape)[:, :-1].reshape(-1)
    return [mindspore.Tensor(index), mindspore.Tensor(tokens[:, 1:].reshape(-1))]


@pytest.mark.parametrize("name", ["qwen2_tied_lora", "qwen2_score_lora"])
def test_adapters_of_peft_give_the_numbers_of_peft(mindspore, name):
    """By adapters in the forward pass, and merged."""
    from mindrlhf.models.decoder import Decoder
    from tests.models.cells import Logits, Scores

    found, expected = ModelDirectory.read(FIXTURES / name), np.load(FIXTURES / name / "expected.npz")
    saved, ids = found.adapter, expected["ids"]
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy()
    inputs = [mindspore.Tensor(array) for array in (ids, positions, np.ones_like(ids))]
    for decoder in (
        Decoder(found.config, found.weights, lora=saved.lora, adapter=saved.tensors.__getitem__),
        Decoder(found.config, found.merged()),
    ):
        if "scores" in expected:
            computed = Scores(decoder)(*inputs, mindspore.Tensor(np.array([11, 23], np.int32))).asnumpy()
            np.testing.assert_allclose(computed, expected["scores"], atol=1e-5)
        else:
            computed = Logits(decoder)(*inputs).asnumpy().reshape(expected["logits"].shape)
            np.testing.assert_allclose(computed, expected["logits"], atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_the_forward_pass_is_that_of_the_merged_weights(mindspore, adapted, modules, transposed):
    from mindrlhf.models.decoder import Decoder
    from tests.models.cells import Logits

    decoder = adapted(transposed, target_modules=modules)
    merged = Decoder(decoder.config, decoder.weights)
    inputs = rows(mindspore, decoder.config)
    ours, theirs = Logits(decoder)(*inputs).asnumpy(), Logits(merged)(*inputs).asnumpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with decoder.adapters_off():
        assert np.abs(Logits(decoder)(*inputs).asnumpy() - theirs).max() > 0.05


def test_decoding_with_adapters(mindspore, adapted, micro_prompts):
    """A generator takes the merged weights; `sync` brings changed adapters."""
    from mindrlhf.config import SamplingConfig
    from mindrlhf.models.decoder import Decoder
    from mindrlhf.wrapper.generator import Generator
    from mindrlhf.wrapper.recompute import RecomputeGenerator

    decoder = adapted(target_modules=ALL)
    generator = Generator(decoder, slots=2, max_prompt_tokens=12, max_tokens=6)
    prompts, sampling = micro_prompts[:2], SamplingConfig(temperature=0, max_tokens=6)
    for _ in range(2):
        wanted = RecomputeGenerator(Decoder(decoder.config, decoder.weights)).generate([p.ids for p in prompts], 6)
        assert [r.response_ids.tolist() for r in generator.generate(prompts, 1, sampling, 0)] == wanted
        old = {name: array.copy() for name, array in decoder.adapter_tensors()}
        decoder.load_adapter(lambda name, old=old: -2 * old[name])
        generator.sync()


def test_gradients_are_those_of_the_merged_weights(mindspore, adapted):
    """dL/dA = scale B^T dL/dW and dL/dB = scale dL/dW A^T."""
    from mindrlhf.models.decoder import Decoder
    from tests.models.cells import NextTokenLoss

    decoder = adapted(target_modules=ALL)
    merged = Decoder(decoder.config, decoder.weights)
    inputs = rows(mindspore, decoder.config)
    inputs += targets(mindspore, inputs)
    names = [name for name in decoder.adapter_by_name if name.endswith("lora_A.weight")]
    weights = [merged.by_name[name.replace("lora_A.", "")] for name in names]
    _, whole = mindspore.value_and_grad(NextTokenLoss(merged), None, weights)(*inputs)
    trained = decoder.trainable()
    _, low = mindspore.value_and_grad(NextTokenLoss(decoder), None, trained)(*inputs)
    gradients = {parameter.name: value.asnumpy() for parameter, value in zip(trained, low, strict=True)}
    values, scale = dict(decoder.adapter_tensors()), decoder.lora.scale
    for name, value in zip(names, whole, strict=True):
        other, value = name.replace("lora_A", "lora_B"), value.asnumpy()
        np.testing.assert_allclose(gradients[name], scale * values[other].T @ value, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(gradients[other], scale * value @ values[name].T, atol=2e-5, err_msg=other)


def test_adapters_off_is_the_base_bit_for_bit_and_recompiles_nothing(mindspore, adapted, compilations):
    from mindrlhf.models.decoder import Decoder, random_weights
    from tests.models.cells import Logits

    decoder = adapted(target_modules=ALL)
    base = random_weights(decoder.config, 0)
    inputs = rows(mindspore, decoder.config)
    wanted = Logits(Decoder(decoder.config, base))(*inputs).asnumpy()
    cell = Logits(decoder)
    on = cell(*inputs).asnumpy()
    assert compilations() == 2
    with decoder.adapters_off():
        np.testing.assert_array_equal(cell(*inputs).asnumpy(), wanted)
        for name, array in decoder.tensors():
            np.testing.assert_array_equal(array, base(name))
    np.testing.assert_array_equal(cell(*inputs).asnumpy(), on)
    assert compilations() == 2


def test_a_new_adapter_changes_nothing(mindspore, micro_config):
    from mindrlhf.models.decoder import Decoder, random_weights
    from tests.models.cells import Logits

    base, lora = random_weights(micro_config, 0), Lora(4, 8, target_modules=MODULES)
    decoder = Decoder(micro_config, base, lora=lora, adapter=random_adapter(lora, micro_config, 3))
    inputs = rows(mindspore, micro_config)
    ours, theirs = Logits(decoder)(*inputs).asnumpy(), Logits(Decoder(micro_config, base))(*inputs).asnumpy()
    np.testing.assert_array_equal(ours, theirs)
    for name, array in decoder.adapter_tensors():
        if name.endswith("lora_B.weight"):
            assert not array.any()
            continue
        bound = array.shape[1] ** -0.5
        assert 0.9 * bound < np.abs(array).max() <= bound
        assert array.std() == pytest.approx(bound / 3**0.5, rel=0.15)
        np.testing.assert_array_equal(array, random_adapter(lora, micro_config, 3)(name))
        assert (array != random_adapter(lora, micro_config, 4)(name)).any()


def test_what_is_trained(adapted, micro_decoder, micro_config):
    decoder = adapted(target_modules=["v_proj", "q_proj"], layers=[1], head="score")
    prefix = "model.layers.1.self_attn"
    wanted = [f"{prefix}.{m}_proj.lora_{kind}.weight" for m in "qv" for kind in "AB"] + ["score.weight"]
    assert [parameter.name for parameter in decoder.trainable()] == wanted
    assert {parameter.name for parameter in decoder.trainable_params()} == set(wanted)
    assert [name for name, _ in decoder.adapter_tensors()] == wanted

    from mindrlhf.models.decoder import Decoder, random_weights

    assert len(micro_decoder.trainable()) == len(list(micro_decoder.tensors()))
    score = replace(micro_config, head="score")
    names = [p.name for p in Decoder(score, random_weights(score, 0)).trainable([1])]
    assert len(names) == 13
    assert {name.split(".layers.")[-1][:1] for name in names if name != "score.weight"} == {"1"}
    assert "score.weight" in names
    with pytest.raises(UserError, match="model.train_layers: there is no layer 2; the model has 0 to 1"):
        micro_decoder.trainable([2])


def test_training_moves_the_adapters_alone(mindspore, adapted):
    from mindrlhf.config import OptimizerConfig
    from mindrlhf.models.decoder import random_weights
    from mindrlhf.wrapper.train_step import TrainStep
    from tests.models.cells import NextTokenLossAndMetrics

    decoder = adapted(target_modules=ALL, dropout=0.1)
    batch = rows(mindspore, decoder.config)
    batch = [array.asnumpy() for array in batch + targets(mindspore, batch)]
    before = {name: array.copy() for name, array in decoder.adapter_tensors()}
    step = TrainStep(NextTokenLossAndMetrics(decoder), decoder.trainable(), OptimizerConfig(), decoder.set_dropout)
    losses = [step([batch], 1e-2).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5
    for name, array in decoder.adapter_tensors():
        assert (array != before[name]).any(), name
    base = random_weights(decoder.config, 0)
    with decoder.adapters_off():
        for name, array in decoder.tensors():
            np.testing.assert_array_equal(array, base(name))


def test_load_leaves_the_adapters(adapted):
    from mindrlhf.models.decoder import random_weights

    decoder = adapted(target_modules=ALL)
    before = {name: array.copy() for name, array in decoder.adapter_tensors()}
    fresh = random_weights(decoder.config, 9)
    decoder.load(fresh)
    for name, array in decoder.adapter_tensors():
        np.testing.assert_array_equal(array, before[name])
    with decoder.adapters_off():
        np.testing.assert_array_equal(decoder.weights("model.norm.weight"), fresh("model.norm.weight"))
    zeros = {name: np.zeros_like(array) for name, array in before.items()}
    decoder.load_adapter(zeros.__getitem__)
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(decoder.weights(name), fresh(name))


def test_dropout_of_a_decoder(mindspore, adapted, compilations):
    from tests.models.cells import Logits

    decoder, without = adapted(dropout=0.25, target_modules=ALL), adapted(target_modules=ALL)
    inputs = rows(mindspore, decoder.config)
    plain, cell = Logits(without)(*inputs).asnumpy(), Logits(decoder)
    np.testing.assert_array_equal(cell(*inputs).asnumpy(), plain)
    count = compilations()
    seen = []
    for seed in (7, 8, 2**31 - 1):
        decoder.set_dropout(seed)
        seen.append(cell(*inputs).asnumpy())
        np.testing.assert_array_equal(cell(*inputs).asnumpy(), seen[-1])
    for other in (plain, seen[1], seen[2]):
        assert np.abs(seen[0] - other).max() > 1e-3
    decoder.set_dropout(0)
    np.testing.assert_array_equal(cell(*inputs).asnumpy(), plain)
    assert compilations() == count
    without.set_dropout(7)
    np.testing.assert_array_equal(Logits(without)(*inputs).asnumpy(), plain)


def dropped(mindspore, share, key, seed, shape=(512, 128)):
    from mindspore import Parameter, Tensor

    from mindrlhf.models.adapters import Dropout

    cell = Dropout(share, Parameter(Tensor(seed, mindspore.int32), name="seed"), shape[1], key)
    return cell(Tensor(np.ones(shape, np.float32))).asnumpy()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_dropout_is_uniform(mindspore, share):
    """Its share over all, over rows and over columns, with the spread of independent draws; and neighbours."""
    mask = dropped(mindspore, share, 3, 11)
    assert set(np.unique(mask)) == {0, np.float32(1 / (1 - share))}
    kept = (mask > 0) - (1 - share)
    variance = share * (1 - share)
    assert abs(kept.mean()) < 4 * (variance / kept.size) ** 0.5
    assert kept.mean(1).var() * 128 / variance == pytest.approx(1, abs=0.3)
    assert kept.mean(0).var() * 512 / variance == pytest.approx(1, abs=0.5)
    for one, other in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[16:], kept[:-16])):
        assert abs((one * other).mean()) / variance < 4.5 / one.size**0.5


def test_dropout_differs_by_seed_and_by_adapter(mindspore):
    masks = [dropped(mindspore, 0.5, key, seed) > 0 for key, seed in ((0, 1), (0, 2), (1, 1), (7, 1))]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs((one == other).mean() - 0.5) < 4 * 0.5 / one.size**0.5


def test_dropout_passes_gradients_where_it_kept(mindspore):
    from mindspore import Parameter, Tensor, ops

    from mindrlhf.models.adapters import Dropout

    cell = Dropout(0.5, Parameter(Tensor(3, mindspore.int32), name="seed"), 16, 0)
    x = Tensor(np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32))
    gradient = ops.GradOperation()(cell)(x).asnumpy()
    np.testing.assert_array_equal(gradient, cell(Tensor(np.ones((8, 16), np.float32))).asnumpy())


CONFIG = DecoderConfig.read(FIXTURES / "qwen2_tied")


def test_settings():
    assert Lora.of(LoraConfig(), CONFIG) is None
    lora = Lora.of(LoraConfig(rank=4, alpha=8, target_modules=["down_proj", "q_proj"], layers=[1, 1]), CONFIG)
    assert lora == Lora(4, 8, 0.0, ("q_proj", "down_proj"), (1,))
    assert lora.scale == 2
    assert replace(lora, rank_stabilised=True).scale == 4
    assert list(lora.shapes(CONFIG).items()) == [
        ("model.layers.1.self_attn.q_proj.lora_A.weight", (4, 32)),
        ("model.layers.1.self_attn.q_proj.lora_B.weight", (32, 4)),
        ("model.layers.1.mlp.down_proj.lora_A.weight", (4, 48)),
        ("model.layers.1.mlp.down_proj.lora_B.weight", (32, 4)),
    ]
    assert Lora.of(LoraConfig(rank=1, target_modules=ALL), CONFIG).target_modules == MODULES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, r"model.lora.rank: -1 must be 0 \(off\) or more"),
        ({"alpha": 0}, "model.lora.alpha: 0 must be over 0"),
        ({"dropout": 1.0}, "model.lora.dropout: 1.0 must be at least 0 and under 1"),
        ({"target_modules": []}, r"model.lora.target_modules: \[\] must be one or more"),
        (
            {"target_modules": ["q"]},
            "target_modules: no module 'q' that can be adapted in model_type qwen2; there are q_proj, k_proj",
        ),
        ({"layers": [0, 2]}, "model.lora.layers: there is no layer 2; the model has 0 to 1"),
        ({"layers": [-1]}, "model.lora.layers: there is no layer -1"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(UserError, match=message):
        Lora.of(LoraConfig(**{"rank": 2, **fields}), CONFIG)
