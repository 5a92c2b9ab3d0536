"""Fresh memory in huge pages.

A large tensor's memory comes from the kernel anew each time, and the first write to each page is a page fault: at
4 KiB a page, that takes two to four times as long as the writing. Pages of 2 MiB (Linux, ``madvise``), which numpy
asks for too, make it negligible; where they are refused, nothing but the time differs.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_LARGE_BYTES = 4 << 20
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def huge_pages(x: Tensor) -> Tensor:
    """x itself, which nothing has been written to yet; on other devices than the CPU it stays as it is, and while
    tracing, where it has no memory."""
    if _madvise is not None and type(x) is Tensor and x.device.type == "cpu" and x.nbytes >= _LARGE_BYTES:
        # The first page that is wholly the tensor's own.
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise(start, (x.data_ptr() + x.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return x
