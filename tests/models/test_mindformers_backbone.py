"""MindFormers' own network behind the decoder's interface, and its checkpoints: against MindFormers itself.

Importing MindFormers takes seconds: what needs it is in this file, and in one process where tests are not spread.
"""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from mindrlhf.config import LoraConfig, ModelConfig
from mindrlhf.errors import UserError
from mindrlhf.layout import Layout
from mindrlhf.models.compute import Compute
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import stored_shapes, to_stored
from mindrlhf.models.mindformers_config import decoder_config
from mindrlhf.models.mindformers_kinds import KINDS
from mindrlhf.models.mindformers_names import (
    from_mindformers,
    mindformers_from_stored,
    mindformers_tensors,
    stored_from_mindformers,
    to_mindformers,
)

QWEN2 = dict(
    seq_length=64, hidden_size=32, num_layers=2, num_heads=4, n_kv_heads=2, vocab_size=48, intermediate_size=48,
    qkv_has_bias=True, tie_word_embeddings=True, max_position_embedding=64, rms_norm_eps=1e-6, init_method_std=0.3,
    compute_dtype="bfloat16", use_flash_attention=True, qkv_concat=True,
)  # fmt: skip
PLAIN = Compute()
LLAMA = {**QWEN2, "num_layers": 1, "tie_word_embeddings": False, "attn_proj_has_bias": True, "n_kv_heads": None}
GLM = dict(
    num_layers=2, padded_vocab_size=40, hidden_size=32, ffn_hidden_size=24, kv_channels=8, num_attention_heads=4,
    seq_length=16, multi_query_group_num=2, add_qkv_bias=True, param_init_type="float32", compute_dtype="float32",
)  # fmt: skip
SANDWICH = {"post_self_attn_layernorm": True, "post_mlp_layernorm": True}


def config_of(values, kind="LlamaConfig"):
    """By a class of that name, which need not be MindFormers'."""
    return decoder_config(type(kind, (SimpleNamespace,), {})(**{**KINDS[kind].defaults, **values}))


CONFIGS = {
    "qwen2": config_of(QWEN2), "llama": config_of(LLAMA), "glm": config_of(GLM, "ChatGLM2Config"),
    "glm4": config_of({**GLM, **SANDWICH}, "ChatGLM2Config"),
}  # fmt: skip


@pytest.fixture(scope="module")
def mindformers(mindspore):
    """MindFormers' classes, quiet; it leaves MindSpore's mode as it is."""
    import logging

    mode = mindspore.get_context("mode")
    logging.disable(logging.WARNING)
    from mindformers.models import glm2, llama
    from mindformers.utils import convert_utils

    yield SimpleNamespace(glm2=glm2, llama=llama, convert_utils=convert_utils)
    logging.disable(logging.NOTSET)
    assert mindspore.get_context("mode") == mode


@pytest.fixture(scope="module")
def make(mindspore):
    """A function: values, head, how it is computed -> both decoders of one random model, MindFormers' second."""
    from mindrlhf.models.decoder import Decoder, random_weights
    from mindrlhf.models.mindformers_backbone import MindFormersDecoder

    def make(values, head="logits", compute=PLAIN):
        config = replace(config_of(values), head=head, compute=compute)
        weights = random_weights(config, 1)
        if head == "score":
            score = np.random.default_rng(2).standard_normal((1, config.hidden_size)).astype(np.float32)
            both = weights
            weights = lambda name: score if name == "score.weight" else both(name)  # noqa: E731
        return Decoder(config, weights), MindFormersDecoder(values, config, weights)

    return make


def packed():
    """Rows [2, 12] of two sequences and of one with padding: tokens, positions, segments."""
    tokens = np.random.default_rng(0).integers(0, 48, (2, 12)).astype(np.int32)
    positions = np.array([[*range(5), *range(7)], [*range(9), 0, 0, 0]], np.int32)
    segments = np.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], np.int32)
    return tokens, positions, segments


def run(cell, *arrays):
    from mindspore import Tensor

    return cell(*(Tensor(array) for array in arrays)).asnumpy()


def close(found, expected, tolerance=1e-5):
    """By the largest number: float32 has so many digits of it."""
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


# -- the network -------------------------------------------------------------------------------------------------------


