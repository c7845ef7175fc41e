"""Every family against transformers + torch on a tiny random model, and against itself.

What is measured goes into the README's table: `pytest tests/models/test_families.py --families-report FILE`,
docs/make_families.py.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.config import DPOConfig, GRPOConfig, LoraConfig, SamplingConfig, load_config
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import stored_shapes, to_stored
from mindrlhf.models.hf import check_names, read_tensors, write_tensors
from mindrlhf.models.model_directory import ModelDirectory, tensors_of
from mindrlhf.models.shapes import CORRECTION, HEAD, SCORE, expected_shapes

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXPECTED = {path.parent.name: np.load(path) for path in sorted(FIXTURES.glob("*/expected.npz"))}
LANGUAGE_MODELS = [name for name, arrays in EXPECTED.items() if "greedy" in arrays]
REWARD_MODELS = [name for name, arrays in EXPECTED.items() if "scores" in arrays and "loss" in arrays]
CONFIGS = {name: DecoderConfig.read(FIXTURES / name) for name in (*LANGUAGE_MODELS, *REWARD_MODELS)}
TOLERANCE = 1e-5

sys.path.insert(0, str(FIXTURES.parents[1] / "docs"))
from make_families import ROWS  # noqa: E402

EACH = [fixtures[0] for _, fixtures, _ in ROWS]  # one of each family


def quick(names, *chosen):
    """The chosen ones; the others are slow tests."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


def still(config):
    """Parameters whose gradient is 0 but for rounding: a key's bias, if nothing rotates it, adds the same to all
    scores of a query."""
    layers = range(config.num_layers) if config.family.learned_positions else ()
    return {f"model.layers.{layer}.self_attn.k_proj.bias" for layer in layers}


def open_decoder(name, transposed=False):
    from mindrlhf.models.decoder import Decoder

    return Decoder(CONFIGS[name], tensors_of(FIXTURES / name, CONFIGS[name]), transposed)


def rows(ids):
    """[B, T] token ids as one segment a row: tokens, positions, segments."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy()
    return ids.astype(np.int32), positions, np.ones_like(positions)


def error(found, expected):
    """The largest difference of two arrays."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


class Subject:
    """A decoder of a fixture, and one compiled graph for all that it is asked in the fixture's shape."""

    def __init__(self, name):
        import mindspore

        from tests.models.cells import Everything

        self.name, self.expected, self.decoder = name, EXPECTED[name], open_decoder(name)
        self.ids = self.expected["ids"]
        self.cell = Everything(self.decoder)
        random = np.random.default_rng(1).standard_normal(self.cell.value_head.weight.shape)
        self.cell.value_head.weight.set_data(mindspore.Tensor(random.astype(np.float32)))
        self.parameters = [p for p in self.decoder.trainable() if p.requires_grad]
        self.gradient = mindspore.value_and_grad(self.cell, None, self.parameters, has_aux=True)

    def __call__(self, tokens, positions, segments):
        """loss of ids' next tokens, hidden states [B, T, H], logits [B, T, V], values [B, T], gradients by name."""
        from mindspore import Tensor

        shape = self.ids.shape
        index = np.arange(self.ids.size, dtype=np.int32).reshape(shape)[:, :-1].reshape(-1)
        inputs = (tokens, positions, segments, index, self.ids[:, 1:].astype(np.int32).reshape(-1))
        (loss, *outputs), gradients = self.gradient(*map(Tensor, inputs))
        hidden, logits, values = (output.asnumpy().reshape(*shape, *output.shape[1:]) for output in outputs)
        named = {p.name: g.asnumpy() for p, g in zip(self.parameters, gradients, strict=True)}
        return float(loss.asnumpy()), hidden, logits, values, named


@pytest.fixture(scope="module")
def subject(mindspore, request):
    return Subject(request.param)


@pytest.mark.parametrize("subject", LANGUAGE_MODELS, indirect=True)
def test_logits_gradients_and_values(subject, measured):
    loss, hidden, logits, values, gradients = subject(*rows(subject.ids))
    measured(subject.name, "logits", error(logits, subject.expected["logits"]), TOLERANCE)
    assert loss == pytest.approx(float(subject.expected["loss"]), abs=TOLERANCE)
    np.testing.assert_allclose(values, hidden @ subject.cell.value_head.weight.asnumpy()[0], atol=TOLERANCE)

    # A conversion of names is linear, so it takes gradients to the names of transformers.
    shapes = expected_shapes(subject.decoder.config)
    assert {name for name in shapes if not name.endswith(CORRECTION)} == set(gradients)
    whole = {**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, **gradients}
    stored = {name: getter() for name, _, getter in to_stored(subject.decoder.config, whole.__getitem__)}
    wanted = {key.removeprefix("grad/"): subject.expected[key] for key in subject.expected if key.startswith("grad/")}
    assert len(wanted) >= 4
    worst = max(error(stored[name], array) for name, array in wanted.items())
    measured(subject.name, "gradients", worst, TOLERANCE)


