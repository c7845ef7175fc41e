"""mindrlhf/models/hf.py: safetensors both ways, and a UserError for every broken file."""

import json
import shutil
import struct
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.hf import check_names, read_generation_config, read_tensors, write_tensors
from mindrlhf.models.shapes import expected_shapes

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz") if path.with_name("config.json").exists())


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(FIXTURES / "qwen2_bf16_sharded", tmp_path / "model"))


@pytest.fixture
def single(tmp_path):
    return Path(shutil.copytree(FIXTURES / "llama_attention_bias", tmp_path / "model"))


def sources(tensors):
    return [(name, tensors.shapes[name], lambda name=name: tensors[name]) for name in tensors]


@pytest.mark.parametrize("name", [model for model in MODELS if model != "qwen2_bf16_sharded"])
def test_float32_is_read_exactly(name):
    tensors = read_tensors(FIXTURES / name)
    wanted = load_file(FIXTURES / name / "model.safetensors")
    assert set(tensors) == set(wanted)
    for key, array in tensors.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted[key])


def test_bfloat16_is_read_exactly():
    """Every bit pattern of the files against the upper half of what is read; the lower half is 0."""
    tensors = read_tensors(FIXTURES / "qwen2_bf16_sharded")
    assert len(tensors) == len(expected_shapes(DecoderConfig.read(FIXTURES / "qwen2_bf16_sharded")))
    seen = 0
    for path in sorted((FIXTURES / "qwen2_bf16_sharded").glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__")
        for name, row in header.items():
            begin, end = row["data_offsets"]
            bits = np.frombuffer(content[8 + length + begin : 8 + length + end], np.uint16)
            read = tensors[name]
            assert read.shape == tuple(row["shape"]) == tensors.shapes[name]
            halves = np.ascontiguousarray(read).reshape(-1).view(np.uint16).reshape(-1, 2)
            np.testing.assert_array_equal(halves[:, 1], bits)
            assert not halves[:, 0].any()
            seen += 1
    assert seen == len(tensors)


def test_other_dtypes(tmp_path):
    values = np.array([[1.5, -2.25], [65504, 6e-8]])
    arrays = {"half": values.astype(np.float16), "double": values, "count": np.arange(3), "empty": np.zeros((0, 4))}
    save_file({**arrays, "scalar": np.array(3, np.float32)}, tmp_path / "model.safetensors")
    tensors = read_tensors(tmp_path)
    np.testing.assert_array_equal(tensors["half"], values.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(tensors["double"], values.astype(np.float32))
    assert tensors["empty"].shape == (0, 4)
    assert tensors["scalar"].shape == ()
    assert tensors["scalar"] == 3
    assert tensors["half"].flags.writeable
    with pytest.raises(UserError, match="count has dtype I64; only F32, F16, BF16, F64 are supported"):
        tensors["count"]


@pytest.mark.parametrize("name", MODELS)
def test_write_then_read(name, tmp_path):
    tensors = read_tensors(FIXTURES / name)
    write_tensors(tmp_path, sources(tensors))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    again, library = read_tensors(tmp_path), load_file(tmp_path / "model.safetensors")
    assert list(again) == list(tensors)
    for key in tensors:
        assert again[key].tobytes() == tensors[key].tobytes() == library[key].tobytes()
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_write_shards(tmp_path):
    tensors = read_tensors(FIXTURES / "qwen2_tied")
    write_tensors(tmp_path, sources(tensors))
    write_tensors(tmp_path, sources(tensors), shard_bytes=10_000)  # the embedding alone is 12288 bytes
    names = sorted(path.name for path in tmp_path.iterdir())
    shards = names[:-1]
    assert names[-1] == "model.safetensors.index.json"
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(tensors[key].nbytes for key in tensors)
    library = {key: array for shard in shards for key, array in load_file(tmp_path / shard).items()}
    again = read_tensors(tmp_path)
    for key in tensors:
        assert again[key].tobytes() == tensors[key].tobytes() == library[key].tobytes()
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= 10_000
    write_tensors(tmp_path, sources(tensors))  # and back to one file: no shard is left for a reader to find
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_tensors(tmp_path, [("a", (2,), lambda: np.ones(2, np.float32))])

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path, [("a", (2,), lambda: np.zeros(2, np.float32)), ("b", (2,), fail)])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    np.testing.assert_array_equal(read_tensors(tmp_path)["a"], np.ones(2))


def test_one_tensor_in_memory_at_a_time(tmp_path):
    alive = []

    def getter():
        assert not any(reference() is not None for reference in alive)
        array = np.ones((4, 4), np.float32)
        alive.append(weakref.ref(array))
        return array

    write_tensors(tmp_path, ((name, (4, 4), getter) for name in "abc"))
    assert len(alive) == 3
    write_tensors(tmp_path, [("t", (2, 3), lambda: np.arange(6, dtype=np.float32).reshape(3, 2).T)])  # not contiguous
    np.testing.assert_array_equal(read_tensors(tmp_path)["t"], [[0, 2, 4], [1, 3, 5]])


def rewrite_header(path, change):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_truncated_and_overlong_files(single):
    path = single / "model.safetensors"
    content = path.read_bytes()
    for kept in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(UserError, match=r"model.safetensors: .*download it again"):
            read_tensors(single)
    path.write_bytes(content + b"\0")
    with pytest.raises(UserError, match=f"is {len(content) + 1} bytes long, its header says {len(content)}"):
        read_tensors(single)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", [1], "has 128 bytes in the header, not 4"),
        ("shape", [-32], "the header's row of model.norm.weight is broken"),
        ("shape", None, "the header's row of model.norm.weight is broken"),
        ("dtype", 3, "the header's row of model.norm.weight is broken"),
        ("data_offsets", [0], "the header's row of model.norm.weight is broken"),
        ("data_offsets", [4, 132], "does not begin where the tensor before it ends"),
        ("dtype", "F16", "has 128 bytes in the header, not 64"),
    ],
)
def test_broken_header_rows(single, field, value, message):
    rewrite_header(single / "model.safetensors", lambda header: header["model.norm.weight"].update({field: value}))
    with pytest.raises(UserError, match=message):
        read_tensors(single)