class Subject:
    """A decoder, and one compiled graph for all that it is asked."""

    index = np.array([0, 1, 2, 3, 5, 6, 7, 8, 12, 14, 19], np.int32)

    def __init__(self, decoder):
        import mindspore

        from tests.models.cells import Everything

        self.parameters = decoder.trainable()
        self.gradient = mindspore.value_and_grad(Everything(decoder), None, self.parameters, has_aux=True)

    def __call__(self, *rows):
        """loss, hidden states [B, T, H], logits [B, T, V], gradients by name."""
        from mindspore import Tensor

        (loss, hidden, logits, _), gradients = self.gradient(*map(Tensor, (*rows, self.index, (3 * self.index) % 48)))
        hidden, logits = (output.asnumpy().reshape(*rows[0].shape, -1) for output in (hidden, logits))
        named = {p.name: gradient.asnumpy() for p, gradient in zip(self.parameters, gradients, strict=True)}
        return loss.asnumpy(), hidden, logits, named


@pytest.fixture(scope="module")
def qwen2(make):
    return [Subject(decoder) for decoder in make({**QWEN2, "num_layers": 1})]


def compare(ours, theirs):
    rows = packed()
    real = rows[2] > 0  # what padding comes to is nobody's
    loss, hidden, logits, gradients = ours(*rows)
    their_loss, their_hidden, their_logits, their_gradients = theirs(*rows)
    close(their_loss, loss)
    close(their_hidden[real], hidden[real])
    close(their_logits[real], logits[real])
    assert list(their_gradients) == list(gradients)
    for name, expected in gradients.items():
        close(their_gradients[name], expected)


def test_logits_and_gradients_are_our_decoders(qwen2):
    compare(*qwen2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "compute"),
    [
        (QWEN2, Compute(recompute=True)),
        (LLAMA, Compute(logits_at_once=100)),
    ],
    ids=["two-layers-recomputed", "output-biases-logits-in-parts"],
)
def test_logits_and_gradients_of_other_shapes(make, values, compute):
    compare(*map(Subject, make(values, compute=compute)))


