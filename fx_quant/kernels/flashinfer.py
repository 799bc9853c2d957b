"""FlashInfer's float8 kernels for NVIDIA GPUs.

Written to the signatures of flashinfer-python 0.6.0 and 0.7.2.post1 (``flashinfer/gemm/gemm_base.py``), to the tensor
maps of ``csrc/nv_internal/tensorrt_llm/deep_gemm/fp8_gemm.cuh`` and to ``csrc/fp8_blockscale_gemm_sm90_binding.cu``::

    flashinfer.bmm_fp8(A, B, A_scale, B_scale, dtype, out=None, backend="cublas") -> Tensor [b, m, n]
    flashinfer.gemm.fp8_blockscale_gemm_sm90(input, weight, input_scale=None, weight_scale=None, out=None,
                                             out_dtype=None) -> Tensor [m, n]

FlashInfer is imported when a matmul runs, never before. It compiles its kernels when they are first used, unless the
package with compiled ones is installed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.kernels.operands import BLOCK, BLOCK_SCALES, add_bias, dense, one_or_each
from fx_quant.kernels.registry import (
    CUDA,
    E4M3_PAIRS,
    TENSOR_SCALES,
    Kernel,
    Requires,
    register_kernel,
    register_op,
)
from fx_quant.scheme import HALF_DTYPES, Numerics


def _tensor(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``bmm_fp8`` with one batch."""
    if not a.shape[0]:
        return a.new_empty((0, n), dtype=out_dtype)
    import flashinfer  # pyrefly: ignore [missing-import]

    # "auto" is CUTLASS on sm100 and newer, or the fastest that FlashInfer's autotuner has found.
    out = flashinfer.bmm_fp8(
        dense(a).unsqueeze(0),
        dense(b.t()).t().unsqueeze(0),
        one_or_each(a_scale, (1, 1), a).reshape(1),
        one_or_each(b_scale, (1, 1), a).reshape(1),
        out_dtype,
        backend="auto",
    )
    return add_bias(out.reshape(a.shape[0], n), bias)


def rows_in_fours(scale: Tensor) -> Tensor:
    """``scale [m, k / 128]`` column by column, each column ``m`` rounded up to 4 elements long: strides ``(1, ...)``.

    The rows that are added to the memory, and are not in the result, are 1.
    """
    m = scale.shape[0]
    return F.pad(scale.float().t(), (0, -m % 4), value=1.0).contiguous().t()[:m]


def _blocks(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``fp8_blockscale_gemm_sm90``, then the bias."""
    if not a.shape[0]:
        return a.new_empty((0, n), dtype=out_dtype)
    from flashinfer.gemm import fp8_blockscale_gemm_sm90  # pyrefly: ignore [missing-import]

    if a_scale is None:
        a_scale = a.new_ones((a.shape[0], a.shape[1] // BLOCK), dtype=torch.float32)
    # The kernel reads the activation's scales as TMA wants them; the Python function in front of it checks no strides.
    out = fp8_blockscale_gemm_sm90(
        dense(a), dense(b.t()), rows_in_fours(a_scale), b_scale.float().contiguous(), out_dtype=out_dtype
    )
    return add_bias(out, bias)


for _name, _body in (("flashinfer_float8", _tensor), ("flashinfer_float8_block_sm90", _blocks)):
    register_op(_name, _body)

register_kernel(
    Kernel(
        name="flashinfer_float8",
        provider="flashinfer",
        linear_kernel="FlashInferFP8ScaledMMLinearKernel",
        op="flashinfer_float8",
        # On sm89 and sm90 it has cuBLASLt and cuDNN alone, and PyTorch brings cuBLASLt with a bias in its epilogue.
        requires=Requires(
            bias=False,
            platforms=CUDA,
            min_capability=100,
            packages={"flashinfer-python": "0.6"},
            codes=E4M3_PAIRS,
            granularities=TENSOR_SCALES,
            out_dtypes=HALF_DTYPES,
            align=16,
        ),
        numerics=Numerics.SAME_ACCUM,
        note="flashinfer.bmm_fp8, tensor-wise scales",
    ),
    priority=50,
)
register_kernel(
    Kernel(
        name="flashinfer_float8_block_sm90",
        provider="flashinfer",
        linear_kernel="FlashInferFP8BlockScaledMMLinearKernel",
        op="flashinfer_float8_block_sm90",
        requires=Requires(
            platforms=CUDA,
            min_capability=90,
            max_capability=90,
            packages={"flashinfer-python": "0.6"},
            codes=E4M3_PAIRS,
            granularities=BLOCK_SCALES,
            # It takes a float16 result and writes bfloat16 bits to it.
            out_dtypes=frozenset({torch.bfloat16}),
            # k in whole blocks, n in multiples of 64.
            align=BLOCK,
        ),
        # It adds no bias, so a bias meets a rounded sum: where the two cancel, that rounding is what is left.
        numerics=Numerics.REASSOCIATED,
        note="flashinfer's DeepGEMM, scales of 1 x 128 and 128 x 128, a bias added after it",
    ),
    priority=50,
)
