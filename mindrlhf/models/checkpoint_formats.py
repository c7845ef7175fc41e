"""One checkpoint in three forms, its bytes unchanged: Hugging Face's, MindSpore's and MindFormers'.

- hf: safetensors under the family's Hugging Face names, with model.safetensors.index.json where they are several files.
- mindspore: the same names in .ckpt files that mindspore.load_checkpoint reads, with param_name_map.json.
- mindformers: the names of MindFormers' legacy networks, in safetensors or .ckpt files, with param_name_map.json.

A tensor is read, written and forgotten; then every tensor is read back, and its SHA-256 compared with what was meant.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.config.reading import read_json
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import stored_shapes
from mindrlhf.models.hf import INDEX_FILE, check_names, named_as_whole
from mindrlhf.models.mindformers_names import mindformers_from_stored, mindformers_tensors, stored_from_mindformers
from mindrlhf.models.raw_tensors import CHECKSUMS_FILE, KINDS, RawSource, RawTensors, sha256
from mindrlhf.models.shapes import CORRECTION
from mindrlhf.models.tensor_files import MAP_FILE, read_raw, write_raw

FORMATS = {"hf": "safetensors", "mindspore": "ckpt", "mindformers": "safetensors"}  # -> its files, where not chosen
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BESIDE = (
    "config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model", "*.tiktoken", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
# What training leaves in a checkpoint of MindSpore beside the weights.
_STATE_PREFIXES = ("adam_m.", "adam_v.", "moment1.", "moment2.", "moments.", "accu_grads.")
_STATE = (
    "global_step", "epoch_num", "step_num", "global_batch_size", "loss_scale", "scale_sense", "current_iterator_step",
    "last_overflow_iterator_step", "learning_rate", "beta1_power", "beta2_power",
)  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """What is asked for."""

    source: Path  # a directory, or one file
    to: str  # a row of FORMATS
    described: Path  # the directory of config.json and the tokenizer
    dtype: str = "keep"  # or a row of DTYPES, for the floating-point tensors
    files: str = ""  # safetensors or ckpt; empty: as FORMATS says
    fused: bool = False  # mindformers: for a network with qkv_concat
    shard_bytes: float = 5e9  # of a file at most


class Report(NamedTuple):
    """What was done."""

    tensors: int
    bytes: int
    files: int
    left_out: list[str]  # tensors of the source that the target has no place for


def convert(asked: Conversion, partial: Path) -> Report:
    """Write the checkpoint into the directory `partial`, which must be there and empty, and read it back.

    Raises UserError for names and shapes that are not the architecture's, dtypes that are no numbers, numbers that
    float16 cannot hold, and where what was read back is not what was written.
    """
    sources, left_out = planned(asked)
    sums: dict[str, str] = {}
    weight_map = write_raw(partial, _files(asked), (_recorded(source, sums) for source in sources), asked.shard_bytes)
    _write_index(partial, asked, sources, weight_map)
    _copy_beside(asked, partial)
    written = read_raw(partial)
    for source in sources:
        if sha256(written[source.name]) != sums[source.name]:
            raise UserError(f"{partial}: {source.name} is not what was written; is the disk sound? try again")
    table = {s.name: {"dtype": s.dtype, "shape": list(s.shape), "sha256": sums[s.name]} for s in sources}
    _write_json(partial / CHECKSUMS_FILE, {"format": asked.to, "tensors": table})
    return Report(len(sources), sum(source.size for source in sources), len(set(weight_map.values())), left_out)


def compare(asked: Conversion, target: Path) -> Report:
    """Whether `target` is what the conversion would write, tensor by tensor. Raises UserError where it is not."""
    sources, left_out = planned(asked)
    found = read_raw(target)
    for name in sorted({source.name for source in sources} ^ set(found)):
        raise UserError(f"{target}: {name} is {'unexpected' if name in found else 'missing'}; convert it again")
    for source in sources:
        place = found.places[source.name]
        if (place.dtype, place.shape) != (source.dtype, source.shape):
            theirs, ours = f"{place.dtype} {list(place.shape)}", f"{source.dtype} {list(source.shape)}"
            raise UserError(f"{target}: {source.name} is {theirs}, of the source {ours}; convert it again")
        if sha256(found[source.name]) != sha256(source.read()):
            raise UserError(f"{target}: {source.name} has other numbers than the source; convert it again")
    files = {path for place in found.places.values() for path, _, _ in place.pieces}
    return Report(len(sources), sum(source.size for source in sources), len(files), left_out)


def planned(asked: Conversion) -> tuple[list[RawSource], list[str]]:
    """The target's tensors in their order, all names and shapes checked, and what is left out. Raises UserError."""
    if asked.to == "hf" and _files(asked) != "safetensors":
        raise UserError("--files ckpt: Hugging Face checkpoints are safetensors; remove it, or use --to mindspore")
    if asked.fused and asked.to != "mindformers":
        raise UserError("--qkv-concat: only MindFormers' networks have fused projections; use --to mindformers")
    raw = read_raw(asked.source)
    config = DecoderConfig.read(asked.described)
    left_out = [name for name in raw if name in _STATE or name.startswith(_STATE_PREFIXES)]
    raw = raw.without(left_out)
    if any(name.endswith("embedding_weight") for name in raw):
        sources = _from_mindformers(raw, config)
    elif any(name.startswith(("embedding.word_embeddings", "decoder.layers.")) for name in raw):
        problem = "holds a network of MindFormers' mcore, whose names are not known here"
        raise UserError(f"{asked.source}: {problem}; give the Hugging Face checkpoint that it was made from")
    else:
        check_names(config, named_as_whole(raw.shapes, config), asked.source)
        sources = {name: raw.source(name) for name in raw}
    if asked.to == "mindformers":
        kept, unknown = _to_mindformers(sources, config, asked)
        left_out += unknown
    else:
        kept = list(sources.values())
    return [_in_dtype(source, asked.dtype) for source in kept], left_out