def test_packed_rows_are_the_sequences_alone(qwen2):
    tokens, positions, segments = packed()
    _, together, _, _ = qwen2[1](tokens, positions, segments)
    for row, columns in ((0, slice(0, 5)), (0, slice(5, 12)), (1, slice(0, 9))):
        alone = [np.zeros_like(tokens) for _ in range(3)]
        length = columns.stop - columns.start
        for target, source in zip(alone, (tokens, positions, segments), strict=True):
            target[0, :length] = source[row, columns]
        close(qwen2[1](*alone)[1][0, :length], together[row, columns], 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scaling"),
    [
        ("NTK", 4.0),
        ("PI", 4.0),
        ("LLAMA3", dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
        (
            "YARN",
            dict(factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0)
            | {"original_max_position_embeddings": 16},
        ),
    ],
    ids=["ntk", "pi", "llama3", "yarn"],
)
def test_its_rope_is_what_the_configuration_says(make, method, scaling):
    """FreqsMgr's tables against those made from Hugging Face's words for them."""
    from tests.models.cells import Logits

    ours, theirs = make({**QWEN2, "num_layers": 1, "extend_method": method, "scaling_factor": scaling})
    tokens = np.random.default_rng(3).integers(0, 48, (1, 40)).astype(np.int32)
    positions, segments = np.arange(40, dtype=np.int32)[None], np.ones((1, 40), np.int32)
    plain = make({**QWEN2, "num_layers": 1})[0]
    expected = run(Logits(ours), tokens, positions, segments)
    close(run(Logits(theirs), tokens, positions, segments), expected)
    assert np.abs(run(Logits(plain), tokens, positions, segments) - expected).max() > 1e-2


@pytest.mark.slow
def test_scores_are_our_decoders(make):
    from tests.models.cells import Scores

    ours, theirs = make({**QWEN2, "num_layers": 1}, "score")
    inputs = (*packed(), np.array([4, 11, 20], np.int32))
    close(run(Scores(theirs), *inputs), run(Scores(ours), *inputs))
    assert "lm_head.weight" not in theirs.by_name and theirs.trainable([0])[-1].name == "score.weight"


def test_weights_go_in_and_out_by_our_names(make):
    """Tied: one parameter. What a generator, a reference and a checkpoint take is byte-equal."""
    ours, theirs = make({**QWEN2, "num_layers": 1})
    assert [p.name for p in theirs.trainable()] == [p.name for p in ours.trainable()]
    for (name, expected), (other, found) in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert name == other
        np.testing.assert_array_equal(found, expected)
    moved = {name: array + 1 for name, array in ours.tensors()}
    theirs.load(moved.__getitem__)
    theirs.write("model.norm.weight", (slice(0, 4),), np.zeros(4, np.float32))
    assert (theirs.weights("model.norm.weight")[:4] == 0).all()
    np.testing.assert_array_equal(theirs.own_weights("model.embed_tokens.weight"), moved["model.embed_tokens.weight"])


def test_what_it_cannot(mindspore, tmp_path):
    from mindrlhf.models.decoder import random_weights
    from mindrlhf.models.lora import Lora, random_adapter
    from mindrlhf.models.mindformers_backbone import MindFormersDecoder, network_of

    def model(values, backbone="mindformers", **sections):
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump({"model": {"model_config": values}, **sections}))
        return ModelConfig(mindformers=str(path), backbone=backbone)

    config, weights = CONFIGS["qwen2"], random_weights(CONFIGS["qwen2"], 0)
    with pytest.raises(UserError, match=r"model.lora: MindFormers' network has no adapters; set model.backbone to"):
        lora = Lora.of(LoraConfig(rank=2), config)
        MindFormersDecoder(QWEN2, config, weights, lora=lora, adapter=random_adapter(lora, config, 0))
    for name in ("tensor", "sequence"):
        with pytest.raises(UserError, match=rf"parallel.{name}: MindFormers' network is not split; set it to 1"):
            MindFormersDecoder(QWEN2, config, weights, layout=Layout(**{name: 2}))
    with pytest.raises(UserError, match=r"model.backbone: mindformers needs model.mindformers"):
        network_of(ModelConfig(backbone="mindformers"))
    llama = {"type": "LlamaConfig", **QWEN2}
    with pytest.raises(UserError, match=r"LlamaConfig with use_legacy false; of MindFormers' networks only Llama"):
        network_of(model(llama, use_legacy=False))
    with pytest.raises(UserError, match=r"model.backbone: \S+model.yaml has ChatGLM2Config; of .* set it to decoder"):
        network_of(model({"type": "ChatGLM2Config", **GLM}))
    assert network_of(model({"type": "ChatGLM2Config", **GLM}, "decoder")).config == CONFIGS["glm"]
    with pytest.raises(UserError, match=r"model.mindformers: num_layers is 2 in \S+ and 1 in the model; remove"):
        network_of(model(llama)).make(replace(config, num_layers=1), weights)


# -- names, checkpoints and defaults: against MindFormers' own ---------------------------------------------------------


@pytest.fixture()
def network(mindformers):
    """A function: family, fused -> MindFormers' network of CONFIGS[family], for rows of 16 tokens."""

    def make(family, fused):
        shared = {"seq_length": 16, "qkv_concat": fused, "use_flash_attention": False, "pad_token_id": -1}
        shared |= {"param_init_type": "float32", "compute_dtype": "float32", "rotary_dtype": "float32"}
        if family in ("qwen2", "llama"):
            settings = {**(QWEN2 if family == "qwen2" else LLAMA), **shared, "fused_rms_norm": False}
            made = mindformers.llama.LlamaForCausalLM(mindformers.llama.LlamaConfig(**settings, use_rope_slice=True))
        else:
            settings = {**GLM, **(SANDWICH if family == "glm4" else {}), **shared, "mlp_concat": fused}
            made = mindformers.glm2.ChatGLM2ForConditionalGeneration(mindformers.glm2.ChatGLM2Config(**settings))
        return made.set_train(False)

    return make


