"""Triton source of the ``triton`` provider's matmuls, in their portable form, launched by ``kernels/triton/tile.py``.

Only that file imports this one, and only when a matmul runs: importing Triton is slow, and it may not be there. One
program computes one ``[BLOCK_M, BLOCK_N]`` tile of the result. Sizes are arbitrary (every load and the store are
masked), strides too, and offsets are int64. Absent operands are None, which Triton compiles out.

Masks have ``other=0.0`` throughout, because ``other=0`` does not compile for float8.
"""

from __future__ import annotations

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]

# Float8 tensor cores of sm89 and sm90 add with about 14 bits: their sums are added to float32 registers this often, as
# in cuBLASLt without fast accumulation.
MAX_IMPRECISE_K = tl.constexpr(128)


@triton.jit
def corner(index, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_M: tl.constexpr):
    """First row and column of a tile; bands of ``TILES_M`` tiles share what they read through the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = index // (TILES_M * tiles_n)
    height = tl.minimum(tiles_m - band * TILES_M, TILES_M)
    within = index % (TILES_M * tiles_n)
    return (band * TILES_M + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def _tile_indices(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_M: tl.constexpr):
    """Rows and columns of this program's tile."""
    row, column = corner(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, TILES_M)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    return rows.to(tl.int64), columns.to(tl.int64)


@triton.jit
def vector(pointer, stride, indices, size):
    """``x[indices]`` of a strided vector, zero from ``size`` on."""
    return tl.load(pointer + indices * stride, mask=indices < size, other=0.0)


@triton.jit
def matrix(pointer, row_stride, column_stride, rows, columns, row_end, column_end):
    """``x[rows, columns]`` of a strided matrix, zero from ``row_end`` and ``column_end`` on."""
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return tl.load(pointer + (rows[:, None] * row_stride + columns[None, :] * column_stride), mask=mask, other=0.0)


@triton.jit
def _products(
    a_ptr,
    b_ptr,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    rows,
    columns,
    depth,
    m,
    n,
    end,
    BLOCK_K: tl.constexpr,
):
    """``sum a[rows, depth] * b[depth, columns]`` of codes up to ``end``: int32 for int8, float32 for float8."""
    INTEGER: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    # Not 0 for float8, or the compiler lets the tensor cores add the sum to the caller's.
    # pyrefly: ignore[bad-assignment]
    IMPRECISE_K: tl.constexpr = 0 if INTEGER else min(BLOCK_K, MAX_IMPRECISE_K)
    a = matrix(a_ptr, stride_am, stride_ak, rows, depth, m, end)
    b = matrix(b_ptr, stride_bk, stride_bn, depth, columns, end, n)
    return tl.dot(a, b, max_num_imprecise_acc=IMPRECISE_K, out_dtype=tl.int32 if INTEGER else tl.float32)


@triton.jit
def _store(out_ptr, y, bias_ptr, stride_bias, rows, columns, m, n):
    """``out[rows, columns] = cast(y + bias)`` into a contiguous ``out``."""
    if bias_ptr is not None:
        y += vector(bias_ptr, stride_bias, columns, n).to(tl.float32)[None, :]
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(out_ptr + rows[:, None] * n + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def scaled_mm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    a_zero_point_ptr,
    b_sum_ptr,
    m,
    n,
    k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_a_scale,
    stride_b_scale,
    stride_bias,
    stride_a_zero_point,
    stride_b_sum,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_M: tl.constexpr,
):
    """``fx_quant::scaled_mm`` without ``block``: a stride of 0 repeats a single scale or zero point."""
    # pyrefly: ignore[bad-assignment]
    ACC: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    rows, columns = _tile_indices(m, n, BLOCK_M, BLOCK_N, TILES_M)
    along_k = tl.arange(0, BLOCK_K).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(tl.cdiv(k, BLOCK_K)):
        depth = tl.cast(step, tl.int64) * BLOCK_K + along_k
        acc += _products(
            a_ptr, b_ptr, stride_am, stride_ak, stride_bk, stride_bn, rows, columns, depth, m, n, k, BLOCK_K
        )
    if a_zero_point_ptr is not None:
        zero_point = vector(a_zero_point_ptr, stride_a_zero_point, rows, m)
        acc -= zero_point[:, None] * vector(b_sum_ptr, stride_b_sum, columns, n)[None, :]
    if out_ptr.dtype.element_ty == tl.int32:
        _store(out_ptr, acc, None, 0, rows, columns, m, n)
    else:
        y = acc.to(tl.float32)
        if a_scale_ptr is not None:
            y *= vector(a_scale_ptr, stride_a_scale, rows, m).to(tl.float32)[:, None]
        if b_scale_ptr is not None:
            y *= vector(b_scale_ptr, stride_b_scale, columns, n).to(tl.float32)[None, :]
        _store(out_ptr, y, bias_ptr, stride_bias, rows, columns, m, n)