def _files(asked: Conversion) -> str:
    return asked.files or FORMATS[asked.to]


def _from_mindformers(raw: RawTensors, config: DecoderConfig) -> dict[str, RawSource]:
    """By Hugging Face's names. Raises UserError."""
    fused = set(raw).isdisjoint(set(mindformers_tensors(config)) - set(mindformers_tensors(config, fused=True)))
    expected = mindformers_tensors(config, fused)
    _check_shapes({name: tensor.shape for name, tensor in expected.items()}, raw)
    dtypes = {part.stored: raw.places[name].dtype for name, tensor in expected.items() for part in tensor.parts}
    weights = stored_from_mindformers(config, raw.__getitem__, fused)
    return {
        name: RawSource(name, dtypes[name], shape, lambda name=name: weights(name))
        for name, shape in stored_shapes(config).items()
    }


def _check_shapes(expected: Mapping[str, tuple[int, ...]], raw: RawTensors) -> None:
    for name in [*expected, *raw]:
        shape, found = expected.get(name), raw.shapes.get(name)
        if shape == found:
            continue
        if found is None:
            problem = f"{name} {list(shape)} is missing"
        elif shape is None:
            problem = f"{name} {list(found)} is unexpected"
        else:
            problem = f"{name} has shape {list(found)}, config.json makes it {list(shape)}"
        raise UserError(f"{raw.path}: {problem}; use the config.json that belongs to these weights")


def _to_mindformers(
    sources: dict[str, RawSource], config: DecoderConfig, asked: Conversion
) -> tuple[list[RawSource], list[str]]:
    """Under MindFormers' names, and the names of what its networks do not have. Raises UserError."""
    expected, found = mindformers_tensors(config, asked.fused), []
    for name, shape, read in mindformers_from_stored(config, lambda name: sources[name].read(), asked.fused):
        dtypes = {sources[part.stored].dtype for part in expected[name].parts}
        if len(dtypes) > 1:
            problem = f"{name} is fused of tensors in {' and '.join(sorted(dtypes))}"
            raise UserError(f"{asked.source}: {problem}; set --dtype, or leave out --qkv-concat")
        found.append(RawSource(name, dtypes.pop(), shape, read))
    stored = {part.stored for tensor in expected.values() for part in tensor.parts}
    return found, [name for name in sources if name not in stored]


# -- dtypes -----------------------------------------------------------------------------------------------------------


def _in_dtype(source: RawSource, dtype: str) -> RawSource:
    """The same tensor in another floating-point dtype; whole numbers stay as they are, and so does the routers' bias,
    whose differences are finer than 16 bits."""
    wanted = DTYPES.get(dtype, source.dtype)
    if source.name.endswith(CORRECTION) or source.dtype == wanted or source.dtype not in (*DTYPES.values(), "F64"):
        return source

    def read() -> np.ndarray:
        values = source.read()
        if source.dtype == "BF16":
            values = values.astype(np.uint32)
            values <<= np.uint32(16)
            values = values.view(np.float32)
        if wanted == "BF16":
            return _bfloat16(values.astype(np.float32, copy=False))
        with np.errstate(over="ignore"):
            found = values.astype(KINDS[wanted].dtype, copy=False)
        overflown = np.isinf(found) & ~np.isinf(values)
        if overflown.any():
            largest = float(np.abs(values[overflown]).max())
            raise UserError(f"{source.name} holds {largest:g}, more than {dtype} can; use --dtype bfloat16 or float32")
        return found

    return RawSource(source.name, wanted, source.shape, read)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as its bits: uint16 of the same shape."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    nan = np.isnan(values)  # rounding could make an infinity of one
    upper = bits[nan] >> np.uint32(16)
    rounded[nan] = np.where(upper & np.uint32(0x7F), upper, upper | np.uint32(0x40))
    return rounded.astype(np.uint16)


# -- what lies beside the tensors -------------------------------------------------------------------------------------


def _recorded(source: RawSource, sums: dict[str, str]) -> RawSource:
    """The same; its checksum is put into `sums` when it is read."""

    def read() -> np.ndarray:
        array = source.read()
        sums[source.name] = sha256(array)
        return array

    return source._replace(read=read)


def _write_index(
    directory: Path, asked: Conversion, sources: Iterable[RawSource], weight_map: Mapping[str, str]
) -> None:
    if asked.to == "hf" and len(set(weight_map.values())) == 1:
        return
    total = {"total_size": sum(source.size for source in sources)}
    name = INDEX_FILE if asked.to == "hf" else MAP_FILE
    _write_json(directory / name, {"metadata": total, "weight_map": dict(weight_map)})


def _copy_beside(asked: Conversion, target: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files; config.json says the dtype."""
    for pattern in _BESIDE:
        for path in sorted(asked.described.glob(pattern)):
            shutil.copyfile(path, target / path.name)
    if asked.dtype in DTYPES:
        values = read_json(asked.described / "config.json")
        names = [name for name in ("torch_dtype", "dtype") if name in values] or ["torch_dtype"]
        _write_json(target / "config.json", values | dict.fromkeys(names, asked.dtype))


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
