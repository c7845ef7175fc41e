"""Checkpoints as raw tensors: one file or a directory of them, safetensors or MindSpore's .ckpt."""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from mindrlhf.config.reading import read_json
from mindrlhf.errors import UserError
from mindrlhf.models.ckpt_files import ckpt_places, write_ckpt
from mindrlhf.models.hf import INDEX_FILE, SINGLE_FILE, flush_path, read_tensor_file, read_tensors
from mindrlhf.models.raw_tensors import KINDS, Place, RawSource, RawTensors

MAP_FILE = "param_name_map.json"  # MindSpore's index of several files; its weight_map is as in Hugging Face's


def read_raw(path: Path) -> RawTensors:
    """Of one .ckpt or .safetensors file, or of a directory of either: what an index names, else all such files.

    Raises UserError where there is nothing, a file of an index is missing, or two files have a tensor of one name.
    """
    if path.is_file():
        return RawTensors(_places(path), path.parent)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; give a directory, or a .ckpt or .safetensors file")
    if (path / MAP_FILE).is_file():
        values = read_json(path / MAP_FILE)
        names = values.get("weight_map", values)
        if not isinstance(names, dict):
            raise UserError(f"{path / MAP_FILE}: weight_map is no mapping of names to files; copy it again")
        files = sorted({path / str(file) for file in names.values()})
        missing = next((file for file in files if not file.is_file()), None)
        if missing:
            raise UserError(f"{missing}: missing, but {MAP_FILE} names it; copy it here")
    elif (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return RawTensors(_safetensors_places(read_tensors(path)), path)
    else:
        files = sorted(path.glob("*.ckpt")) or sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: holds no {SINGLE_FILE}, {INDEX_FILE}, {MAP_FILE} or .ckpt file; is it a checkpoint?")
    places: dict[str, Place] = {}
    for file in files:
        for name, place in _places(file).items():
            if name in places:
                raise UserError(f"{path}: {name} is in {places[name].pieces[0][0].name} and in {file.name}; remove one")
            places[name] = place
    return RawTensors(places, path)


def _places(path: Path) -> dict[str, Place]:
    if path.suffix == ".ckpt":
        return ckpt_places(path)
    if path.suffix == ".safetensors":
        return _safetensors_places(read_tensor_file(path))
    raise UserError(f"{path}: neither .ckpt nor .safetensors; convert it with the program that wrote it")


def _safetensors_places(tensors: Any) -> dict[str, Place]:
    def size(entry: Any) -> int:
        return math.prod(entry.shape) * KINDS[entry.dtype].dtype.itemsize if entry.dtype in KINDS else 0

    return {
        name: Place(entry.dtype, entry.shape, ((entry.path, entry.offset, size(entry)),))
        for name, entry in tensors.entries.items()
    }


def write_raw(directory: Path, ending: str, tensors: Iterable[RawSource], shard_bytes: float) -> dict[str, str]:
    """The tensors as model.ENDING, or model-00001-of-0000N.ENDING of at most shard_bytes each; no index.

    ending: "safetensors" or "ckpt". A tensor larger than shard_bytes has a file of its own. Returns name -> file.
    """
    shards: list[list[RawSource]] = [[]]
    filled = 0
    for source in tensors:
        if shards[-1] and filled + source.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += source.size
    found = {}
    for number, shard in enumerate(shards, 1):
        name = f"model.{ending}" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.{ending}"
        with (directory / name).open("wb") as file:
            (write_ckpt if ending == "ckpt" else _write_safetensors)(file, shard)
        flush_path(directory / name)
        found |= dict.fromkeys((source.name for source in shard), name)
    return found


def _write_safetensors(file: BinaryIO, tensors: list[RawSource]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for source in tensors:
        span = [position, position + source.size]
        header[source.name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for source in tensors:
        file.write(source.bytes())
