"""Giving a parameter's memory back to the system while its values are not needed."""

import ctypes
import mmap
from collections.abc import Iterable

from mindspore import Parameter

DONTNEED = 4  # madvise(2): drop the pages; they read as zeros when touched again
SMALLEST = 1 << 20  # bytes; below it the call costs more than the memory is worth


def give_back(parameters: Iterable[Parameter]) -> None:
    """Drop the pages of CPU parameters: resident memory falls, every value may become 0 and must be written anew.

    Compiled cells go on using the parameters. Ranges are cut to whole pages, so neighbours in memory keep theirs.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    for parameter in parameters:
        size = parameter.size * parameter.itemsize
        if size < SMALLEST or parameter.asnumpy().ctypes.data != parameter.data_ptr():
            continue  # small, or held by a device whose memory is not the host's
        start = -(-parameter.data_ptr() // page) * page
        length = (parameter.data_ptr() + size) // page * page - start
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), DONTNEED):
            raise OSError(ctypes.get_errno(), f"madvise of {parameter.name}")
