"""Triton source of ``silu(a @ gate) * (a @ up)``, launched by ``fx_quant/gpu/gated.py``, which alone imports this file.

A program sums a tile of the gate and the same tile of up, so that their product never leaves it. Sizes are arbitrary.
"""

from __future__ import annotations

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]

from fx_quant.kernels.native.triton_gemm import MAX_IMPRECISE_K, corner, matrix, vector

# 1.5 * 2**23: added to a float32 below 2**22 and taken away again, it leaves the nearest integer, halves to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _add(x, y, acc):
    """``acc + x @ y`` of codes; float8 sums leave the tensor cores every ``MAX_IMPRECISE_K`` products."""
    if x.dtype == tl.int8:
        acc = tl.dot(x, y, acc, out_dtype=tl.int32)
    else:
        # pyrefly: ignore[bad-assignment]
        IMPRECISE_K: tl.constexpr = min(x.shape[1], MAX_IMPRECISE_K)
        acc = tl.dot(x, y, acc, max_num_imprecise_acc=IMPRECISE_K)
    return acc


@triton.jit
def _scaled(acc, a_scale, b_scale_ptr, stride_b_scale, columns, inside, ROUNDED: tl.constexpr):
    """``acc * a_scale * b_scale``, rounded to ``ROUNDED``, in float32."""
    y = acc.to(tl.float32)
    if a_scale is not None:
        y *= a_scale[:, None]
    if b_scale_ptr is not None:
        y *= tl.load(b_scale_ptr + columns * stride_b_scale, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y.to(ROUNDED).to(tl.float32)


@triton.jit
def _finish(
    gate,
    up,
    out_ptr,
    out_scale_ptr,
    a_scale_ptr,
    b_scale_ptr,
    rows,
    columns,
    m,
    n,
    stride_a_scale,
    stride_b_scale,
    divisor,
    floor,
    lo,
    hi,
    ROUNDED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FLOOR_ON: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """Store ``silu(gate) * up`` of the scaled sums, or its codes under a given scale or one a row of the tile."""
    a_scale = None
    if a_scale_ptr is not None:
        a_scale = vector(a_scale_ptr, stride_a_scale, rows, m).to(tl.float32)
    inside = columns < n
    gate = _scaled(gate, a_scale, b_scale_ptr, stride_b_scale, columns, inside, ROUNDED)
    up = _scaled(up, a_scale, b_scale_ptr, stride_b_scale, columns + n, inside, ROUNDED)
    # In this order nothing overflows, and Triton 3.9 spills nothing.
    y = (up / (1.0 + tl.exp(-gate)) * gate).to(ROUNDED)
    if QUANTIZED != "no":
        y = y.to(tl.float32)
        if QUANTIZED == "groups":
            # Magnitudes are compared as the integers of their bits, in which NaN is the largest.
            bits = tl.max(tl.where(inside[None, :], y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), 1)
            # pyrefly: ignore[missing-attribute]
            scale = bits.to(tl.float32, bitcast=True)
            # `where` keeps a NaN, which `maximum` would drop.
            if FLOOR_ON == "amax":
                scale = tl.where(scale < floor, floor, scale)
            scale = tl.div_rn(scale, divisor)
            if FLOOR_ON == "scale":
                scale = tl.where(scale < floor, floor, scale)
            group = tl.max(columns, 0) // columns.shape[0]
            tl.store(out_scale_ptr + group * m + rows, scale, mask=rows < m)
            scale = scale[:, None]
        else:
            scale = tl.load(out_scale_ptr).to(tl.float32)
        if RECIPROCAL:
            y *= tl.div_rn(1.0, scale)
        else:
            y = tl.div_rn(y, tl.broadcast_to(scale, y.shape))
        y = tl.where(y < lo, lo, y)
        y = tl.where(y > hi, hi, y)
        if out_ptr.dtype.element_ty == tl.int8:
            # After the clamp, because it is exact below 2**22 only; the bounds are integers.
            y = (y + ROUND) - ROUND
    mask = (rows < m)[:, None] & inside[None, :]
    tl.store(out_ptr + rows[:, None] * n + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def tile_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    out_scale_ptr,
    a_scale_ptr,
    b_scale_ptr,
    m,
    n,
    k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_a_scale,
    stride_b_scale,
    divisor,
    floor,
    lo,
    hi,
    ROUNDED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FLOOR_ON: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_M: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """``fx_quant::gated_mm`` of operands of any strides; ``n`` columns each of gate and up.

    ``SWAPPED``, rows of the weight are the rows of the tensor cores, which few rows of ``a`` would not fill.
    """
    # pyrefly: ignore[bad-assignment]
    ACC: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    # pyrefly: ignore[bad-assignment]
    SHAPE: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N)
    row, column = corner(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, TILES_M)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (column + tl.arange(0, BLOCK_N)).to(tl.int64)
    up_ptr = b_ptr + tl.cast(n, tl.int64) * stride_bn
    gate, up = tl.zeros(SHAPE, dtype=ACC), tl.zeros(SHAPE, dtype=ACC)
    for step in range(tl.cdiv(k, BLOCK_K)):
        depth = tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        a = matrix(a_ptr, stride_am, stride_ak, rows, depth, m, k)
        if SWAPPED:
            gate = _add(matrix(b_ptr, stride_bn, stride_bk, columns, depth, n, k), tl.trans(a), gate)
            up = _add(matrix(up_ptr, stride_bn, stride_bk, columns, depth, n, k), tl.trans(a), up)
        else:
            gate = _add(a, matrix(b_ptr, stride_bk, stride_bn, depth, columns, k, n), gate)
            up = _add(a, matrix(up_ptr, stride_bk, stride_bn, depth, columns, k, n), up)
    if SWAPPED:
        gate, up = tl.trans(gate), tl.trans(up)
    _finish(
        gate,
        up,
        out_ptr,
        out_scale_ptr,
        a_scale_ptr,
        b_scale_ptr,
        rows,
        columns,
        m,
        n,
        stride_a_scale,
        stride_b_scale,
        divisor,
        floor,
        lo,
        hi,
        ROUNDED,
        QUANTIZED,
        FLOOR_ON,
        RECIPROCAL,
    )


@triton.jit(do_not_specialize=["m"])
def persistent_kernel(
    a,
    gate_weight,
    up_weight,
    out_ptr,
    out_scale_ptr,
    a_scale_ptr,
    b_scale_ptr,
    m,
    n,
    k,
    stride_am,
    stride_a_scale,
    stride_b_scale,
    divisor,
    floor,
    lo,
    hi,
    ROUNDED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FLOOR_ON: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_M: tl.constexpr,
    WARP_SPECIALIZED: tl.constexpr,
):
    """``fx_quant::gated_mm`` by tensor descriptors of the halves of the weight, tile after tile."""
    # pyrefly: ignore[bad-assignment]
    ACC: tl.constexpr = tl.int32 if gate_weight.dtype == tl.int8 else tl.float32
    if WARP_SPECIALIZED:
        # Its consumers share a tile's rows among them, which a descriptor from the host does not follow: Triton 3.6
        # then writes beyond the half of a tile, and 3.9 refuses (github.com/triton-lang/triton/issues/11587).
        # pyrefly: ignore[bad-argument-type]
        a = tl.make_tensor_descriptor(a, [m, k], [stride_am, 1], [BLOCK_M, BLOCK_K])
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZED):
        row, column = corner(index, m, n, BLOCK_M, BLOCK_N, TILES_M)
        gate, up = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC), tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for depth in range(0, k, BLOCK_K):
            a_tile = a.load([row, depth])
            gate = _add(a_tile, gate_weight.load([column, depth]).T, gate)
            up = _add(a_tile, up_weight.load([column, depth]).T, up)
        _finish(
            gate,
            up,
            out_ptr,
            out_scale_ptr,
            a_scale_ptr,
            b_scale_ptr,
            (row + tl.arange(0, BLOCK_M)).to(tl.int64),
            column + tl.arange(0, BLOCK_N),
            m,
            n,
            stride_a_scale,
            stride_b_scale,
            divisor,
            floor,
            lo,
            hi,
            ROUNDED,
            QUANTIZED,
            FLOOR_ON,
            RECIPROCAL,
        )
