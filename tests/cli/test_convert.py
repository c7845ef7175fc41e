"""`mindrlhf convert`: bytes kept through every form, MindSpore's own reading and writing, memory, what is refused."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors

from mindrlhf.cli.main import main
from mindrlhf.models import checkpoint_formats, ckpt_files
from mindrlhf.models.raw_tensors import RawSource, sha256
from mindrlhf.models.tensor_files import read_raw, write_raw

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARDED = FIXTURES / "qwen2_bf16_sharded"


def convert(*words):
    return main(["convert", *map(str, words)])


def stored(directory):
    """Name -> (dtype, shape, bytes) of every tensor, as the safetensors library reads them."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


@pytest.fixture
def model(tmp_path):
    """A small float32 checkpoint that may be spoiled."""
    return Path(shutil.copytree(FIXTURES / "qwen2_tied", tmp_path / "model"))


@pytest.mark.parametrize(
    "options",
    [
        ["--to", "mindspore"],
        ["--to", "mindspore", "--shard-size", "10KB"],
        ["--to", "mindspore", "--files", "safetensors"],
        ["--to", "mindformers"],
        ["--to", "mindformers", "--files", "ckpt", "--shard-size", "0.01 MB"],
        ["--to", "mindformers", "--qkv-concat"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["qwen2_bf16_sharded", "llama_attention_bias", "glm4"])
def test_there_and_back(tmp_path, capsys, name, options):
    source = FIXTURES / name
    assert convert(source, tmp_path / "there", *options) == 0
    assert convert(tmp_path / "there", tmp_path / "back", "--to", "hf") == 0
    assert stored(tmp_path / "back") == stored(source)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert "read back: every tensor has the SHA-256 of what was written" in capsys.readouterr().out
    assert convert(source, tmp_path / "there", *options, "--check") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_score", "deepseek_v3", "qwen3_moe", "gpt2", "baichuan2"])
def test_every_family_keeps_its_names_in_ckpt_files(tmp_path, name):
    assert convert(FIXTURES / name, tmp_path / "there", "--to", "mindspore") == 0
    assert convert(tmp_path / "there" / "model.ckpt", tmp_path / "back", "--to", "hf") == 0
    assert stored(tmp_path / "back") == stored(FIXTURES / name)


def test_shards_have_an_index(tmp_path):
    assert convert(SHARDED, tmp_path / "hf", "--to", "hf", "--shard-size", "20KB") == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored(SHARDED).values())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2 and files == sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert all((tmp_path / "hf" / file).stat().st_size < 25000 for file in files)
    assert convert(SHARDED, tmp_path / "ms", "--to", "mindspore", "--shard-size", "20KB") == 0
    weight_map = json.loads((tmp_path / "ms" / "param_name_map.json").read_text())["weight_map"]
    assert weight_map == {name: file.replace("safetensors", "ckpt") for name, file in index["weight_map"].items()}


def test_the_manifest(tmp_path):
    convert(SHARDED, tmp_path / "to", "--to", "mindspore")
    manifest = json.loads((tmp_path / "to" / "checksums.json").read_text())
    dtype, shape, data = stored(SHARDED)["model.norm.weight"]
    row = manifest["tensors"]["model.norm.weight"]
    assert row == {"dtype": dtype, "shape": list(shape), "sha256": sha256(np.frombuffer(data, np.uint8))}
    assert manifest["format"] == "mindspore" and set(manifest["tensors"]) == set(stored(SHARDED))


def test_mindspore_reads_what_is_written(mindspore, tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt_files, "SLICE", 1000)  # large tensors are written in pieces
    convert(SHARDED, tmp_path / "to", "--to", "mindspore")
    found = mindspore.load_checkpoint(str(tmp_path / "to" / "model.ckpt"))
    assert set(found) == set(stored(SHARDED))
    for name, (_, shape, data) in stored(SHARDED).items():
        assert (found[name].dtype, found[name].shape) == (mindspore.bfloat16, shape)
        assert found[name].get_bytes() == data
    convert(SHARDED, tmp_path / "mf", "--to", "mindformers")
    found = mindspore.load_checkpoint(str(tmp_path / "mf" / "model.safetensors"), format="safetensors")
    assert found["model.norm_out.weight"].get_bytes() == stored(SHARDED)["model.norm.weight"][2]


def test_what_mindspore_writes_is_read(mindspore, tmp_path, model, capsys):
    """With a checksum at its end, and what training leaves beside the weights."""
    tensors = {name: np.frombuffer(data, np.float32).reshape(shape) for name, (_, shape, data) in stored(model).items()}
    rows = [{"name": name, "data": mindspore.Tensor(array.copy())} for name, array in tensors.items()]
    rows.append({"name": "adam_m.model.norm.weight", "data": mindspore.Tensor(np.ones(3, np.float32))})
    rows.append({"name": "global_step", "data": mindspore.Tensor(7, mindspore.int32)})
    mindspore.save_checkpoint(rows, str(tmp_path / "own.ckpt"), crc_check=True)
    assert read_raw(tmp_path / "own.ckpt")["global_step"] == np.int32(7)
    assert convert(tmp_path / "own.ckpt", tmp_path / "to", "--to", "hf", "--config", model) == 0
    assert "left out: adam_m.model.norm.weight, global_step" in capsys.readouterr().out
    assert stored(tmp_path / "to") == stored(model)
    damaged = bytearray((tmp_path / "own.ckpt").read_bytes())
    damaged[5000] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(damaged)
    assert convert(tmp_path / "damaged.ckpt", tmp_path / "no", "--to", "hf", "--config", model) == 2
    assert "damaged.ckpt: its checksum does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_every_dtype_and_shape(tmp_path, ending):
    arrays = {
        "scalar": ("F32", np.float32(2.5).reshape(())),
        "empty": ("F16", np.zeros((0, 3), np.float16)),
        "bfloat16": ("BF16", np.arange(300, dtype=np.uint16).reshape(2, 150)),
        "double": ("F64", np.array([1 / 3])),
        "whole": ("I64", np.array([[-(2**40), 127, 128]])),
        "truth": ("BOOL", np.array([True, False])),
        "byte": ("U8", np.arange(256, dtype=np.uint8)),
    }
    write_raw(tmp_path, ending, (RawSource(n, d, a.shape, lambda a=a: a) for n, (d, a) in arrays.items()), 5e9)
    found = read_raw(tmp_path)
    assert list(found) == list(arrays)
    for name, (dtype, array) in arrays.items():
        assert found.places[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_memory_is_a_few_of_the_largest_tensor(tmp_path):
    """100 tensors of 1 MB: never more than four of them at a time, in both directions."""
    values = np.random.default_rng(0).standard_normal((512, 512), np.float32)
    config = json.loads((FIXTURES / "qwen2_tied" / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 14}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shapes = checkpoint_formats.stored_shapes(checkpoint_formats.DecoderConfig.read(source))
    assert sum(len(shape) == 2 for shape in shapes.values()) > 95
    write_raw(source, "safetensors", (
        RawSource(name, "F32", shape, lambda shape=shape: values if len(shape) == 2 else values[0])
        for name, shape in shapes.items()
    ), 5e9)  # fmt: skip
    tracemalloc.start()
    try:
        assert convert(source, tmp_path / "there", "--to", "mindformers", "--files", "ckpt") == 0
        assert convert(tmp_path / "there", tmp_path / "back", "--to", "hf", "--dtype", "bfloat16") == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4.5 * values.nbytes, f"{peak / 2**20:.1f} MB"


def test_dtypes(mindspore, tmp_path, model):
    """As MindSpore rounds them; back from bfloat16 to float32 nothing is rounded."""
    assert convert(model, tmp_path / "half", "--to", "hf", "--dtype", "float16") == 0
    assert convert(model, tmp_path / "brain", "--to", "hf", "--dtype", "bfloat16") == 0
    assert convert(tmp_path / "brain", tmp_path / "wide", "--to", "hf", "--dtype", "float32") == 0
    half, brain, wide = (stored(tmp_path / name) for name in ("half", "brain", "wide"))
    for name, (_, shape, data) in stored(model).items():
        values = np.frombuffer(data, np.float32).reshape(shape)
        assert half[name] == ("F16", shape, values.astype(np.float16).tobytes())
        rounded = mindspore.Tensor(values).astype(mindspore.bfloat16)
        assert brain[name] == ("BF16", shape, rounded.get_bytes())
        assert wide[name] == ("F32", shape, rounded.astype(mindspore.float32).asnumpy().tobytes())
    assert json.loads((tmp_path / "brain" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_routers_bias_stays_float32(tmp_path):
    source, bias = FIXTURES / "deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"
    assert convert(source, tmp_path / "brain", "--to", "hf", "--dtype", "bfloat16") == 0
    assert stored(tmp_path / "brain")[bias] == stored(source)[bias]


def test_bfloat16_rounds_to_the_nearest():
    """0x3f808000 lies between 0x3f80 and 0x3f81 and goes to the even one, as 0x3f818000 does to 0x3f82."""
    bits = [0x3F808000, 0x3F808001, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7F810000, 0x80000000]
    expected = [0x3F80, 0x3F81, 0x3F82, 0x7F80, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x8000]
    values = np.array(bits, np.uint32).view(np.float32)
    assert checkpoint_formats._bfloat16(values).tolist() == expected


def spoil(model, change):
    """The checkpoint with `change` of its {name: array}."""
    tensors = {name: np.frombuffer(data, np.float32).reshape(shape) for name, (_, shape, data) in stored(model).items()}
    change(tensors)
    (model / "model.safetensors").unlink()
    write_raw(model, "safetensors", (RawSource(n, "F32", a.shape, lambda a=a: a) for n, a in tensors.items()), 5e9)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (lambda t: t.pop(NORM), [], "model.norm.weight [32] is missing"),
        (lambda t: t.update(extra=t[NORM]), [], "extra [32] is unexpected: qwen2 models have no such tensor"),
        (lambda t: t.update({NORM: t[NORM][:3]}), [], "model.norm.weight has shape [3], config.json makes it [32]"),
        (
            lambda t: t.update({NORM: t[NORM] + 1e5}),
            ["--dtype", "float16"],
            "more than float16 can; use --dtype bfloat16 or float32",
        ),
        (lambda t: None, ["--shard-size", "5 apples"], "--shard-size 5 apples: not a size; write it as 5GB or 500MB"),
        (lambda t: None, ["--files", "ckpt"], "--files ckpt: Hugging Face checkpoints are safetensors"),
        (lambda t: None, ["--qkv-concat"], "--qkv-concat: only MindFormers' networks have fused projections"),
        (lambda t: None, ["--config", "nowhere"], "nowhere: no config.json here; give --config with the directory"),
    ],
)
def test_refused(model, tmp_path, capsys, change, options, expected):
    spoil(model, change)
    assert convert(model, tmp_path / "to", "--to", "hf", *options) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_names_of_mindformers_are_checked(model, tmp_path, capsys):
    convert(model, tmp_path / "mf", "--to", "mindformers")
    for name in ("model.safetensors", "param_name_map.json", "checksums.json"):
        (tmp_path / "mf" / name).unlink()
    one = RawSource("model.tok_embeddings.embedding_weight", "F32", (1,), lambda: np.ones(1, np.float32))
    write_raw(tmp_path / "mf", "safetensors", [one], 5e9)
    assert convert(tmp_path / "mf", tmp_path / "to", "--to", "hf") == 2
    assert "model.tok_embeddings.embedding_weight has shape [1], config.json makes it" in capsys.readouterr().err
    write_raw(tmp_path / "mf", "safetensors", [one._replace(name="embedding.word_embeddings.weight")], 5e9)
    assert convert(tmp_path / "mf", tmp_path / "to", "--to", "hf") == 2
    assert "holds a network of MindFormers' mcore, whose names are not known here" in capsys.readouterr().err


def test_families_that_mindformers_has_no_names_for(tmp_path, capsys):
    assert convert(FIXTURES / "mixtral", tmp_path / "to", "--to", "mindformers") == 2
    assert "model_type 'mixtral' has no legacy MindFormers checkpoints" in capsys.readouterr().err


def test_an_unknown_architecture(model, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text()) | {"model_type": "mamba"}
    (model / "config.json").write_text(json.dumps(config))
    assert convert(model, tmp_path / "to", "--to", "mindspore") == 2
    assert "config.json: model_type 'mamba' is not supported; known: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a whole MindSpore checkpoint"),
        (b"\x0a\xff\xff\xff\x7f", "not a whole MindSpore checkpoint"),
        (b"PK\x03\x04 a zip file of torch", "not a whole MindSpore checkpoint (or an encrypted one); copy it again"),
    ],
)
def test_broken_ckpt_files(model, tmp_path, capsys, content, expected):
    (tmp_path / "x.ckpt").write_bytes(content)
    assert convert(tmp_path / "x.ckpt", tmp_path / "to", "--to", "hf", "--config", model) == 2
    assert expected in capsys.readouterr().err


