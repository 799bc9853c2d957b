"""Triton source of half-precision rows by a packed weight, launched by ``kernels/triton/weight_only.py``.

Only that file imports this one, and only when a matmul runs. The weight's rows are the rows of the tensor cores' first
operand, which they read from registers, where the codes are decoded; the rows of ``x`` are their columns. A packed
weight is ``[blocks, n, 16]`` int32 (``kernels/triton/weight_only_kernels.py`` packs it) or ``[blocks, n, 64]`` float8,
so that a tile's part of a block is contiguous.
"""

from __future__ import annotations

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]

from fx_quant.kernels.triton.source.gemm import corner, matrix, vector
from fx_quant.kernels.triton.source.split import arrive, collect


@triton.jit
def _halves(words, HALF: tl.constexpr):
    """Both halves of each word as numbers, the low one first: ``[rows, words]`` -> ``[rows, 2 words]``.

    Codes are taken out of whole words, two by one instruction, and the halves split for the type system alone: in the
    machine code the registers stay what they are.
    """
    halves = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    return tl.reshape(halves, (words.shape[0], 2 * words.shape[1])).to(HALF, bitcast=True)


@triton.jit
def _along_k(first, second):
    """``first`` and then ``second``, along columns."""
    both = tl.permute(tl.join(first, second), (0, 2, 1))
    return tl.reshape(both, (first.shape[0], 2 * first.shape[1]))


@triton.jit
def _plane(words, INDEX: tl.constexpr, CODES: tl.constexpr, HALF: tl.constexpr):
    """Codes ``32 INDEX`` to ``32 INDEX + 31`` of each row's block, as numbers.

    The last bit of ``ONE`` counts 1, so that a code in its lowest bits adds itself. All differences are exact.
    """
    # pyrefly: ignore[bad-assignment]
    ONE: tl.constexpr = 128.0 if tl.bfloat16 == HALF else 1024.0
    # pyrefly: ignore[bad-assignment]
    BITS: tl.constexpr = 0x43004300 if tl.bfloat16 == HALF else 0x64006400
    if CODES == "int4":
        numbers = _halves(words >> (4 * INDEX) & 0x000F000F | BITS, HALF) - (ONE + 8.0)
    else:
        # Bfloat16 has 7 bits below its first, so the sign of an int8 code becomes the 128 that is taken off too much.
        shifted = words >> (8 * INDEX)
        numbers = _halves(shifted & 0x007F007F | BITS, HALF) - _halves(shifted & 0x00800080 | BITS, HALF)
        if CODES == "uint8":
            numbers += 128.0
    return numbers


@triton.jit
def _numbers(words, FIRST: tl.constexpr, DEPTH: tl.constexpr, CODES: tl.constexpr, HALF: tl.constexpr):
    """``DEPTH`` codes of each row from plane ``FIRST`` on, as numbers."""
    if CODES == "float8":
        # Exact all the way, and faster than the direct conversion to bfloat16, of which a multiprocessor of sm90 does
        # 16 in a cycle.
        numbers = words.to(tl.float16)
        if tl.bfloat16 == HALF:
            numbers = numbers.to(tl.float32).to(HALF)
    else:
        numbers = _plane(words, FIRST, CODES, HALF)
        if DEPTH >= 64:
            numbers = _along_k(numbers, _plane(words, FIRST + 1, CODES, HALF))
        if DEPTH == 128:
            third = _plane(words, FIRST + 2, CODES, HALF)
            numbers = _along_k(numbers, _along_k(third, _plane(words, FIRST + 3, CODES, HALF)))
    return numbers


