"""Kernels that store what the swapped form keeps in registers, for Triton's interpreter, which casts to float8 wrongly."""

from __future__ import annotations

import torch
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]
from torch import Tensor

from fx_quant.kernels.native.triton_swapped import _choose_scale, _quantize


@triton.jit
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    m,
    k,
    stride_xm,
    stride_xk,
    divisor,
    floor,
    lo,
    hi,
    FLOOR_ON: tl.constexpr,
    DIVIDE: tl.constexpr,
    SCALE: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    scale = _choose_scale(
        x_ptr, stride_xm, stride_xk, m, k, divisor, floor, FLOOR_ON, DIVIDE, SCALE, PER_TENSOR, ROWS, BLOCK
    )
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (rows < m)[:, None] & (columns < k)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk, mask=mask, other=0.0)
    y = _quantize(x, scale, lo, hi, RECIPROCAL, INTEGER)
    tl.store(codes_ptr + rows[:, None] * k + columns[None, :], y, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < m)


def quantize_in_float32(
    x: Tensor,
    integer: bool,
    granularity: str,
    divisor: float,
    divide_dtype: torch.dtype,
    floor: float,
    floor_on: str,
    scale_dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
) -> tuple[Tensor, Tensor]:
    """Codes before the cast, and scales ``[m]``, as the decode kernel computes them."""
    m, k = x.shape
    codes, scale = x.new_empty((m, k), dtype=torch.float32), x.new_empty(m, dtype=torch.float32)
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    rows, columns = 1 << (m - 1).bit_length(), 1 << (k - 1).bit_length()
    _quantize_kernel[(1,)](
        x,
        codes,
        scale,
        m,
        k,
        *x.stride(),
        divisor,
        floor,
        lo,
        hi,
        floor_on,
        types[divide_dtype],
        types[scale_dtype],
        granularity == "per_tensor",
        reciprocal,
        integer,
        rows,
        32,
        columns,
    )
    return codes, scale
