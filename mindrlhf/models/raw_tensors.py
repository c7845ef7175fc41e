"""Tensors as they are stored, dtype and bytes, whatever file they lie in; one in memory at a time."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindrlhf.config.reading import read_json
from mindrlhf.errors import UserError

CHECKSUMS_FILE = "checksums.json"


class Kind(NamedTuple):
    """A dtype of a file."""

    dtype: np.dtype  # what its bytes are read as; bfloat16 as the integer that it is stored as
    mindspore: str


KINDS = {  # by safetensors' names
    "F64": Kind(np.dtype("<f8"), "Float64"), "F32": Kind(np.dtype("<f4"), "Float32"),
    "F16": Kind(np.dtype("<f2"), "Float16"), "BF16": Kind(np.dtype("<u2"), "BFloat16"),
    "I64": Kind(np.dtype("<i8"), "Int64"), "I32": Kind(np.dtype("<i4"), "Int32"),
    "I16": Kind(np.dtype("<i2"), "Int16"), "I8": Kind(np.dtype("i1"), "Int8"),
    "U64": Kind(np.dtype("<u8"), "UInt64"), "U32": Kind(np.dtype("<u4"), "UInt32"),
    "U16": Kind(np.dtype("<u2"), "UInt16"), "U8": Kind(np.dtype("u1"), "UInt8"), "BOOL": Kind(np.dtype("?"), "Bool"),
}  # fmt: skip


class Place(NamedTuple):
    """A stored tensor."""

    dtype: str  # a row of KINDS, or a type that only its file knows
    shape: tuple[int, ...]
    pieces: tuple[tuple[Path, int, int], ...]  # (file, first byte, bytes), in order


class RawSource(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str  # a row of KINDS
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * KINDS[self.dtype].dtype.itemsize

    def bytes(self) -> memoryview:
        """Row-major, as a file has them."""
        array = np.asarray(self.read(), order="C")
        assert array.dtype == KINDS[self.dtype].dtype, f"{self.name}: {array.dtype}"
        assert array.shape == self.shape, f"{self.name}: {array.shape}, announced as {self.shape}"
        return memoryview(array.reshape(-1).view(np.uint8))


class RawTensors(Mapping[str, np.ndarray]):
    """A checkpoint's tensors by name; each look-up reads one, as its kind's dtype, and compares it with checksums.json.

    Raises UserError at look-up for a dtype that KINDS lacks, a file cut short, and bytes that are not those of the sum.
    """

    def __init__(self, places: dict[str, Place], path: Path):
        self.places, self.path = places, path
        sums = path / CHECKSUMS_FILE
        self._sums = read_json(sums).get("tensors") if sums.is_file() else {}
        if not isinstance(self._sums, dict) or not all(isinstance(entry, dict) for entry in self._sums.values()):
            raise UserError(f"{sums}: tensors is no mapping of names to checksums; copy it again or remove it")

    def __getitem__(self, name: str) -> np.ndarray:
        place = self.places[name]
        if place.dtype not in KINDS:
            raise UserError(f"{self.path}: {name} is of type {place.dtype}; there are {', '.join(KINDS)}")
        array = np.empty(place.shape, KINDS[place.dtype].dtype)
        size = sum(length for _, _, length in place.pieces)
        if size != array.nbytes:
            problem = f"{name} {list(place.shape)} {place.dtype} has {size} bytes, not {array.nbytes}"
            raise UserError(f"{self.path}: {problem}; copy the file again")
        buffer, filled = memoryview(array.reshape(-1).view(np.uint8)), 0
        for path, offset, length in place.pieces:
            with path.open("rb") as file:
                file.seek(offset)
                if file.readinto(buffer[filled : filled + length]) != length:
                    raise UserError(f"{path}: the file ends in the midst of {name}; copy it again")
            filled += length
        if name in self._sums and self._sums[name].get("sha256") != sha256(array):
            problem = f"{name} is not what {CHECKSUMS_FILE} says it was"
            raise UserError(
                f"{self.path}: {problem}; copy the files again, or remove it if they were changed on purpose"
            )
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def without(self, names: Iterable[str]) -> "RawTensors":
        left = set(names)
        return RawTensors({name: place for name, place in self.places.items() if name not in left}, self.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self.places.items()}

    def source(self, name: str) -> RawSource:
        place = self.places[name]
        return RawSource(name, place.dtype, place.shape, lambda: self[name])


def sha256(array: np.ndarray) -> str:
    """Of its bytes, row-major."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()
