"""mindrlhf/models/peft.py and model_directory.py: PEFT's files both ways, and one line for what cannot be honoured."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.lora import MODULES, Lora, merged
from mindrlhf.models.model_directory import ModelDirectory
from mindrlhf.models.peft import base_directory, read_adapter, write_adapter

FIXTURES = Path(__file__).parents[1] / "fixtures"
TIED = DecoderConfig.read(FIXTURES / "qwen2_tied")
SCORE = DecoderConfig.read(FIXTURES / "qwen2_score")
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    """A copy of PEFT's adapter beside its base, free to be changed."""
    (tmp_path / "qwen2_tied").symlink_to(FIXTURES / "qwen2_tied")
    return Path(shutil.copytree(FIXTURES / "qwen2_tied_lora", tmp_path / "adapter"))


def change(path, values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_peft_wrote():
    saved = read_adapter(FIXTURES / "qwen2_tied_lora", TIED)
    assert saved.lora == Lora(2, 5, 0.0, MODULES)
    assert set(saved.tensors) == set(saved.lora.shapes(TIED))
    saved = read_adapter(FIXTURES / "qwen2_score_lora", SCORE)
    assert saved.lora == Lora(3, 6, 0.25, ("q_proj", "down_proj"), (1,), rank_stabilised=True)
    assert saved.lora.scale == pytest.approx(6 / 3**0.5)
    assert set(saved.tensors) == {*saved.lora.shapes(SCORE), "score.weight"}


@pytest.mark.parametrize("family", ["glm4", "deepseek_v3_plain"])
def test_projections_that_are_stored_otherwise_are_refused(adapter, family):
    """Their rows are in the checkpoint's order, the decoder's are not: merged as they are they would be wrong."""
    with pytest.raises(UserError, match="adapts q_proj, which model_type .* stores in another form"):
        read_adapter(adapter, DecoderConfig.read(FIXTURES / family))


@pytest.mark.parametrize(("name", "config"), [("qwen2_tied_lora", TIED), ("qwen2_score_lora", SCORE)])
def test_round_trip(name, config, tmp_path):
    """Every tensor's bytes, and every key that PEFT wrote and that is not its own default."""
    saved, original = read_adapter(FIXTURES / name, config), FIXTURES / name
    write_adapter(tmp_path, saved.lora, "../base", saved.tensors.items(), score=config.head == "score")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, original))
    assert {key: array.tobytes() for key, array in ours.items()} == {k: a.tobytes() for k, a in theirs.items()}
    again = read_adapter(tmp_path, config)
    assert again.lora == saved.lora
    for key, array in saved.tensors.items():
        assert again.tensors[key].tobytes() == array.tobytes()
    ours, theirs = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, original))
    assert set(ours) <= set(theirs)
    free = {"base_model_name_or_path", "target_modules", "modules_to_save"}
    assert {k: v for k, v in ours.items() if k not in free} == {k: theirs[k] for k in ours if k not in free}
    write_adapter(tmp_path / "again", again.lora, "../base", again.tensors.items(), score=config.head == "score")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_bfloat16_is_read(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({key: array.astype(np.float16) for key, array in load_file(path).items()}, path)
    tensors = read_adapter(adapter, TIED).tensors
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}


def test_merged_weights():
    found = ModelDirectory.read(FIXTURES / "qwen2_score_lora")
    assert (found.config.head, found.base) == ("score", FIXTURES / "qwen2_score_lora" / ".." / "qwen2_score")
    weights, base = found.merged(), ModelDirectory.read(FIXTURES / "qwen2_score").weights
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = (found.adapter.tensors[name.replace("weight", f"lora_{kind}.weight")].astype(np.float64) for kind in "AB")
    np.testing.assert_allclose(weights(name), base(name) + 6 / 3**0.5 * b @ a, atol=1e-6)
    np.testing.assert_array_equal(weights("score.weight"), found.adapter.tensors["score.weight"])
    assert (weights("score.weight") != base("score.weight")).any()
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"):
        np.testing.assert_array_equal(weights(name), base(name))
    assert merged(base, 2.0, {})(name) is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; only 'LORA' is"),
        ({"use_dora": True}, "use_dora True is not supported; merge the adapter with peft and use that"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern {'q_proj': 4} is not supported"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern {'q_proj': 4} is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"modules_to_save": ["score", "lm_head"]}, "modules_to_save 'lm_head' is not supported; only 'score' is"),
        ({"r": None}, "r is missing; add it"),
        ({"r": 3}, r"q_proj.lora_A.weight has shape \[2, 32\], the base model makes it \[3, 32\]"),
        ({"lora_alpha": -1}, "out of range"),
    ],
)
def test_refused_settings(adapter, values, message):
    change(adapter / "adapter_config.json", values)
    with pytest.raises(UserError, match=message) as caught:
        ModelDirectory.read(adapter)
    assert str(caught.value).startswith(str(adapter / "adapter_"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "lacks model.layers.0.self_attn.q_proj.lora_B.weight"),
        (lambda t: [t.pop(f"{Q}.lora_{k}.weight") for k in "AB"], "lacks .*same projections of each adapted layer"),
        (lambda t: t.update({f"{Q}.lora_B.bias": np.zeros(32)}), "q_proj.lora_B.bias is unexpected; only q_proj"),
        (lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((96, 32))}), "lm_head.weight is unexpected"),
        (lambda t: t.update({"base_model.model.score.weight": np.zeros((2, 32))}), "score.weight has shape"),
        (lambda t: t.clear(), "adapted modules are out of range"),
    ],
)
def test_refused_tensors(adapter, edit, message):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        ModelDirectory.read(adapter)


def test_where_the_base_is_looked_for(adapter, tmp_path, monkeypatch):
    path = adapter / "adapter_config.json"
    assert base_directory(adapter) == adapter / "../qwen2_tied"
    change(path, {"base_model_name_or_path": "qwen2_tied"})
    with pytest.raises(UserError, match="adapter_config.json: base_model_name_or_path is 'qwen2_tied', and there is"):
        base_directory(adapter)
    monkeypatch.chdir(tmp_path)
    assert base_directory(adapter) == Path("qwen2_tied")
    assert base_directory(adapter, str(FIXTURES)) == FIXTURES
    with pytest.raises(UserError, match="nowhere: no such checkpoint directory; give the model that"):
        base_directory(adapter, "nowhere")
    change(path, {"base_model_name_or_path": None})
    with pytest.raises(UserError, match="base_model_name_or_path is None; set it to the base model's directory"):
        base_directory(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: no such file"):
        ModelDirectory.read(adapter, str(FIXTURES / "qwen2_tied"))


def test_heads():
    language, reward = (ModelDirectory.read(FIXTURES / name) for name in ("qwen2_tied_lora", "qwen2_score_lora"))
    assert reward.with_head("score") is reward
    with pytest.raises(UserError, match="qwen2_score_lora: a reward model, which has no lm_head.weight"):
        reward.with_head("logits")
    new = language.with_head("score")
    assert new.config == replace(language.config, head="score")
    assert not new.weights("score.weight").any()
    assert new.merged()("model.norm.weight").tobytes() == language.weights("model.norm.weight").tobytes()