def test_broken_header_text(single):
    path = single / "model.safetensors"
    content = bytearray(path.read_bytes())
    for byte in (0xFF, ord("[")):
        content[8] = byte
        path.write_bytes(content)
        with pytest.raises(UserError, match="its safetensors header is broken"):
            read_tensors(single)


def test_broken_shards(sharded):
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["ghost.weight"] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors: lacks ghost.weight"):
        read_tensors(sharded)
    values["weight_map"]["ghost.weight"] = "../model-00002-of-00003.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not a file name"):
        read_tensors(sharded)
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00003-of-00003.safetensors: missing"):
        read_tensors(sharded)
    index.write_text("{}")
    with pytest.raises(UserError, match="index.json: weight_map is missing"):
        read_tensors(sharded)
    index.unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        read_tensors(sharded)


@pytest.mark.parametrize("name", MODELS)
def test_names_of_the_fixtures(name):
    check_names(DecoderConfig.read(FIXTURES / name), read_tensors(FIXTURES / name).shapes, name)


def test_wrong_names():
    config = DecoderConfig.read(FIXTURES / "llama_attention_bias")
    shapes = expected_shapes(config)
    assert "model.layers.0.self_attn.o_proj.bias" in shapes
    check_names(config, {**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}, "dir")
    with pytest.raises(UserError, match=r"dir: score.weight \[1, 32\] is unexpected"):
        check_names(config, {**shapes, "score.weight": (1, 32)}, "dir")
    with pytest.raises(UserError, match=r"model.norm.weight has shape \[33\], config.json makes it \[32\]; use"):
        check_names(config, {**shapes, "model.norm.weight": (33,)}, "dir")
    with pytest.raises(UserError, match=r"model.embed_tokens.weight \[72, 32\] is missing \(and \d+ more\)"):
        check_names(config, {}, "dir")
    del shapes["lm_head.weight"]
    with pytest.raises(UserError, match=r"lm_head.weight \[72, 32\] is missing .*tie_word_embeddings true"):
        check_names(config, shapes, "dir")
    tied = DecoderConfig.read(FIXTURES / "qwen2_tied")
    check_names(tied, {**expected_shapes(tied), "lm_head.weight": (96, 32)}, "dir")
    score = DecoderConfig.read(FIXTURES / "qwen2_score")
    assert list(expected_shapes(score).items())[-1] == ("score.weight", (1, 32))
    check_names(score, {**expected_shapes(score), "lm_head.weight": (64, 32)}, "dir")
    with pytest.raises(UserError, match=r"score.weight \[1, 32\] is missing"):
        check_names(score, expected_shapes(replace(score, head="logits")), "dir")


def test_generation_config(tmp_path):
    assert read_generation_config(FIXTURES / "llama_llama3_rope")["eos_token_id"] == [2, 3]
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json: not JSON"):
        read_generation_config(tmp_path)