@triton.jit
def _factors(
    pointer,
    stride_n,
    stride_k,
    columns,
    block,
    n,
    k,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Scales or zero points ``[columns, PARTS]`` of the groups of one block, zero beyond n and k."""
    starts = tl.cast(block, tl.int64) * BLOCK_K + tl.arange(0, PARTS) * (BLOCK_K // PARTS)
    at = pointer + (columns // GROUP_N * stride_n)[:, None] + (starts // GROUP_K * stride_k)[None, :]
    return tl.load(at, mask=(columns < n)[:, None] & (starts < k)[None, :], other=0.0)


@triton.jit
def _part(factors, INDEX: tl.constexpr):
    """Column ``INDEX`` of what ``_factors`` loaded."""
    if factors.shape[1] == 1:
        part = tl.reshape(factors, (factors.shape[0],))
    elif factors.shape[1] == 2:
        first, second = tl.split(factors)
        part = second if INDEX == 1 else first
    else:
        even, odd = tl.split(tl.reshape(factors, (factors.shape[0], 2, 2)))
        first, second = tl.split(odd if INDEX % 2 == 1 else even)
        part = second if INDEX >= 2 else first
    return part


@triton.jit(do_not_specialize=["m"])
def packed_weight_kernel(
    x_ptr,
    packed_ptr,
    out_ptr,
    partials_ptr,
    semaphore_ptr,
    scale_ptr,
    zero_point_ptr,
    bias_ptr,
    m,
    n,
    k,
    stride_xm,
    stride_xk,
    stride_scale_n,
    stride_scale_k,
    stride_zero_point_n,
    stride_zero_point_k,
    stride_bias,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TILES_M: tl.constexpr,
):
    """``fx_quant::weight_only_mm`` of a packed weight.

    Where there are groups along k, ``PARTS`` to a block, their scales are applied to float32 sums of each; else
    (``GROUP_K`` is 0) at the end. ``SPLIT_K`` programs share a tile, as in ``triton_swapped.py``.
    """
    # pyrefly: ignore[bad-assignment]
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    # pyrefly: ignore[bad-assignment]
    WORDS: tl.constexpr = 64 if CODES == "float8" else 16
    DEPTH: tl.constexpr = BLOCK_K // PARTS
    tile, part = tl.program_id(0) // SPLIT_K, tl.program_id(0) % SPLIT_K
    row, column = corner(tile, m, n, BLOCK_M, BLOCK_N, TILES_M)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (column + tl.arange(0, BLOCK_N)).to(tl.int64)
    total = tl.cdiv(k, BLOCK_K)
    steps = tl.cdiv(total, SPLIT_K)
    first = part * steps
    zero_point = tl.zeros((BLOCK_N,), dtype=HALF)
    if zero_point_ptr is not None and GROUP_K == 0:
        # A name of its own: the loop's pointers have another type, which Triton would take it to have too.
        of_rows = zero_point_ptr + columns // GROUP_N * stride_zero_point_n
        zero_point = tl.load(of_rows, mask=columns < n, other=0.0).to(HALF)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    scales = None
    if GROUP_K:
        scales = _factors(
            scale_ptr, stride_scale_n, stride_scale_k, columns, first, n, k, GROUP_N, GROUP_K, BLOCK_K, PARTS
        )
    for block in range(first, tl.minimum(first + steps, total)):
        at = packed_ptr + ((tl.cast(block, tl.int64) * n + columns) * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
        words = tl.load(at, mask=(columns < n)[:, None], other=0.0)
        next_scales, zero_points = None, None
        if GROUP_K:
            # A block ahead, as nothing else hides how long they take.
            next_scales = _factors(
                scale_ptr, stride_scale_n, stride_scale_k, columns, block + 1, n, k, GROUP_N, GROUP_K, BLOCK_K, PARTS
            )
            if zero_point_ptr is not None:
                zero_points = _factors(
                    zero_point_ptr,
                    stride_zero_point_n,
                    stride_zero_point_k,
                    columns,
                    block,
                    n,
                    k,
                    GROUP_N,
                    GROUP_K,
                    BLOCK_K,
                    PARTS,
                )
        for index in tl.static_range(PARTS):
            depth = tl.cast(block, tl.int64) * BLOCK_K + index * DEPTH + tl.arange(0, DEPTH)
            x = matrix(x_ptr, stride_xm, stride_xk, rows, depth, m, k)
            numbers = _numbers(words, index * (DEPTH // 32), DEPTH, CODES, HALF)
            if zero_point_ptr is not None:
                if GROUP_K:
                    numbers -= _part(zero_points, index).to(numbers.dtype)[:, None]
                else:
                    numbers -= zero_point[:, None]
            if GROUP_K:
                acc += tl.dot(numbers, tl.trans(x)) * _part(scales, index).to(tl.float32)[:, None]
            else:
                acc = tl.dot(numbers, tl.trans(x), acc)
        if GROUP_K:
            scales = next_scales
    finishes = True
    if SPLIT_K > 1:
        finishes = arrive(partials_ptr, semaphore_ptr, acc, tile, part, SPLIT_K)
    if finishes:
        if SPLIT_K > 1:
            acc = collect(partials_ptr, semaphore_ptr, tile, acc, SPLIT_K)
        if GROUP_K == 0:
            at = scale_ptr + columns // GROUP_N * stride_scale_n
            acc *= tl.load(at, mask=columns < n, other=0.0).to(tl.float32)[:, None]
        if bias_ptr is not None:
            acc += vector(bias_ptr, stride_bias, columns, n).to(tl.float32)[:, None]
        mask = (columns < n)[:, None] & (rows < m)[None, :]
        tl.store(out_ptr + rows[None, :] * n + columns[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)
