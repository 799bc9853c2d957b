"""Triton source of the persistent form, launched by ``kernels/triton/persistent.py``, which alone imports this file.

Every program computes tile after tile. Tiles of ``a`` ``[m, k]`` and of the weight ``[n, k]`` are loaded by tensor
descriptors, which read zeros beyond the operands: sizes need not be multiples of a tile. Absent operands are None,
which Triton compiles out.
"""

from __future__ import annotations

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]

from fx_quant.kernels.triton.source.gemm import corner


@triton.jit
def _vector(pointer, stride, indices, size):
    """``x[indices]`` of a strided vector, zero from ``size`` on; float32 unless it is int32."""
    x = tl.load(pointer + indices.to(tl.int64) * stride, mask=indices < size, other=0.0)
    return x if x.dtype == tl.int32 else x.to(tl.float32)


@triton.jit(do_not_specialize=["m", "stride_a_scale_k"])
def scaled_mm_kernel(
    a,
    b,
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
    stride_a_scale_m,
    stride_a_scale_k,
    stride_b_scale_n,
    stride_b_scale_k,
    stride_bias,
    stride_a_zero_point,
    stride_b_sum,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    IMPRECISE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_M: tl.constexpr,
    WARP_SPECIALIZED: tl.constexpr,
    FLATTENED: tl.constexpr,
):
    """``fx_quant::scaled_mm``: a stride of 0 repeats a single scale, zero point or bias.

    Where ``GROUP_K`` is not 0, scales of blocks of ``GROUP_N`` columns and ``GROUP_K`` products are multiplied with
    each other, then with the block's sum. ``b`` is a descriptor of tiles ``[BLOCK_N, BLOCK_K]``; ``a`` is one of tiles
    ``[BLOCK_M, BLOCK_K]``, or a pointer with warp specialization. Where ``IMPRECISE_K`` is not 0, what the tensor cores
    sum up leaves them after as many products.
    """
    # pyrefly: ignore[bad-assignment]
    ACC: tl.constexpr = tl.int32 if b.dtype == tl.int8 else tl.float32
    if WARP_SPECIALIZED:
        # Its consumers share a tile's rows among them, which a descriptor from the host does not follow: Triton 3.6
        # then writes beyond the half of a tile, and 3.9 refuses (github.com/triton-lang/triton/issues/11587).
        # pyrefly: ignore[bad-argument-type]
        a = tl.make_tensor_descriptor(a, [m, k], [stride_am, 1], [BLOCK_M, BLOCK_K])
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for index in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTENED, warp_specialize=WARP_SPECIALIZED
    ):
        row, column = corner(index, m, n, BLOCK_M, BLOCK_N, TILES_M)
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for depth in range(0, k, BLOCK_K):
            a_tile, b_tile = a.load([row, depth]), b.load([column, depth]).T
            if GROUP_K:
                group = tl.cast(depth // GROUP_K, tl.int64)
                at = b_scale_ptr + group * stride_b_scale_k
                if GROUP_N % BLOCK_N == 0:
                    scale = tl.load(at + column // GROUP_N * stride_b_scale_n).to(tl.float32)
                else:
                    scale = _vector(at, stride_b_scale_n, columns // GROUP_N, tl.cdiv(n, GROUP_N))[None, :]
                if a_scale_ptr is not None:
                    at = a_scale_ptr + group * stride_a_scale_k
                    scale = _vector(at, stride_a_scale_m, rows, m)[:, None] * scale
                acc = tl.fma(tl.dot(a_tile, b_tile, out_dtype=ACC), scale, acc)
            elif IMPRECISE_K:
                acc += tl.dot(a_tile, b_tile, max_num_imprecise_acc=IMPRECISE_K, out_dtype=ACC)
            else:
                acc = tl.dot(a_tile, b_tile, acc, out_dtype=ACC)
        if a_zero_point_ptr is not None:
            zero_point = _vector(a_zero_point_ptr, stride_a_zero_point, rows, m)
            acc -= zero_point[:, None] * _vector(b_sum_ptr, stride_b_sum, columns, n)[None, :]
        if out_ptr.dtype.element_ty != tl.int32:
            acc = acc.to(tl.float32)
            if GROUP_K == 0 and a_scale_ptr is not None:
                acc *= _vector(a_scale_ptr, stride_a_scale_m, rows, m)[:, None]
            if GROUP_K == 0 and b_scale_ptr is not None:
                acc *= _vector(b_scale_ptr, stride_b_scale_n, columns, n)[None, :]
            if bias_ptr is not None:
                acc += _vector(bias_ptr, stride_bias, columns, n)[None, :]
        # Not by a descriptor: its buffer in shared memory would take the place of a stage.
        offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