@pytest.mark.parametrize("subject", LANGUAGE_MODELS, indirect=True)
def test_packed_rows(subject):
    """Beginnings of both rows, packed into one between padding, have the logits that transformers gives them alone."""
    tokens, positions, segments = (np.zeros_like(array) for array in rows(subject.ids))
    places, start = [], 1
    for number, length in enumerate((4, 6)):
        here = slice(start, start + length)
        tokens[1, here], positions[1, here] = subject.ids[number, :length], np.arange(length)
        segments[1, here] = number + 1
        places.append(here)
        start += length
    _, _, logits, _, _ = subject(tokens, positions, segments)
    for number, here in enumerate(places):
        alone = subject.expected["logits"][number, : here.stop - here.start]
        assert error(logits[1, here], alone) < TOLERANCE


@pytest.mark.parametrize("subject", quick(LANGUAGE_MODELS, *EACH), indirect=True)
def test_cached_decoding(subject, measured):
    """The tokens are those of transformers, and the log-probs those of one whole pass; the generator's decoder is
    the transposed one."""
    from mindrlhf.types import Prompt
    from mindrlhf.wrapper.generator import Generator

    ids, expected = subject.ids, subject.expected["greedy"].tolist()
    length, count = ids.shape[1], len(expected)
    prompts = [ids[0], ids[0, : length - count], ids[1, : length - count]]
    prompts = [Prompt(one.astype(np.int32), "", None, key) for key, one in enumerate(prompts)]
    width = 1 << (length - 1).bit_length()  # one width for all prompts: one graph
    generator = Generator(subject.decoder, 2, length, count, least_width=width)
    whole, *others = generator.generate(prompts, 1, SamplingConfig(temperature=0, max_tokens=count), 0)
    assert whole.response_ids.tolist() == expected
    tokens = np.stack([np.concatenate([one.prompt_ids, one.response_ids]) for one in others])
    _, _, logits, _, _ = subject(*rows(tokens))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, rollout in enumerate(others):
        places = np.arange(length - count, length)
        assert logits[row, places - 1].argmax(-1).tolist() == rollout.response_ids.tolist()
        worst = error(rollout.sampled_logprobs, logprobs[row, places - 1, rollout.response_ids])
        measured(subject.name, "cached decode", worst, TOLERANCE)


@pytest.mark.parametrize("subject", quick(EACH, "deepseek_v3", "baichuan2", "gpt2"), indirect=True)
def test_a_new_score_head(mindspore, subject, measured):
    """It is 0 and learns; with other weights scores are their product with the hidden states, and the trunk learns."""
    from mindrlhf.models.decoder import Decoder
    from tests.models.cells import PairLossAndScores

    found = ModelDirectory.read(FIXTURES / subject.name).with_head("score")
    decoder = Decoder(found.config, found.weights)
    parameters = {p.name: p for p in decoder.trainable() if p.requires_grad}
    cell = mindspore.value_and_grad(PairLossAndScores(decoder), None, list(parameters.values()), has_aux=True)
    inputs = [*rows(subject.ids), np.array([3, subject.ids.size - 1], np.int32)]
    _, hidden, _, _, _ = subject(*rows(subject.ids))
    chosen, rejected = hidden[0, 3], hidden[1, -1]

    (_, scores), gradients = cell(*map(mindspore.Tensor, inputs))
    gradients = dict(zip(parameters, gradients, strict=True))
    assert scores.asnumpy().tolist() == [0, 0]
    assert error(gradients.pop(SCORE).asnumpy()[0], -0.5 * (chosen - rejected)) < TOLERANCE
    assert not any(np.any(gradient.asnumpy()) for gradient in gradients.values())

    weight = np.random.default_rng(2).standard_normal((1, len(chosen))).astype(np.float32)
    decoder.load(lambda name: weight if name == SCORE else decoder.weights(name))
    (_, scores), gradients = cell(*map(mindspore.Tensor, inputs))
    measured(subject.name, "reward head", error(scores.asnumpy(), np.stack([chosen, rejected]) @ weight[0]), TOLERANCE)
    without = {name for name, one in zip(parameters, gradients, strict=True) if not np.any(one.asnumpy())}
    assert without <= still(found.config) | {"model.norm.bias"}  # which both scores of the pair have