def in_mindformers_names(config, fused):
    """A random model's checkpoint."""
    from mindrlhf.models.decoder import random_weights

    stored = {name: getter() for name, _, getter in to_stored(config, random_weights(config, 1))}
    return {name: getter() for name, _, getter in mindformers_from_stored(config, stored.__getitem__, fused)}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_tensors_are_those_of_the_network(network, family, fused):
    found = {p.name: p.shape for p in network(family, fused).get_parameters() if "_cache" not in p.name}
    assert found == {name: tensor.shape for name, tensor in mindformers_tensors(CONFIGS[family], fused).items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_its_forward_pass_of_a_checkpoint_is_ours(network, family, fused):
    """Llama's network as it is; of GLM's, norms and the mask are replaced."""
    import mindspore

    from mindrlhf.models.decoder import Decoder, random_weights
    from tests.models.cells import Logits
    from tests.models.mindformers_cells import GlmLogits

    config, cell = replace(CONFIGS[family], initializer_range=0.3), network(family, fused)
    tensors = in_mindformers_names(config, fused)
    missing, unknown = mindspore.load_param_into_net(cell, {n: mindspore.Parameter(a) for n, a in tensors.items()})
    assert not unknown and all("_cache" in name for name in missing)
    tokens = np.random.default_rng(4).integers(0, 40, (1, 16)).astype(np.int32)
    if family in ("qwen2", "llama"):
        found = cell(mindspore.Tensor(tokens))[0].asnumpy()
    else:
        mask = np.triu(np.ones((1, 1, 16, 16), np.float32), 1)
        found = run(GlmLogits(cell, config.norm_epsilon), tokens, mask)
    rows = tokens, np.arange(16, dtype=np.int32)[None], np.ones_like(tokens)
    expected = run(Logits(Decoder(config, random_weights(config, 1))), *rows)
    close(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_checkpoints_go_both_ways_byte_for_byte(family, fused):
    config, random = CONFIGS[family], np.random.default_rng(0)
    stored = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in stored_shapes(config).items()}
    made = {}
    for name, shape, getter in mindformers_from_stored(config, stored.__getitem__, fused):
        made[name] = getter()
        assert made[name].shape == shape
    assert sum(array.size for array in made.values()) == sum(array.size for array in stored.values())
    back = stored_from_mindformers(config, made.__getitem__, fused)
    for name, array in stored.items():
        np.testing.assert_array_equal(back(name), array)


def test_names_are_its_own(mindformers):
    for family, network in (
        ("qwen2", mindformers.llama.LlamaForCausalLM),
        ("glm", mindformers.glm2.ChatGLM2ForConditionalGeneration),
    ):
        for name in stored_shapes(CONFIGS[family]):
            if "gate_up_proj" not in name:
                assert to_mindformers(name, family) == network.convert_name(name)
                assert from_mindformers(network.convert_name(name), family) == name
    with pytest.raises(UserError, match="model_type 'gpt2' has no legacy MindFormers checkpoints"):
        to_mindformers("model.norm.weight", "gpt2")


def test_fused_rows_are_in_its_order(mindformers):
    """GLM's are one after the other: the network above has their names, and Hugging Face's checkpoint their order."""
    config, random = CONFIGS["qwen2"], np.random.default_rng(0)
    stored = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in stored_shapes(config).items()}
    made = {name: getter() for name, _, getter in mindformers_from_stored(config, stored.__getitem__, True)}
    layer = "model.layers.1"
    for kind in ("weight", "bias"):
        parts = [stored[f"{layer}.self_attn.{module}_proj.{kind}"] for module in "qkv"]
        expected = mindformers.convert_utils.qkv_concat_hf2mg(np.concatenate(parts), 4, 2, 32)
        np.testing.assert_array_equal(made[f"{layer}.attention.w_qkv.{kind}"], expected)
    parts = [stored[f"{layer}.mlp.{module}_proj.weight"] for module in ("gate", "up")]
    expected = mindformers.convert_utils.ffn_concat_hf2mg(np.concatenate(parts), 48)
    np.testing.assert_array_equal(made[f"{layer}.feed_forward.w_gate_hidden.weight"], expected)


def test_defaults_are_its_own(mindformers):
    for kind, module in (("LlamaConfig", mindformers.llama), ("ChatGLM2Config", mindformers.glm2)):
        parameters = inspect.signature(getattr(module, kind).__init__).parameters
        for key, value in KINDS[kind].defaults.items():
            assert parameters[key].default == value, key


def test_its_objects_are_read_as_its_yaml_is(mindformers):
    assert decoder_config(mindformers.llama.LlamaConfig(**QWEN2)) == CONFIGS["qwen2"]
    assert decoder_config(mindformers.glm2.ChatGLM2Config(**GLM)) == CONFIGS["glm"]
    assert isinstance(CONFIGS["glm"], DecoderConfig)
