"""Triton source of a sum along k that several programs share: partial sums in memory, added in order by the last.

A semaphore of each tile counts its parts. It is zero before a launch and after it (``kernels/triton/semaphores.py``).
"""

from __future__ import annotations

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]


@triton.jit
def partials(partials_ptr, tile, part, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where the partial sum of ``part`` lies."""
    within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    return partials_ptr + (tile.to(tl.int64) * SPLIT_K + part) * (BLOCK_N * BLOCK_M) + within


@triton.jit
def arrive(partials_ptr, semaphore_ptr, acc, tile, part, SPLIT_K: tl.constexpr):
    """Hand in a partial sum; whether this program is the tile's last to do so."""
    tl.store(partials(partials_ptr, tile, part, SPLIT_K, acc.shape[0], acc.shape[1]), acc)
    # On NVIDIA's, all of this program's stores then come before the release that its first thread makes for it.
    tl.debug_barrier()
    return tl.atomic_add(semaphore_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1


@triton.jit
def collect(partials_ptr, semaphore_ptr, tile, acc, SPLIT_K: tl.constexpr):
    """The sum of all parts, in order; the semaphore is left as it was found, at zero."""
    tl.store(semaphore_ptr + tile, 0)
    total = tl.zeros_like(acc)
    for part in tl.static_range(SPLIT_K):
        # Not from the cache of this processor, which other processors do not write through.
        at = partials(partials_ptr, tile, part, SPLIT_K, acc.shape[0], acc.shape[1])
        total += tl.load(at, cache_modifier=".cg")
    return total
