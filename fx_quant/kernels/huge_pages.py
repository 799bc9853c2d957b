"""Packed weights in huge pages, one beside the other, where the system gives such pages when asked.

A matmul of few rows reads its weight from memory once. With pages of 4 KiB it also waits for their addresses, and the
hardware's prefetcher stops at the end of each. Source: madvise(2), ``MADV_HUGEPAGE``.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

_PAGE = 2 << 20
# Of addresses; memory is taken as it is written to.
_REGION = 32 << 20
# Smaller tensors are in cache after a few pages.
_LEAST = 64 << 10
_LINE = 64


@dataclass
class _Region:
    """Memory that weights are put into in turn, free from ``start`` to ``end``; it goes when the last of them does."""

    memory: weakref.ref[mmap.mmap]
    start: int
    end: int

    @property
    def room(self) -> int:
        """Bytes that are free."""
        return self.end - self.start


_lock = threading.Lock()
_roomiest: list[_Region] = []  # of the regions the one with the most room; none at first


def in_huge_pages(x: Tensor) -> Tensor:
    """A copy of contiguous ``x`` in memory that was asked to be in huge pages; ``x`` itself where that is no use.

    It is no use for small tensors, on other devices than a CPU, and on other systems than Linux. Whether the system
    follows is its own decision: nothing but time depends on it. The copy has a storage of its own.
    """
    if x.device.type != "cpu" or x.nbytes < _LEAST:
        return x
    found = _room(x.nbytes)
    if found is None:
        return x
    memory, offset = found
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape).copy_(x)


def _room(size: int) -> tuple[mmap.mmap, int] | None:
    """Memory of which ``size`` bytes from an offset on are nobody else's; None where there are no huge pages."""
    with _lock:
        region = _roomiest[0] if _roomiest else None
        memory = None if region is None else region.memory()
        if region is None or memory is None or region.room < size:
            memory = _new_memory(max(_REGION, size))
            if memory is None:
                return None
            address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
            start = -address % _PAGE
            region = _Region(weakref.ref(memory), start, start + len(memory) - _PAGE)
        start = region.start
        region.start = min(region.end, -(-(start + size) // _LINE) * _LINE)
        if not _roomiest or _roomiest[0].memory() is None or region.room > _roomiest[0].room:
            _roomiest[:] = [region]
        return memory, start


def _new_memory(size: int) -> mmap.mmap | None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return None
    # Private, since memory that can be shared follows another setting; longer by what its start may be off by.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, -(-size // _PAGE) * _PAGE + _PAGE, flags=flags)
        memory.madvise(advice)
    except OSError:
        return None
    return memory
