"""``split_zero_point``: a zero point of any size as one that integer sums have room for, and what is left of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.ops.library import QUANTIZE_TAGS, register


def split_zero_point(zero_point: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """``(near, rest)`` with ``zero_point == near + rest``: ``near`` is the closest integer in ``lo`` to ``hi``.

    Codes less ``near`` can be summed as integers. ``rest`` is 0 wherever a zero point lies in the range of its codes;
    where it does not, codes less zero point are as large as it at least, and rounding it to float32 is as exact as to
    subtract it in float32.

    Args:
        zero_point: integers of any dtype and shape.
        lo, hi: inclusive; ``lo <= 0 <= hi``, so that ``near`` is never larger than the zero point.

    Returns:
        int32 and float32 of the shape of ``zero_point``.
    """
    _check(zero_point, lo, hi)
    near = zero_point.clamp(lo, hi)
    return near.to(torch.int32), (zero_point - near).to(torch.float32)


def _check(zero_point: Tensor, lo: int, hi: int) -> None:
    kind = zero_point.dtype
    torch._check(
        not (kind.is_floating_point or kind.is_complex or kind is torch.bool),
        lambda: f"split_zero_point: zero_point must be integers, got {kind}",
    )
    torch._check(lo <= 0 <= hi, lambda: f"split_zero_point: lo must be <= 0 and hi >= 0, got {lo} and {hi}")


def _fake(zero_point: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    _check(zero_point, lo, hi)
    shape = zero_point.shape
    return zero_point.new_empty(shape, dtype=torch.int32), zero_point.new_empty(shape, dtype=torch.float32)


register(
    "split_zero_point(Tensor zero_point, int lo, int hi) -> (Tensor near, Tensor rest)",
    lambda zero_point, lo, hi: tuple(x.contiguous() for x in split_zero_point(zero_point, lo, hi)),
    _fake,
    QUANTIZE_TAGS,
)
