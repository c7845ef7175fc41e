"""Hugging Face checkpoints: safetensors in and out, without torch, one tensor in memory at a time.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes, the header's length as a little-endian
integer; the header, a JSON object name -> {dtype, shape, data_offsets}, perhaps with "__metadata__"; the bytes of the
tensors, row-major and little-endian, without holes. A large model is several such files and
model.safetensors.index.json, whose weight_map says which file has which tensor.

Files are read by this module's own few lines because the library's NumPy reader cannot return bfloat16, and because
other loaders check nothing: a file cut short must be an error here, not a model with random tails.
"""

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.config.reading import read_json
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import Source, stored_shapes
from mindrlhf.models.shapes import HEAD, SCORE
from mindrlhf.utils.parallel import is_main

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes, the library's own limit

# What can be read as float32. bfloat16 is the upper half of a float32, so it is read as the integer it is stored as.
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F64": np.dtype("<f8")}


class Entry(NamedTuple):
    """Where one tensor lies."""

    path: Path
    dtype: str  # the format's name of it, such as BF16
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class Tensors(Mapping[str, np.ndarray]):
    """A checkpoint's tensors by name; each look-up reads one from disk as a new float32 array of its stored shape.

    float32, float16 and bfloat16 are read exactly, float64 is rounded. Raises UserError at look-up for other dtypes.
    """

    def __init__(self, entries: dict[str, Entry]):
        self._entries = entries

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def named_as_whole(self, config: DecoderConfig) -> "Tensors":
        return Tensors(named_as_whole(self._entries, config))

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.path}: {name} has dtype {entry.dtype}; only {', '.join(DTYPES)} are supported, "
                "convert the checkpoint to one of them"
            )
        count = math.prod(entry.shape)
        raw = np.fromfile(entry.path, DTYPES[entry.dtype], count, offset=entry.offset)
        if raw.size != count:
            raise UserError(f"{entry.path}: the file became shorter while it was read; download it again")
        if entry.dtype == "BF16":
            raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return raw.astype(np.float32, copy=False).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def named_as_whole(tensors: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The same under a whole model's names where they are those of its trunk, as in GPT-2's own checkpoints."""
    trunk = config.family.trunk
    if any(name.startswith(trunk) for name in tensors):
        return dict(tensors)
    return {name if name in (HEAD, SCORE) else trunk + name: tensor for name, tensor in tensors.items()}


def read_tensors(directory: str | Path) -> Tensors:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json names.

    Headers are read and checked at once, tensors when looked up. Raises UserError where a file is missing, is shorter
    or longer than its header says, has a broken header, or lacks a tensor that the index promises.
    """
    directory = Path(directory)
    if (directory / SINGLE_FILE).is_file():
        return Tensors(_read_header(directory / SINGLE_FILE))
    if not (directory / INDEX_FILE).is_file():
        hint = "convert its .bin files to safetensors" if any(directory.glob("*.bin")) else "is it a checkpoint?"
        raise UserError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is here; {hint}")
    index = directory / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or empty; download it again")
    headers: dict[str, dict[str, Entry]] = {}
    entries = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {name} lies in {file!r}, which is not a file name; download it again")
        if file not in headers:
            if not (directory / file).is_file():
                raise UserError(f"{directory / file}: missing, but {INDEX_FILE} names it; download it")
            headers[file] = _read_header(directory / file)
        if name not in headers[file]:
            raise UserError(f"{directory / file}: lacks {name}, which {INDEX_FILE} says it holds; download both again")
        entries[name] = headers[file][name]
    return Tensors(entries)


def read_tensor_file(path: Path) -> Tensors:
    """The tensors of one safetensors file, its header checked. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; download it")
    return Tensors(_read_header(path))


def _read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of one file, checked against the file's size. Raises UserError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise UserError(f"{path}: not a whole safetensors file ({size} bytes); download it again")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            raise UserError(f"{path}: its safetensors header is broken; download it again") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its safetensors header is broken; download it again")
    header.pop("__metadata__", None)
    start = 8 + length
    entries, spans = {}, []
    for name, values in header.items():
        dtype, shape, (begin, end) = _header_row(path, name, values)
        itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else None
        if itemsize and end - begin != math.prod(shape) * itemsize:
            raise UserError(
                f"{path}: {name} {dtype} {list(shape)} has {end - begin} bytes in the header, not "
                f"{math.prod(shape) * itemsize}; download it again"
            )
        entries[name] = Entry(path, dtype, shape, start + begin)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise UserError(f"{path}: {name} does not begin where the tensor before it ends; download it again")
        position = end
    if start + position != size:
        raise UserError(f"{path}: is {size} bytes long, its header says {start + position}; download it again")
    return entries


def _header_row(path: Path, name: str, values: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """(dtype, shape, (begin, end)) of one tensor's row of the header. Raises UserError."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)

    values = values if isinstance(values, dict) else {}
    dtype, shape, span = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not isinstance(dtype, str) or not counts(shape) or not counts(span) or len(span) != 2 or span[0] > span[1]:
        raise UserError(f"{path}: the header's row of {name} is broken; download it again")
    return dtype, tuple(shape), (span[0], span[1])


def write_tensors(
    directory: str | Path,
    tensors: Iterable[Source],
    shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write float32 tensors as model.safetensors, or as several files of at most `shard_bytes` and their index.

    `tensors` are (name, shape, getter); each getter is called once, in order, and its array let go before the next,
    so one tensor is in memory at a time. A tensor larger than shard_bytes gets a file of its own. Every file is written
    beside its place, flushed to disk and only then renamed, all of them after the last is whole; then weights that an
    earlier write left in the directory under other names are removed, because a reader would prefer them.

    Of several processes all call it, since a getter may bring a tensor together, and the main one writes.
    """
    if not is_main():
        return _go_through(tensors)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    shards = _split(list(tensors), shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    written = dict(zip(names, shards, strict=True))
    files = list(written) + ([INDEX_FILE] if len(shards) > 1 else [])
    try:
        for file, shard in written.items():
            _write_file(_temporary(directory / file), shard, metadata)
        if len(shards) > 1:
            _write_index(_temporary(directory / INDEX_FILE), written)
        for file in files:
            os.replace(_temporary(directory / file), directory / file)
    finally:
        for file in files:
            _temporary(directory / file).unlink(missing_ok=True)
    for pattern in (SINGLE_FILE, INDEX_FILE, "model-?????-of-?????.safetensors"):
        for path in directory.glob(pattern):
            if path.name not in files:
                path.unlink()
    flush_path(directory)


def write_tensor_file(path: Path, tensors: Iterable[Source]) -> None:
    """One file of float32 tensors, written beside its place, flushed and renamed; by the main process alone."""
    if not is_main():
        return _go_through(tensors)
    try:
        _write_file(_temporary(path), list(tensors), {"format": "pt"})
        os.replace(_temporary(path), path)
    finally:
        _temporary(path).unlink(missing_ok=True)
    flush_path(path.parent)


def _go_through(tensors: Iterable[Source]) -> None:
    for _, _, getter in tensors:
        getter()


def _split(tensors: list[Source], shard_bytes: float) -> list[list[Source]]:
    """The tensors in order, a new list whenever the next one would not fit."""
    shards: list[list[Source]] = [[]]
    filled = 0
    for source in tensors:
        size = 4 * math.prod(source[1])
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += size
    return shards


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _write_file(path: Path, tensors: Sequence[Source], metadata: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, shape, _ in tensors:
        assert name not in header, f"two tensors are named {name}"
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the library maps the file: tensors then lie on 8-byte boundaries
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, shape, getter in tensors:
            array = np.asarray(getter(), order="C")
            assert array.dtype == np.float32, f"{name} is {array.dtype}"
            assert array.shape == tuple(shape), f"{name} is {array.shape}, its shape was announced as {shape}"
            file.write(array)
            del array  # before the next getter makes its own
        _flush(file)


def _write_index(path: Path, written: Mapping[str, Sequence[Source]]) -> None:
    total = sum(4 * math.prod(shape) for shard in written.values() for _, shape, _ in shard)
    weight_map = {name: file for file, shard in written.items() for name, _, _ in shard}
    with path.open("wb") as file:
        file.write(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode())
        _flush(file)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_path(path: Path) -> None:
    """A file's bytes, or a directory's names, onto the disk: a rename survives a power cut only behind it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_names(config: DecoderConfig, found: Mapping[str, tuple[int, ...]], directory: str | Path) -> None:
    """Every tensor of the family's checkpoint is there in its shape, and nothing else is.

    Passed over: what old checkpoints store and nobody needs (rotary frequencies, causal masks), layers behind the last
    (DeepSeek-V3's, which predict several tokens), and lm_head.weight where the embedding or the score is the head.
    Raises one UserError naming the first tensor that is missing, misshapen or unexpected, and how many more there are.
    """
    expected = stored_shapes(config)
    problems = []
    for name, shape in expected.items():
        if name not in found:
            hint = " (a head tied to the embedding? then set tie_word_embeddings true)" if name == HEAD else ""
            problems.append(f"{name} {list(shape)} is missing{hint}")
        elif tuple(found[name]) != shape:
            problems.append(f"{name} has shape {list(found[name])}, config.json makes it {list(shape)}")
    for name, shape in found.items():
        if name not in expected and not _is_passed_over(name, config):
            problems.append(f"{name} {list(shape)} is unexpected: {config.model_type} models have no such tensor")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{directory}: {problems[0]}{more}; use the config.json that belongs to these weights")


def _is_passed_over(name: str, config: DecoderConfig) -> bool:
    if name == HEAD or name.endswith("rotary_emb.inv_freq"):
        return True
    if config.family.learned_positions and name.endswith((".attn.bias", ".attn.masked_bias")):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return config.latent is not None and layer is not None and int(layer[1]) >= config.num_layers


def read_generation_config(directory: str | Path) -> dict[str, Any]:
    """generation_config.json as it is, empty where the checkpoint has none. Raises UserError where it is broken."""
    path = Path(directory) / "generation_config.json"
    return read_json(path) if path.is_file() else {}
