"""Packed weights in huge pages, one beside the other, where the system gives such pages when asked.

A matmul of few rows reads its weight from memory once. With pages of 4 KiB it also waits for their addresses, and the
hardware's prefetcher stops at the end of each. Source: madvise(2), ``MADV_HUGEPAGE``.

What a weight leaves when it dies is room for the next, and pages that are all free go back to the system at once
(``MADV_DONTNEED``). Weights smaller than a page are among their own kind, so that none keeps what large ones leave.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PAGE = 2 << 20
# Of addresses; memory is taken as it is written to.
_REGION = 32 << 20
# Smaller tensors are in cache after a few pages.
_LEAST = 64 << 10
_LINE = 64


@dataclass(eq=False)
class _Region:
    """Memory that weights are put into, from ``start``, which is that of a page, to ``end``.

    Args:
        small: it holds weights smaller than a page.
        holes: what is free, ``(start, end)``, in order and apart.
    """

    memory: mmap.mmap
    start: int
    end: int
    small: bool
    holes: list[tuple[int, int]]

    @property
    def is_empty(self) -> bool:
        """Whether no weight is in it."""
        return self.holes == [(self.start, self.end)]

    def take(self, size: int) -> int | None:
        """Where the first ``size`` free bytes are; None where there are none."""
        for i, (start, end) in enumerate(self.holes):
            if end - start >= size:
                self.holes[i : i + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give(self, start: int, end: int) -> None:
        """Free what ``take`` gave, and the pages that nothing is left in."""
        at = bisect.bisect(self.holes, (start, end))
        first, last = start, end
        if at < len(self.holes) and self.holes[at][0] == end:
            last = self.holes.pop(at)[1]
        if at and self.holes[at - 1][1] == start:
            at -= 1
            first = self.holes.pop(at)[0]
        self.holes.insert(at, (first, last))
        # Of the pages that these bytes are in, those that are free now.
        low = self._page(max(first, self._page(start)) + _PAGE - 1)
        high = min(self._page(last), self._page(end - 1) + _PAGE)
        if low < high:
            with contextlib.suppress(OSError):  # of locked memory, which then is only used again
                self.memory.madvise(mmap.MADV_DONTNEED, low, high - low)

    def _page(self, at: int) -> int:
        """Where the page of ``at`` starts."""
        return at - (at - self.start) % _PAGE


_lock = threading.Lock()
_regions: list[_Region] = []  # those that a weight is in, oldest first
_freed: deque[tuple[_Region, int, int]] = deque()  # what died while somebody held the lock


def in_huge_pages(x: Tensor) -> Tensor:
    """A copy of contiguous ``x`` in memory that was asked to be in huge pages; ``x`` itself where that is no use.

    It is no use for small tensors, on other devices than a CPU, and on other systems than Linux. Whether the system
    follows is its own decision: nothing but time depends on it. The copy has a storage of its own, with which its
    memory is freed.
    """
    room = _empty(x.shape, x.dtype, x.device)
    return x if room is None else room.copy_(x)


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty`` in such memory, where that is of use."""
    room = _empty(shape, dtype, device)
    return torch.empty(shape, dtype=dtype, device=device) if room is None else room


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LEAST:
        return None
    room = _room(size)
    return None if room is None else torch.frombuffer(room, dtype=dtype, count=math.prod(shape)).view(shape)


def trim() -> None:
    """Give memory that was freed back to the system, where the C library keeps it and can be asked to (glibc)."""
    if sys.platform == "linux":
        asked = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if asked is not None:
            asked(0)


def _room(size: int) -> memoryview | None:
    """``size`` bytes that are nobody else's until the view dies; None where there are no huge pages."""
    taken = -(-size // _LINE) * _LINE
    small = size < _PAGE
    _settle()
    with _lock:
        for region in _regions:
            start = region.take(taken) if region.small == small else None
            if start is not None:
                break
        else:
            made = _new_region(max(_REGION, taken), small)
            if made is None:
                return None
            region, start = made, made.take(taken)
            _regions.append(region)
    assert start is not None
    view = memoryview(region.memory)[start : start + size]
    finalizer = weakref.finalize(view, _free, region, start, start + taken)
    finalizer.atexit = False  # pyrefly: ignore [missing-attribute]
    _settle()
    return view


def _free(region: _Region, start: int, end: int) -> None:
    # The collector runs anywhere, also in a thread that holds the lock.
    _freed.append((region, start, end))
    _settle()


def _settle() -> None:
    """Give back what died, unless somebody holds the lock, who does so when it is released."""
    while _freed and _lock.acquire(blocking=False):
        try:
            while _freed:
                region, start, end = _freed.popleft()
                region.give(start, end)
                if region.is_empty and region in _regions:
                    _regions.remove(region)
        finally:
            _lock.release()


def _new_region(size: int, small: bool) -> _Region | None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return None
    # Private, since memory that can be shared follows another setting; longer by what its start may be off by.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    length = -(-size // _PAGE) * _PAGE
    try:
        memory = mmap.mmap(-1, length + _PAGE, flags=flags)
        memory.madvise(advice)
    except OSError:
        return None
    start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _PAGE
    return _Region(memory, start, start + length, small, [(start, start + length)])
