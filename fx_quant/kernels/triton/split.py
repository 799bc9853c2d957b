"""Sums along k that several programs share, where a result has too few tiles for all processors.

Of the two rules ``split_by_steps`` weighs what a split costs, and ``split_by_blocks`` fills the processors; neither was
timed, and they give different numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.launch import Configuration
from fx_quant.kernels.triton.semaphores import semaphores

# More parts of a sum than this cost more to add up than they hide.
_MAX_SPLIT = 16

# Counted in steps, of some 0.7 microseconds on an H100, where nothing was timed yet: filling the pipeline of a program,
# handing in and waiting for partial sums, and adding one of them.
_FILL_STEPS = 1.0
_SPLIT_STEPS = 3.0
_PART_STEPS = 0.125

# A split that gains less than this is not worth its memory.
_WORTH = 1.1

# Blocks that a program sums at least where a packed weight is split: fewer do not fill its pipeline.
_LEAST_BLOCKS = 6


def unfit_split(split: int, architecture: Architecture) -> str | None:
    """Why k cannot be split among ``split`` programs there, in one line; None if it can."""
    if split > 1 and architecture.platform == "rocm":
        # Its code has no wait for the stores of other wavefronts before their barrier (seen in Triton 3.6 and 3.9):
        # partial sums could arrive after the counter.
        return f"cannot split k on {architecture.name}, whose barrier does not wait for stores; use split_k = 1"
    return None


def split_by_steps(n: int, k: int, block_n: int, block_k: int, processors: int) -> int:
    """Programs that share a tile's sum along k: as few as keep about every processor busy.

    A processor that runs ``w`` programs takes ``w`` times the steps of one, which are ``ceil(steps / split)`` of
    ``block_k`` and those of filling its pipeline; partial sums cost some more. No part is empty.
    """
    tiles, steps = -(-n // block_n), -(-k // block_k)

    def cost(split: int) -> float:
        waves = -(-tiles * split // processors)
        return waves * (-(-steps // split) + _FILL_STEPS) + (_SPLIT_STEPS + _PART_STEPS * split if split > 1 else 0.0)

    # Other numbers would leave parts empty.
    splits = sorted({-(-steps // -(-steps // split)) for split in range(1, min(_MAX_SPLIT, steps) + 1)}) or [1]
    least = min(map(cost, splits))
    return next(split for split in splits if cost(split) <= _WORTH * least)


def split_by_blocks(tiles: int, blocks: int, processors: int) -> int:
    """Programs that share a tile: enough for two on each processor, while each has blocks to fill its pipeline."""
    wanted = -(-2 * processors // max(tiles, 1))
    return max(1, min(wanted, blocks // _LEAST_BLOCKS, _MAX_SPLIT))


def split_arguments(x: Tensor, tiles: int, configuration: Configuration, sums: torch.dtype) -> dict[str, Any]:
    """What a kernel takes to add up partial sums of dtype ``sums``; nothing where k is not split."""
    split, partials, semaphore = configuration.split_k, None, None
    if split > 1:
        partials = x.new_empty((tiles, split, configuration.block_n, configuration.block_m), dtype=sums)
        semaphore = semaphores(tiles, x.device)
    return {"partials_ptr": partials, "semaphore_ptr": semaphore, "SPLIT_K": split}