@triton.jit(do_not_specialize=["m"])
def block_scaled_mm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_a_scale_m,
    stride_a_scale_k,
    stride_b_scale_n,
    stride_b_scale_k,
    stride_bias,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_M: tl.constexpr,
):
    """``fx_quant::scaled_mm`` with ``block = [GROUP_N, GROUP_K]``: the scales are applied group by group along k."""
    STEPS: tl.constexpr = (GROUP_K + BLOCK_K - 1) // BLOCK_K
    rows, columns = _tile_indices(m, n, BLOCK_M, BLOCK_N, TILES_M)
    along_k = tl.arange(0, BLOCK_K).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for index in range(tl.cdiv(k, GROUP_K)):
        group = tl.cast(index, tl.int64)
        end = tl.minimum((group + 1) * GROUP_K, k)
        depth = group * GROUP_K + along_k
        part = _products(
            a_ptr, b_ptr, stride_am, stride_ak, stride_bk, stride_bn, rows, columns, depth, m, n, end, BLOCK_K
        )
        for _ in range(1, STEPS):
            depth += BLOCK_K
            part += _products(
                a_ptr, b_ptr, stride_am, stride_ak, stride_bk, stride_bn, rows, columns, depth, m, n, end, BLOCK_K
            )
        scaled = part.to(tl.float32)
        if a_scale_ptr is not None:
            scaled *= vector(a_scale_ptr + group * stride_a_scale_k, stride_a_scale_m, rows, m).to(tl.float32)[:, None]
        b_scale = tl.load(
            b_scale_ptr + group * stride_b_scale_k + columns // GROUP_N * stride_b_scale_n, mask=columns < n, other=0.0
        )
        acc += scaled * b_scale.to(tl.float32)[None, :]
    _store(out_ptr, acc, bias_ptr, stride_bias, rows, columns, m, n)


@triton.jit
def _weight_codes(
    b_ptr,
    stride_bk,
    stride_bn,
    start,
    columns,
    end,
    n,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Codes ``[BLOCK_K, BLOCK_N]`` of the weight from ``start`` along k; packed int4 codes are unpacked to int8.

    Codes from ``end`` on are arbitrary but finite; they meet zeros of the activation.
    """
    if PACKED:
        pairs = start // 2 + tl.arange(0, BLOCK_K // 2).to(tl.int64)
        packed = matrix(b_ptr, stride_bk, stride_bn, pairs, columns, end // 2, n)
        nibbles = tl.permute(tl.join(packed & 0xF, packed >> 4), (0, 2, 1))
        codes = tl.reshape(nibbles, (BLOCK_K, BLOCK_N)).to(tl.int8) - 8
    else:
        codes = matrix(b_ptr, stride_bk, stride_bn, start + tl.arange(0, BLOCK_K).to(tl.int64), columns, end, n)
    return codes


@triton.jit(do_not_specialize=["m"])
def weight_only_mm_kernel(
    x_ptr,
    b_ptr,
    out_ptr,
    b_scale_ptr,
    b_zero_point_ptr,
    bias_ptr,
    m,
    n,
    k,
    stride_xm,
    stride_xk,
    stride_bk,
    stride_bn,
    stride_scale_n,
    stride_scale_k,
    stride_zero_point_n,
    stride_zero_point_k,
    stride_bias,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_M: tl.constexpr,
):
    """``fx_quant::weight_only_mm``: codes without their zero point, exact in the activation's dtype, are multiplied.

    The scales are applied to the float32 sums: of a group of ``GROUP_K`` along k, or at the end when ``GROUP_K`` is 0.
    """
    # One group reaches beyond k where there are no groups: the loop is then one over k.
    # pyrefly: ignore[bad-assignment]
    STEPS: tl.constexpr = (GROUP_K + BLOCK_K - 1) // BLOCK_K if GROUP_K else 1
    DEPTH: tl.constexpr = GROUP_K if GROUP_K else BLOCK_K
    rows, columns = _tile_indices(m, n, BLOCK_M, BLOCK_N, TILES_M)
    along_n = columns // GROUP_N
    along_k = tl.arange(0, BLOCK_K).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    zero_point = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if GROUP_K == 0 and b_zero_point_ptr is not None:
        zero_point = tl.load(b_zero_point_ptr + along_n * stride_zero_point_n, mask=columns < n, other=0.0)
        zero_point = zero_point.to(tl.float32)
    for index in range(tl.cdiv(k, DEPTH)):
        group = tl.cast(index, tl.int64)
        end = tl.minimum((group + 1) * DEPTH, k)
        if GROUP_K:
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if b_zero_point_ptr is not None:
                at = b_zero_point_ptr + group * stride_zero_point_k
                zero_point = tl.load(at + along_n * stride_zero_point_n, mask=columns < n, other=0.0).to(tl.float32)
        else:
            part = acc
        for step in range(STEPS):
            start = group * DEPTH + step * BLOCK_K
            x = matrix(x_ptr, stride_xm, stride_xk, rows, start + along_k, m, end)
            codes = _weight_codes(b_ptr, stride_bk, stride_bn, start, columns, end, n, BLOCK_K, BLOCK_N, PACKED)
            if b_zero_point_ptr is not None:
                codes = codes.to(tl.float32) - zero_point[None, :]
            part = tl.dot(x, codes.to(x.dtype), part, input_precision="ieee")
        if GROUP_K:
            at = b_scale_ptr + group * stride_scale_k
            scale = tl.load(at + along_n * stride_scale_n, mask=columns < n, other=0.0)
            acc += part * scale.to(tl.float32)[None, :]
        else:
            acc = part
    if GROUP_K == 0:
        scale = tl.load(b_scale_ptr + along_n * stride_scale_n, mask=columns < n, other=0.0)
        acc *= scale.to(tl.float32)[None, :]
    _store(out_ptr, acc, bias_ptr, stride_bias, rows, columns, m, n)