@pytest.mark.parametrize("name", quick(LANGUAGE_MODELS, "mixtral", "gpt2"))
def test_logits_in_the_layout_for_decoding(mindspore, name):
    from tests.models.cells import Logits

    found = Logits(open_decoder(name, transposed=True))(*map(mindspore.Tensor, rows(EXPECTED[name]["ids"])))
    assert error(found.asnumpy().reshape(EXPECTED[name]["logits"].shape), EXPECTED[name]["logits"]) < TOLERANCE


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *REWARD_MODELS])
def test_round_trip(mindspore, name, tmp_path, measured):
    """Read, held by a decoder of either layout, written: every tensor has its name, its shape and its bytes."""
    before = read_tensors(FIXTURES / name)
    for transposed in (False, True):
        decoder = open_decoder(name, transposed)
        write_tensors(tmp_path, to_stored(decoder.config, decoder.weights))
        after = read_tensors(tmp_path)
        assert after.shapes == before.shapes
        for tensor in before:  # of a bfloat16 file as float32
            assert after[tensor].tobytes() == before[tensor].tobytes(), tensor
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name].to_hf()))
    assert DecoderConfig.read(tmp_path) == CONFIGS[name]
    measured(name, "round trip")


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_scores_of_a_reward_model(mindspore, name):
    from tests.models.cells import PairLossAndScores

    decoder, expected = open_decoder(name), EXPECTED[name]
    assert HEAD not in decoder.by_name and not decoder.tied
    parameters = decoder.trainable()
    gradient = mindspore.value_and_grad(PairLossAndScores(decoder), None, parameters, has_aux=True)
    last = np.arange(1, 3, dtype=np.int32) * expected["ids"].shape[1] - 1
    (loss, scores), found = gradient(*map(mindspore.Tensor, (*rows(expected["ids"]), last)))
    assert error(scores.asnumpy(), expected["scores"]) < TOLERANCE
    assert float(loss.asnumpy()) == pytest.approx(float(expected["loss"]), abs=TOLERANCE)
    shapes = expected_shapes(decoder.config)
    whole = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    whole |= {p.name: g.asnumpy() for p, g in zip(parameters, found, strict=True)}
    stored = {name: getter() for name, _, getter in to_stored(decoder.config, whole.__getitem__)}
    wanted = [key for key in expected if key.startswith("grad/")]
    assert "grad/score.weight" in wanted
    for key in wanted:
        assert error(stored[key.removeprefix("grad/")], expected[key]) < TOLERANCE, key


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Problems and preferences, and what the tokenizer learns from."""
    path = tmp_path_factory.mktemp("families") / "rows.jsonl"
    sums = [(f"{a}+{a + 1}=", f"{2 * a + 1}") for a in range(6)]
    lines = [{"prompt": p, "label": one, "chosen": one, "rejected": one[::-1] + "0"} for p, one in sums]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture()
def checkpoint(mindspore, data, tmp_path):
    """A function: a fixture's name -> a checkpoint of its model, with a vocabulary for a tokenizer beside it."""

    def write(name):
        from mindrlhf.data.tokenizers import build_tokenizer, load_tokenizer
        from mindrlhf.models.decoder import random_weights
        from mindrlhf.utils.checkpoint import write_model

        build_tokenizer([str(data)], 270, tmp_path / "tokenizer")
        tokenizer = load_tokenizer(tmp_path / "tokenizer")
        config = replace(CONFIGS[name], vocab_size=270, initializer_range=0.2)
        language, random = tensors_of(FIXTURES / name, CONFIGS[name]), random_weights(config, 0)
        kept = expected_shapes(CONFIGS[name]).items() & expected_shapes(config).items()
        sources = to_stored(config, lambda tensor: (language if tensor in dict(kept) else random)(tensor))
        write_model(tmp_path / name, config, sources, tokenizer, {"eos_token_id": tokenizer.eos_token_id})
        return tmp_path / name

    return write


def odd_characters(completions, **columns):
    """Their share: dense, so that every group has a signal."""
    return [sum(ord(character) % 2 for character in text) / max(len(text), 1) for text in completions]


