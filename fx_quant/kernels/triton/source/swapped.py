"""Triton source of the swapped form, for few rows of ``a``, launched by ``fx_quant/kernels/triton/swapped.py``.

The result is computed transposed: rows of the weight ``[n, k]`` are the rows of the tensor cores, which take no fewer
than 64, and tokens are their columns, of which 16 are enough. One program sums a slice of k of one
``[BLOCK_N, BLOCK_M]`` tile. Where ``SPLIT_K`` programs share a tile, the last of them to arrive adds all partial sums,
always in the order of k, and runs the epilogue.

Sizes and strides are arbitrary; offsets are int64. A weight comes by a tensor descriptor (``DESCRIPTOR``), which reads
zeros beyond its end, or by pointers. Masks have ``other=0.0``, because ``other=0`` does not compile for float8.
"""

from __future__ import annotations

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]

from fx_quant.kernels.triton.source.gemm import matrix, vector
from fx_quant.kernels.triton.source.split import arrive, collect

# Float8 tensor cores of sm89 and sm90 add with about 14 bits: their sums are added to float32 registers this often, as
# in cuBLASLt without fast accumulation.
MAX_IMPRECISE_K = tl.constexpr(128)


@triton.jit
def _place(m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """This program's tile, its part of k, the tile's rows and first column, and the steps along k from and to."""
    program = tl.program_id(0)
    tile, part = program // SPLIT_K, program % SPLIT_K
    tiles_m = tl.cdiv(m, BLOCK_M)
    rows = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = (tile // tiles_m) * BLOCK_N
    total = tl.cdiv(k, BLOCK_K)
    steps = tl.cdiv(total, SPLIT_K)
    first = part * steps
    return tile, part, rows.to(tl.int64), start_n, first, tl.minimum(first + steps, total)


@triton.jit
def _weights(
    b_ptr,
    stride_bk,
    stride_bn,
    start_n,
    step,
    n,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Rows ``[BLOCK_N, BLOCK_K]`` of the weight at ``step`` along k, zero beyond n and k."""
    if DESCRIPTOR:
        codes = b_ptr.load([start_n, step * BLOCK_K])
    else:
        columns = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        depth = tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        codes = matrix(b_ptr, stride_bn, stride_bk, columns, depth, n, k)
    return codes


@triton.jit
def _dot(b, a, acc):
    """``acc + b @ a.T`` of codes ``[BLOCK_N, BLOCK_K]`` and ``[BLOCK_M, BLOCK_K]``."""
    if a.dtype == tl.int8:
        acc = tl.dot(b, tl.trans(a), acc, out_dtype=tl.int32)
    else:
        # Not 0, or the compiler lets the tensor cores add the sum to the caller's.
        IMPRECISE_K: tl.constexpr = min(b.shape[1], MAX_IMPRECISE_K)
        acc += tl.dot(b, tl.trans(a), max_num_imprecise_acc=IMPRECISE_K)
    return acc


@triton.jit
def _epilogue(out_ptr, acc, a_scale, b_scale_ptr, bias_ptr, stride_b_scale, stride_bias, rows, columns, m, n):
    """``out[rows, columns] = cast(acc * a_scale * b_scale + bias)``; ``acc`` is transposed, ``out`` contiguous."""
    mask = (columns < n)[:, None] & (rows < m)[None, :]
    at = out_ptr + rows[None, :] * n + columns[:, None]
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(at, acc, mask=mask)
    else:
        y = acc.to(tl.float32)
        if a_scale is not None:
            y *= a_scale[None, :]
        if b_scale_ptr is not None:
            y *= vector(b_scale_ptr, stride_b_scale, columns, n).to(tl.float32)[:, None]
        if bias_ptr is not None:
            y += vector(bias_ptr, stride_bias, columns, n).to(tl.float32)[:, None]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def scaled_mm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    partials_ptr,
    semaphore_ptr,
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
    SPLIT_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """``fx_quant::scaled_mm`` without ``block``: a stride of 0 repeats a single scale or zero point."""
    # pyrefly: ignore[bad-assignment]
    ACC: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    tile, part, rows, start_n, first, last = _place(m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    for step in range(first, last):
        depth = tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        b = _weights(b_ptr, stride_bk, stride_bn, start_n, step, n, k, BLOCK_N, BLOCK_K, DESCRIPTOR)
        acc = _dot(b, matrix(a_ptr, stride_am, stride_ak, rows, depth, m, k), acc)
    finishes = True
    if SPLIT_K > 1:
        finishes = arrive(partials_ptr, semaphore_ptr, acc, tile, part, SPLIT_K)
    if finishes:
        if SPLIT_K > 1:
            acc = collect(partials_ptr, semaphore_ptr, tile, acc, SPLIT_K)
        columns = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        if a_zero_point_ptr is not None:
            zero_point = vector(a_zero_point_ptr, stride_a_zero_point, rows, m)
            acc -= vector(b_sum_ptr, stride_b_sum, columns, n)[:, None] * zero_point[None, :]
        a_scale = None
        if a_scale_ptr is not None:
            a_scale = vector(a_scale_ptr, stride_a_scale, rows, m).to(tl.float32)
        _epilogue(out_ptr, acc, a_scale, b_scale_ptr, bias_ptr, stride_b_scale, stride_bias, rows, columns, m, n)


@triton.jit
def _group_scales(
    a_scale_ptr,
    b_scale_ptr,
    stride_a_scale_m,
    stride_a_scale_k,
    stride_b_scale_n,
    stride_b_scale_k,
    rows,
    start_n,
    step,
    m,
    n,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
):
    """Scales at ``step`` along k of ``a`` (None when it has none) and of ``b`` (one when the tile needs no more)."""
    group = tl.cast(step, tl.int64) * BLOCK_K // GROUP_K
    # No step begins at k: then there is nothing to load.
    inside = step * BLOCK_K < k
    a_scale = None
    if a_scale_ptr is not None:
        at = a_scale_ptr + group * stride_a_scale_k
        a_scale = vector(at, stride_a_scale_m, rows, tl.where(inside, m, 0)).to(tl.float32)
    start = start_n.to(tl.int64)
    columns = start if GROUP_N % BLOCK_N == 0 else start + tl.arange(0, BLOCK_N)
    at = b_scale_ptr + group * stride_b_scale_k + columns // GROUP_N * stride_b_scale_n
    return a_scale, tl.load(at, mask=columns < tl.where(inside, n, 0), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["m"])
def block_scaled_mm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    partials_ptr,
    semaphore_ptr,
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
    SPLIT_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """``fx_quant::scaled_mm`` with ``block = [GROUP_N, GROUP_K]``; ``BLOCK_K`` divides ``GROUP_K``."""
    # pyrefly: ignore[bad-assignment]
    ACC: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    tile, part, rows, start_n, first, last = _place(m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    a_scale, b_scale = _group_scales(
        a_scale_ptr,
        b_scale_ptr,
        stride_a_scale_m,
        stride_a_scale_k,
        stride_b_scale_n,
        stride_b_scale_k,
        rows,
        start_n,
        first,
        m,
        n,
        k,
        BLOCK_N,
        BLOCK_K,
        GROUP_N,
        GROUP_K,
    )
    for step in range(first, last):
        depth = tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        b = _weights(b_ptr, stride_bk, stride_bn, start_n, step, n, k, BLOCK_N, BLOCK_K, DESCRIPTOR)
        a = matrix(a_ptr, stride_am, stride_ak, rows, depth, m, k)
        # The next step's scales are asked for a step ahead, as nothing else hides how long they take.
        next_a_scale, next_b_scale = _group_scales(
            a_scale_ptr,
            b_scale_ptr,
            stride_a_scale_m,
            stride_a_scale_k,
            stride_b_scale_n,
            stride_b_scale_k,
            rows,
            start_n,
            step + 1,
            m,
            n,
            k,
            BLOCK_N,
            BLOCK_K,
            GROUP_N,
            GROUP_K,
        )
        scaled = _dot(b, a, tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)).to(tl.float32)
        if a_scale_ptr is not None:
            # pyrefly: ignore[unsupported-operation]
            scaled *= a_scale[None, :]
        if GROUP_N % BLOCK_N == 0:
            acc += scaled * b_scale
        else:
            acc += scaled * b_scale[:, None]
        a_scale, b_scale = next_a_scale, next_b_scale
    finishes = True
    if SPLIT_K > 1:
        finishes = arrive(partials_ptr, semaphore_ptr, acc, tile, part, SPLIT_K)
    if finishes:
        if SPLIT_K > 1:
            acc = collect(partials_ptr, semaphore_ptr, tile, acc, SPLIT_K)
        columns = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        _epilogue(out_ptr, acc, None, None, bias_ptr, 0, stride_bias, rows, columns, m, n)
