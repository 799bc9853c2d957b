"""CUTLASS kernels for NVIDIA GPUs, from vLLM's op library.

Written to the signatures of vLLM 0.13.0 and 0.33.0 (``csrc/torch_bindings.cpp``) and to the checks of
``csrc/quantization/w8a8/cutlass`` (``scaled_mm_entry.cu``, ``scaled_mm_c2x.cu``, ``c3x/scaled_mm_helper.hpp`` and
``c3x/scaled_mm_blockwise_sm90_fp8_dispatch.cuh``)::

    _C::cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()
    _C::cutlass_scaled_mm_azp(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor azp_adj,
                              Tensor? azp, Tensor? bias) -> ()

``a [m, k]`` is row-major and ``b [k, n]`` column-major, both dense, with ``n`` and ``k`` in multiples of 16 bytes. vLLM
is imported when a matmul runs, never before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.kernels.operands import BLOCK, BLOCK_SCALES, add_bias, dense, one_or_each, vllm_op, whole_blocks
from fx_quant.kernels.registry import (
    ACTIVATION,
    CUDA,
    E4M3_PAIRS,
    INT8_MAX_K,
    INT8_PAIRS,
    ROW_SCALES,
    Kernel,
    Requires,
    register_kernel,
    register_op,
)
from fx_quant.ops import column_sums
from fx_quant.scheme import HALF_DTYPES, Numerics


def _rows(a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, **_) -> Tensor:
    """``cutlass_scaled_mm``, or ``cutlass_scaled_mm_azp`` where the activation has a zero point."""
    out = a.new_empty((a.shape[0], n), dtype=out_dtype)
    if not a.shape[0]:
        return out
    a, column_major = dense(a), dense(b.t()).t()
    scales = one_or_each(a_scale, (-1, 1), a), one_or_each(b_scale, (1, -1), a)
    bias = None if bias is None else bias.contiguous()
    if a_zero_point is None:
        vllm_op("_C", "cutlass_scaled_mm")(out, a, column_major, *scales, bias)
        return out
    sums = (column_sums(b) if b_sum is None else b_sum).contiguous()
    if a_zero_point.numel() == 1:
        # One zero point for all rows is wanted as a part of the sums.
        sums, zero_points = sums * a_zero_point.reshape(()), None
    else:
        zero_points = a_zero_point.reshape(-1).contiguous()
    vllm_op("_C", "cutlass_scaled_mm_azp")(out, a, column_major, *scales, sums, zero_points, bias)
    return out


def _blocks(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``cutlass_scaled_mm`` with scales of 1 x 128 and 128 x 128, then the bias."""
    out = a.new_empty((a.shape[0], n), dtype=out_dtype)
    if not a.shape[0]:
        return out
    a, b = whole_blocks(a, b)
    if a_scale is None:
        a_scale = a.new_ones((a.shape[0], a.shape[1] // BLOCK), dtype=torch.float32)
    # Both are read as raw memory: the activation's column by column, the weight's along k.
    scale_a = a_scale.float().t().contiguous().t()
    scale_b = b_scale.float().contiguous().t()
    vllm_op("_C", "cutlass_scaled_mm")(out, dense(a), dense(b.t()).t(), scale_a, scale_b, None)
    return add_bias(out, bias)


for _name, _body in (("cutlass_float8", _rows), ("cutlass_int8", _rows), ("cutlass_float8_block", _blocks)):
    register_op(_name, _body)

register_kernel(
    Kernel(
        name="cutlass_float8",
        provider="cutlass",
        linear_kernel="CutlassFP8ScaledMMLinearKernel",
        op="cutlass_float8",
        requires=Requires(
            platforms=CUDA,
            min_capability=89,
            packages={"vllm": "0.13"},
            codes=E4M3_PAIRS,
            granularities=ROW_SCALES,
            out_dtypes=HALF_DTYPES,
            bias_dtypes=HALF_DTYPES,
            bias_as_out=True,
            align=16,
        ),
        numerics=Numerics.SAME_ACCUM,
        note="vLLM's CUTLASS matmul, scales and bias in its epilogue",
    ),
    priority=40,
)
register_kernel(
    Kernel(
        name="cutlass_float8_block",
        provider="cutlass",
        linear_kernel="CutlassFP8BlockScaledMMLinearKernel",
        op="cutlass_float8_block",
        # Before 0.33 it wanted m in multiples of 4 on sm90.
        requires=Requires(
            platforms=CUDA,
            min_capability=90,
            packages={"vllm": "0.33"},
            codes=E4M3_PAIRS,
            granularities=BLOCK_SCALES,
            out_dtypes=HALF_DTYPES,
            align=16,
        ),
        # It adds no bias, so a bias meets a rounded sum: where the two cancel, that rounding is what is left.
        numerics=Numerics.REASSOCIATED,
        note="vLLM's CUTLASS matmul, scales of 1 x 128 and 128 x 128, a bias added after it",
    ),
    priority=40,
)
register_kernel(
    Kernel(
        name="cutlass_int8",
        provider="cutlass",
        linear_kernel="CutlassInt8ScaledMMLinearKernel",
        op="cutlass_int8",
        # Tensor cores from sm100 on have no int8 that it uses, and its zero point has kernels up to sm90.
        requires=Requires(
            platforms=CUDA,
            min_capability=75,
            max_capability=99,
            packages={"vllm": "0.13"},
            codes=INT8_PAIRS,
            granularities=ROW_SCALES,
            asymmetric=ACTIVATION,
            out_dtypes=HALF_DTYPES,
            bias_dtypes=HALF_DTYPES,
            bias_as_out=True,
            align=16,
            # Up to sm89 its sum saturates.
            max_k=INT8_MAX_K,
        ),
        numerics=Numerics.SAME_ACCUM,
        note="vLLM's CUTLASS matmul, scales, zero point and bias in its epilogue",
    ),
    priority=40,
)
