"""Large packed weights in huge pages, where the system gives them when asked.

A matmul of few rows reads its weight from memory once. With pages of 4 KiB it also waits for their addresses, and the
hardware's prefetcher stops at the end of each. Source: madvise(2), ``MADV_HUGEPAGE``.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_PAGE = 2 << 20
# Smaller tensors hold too few whole huge pages, and a copy costs as much as a pack.
_LEAST = 4 * _PAGE
_MADV_HUGEPAGE = 14


def in_huge_pages(x: Tensor) -> Tensor:
    """A copy of contiguous ``x`` in memory that was asked to be in huge pages; ``x`` itself where that is no use.

    It is no use for small tensors, on other devices than a CPU, and on other systems than Linux. Whether the system
    follows is its own decision: nothing but time depends on it.
    """
    advise = _madvise()
    if x.device.type != "cpu" or x.nbytes < _LEAST or advise is None:
        return x
    copy = x.new_empty(x.shape)
    first = -(-copy.data_ptr() // _PAGE) * _PAGE
    end = (copy.data_ptr() + copy.nbytes) // _PAGE * _PAGE
    # Before the first write, which is when the system chooses the pages.
    return copy.copy_(x) if advise(first, end - first, _MADV_HUGEPAGE) == 0 else x


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise.restype = ctypes.c_int
    return madvise
