"""The pages behind parameters on a CPU, and what of them is in memory."""

import contextlib
import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from mindspore import Parameter

DONTNEED = 4  # madvise(2): drop the pages; they read as zeros when touched again
GB = 1e9  # bytes
SMALLEST = 1 << 16  # bytes; below it the call costs more than the memory is worth
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def pages(parameter: Parameter) -> np.ndarray:
    """The whole pages that a parameter has for itself, [bytes] uint8, writable and without a copy.

    Empty for one that is small, or held by a device whose memory is not the host's.
    """
    size = parameter.size * parameter.itemsize
    view = parameter.asnumpy()
    if size < SMALLEST or view.ctypes.data != parameter.data_ptr():
        return np.zeros(0, np.uint8)
    page = mmap.PAGESIZE
    first = -parameter.data_ptr() % page
    last = (parameter.data_ptr() + size) // page * page - parameter.data_ptr()
    return view.reshape(-1).view(np.uint8)[first : max(first, last)]


def drop(memory: np.ndarray) -> None:
    """Give back whole pages, [bytes] uint8: resident memory falls, and they read as zeros from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if len(memory) and libc.madvise(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(len(memory)), DONTNEED):
        raise OSError(ctypes.get_errno(), f"madvise of {len(memory)} bytes")


def give_back(parameters: Iterable[Parameter]) -> None:
    """Drop the pages of CPU parameters: every value may become 0 and must be written anew.

    Compiled cells go on using the parameters.
    """
    for parameter in parameters:
        drop(pages(parameter))


def peak_rss() -> int:
    """Bytes of this process that were in memory at once, at most, since `reset_peak_rss`; 0 where there is no /proc."""
    if not STATUS.is_file():
        return 0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak_rss() -> None:
    """Measure the peak from now on, where the kernel lets a process say so."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
