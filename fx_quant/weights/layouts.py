"""Layouts of codes and scales: padding, blocks, column-major scales, two int4 codes to a byte."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fx_quant.scheme import INT4_DTYPES, INT8_DTYPES, dtype_name
from fx_quant.weights.checks import (
    INT4,
    ceil_div,
    checked_scale,
    require,
    require_codes,
    require_multiple,
    scale_of_blocks,
    scale_of_rows,
)


def _pad_to(x: Tensor, shape: Sequence[int], value: float) -> Tensor:
    """``x`` in the first corner of a tensor of ``shape`` filled with ``value``; ``x`` itself if it has that shape."""
    if list(x.shape) == list(shape):
        return x
    # Not F.pad: constant_pad_nd has no float8 everywhere.
    out = torch.full(tuple(shape), value, dtype=torch.float32, device=x.device).to(x.dtype)
    out[tuple(slice(size) for size in x.shape)] = x.detach()
    return out


def pad_weight(
    weight: Tensor,
    scale: Tensor,
    multiple_n: int,
    multiple_k: int,
    bias: Tensor | None = None,
    *,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A symmetric weight made wide and deep enough for a kernel's alignment; slice its output to the old n.

    Codes pad with 0, scales with 1 (finite, so that no 0 * inf arises), the bias with 0. A scale of one element covers
    the padding already. What needs no padding is returned as it came, without a copy.

    Args:
        weight: ``[n, k]`` codes; n and k are padded to multiples of ``multiple_n`` and ``multiple_k``.
        scale: one element, ``[n]`` or ``[n, 1]``; with ``block`` ``[ceil(n / r), ceil(k / c)]``.
        bias: ``[n]``, any dtype.
        block: ``(r, c)``: rows and columns that share a scale; ``(1, g)`` for groups.

    Returns:
        ``(weight, scale, bias)``, padded; ``scale`` keeps its number of dimensions and its dtype.

    Raises:
        WeightError: a scale or bias that does not fit the weight; a multiple below 1.
    """
    require_codes(weight)
    require_multiple(multiple_n, "multiple_n")
    require_multiple(multiple_k, "multiple_k")
    n, k = weight.shape
    wide = (ceil_div(n, multiple_n) * multiple_n, ceil_div(k, multiple_k) * multiple_k)
    if bias is not None:
        require(list(bias.shape) == [n], f"bias must have shape [n] = [{n}], got {list(bias.shape)}")
        bias = _pad_to(bias, wide[:1], 0)
    if block is not None:
        scale_of_blocks(scale, block, weight.shape)
        scale = _pad_to(scale, [ceil_div(size, step) for size, step in zip(wide, block, strict=True)], 1)
    else:
        scale_of_rows(scale, n)
        if scale.numel() != 1:
            scale = _pad_to(scale, (wide[0], *scale.shape[1:]), 1)
    return _pad_to(weight, wide, 0), scale, bias


def expand_block_scale(scale: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """One scale per block as one per code: ``out[n, k] = scale[n // r, k // c]``.

    Args:
        scale: ``[ceil(n / r), ceil(k / c)]``; the last block of a row or column may be cut short.
        block: ``(r, c)``; ``(1, g)`` for groups.
        shape: ``(n, k)``.

    Returns:
        ``[n, k]``, float32, contiguous.

    Raises:
        WeightError: a scale of another shape, negative or not finite.
    """
    return repeat_blocks(scale_of_blocks(scale, block, shape), block, shape)


def repeat_blocks(values: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """``out[n, k] = values[n // r, k // c]`` for any dtype and sign, such as zero points; nothing is checked."""
    rows, columns = (torch.arange(size, device=values.device) // step for size, step in zip(shape, block, strict=True))
    return values.index_select(0, rows).index_select(1, columns)


def dequantize_blockwise(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """``out[n, k] = float32(codes[n, k]) * scale[n // r, k // c]``; see ``expand_block_scale``."""
    require_codes(codes, what="codes")
    return codes.detach().float() * expand_block_scale(scale, block, codes.shape)


def column_major_scales(scale: Tensor, align: int = 1) -> Tensor:
    """The same values with m as the fastest dimension: shape ``[m, g]``, strides ``(1, m')``.

    ``m'`` is m rounded up to a multiple of ``align`` (TMA wants 4 float32); the memory between is 1. Always a copy.

    Raises:
        WeightError: ``scale`` is not 2-D; ``align`` below 1.
    """
    require(scale.dim() == 2, f"scale must be [m, g], got {list(scale.shape)}")
    require_multiple(align, "align")
    m, groups = scale.shape
    columns = torch.ones(groups, ceil_div(m, align) * align, dtype=scale.dtype, device=scale.device)
    columns[:, :m] = scale.detach().t()
    return columns.t()[:m]


def round_scales_to_power_of_two(scale: Tensor) -> Tensor:
    """Scales that fit in ue8m0: ``2 ** ceil(log2(scale))``, exactly; never below ``scale``, so no code overflows.

    0 and everything below become 2**-127, the smallest ue8m0. The codes belong to the old scale: quantize them again.

    Returns:
        The shape of ``scale``, float32.

    Raises:
        WeightError: a scale above 2**127, the largest ue8m0, negative or not finite.
    """
    scale = checked_scale(scale)
    require(bool((scale <= 2.0**127).all()), "scale must not exceed 2**127, the largest ue8m0")
    fraction, exponent = torch.frexp(scale.double())
    # scale == fraction * 2**exponent with a fraction in [0.5, 1): 0.5 is the power of two itself.
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    exponent = torch.where(scale == 0, -127, exponent).clamp(min=-127)
    return torch.ldexp(torch.ones_like(scale, dtype=torch.float64), exponent).float()


# --- int4 -----------------------------------------------------------------------------------------------------


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
    require(codes.shape[1] % 2 == 0, f"codes must have an even k, got {codes.shape[1]}; pad with pad_weight(..., 1, 2)")
    low = -8 if codes.dtype is torch.int8 else 0
    outside = int(((codes < low) | (codes > low + 15)).sum())
    require(not outside, f"4-bit {dtype_name(codes.dtype)} codes must be in {low}..{low + 15}, got {outside} outside")
    nibbles = (codes - low).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_int4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes of ``pack_int4``: ``[n, k / 2]`` uint8 to ``[n, k]``.

    Args:
        dtype: what a code means: ``torch.int4`` gives int8 codes in -8..7, ``torch.uint4`` uint8 codes in 0..15.

    Raises:
        WeightError: ``packed`` is not 2-D uint8, or another dtype.
    """
    require_codes(packed, (torch.uint8,), "packed")
    require(dtype in INT4_DTYPES, f"dtype must be torch.int4 or torch.uint4, got {dtype_name(dtype)}")
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return codes.to(torch.int8) - 8 if dtype is INT4 else codes
