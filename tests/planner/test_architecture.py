"""Sizes by config.json alone, against published numbers and against the decoder's own count."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindrlhf.errors import UserError
from mindrlhf.layout import Layout
from mindrlhf.models.shapes import expected_shapes
from mindrlhf.planner.architecture import architecture_of, read_architecture

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("qwen2_5_7b", 7_615_616_512, None),  # Qwen publishes 7.62 B
        ("qwen2_5_32b", 32_763_876_352, None),  # 32.8 B
        ("deepseek_v3", 671_026_419_200, 36.6e9),  # 671 B, 36.6 B of them for a token with the head
    ],
)
def test_published_counts(name, parameters, active):
    model = read_architecture(FIXTURES / "configs" / name)
    assert model.num_parameters == parameters
    if active:
        assert model.active_parameters == pytest.approx(active, rel=0.005)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_score", "mixtral", "glm4", "deepseek_v3", "gpt2"])
def test_kinds_of_tensors_are_all_tensors(name):
    model = read_architecture(FIXTURES / name)
    assert sum(weight.numbers for weight in model.weights) == model.num_parameters
    assert len(model.weights) < len(expected_shapes(model))


def test_mixture_of_experts_by_hand():
    """2 layers with 4 experts of 3 matrices, of which a token goes through 2."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = architecture_of({"model_type": "mixtral", **SMALL, **experts}, "here")
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32
    layer = attention + 2 * 32 + 4 * 32 + 4 * 3 * 32 * 40
    assert model.num_parameters == 2 * 48 * 32 + 3 * layer + 32
    assert model.active_parameters == 48 * 32 + 3 * (attention + 4 * 32 + 2 * 3 * 32 * 40)


def test_latent_attention_caches_one_vector_a_token():
    model = read_architecture(FIXTURES / "configs" / "deepseek_v3")
    assert model.cache_width == 512 + 64
    assert model.cache_ranks(Layout(1, 8)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "/here: model_type 'mamba' is not supported; known: llama, qwen2"),
        ({"model_type": None}, "/here: model_type None is not supported"),
        ({"num_hidden_layers": 0}, "/here: num_hidden_layers is 0; it must be at least 1"),
        ({"hidden_size": "wide"}, "/here: hidden_size is 'wide'; it must be a whole number"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(UserError) as error:
        architecture_of({"model_type": "qwen2", **SMALL, **changes}, "/here")
    assert str(error.value).startswith(message)


def test_layouts_that_do_not_divide_an_expert():
    values = json.loads((FIXTURES / "configs" / "deepseek_v3" / "config.json").read_text(encoding="utf-8"))
    model = architecture_of({**values, "moe_intermediate_size": 2044}, "here")
    with pytest.raises(UserError, match="moe_intermediate_size, 2044, does not divide by 8"):
        Layout(1, 8).check(model, "parallel")


def test_the_planner_does_without_mindspore():
    program = "import sys, mindrlhf.planner.report, mindrlhf.planner.picture; assert 'mindspore' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=FIXTURES.parents[1])