def test_a_ckpt_cut_short(tmp_path, capsys):
    convert(SHARDED, tmp_path / "to", "--to", "mindspore")
    whole = (tmp_path / "to" / "model.ckpt").read_bytes()
    (tmp_path / "to" / "model.ckpt").write_bytes(whole[:-10])
    assert convert(tmp_path / "to", tmp_path / "back", "--to", "hf") == 2
    assert "model.ckpt: not a whole MindSpore checkpoint" in capsys.readouterr().err


def test_damage_after_the_conversion_is_found(tmp_path, capsys):
    """A bit of a copied checkpoint: its checksums.json is read with it."""
    convert(SHARDED, tmp_path / "to", "--to", "mindspore")
    damaged = bytearray((tmp_path / "to" / "model.ckpt").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "to" / "model.ckpt").write_bytes(damaged)
    assert convert(tmp_path / "to", tmp_path / "back", "--to", "hf") == 2
    assert "is not what checksums.json says it was; copy the files again" in capsys.readouterr().err
    (tmp_path / "to" / "checksums.json").unlink()
    assert convert(SHARDED, tmp_path / "to", "--to", "mindspore", "--check") == 2
    assert "has other numbers than the source; convert it again" in capsys.readouterr().err


def test_an_adapter(tmp_path, capsys):
    options = ["--to", "hf", "--config", FIXTURES / "qwen2_tied"]
    assert convert(FIXTURES / "qwen2_tied_lora", tmp_path / "to", *options) == 2
    assert "an adapter without its model; merge them first (mindrlhf merge-lora)" in capsys.readouterr().err


