"""Layouts of codes and scales: blocks, and two int4 codes to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.ops import unpack_nibbles
from fx_quant.scheme import INT4_DTYPES, INT8_DTYPES, dtype_name
from fx_quant.weights.checks import (
    INT4,
    must,
    require_codes,
)


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes per byte along k, the even k in the low nibble: ``packed[n, j] = u[n, 2j] | u[n, 2j + 1] << 4``.

    Args:
        codes: ``[n, k]``, k even. uint8 codes (``torch.uint4``, 0..15) are stored as they are, ``u = code``; int8 codes
            (``torch.int4``, -8..7) with an offset, ``u = code + 8``.

    Returns:
        ``[n, k / 2]``, uint8.

    Raises:
        WeightError: an odd k; a code that does not fit in four bits.
    """
    require_codes(codes, INT8_DTYPES, "codes")
    must(codes.shape[1] % 2 == 0, f"codes must have an even k, got {codes.shape[1]}; pad it with codes of 0")
    low = -8 if codes.dtype is torch.int8 else 0
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > low + 15):
        outside = int(((codes < low) | (codes > low + 15)).sum())
        must(False, f"4-bit {dtype_name(codes.dtype)} codes must be in {low}..{low + 15}, got {outside} outside")
    # Halves, one after the other: a whole weight of bytes would be several times what it is packed.
    odd = (codes[:, 1::2] - low).view(torch.uint8).bitwise_left_shift_(4)
    return odd.bitwise_or_((codes[:, ::2] - low).view(torch.uint8))


def unpack_int4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes of ``pack_int4``: ``[n, k / 2]`` uint8 to ``[n, k]``.

    Args:
        dtype: what a code means: ``torch.int4`` gives int8 codes in -8..7, ``torch.uint4`` uint8 codes in 0..15.

    Raises:
        WeightError: ``packed`` is not 2-D uint8, or another dtype.
    """
    require_codes(packed, (torch.uint8,), "packed")
    must(dtype in INT4_DTYPES, f"dtype must be torch.int4 or torch.uint4, got {dtype_name(dtype)}")
    codes = unpack_nibbles(packed)
    return codes.to(torch.int8) - 8 if dtype is INT4 else codes