def settings(kind, model, data, **more):
    """A job of one step on that checkpoint."""
    values = {
        "output": model.parent / "run", "model.path": model, "data.train": f"[{{path: {data}}}]", "trainer.steps": 1,
        "trainer.rows": 4, "trainer.row_tokens": 32, "logging.tensorboard": "false", "logging.progress": "false",
    }  # fmt: skip
    return load_config(kind, None, [f"{key.replace('__', '.')}={value}" for key, value in (values | more).items()])


def all_weights_moved(trainer, model):
    """Of the trained policy, and of the checkpoint that the run leaves."""
    before = ModelDirectory.read(model)
    after = ModelDirectory.read(next(trainer.output.glob("checkpoints/step-*")))
    assert after.config == before.config
    for name in expected_shapes(before.config):
        assert np.isfinite(after.weights(name)).all(), name
        np.testing.assert_array_equal(after.weights(name), trainer.policy.decoder.weights(name))
        if not name.endswith(CORRECTION) and name not in still(before.config):
            assert np.any(after.weights(name) != before.weights(name)), name


@pytest.mark.parametrize("name", quick(EACH, "deepseek_v3", "gpt2"))
def test_a_grpo_step(checkpoint, data, name, measured):
    from mindrlhf.trainer.grpo import GRPOTrainer

    model = checkpoint(name)
    rollout = {"prompts_per_step": 2, "num_generations": 4, "slots": 8, "max_prompt_tokens": 8}
    more = {f"rollout.{key}": value for key, value in rollout.items()}
    config = settings(
        GRPOConfig, model, data, rollout__sampling__max_tokens=8, algorithm__learning_rate=1e-3, algorithm__kl_coef=0,
        **more,
    )  # fmt: skip
    trainer = GRPOTrainer(config, reward_funcs=odd_characters)
    trainer.fit()
    all_weights_moved(trainer, model)
    measured(name, "GRPO step")


@pytest.mark.parametrize("name", quick(EACH, "deepseek_v3", "gpt2"))
def test_a_dpo_step(checkpoint, data, name, measured):
    from mindrlhf import DPOTrainer

    model = checkpoint(name)
    trainer = DPOTrainer(settings(DPOConfig, model, data, training__batch_size=4, training__learning_rate=1e-3))
    trainer.fit()
    all_weights_moved(trainer, model)
    measured(name, "DPO step")


@pytest.mark.parametrize("subject", quick(EACH, "qwen3"), indirect=True)
def test_adapters(mindspore, subject):
    """A decoder with adapters is the decoder with the sum as its weights."""
    from mindrlhf.models.decoder import Decoder
    from mindrlhf.models.lora import Lora
    from tests.models.cells import Logits

    config, weights = CONFIGS[subject.name], tensors_of(FIXTURES / subject.name, CONFIGS[subject.name])
    try:
        lora = Lora.of(LoraConfig(rank=2, alpha=4, target_modules=["all-linear"]), config)
    except UserError as refusal:
        assert "has no projections that adapters can be on" in str(refusal)
        return
    random = np.random.default_rng(5)
    values = {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in lora.shapes(config).items()}
    adapted = Decoder(config, weights, lora=lora, adapter=values.__getitem__)
    inputs = rows(subject.ids)
    found = Logits(adapted)(*map(mindspore.Tensor, inputs)).asnumpy()
    subject.decoder.load(adapted.weights)
    try:
        _, _, logits, _, _ = subject(*inputs)
    finally:
        subject.decoder.load(weights)
    assert error(logits, subject.expected["logits"]) > 0.01
    assert error(found.reshape(logits.shape), logits) < TOLERANCE


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_tensor_too_few_or_too_many_is_named(name):
    config = CONFIGS[name]
    shapes = stored_shapes(config)
    check_names(config, shapes, name)
    for tensor in shapes:
        if ".layers." in tensor or ".h." in tensor:
            left = {other: size for other, size in shapes.items() if other != tensor}
            with pytest.raises(UserError, match=rf"{tensor} .* is missing; use the config.json that belongs"):
                check_names(config, left, name)
    first = next(tensor for tensor in shapes if ".0." in tensor)
    with pytest.raises(UserError, match=r"extra.weight \[2, 3\] is unexpected: \w+ models have no such tensor; use"):
        check_names(config, {**shapes, "extra.weight": (2, 3)}, name)
    with pytest.raises(UserError, match=rf"{first} has shape \[7\], config.json makes it"):
        check_names(config, {**shapes, first: (7,)}, name)
