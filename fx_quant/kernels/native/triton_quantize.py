"""Triton source of quantization, alone and behind RMSNorm, launched by ``fx_quant/gpu/quantize.py``.

Only that file imports this one, and only when something is quantized. One program has a tile of ``ROWS`` rows and
``WIDTH`` columns. Divisions and square roots are correctly rounded, products and sums are never fused, and NaN goes
where the canonical ops let it go. Offsets are int64; absent operands are None, which Triton compiles out.

Extremes are taken of the bits of float32, as integers: they have the same order, those of NaN come last (a negative
NaN's come first), and no floating-point maximum that treats NaN as a number is involved.
"""

from __future__ import annotations

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]

# From here on every float32 is an integer.
_WHOLE = tl.constexpr(8388608.0)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _ordered(x):
    """An int32 for each float32, in the same order; applied to those bits again, it undoes itself."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _round(x):
    """To the nearest integer, ties to even; NaN and infinities stay."""
    whole = tl.where(x < 0, -_WHOLE, _WHOLE)
    return tl.where(tl.abs(x) < _WHOLE, (x + whole) - whole, x)


@triton.jit
def _at_least(x, least):
    """Like ``clamp(min=least)``: NaN stays, which ``tl.maximum`` loses."""
    return tl.where(x < least, least, x)


@triton.jit
def _between(x, lo, hi):
    return tl.where(x > hi, hi, _at_least(x, lo))


@triton.jit
def _symmetric_scale(
    amax, divisor, floor, FLOOR_ON: tl.constexpr, DIVIDE_DTYPE: tl.constexpr, SCALE_DTYPE: tl.constexpr
):
    """``choose_scale`` of the canonical op, from ``amax``."""
    if FLOOR_ON == "amax":
        amax = _at_least(amax, floor)
    scale = tl.div_rn(amax, divisor).to(DIVIDE_DTYPE).to(tl.float32)
    if FLOOR_ON == "scale":
        scale = _at_least(scale, floor)
    return scale.to(SCALE_DTYPE).to(tl.float32)


@triton.jit
def _asymmetric_scale(low, high):
    """``(scale, zero_point)`` of int8 codes for the range from ``low`` to ``high``, which 0 always belongs to."""
    low, high = tl.where(low > 0, 0.0, low), _at_least(high, 0.0)
    steps = tl.full(low.shape, 255.0, tl.float32)
    scale = _at_least(tl.div_rn(high, steps) - tl.div_rn(low, steps), _TINY)
    scale = tl.where(high == low, 1.0, scale)
    return scale, _between(_round(-128.0 - tl.div_rn(low, scale)), -128.0, 127.0)


@triton.jit
def _codes(x, scale, zero_point, lo, hi, RECIPROCAL: tl.constexpr, INTEGER: tl.constexpr, SHIFTED: tl.constexpr):
    """Codes as float32, in range; ``scale`` and ``zero_point`` broadcast to ``x``. NaN has the integer code 0."""
    if RECIPROCAL:
        y = x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    else:
        y = tl.div_rn(x, scale)
    if INTEGER:
        y = _round(y)
        if SHIFTED:
            y += zero_point
    y = _between(y, lo, hi)
    return tl.where(y == y, y, 0.0) if INTEGER else y


@triton.jit
def _rms_norm(x, weight, eps, k, DTYPE: tl.constexpr):
    """``x / sqrt(mean(x ** 2) + eps) * weight``, rounded to ``DTYPE``; columns from ``k`` on are zeros."""
    squares = tl.sum(x * x, 1)
    mean = tl.div_rn(squares, tl.zeros_like(squares) + k)
    root = tl.sqrt_rn(mean + eps)
    norm = tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)
    return ((x * norm[:, None]) * weight).to(DTYPE).to(tl.float32)


@triton.jit
def _parts(pointer, rows, m, PARTS: tl.constexpr):
    """What ``extremes_kernel`` found in the parts of each row."""
    at = pointer + rows[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    return tl.load(at, mask=(rows < m)[:, None], other=0)


@triton.jit(do_not_specialize=["m"])
def quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    low_ptr,
    high_ptr,
    scale_ptr,
    zero_point_ptr,
    codes_ptr,
    m,
    k,
    stride_xm,
    stride_xk,
    stride_residual_m,
    stride_residual_k,
    stride_weight,
    stride_scale_m,
    stride_scale_k,
    stride_zero_point_m,
    stride_zero_point_k,
    eps,
    divisor,
    floor,
    lo,
    hi,
    DYNAMIC: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FLOOR_ON: tl.constexpr,
    DIVIDE_DTYPE: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    INTEGER: tl.constexpr,
    SCALE_OF_ROW: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Codes of a tile, and the scales (zero points) that it chooses where they are not given.

    With ``weight_ptr`` what is quantized is the RMSNorm of ``x``, or of ``x + residual``, which is then written too;
    a tile is then a whole row. ``STEP`` is how far apart tiles begin, and ``GROUPS`` how many groups of a row a tile
    has. With ``PARTS`` the extremes were taken before, by ``extremes_kernel``.
    """
    program, tiles = tl.program_id(0), tl.cdiv(k, STEP)
    # Divided before they are widened: a division of int64 is a subroutine.
    first = (program // tiles).to(tl.int64) * ROWS
    tile = (program % tiles).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    along = tl.arange(0, WIDTH)
    columns = tile * STEP + along
    inside = columns < k
    if STEP < WIDTH:
        inside = inside & (along < STEP)
    mask = (rows < m)[:, None] & inside[None, :]

    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk, mask=mask, other=0.0)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if residual_ptr is not None:
        offsets = rows[:, None] * stride_residual_m + columns[None, :] * stride_residual_k
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(DTYPE)
        tl.store(sum_ptr + rows[:, None] * k + columns[None, :], x, mask=mask)
    x = x.to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns[None, :] * stride_weight, mask=inside[None, :], other=0.0)
        x = _rms_norm(x, weight.to(tl.float32), eps, k, DTYPE)
    if GROUPS > 1:
        x = tl.reshape(x, (ROWS * GROUPS, WIDTH // GROUPS))

    if DYNAMIC:
        if PARTS:
            high = tl.max(_parts(high_ptr, rows, m, PARTS), 1)
        else:
            high = tl.max(_ordered(tl.abs(x) if SYMMETRIC else x), 1)
        high = _unordered(high)
        if SYMMETRIC:
            scale = _symmetric_scale(high, divisor, floor, FLOOR_ON, DIVIDE_DTYPE, SCALE_DTYPE)
            zero_point = scale
        else:
            if PARTS:
                low = tl.min(_parts(low_ptr, rows, m, PARTS), 1)
            else:
                low = tl.min(_ordered(x), 1)
            scale, zero_point = _asymmetric_scale(_unordered(low), high)
        # One row here is one group of a row of x.
        index = tl.arange(0, ROWS * GROUPS)
        row = first + index // GROUPS
        group = tile * GROUPS + index % GROUPS
        stored = (row < m) & (index % GROUPS * (WIDTH // GROUPS) + tile * STEP < k)
        if PARTS:
            stored = stored & (group == 0)
        tl.store(scale_ptr + row * stride_scale_m + group * stride_scale_k, scale, mask=stored)
        if not SYMMETRIC:
            at = zero_point_ptr + row * stride_zero_point_m + group * stride_zero_point_k
            tl.store(at, zero_point.to(tl.int32), mask=stored)
        scale, zero_point = scale[:, None], zero_point[:, None]
    elif SCALE_OF_ROW:
        scale = tl.load(scale_ptr + rows * stride_scale_m, mask=rows < m, other=1.0).to(tl.float32)[:, None]
        zero_point = scale
        if zero_point_ptr is not None:
            zero_point = tl.load(zero_point_ptr + rows * stride_zero_point_m, mask=rows < m, other=0)
            zero_point = zero_point.to(tl.float32)[:, None]
    else:
        offsets = rows[:, None] * stride_scale_m + columns[None, :] * stride_scale_k
        scale = tl.load(scale_ptr + offsets, mask=mask, other=1.0).to(tl.float32)
        zero_point = scale
        if zero_point_ptr is not None:
            offsets = rows[:, None] * stride_zero_point_m + columns[None, :] * stride_zero_point_k
            zero_point = tl.load(zero_point_ptr + offsets, mask=mask, other=0).to(tl.float32)

    # pyrefly: ignore[bad-assignment]
    SHIFTED: tl.constexpr = zero_point_ptr is not None
    codes = _codes(x, scale, zero_point, lo, hi, RECIPROCAL, INTEGER, SHIFTED)
    if GROUPS > 1:
        codes = tl.reshape(codes, (ROWS, WIDTH))
    codes = codes.to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + rows[:, None] * k + columns[None, :], codes, mask=mask)


@triton.jit
def extremes_kernel(
    x_ptr,
    low_ptr,
    high_ptr,
    k,
    stride_xm,
    stride_xk,
    SYMMETRIC: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Extremes of the parts of each row, as ordered integers: ``high [m, PARTS]`` of ``|x|``, or both of ``x``.

    Program ``row * PARTS + part`` takes every ``PARTS``-th tile of its row.
    """
    program = tl.program_id(0).to(tl.int64)
    row, part = program // PARTS, program % PARTS
    high = tl.zeros((WIDTH,), dtype=tl.int32)
    low = tl.zeros((WIDTH,), dtype=tl.int32)
    for tile in range(part, tl.cdiv(k, WIDTH), PARTS):
        columns = tl.cast(tile, tl.int64) * WIDTH + tl.arange(0, WIDTH)
        x = tl.load(x_ptr + row * stride_xm + columns * stride_xk, mask=columns < k, other=0.0).to(tl.float32)
        if SYMMETRIC:
            high = tl.maximum(high, _ordered(tl.abs(x)))
        else:
            ordered = _ordered(x)
            high, low = tl.maximum(high, ordered), tl.minimum(low, ordered)
    tl.store(high_ptr + program, tl.max(high, 0))
    if not SYMMETRIC:
        tl.store(low_ptr + program, tl.min(low, 0))
