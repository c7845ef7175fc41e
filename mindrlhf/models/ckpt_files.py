"""MindSpore's .ckpt files, a Value at a time.

A .ckpt is a protobuf, MindSpore's `checkpoint.proto`: a Checkpoint is repeated Values {tag: 1, tensor: 2}, a tensor is
{dims: 1, tensor_type: 2, tensor_content: 3}; a large tensor is several Values of the same tag in a row, each with the
whole shape. Perhaps "crc_num" and a CRC-32 as ten bytes follow. MindSpore reads and writes all of it at once; here
Values are written one after the other, which is the same file, and read by their places.
"""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from mindrlhf.errors import UserError
from mindrlhf.models.raw_tensors import KINDS, Place, RawSource

SLICE = 512 * 2**20  # bytes of a Value at most, as MindSpore writes them: a protobuf cannot hold 2 GB in one
_CRC = b"crc_num"
_BY_MINDSPORE = {kind.mindspore: name for name, kind in KINDS.items()}


class _Reader:
    """Fields of a protobuf in a file, from `place` to `end`."""

    def __init__(self, path: Path, file: BinaryIO, place: int, end: int):
        self.path, self.file, self.place, self.end = path, file, place, end
        file.seek(place)

    def fields(self) -> Iterator[tuple[int, int, int]]:
        """(number, first byte, length) of what has a length; (number, -1, value) of a varint."""
        while self.place < self.end:
            key = self._varint()
            if key & 7 == 0:
                yield key >> 3, -1, self._varint()
                continue
            length = self._varint() if key & 7 == 2 else self.end  # no other kind stands in a checkpoint
            first = self.place
            if first + length > self.end:
                raise _broken(self.path)
            yield key >> 3, first, length
            self.place = first + length
            self.file.seek(self.place)

    def bytes(self, first: int, length: int) -> bytes:
        self.file.seek(first)
        return self.file.read(length)

    def inner(self, first: int, length: int) -> "_Reader":
        return _Reader(self.path, self.file, first, first + length)

    def _varint(self) -> int:
        value, shift = 0, 0
        while shift < 64:
            byte = self.file.read(1)
            if not byte:
                raise _broken(self.path)
            self.place += 1
            value |= (byte[0] & 127) << shift
            if byte[0] < 128:
                return value
            shift += 7
        raise _broken(self.path)


def _broken(path: Path) -> UserError:
    return UserError(f"{path}: not a whole MindSpore checkpoint (or an encrypted one); copy it again")


def ckpt_places(path: Path) -> dict[str, Place]:
    places: dict[str, Place] = {}
    before = None
    with path.open("rb") as file:
        end = path.stat().st_size
        file.seek(max(end - 17, 0))
        trailer = file.read()
        if len(trailer) == 17 and trailer.startswith(_CRC):
            end -= 17
            if _crc32(file, end) != int.from_bytes(trailer[7:], "big"):
                raise UserError(f"{path}: its checksum does not fit: the file is damaged; copy it again")
        reader = _Reader(path, file, 0, end)
        for number, first, length in reader.fields():
            if number != 1 or first < 0:
                raise _broken(path)
            name, place = _value(reader.inner(first, length))
            if name in places:
                whole = places[name]
                if name != before or (whole.dtype, whole.shape) != (place.dtype, place.shape):
                    raise UserError(f"{path}: {name} is in it twice; write it again")
                place = whole._replace(pieces=whole.pieces + place.pieces)
            places[name], before = place, name
    if not places:
        raise _broken(path)
    return places


def _value(reader: _Reader) -> tuple[str, Place]:
    name, tensor = None, None
    for number, first, length in reader.fields():
        if number == 1:
            name = reader.bytes(first, length)
        elif number == 2:
            tensor = (first, length)
    if name is None or tensor is None:
        raise _broken(reader.path)
    dims, kind, content = [], b"", None
    inner = reader.inner(*tensor)
    for number, first, length in inner.fields():
        if number == 1 and first < 0:
            dims.append(length)
        elif number == 2:
            kind = inner.bytes(first, length)
        elif number == 3:
            content = (reader.path, first, length)
    if content is None:
        raise _broken(reader.path)
    try:
        name, kind = name.decode(), kind.decode()
    except UnicodeDecodeError:
        raise _broken(reader.path) from None
    dtype = _BY_MINDSPORE.get(kind, kind)
    is_scalar = dims == [0] and content[2] > 0  # so MindSpore writes them
    return name, Place(dtype, () if is_scalar else tuple(dims), (content,))


def _crc32(file: BinaryIO, size: int) -> int:
    file.seek(0)
    found = 0
    while size:
        block = file.read(min(size, 2**22))
        found, size = zlib.crc32(block, found), size - len(block)
    return found


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))


def _delimited(number: int, content: bytes) -> bytes:
    return _delimited_key(number, len(content)) + content


def _delimited_key(number: int, length: int) -> bytes:
    return _varint(number << 3 | 2) + _varint(length)


def write_ckpt(file: BinaryIO, tensors: Iterable[RawSource]) -> None:
    for source in tensors:
        dims = b"".join(b"\x08" + _varint(size) for size in source.shape or (0,))
        described = dims + _delimited(2, KINDS[source.dtype].mindspore.encode())
        content = source.bytes()
        for first in range(0, max(len(content), 1), SLICE):
            piece = content[first : first + SLICE]
            tensor = described + _delimited_key(3, len(piece))
            value = _delimited(1, source.name.encode()) + _delimited_key(2, len(tensor) + len(piece)) + tensor
            file.write(_delimited_key(1, len(value) + len(piece)) + value)
            file.write(piece)