def test_missing_files(model, tmp_path, capsys):
    assert convert(tmp_path / "none", tmp_path / "to", "--to", "hf") == 2
    assert "none: no such checkpoint; give a directory" in capsys.readouterr().err
    convert(SHARDED, tmp_path / "ms", "--to", "mindspore", "--shard-size", "20KB")
    next((tmp_path / "ms").glob("*.ckpt")).unlink()
    assert convert(tmp_path / "ms", tmp_path / "to", "--to", "hf") == 2
    assert "missing, but param_name_map.json names it; copy it here" in capsys.readouterr().err
    (model / "model.safetensors").unlink()
    assert convert(model, tmp_path / "to", "--to", "hf") == 2
    assert "holds no model.safetensors" in capsys.readouterr().err


def test_a_target_is_never_overwritten(tmp_path, capsys):
    assert convert(SHARDED, tmp_path, "--to", "hf") == 2
    assert "exists already; remove it, name another directory, or --check it" in capsys.readouterr().err
    assert convert(SHARDED, tmp_path / "a" / "b", "--to", "hf") == 2
    assert "no such directory to write it into" in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_formats, "_copy_beside", interrupted)
    assert convert(SHARDED, tmp_path / "to", "--to", "hf") == 130
    assert not list(tmp_path.iterdir())


def test_check_names_what_differs(tmp_path, capsys):
    convert(SHARDED, tmp_path / "to", "--to", "hf")
    assert convert(SHARDED, tmp_path / "to", "--to", "hf", "--dtype", "float32", "--check") == 2
    assert "is BF16" in capsys.readouterr().err
    assert convert(SHARDED, tmp_path / "to", "--to", "mindformers", "--check") == 2
    assert "model.embed_tokens.weight is unexpected; convert it again" in capsys.readouterr().err
