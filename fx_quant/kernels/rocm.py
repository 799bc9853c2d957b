"""Float8 for AMD GPUs with one scale for each operand: vLLM's skinny matmul for few rows, PyTorch's for more.

Written to the signatures of vLLM 0.13.0 and 0.33.0 (``csrc/rocm/torch_bindings.cpp``), to the checks of
``csrc/rocm/skinny_gemms.cu`` and to the choice that ``ROCmFP8ScaledMMLinearKernel`` makes in each call::

    _rocm_C::wvSplitKQ(Tensor in_a, Tensor in_b, Tensor? in_bias, Tensor! out_c, Tensor scale_a, Tensor scale_b,
                       int CuCount) -> ()

``in_a`` is the weight ``[n, k]`` and ``in_b`` the activation ``[m, k]`` of at most 4 rows. The number of rows is looked
at when a matmul runs, so a graph of any m has both. vLLM is imported when a matmul of few rows runs, never before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.kernels.operands import dense, one_or_each, vllm_op
from fx_quant.kernels.pytorch import scaled_mm
from fx_quant.kernels.registry import (
    ROCM,
    ROCM_FLOAT8,
    TENSOR_SCALES,
    Kernel,
    Requires,
    by_rows,
    register_kernel,
    register_op,
)
from fx_quant.scheme import HALF_DTYPES, Numerics

# wvSplitKQ is compiled for each number of rows up to this.
MAX_ROWS = 4


def compute_units(device: torch.device) -> int:
    """How many compute units the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _skinny(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``wvSplitKQ`` of up to ``MAX_ROWS`` rows, which like ``torch._scaled_mm`` rounds once, after scales and bias."""
    out = a.new_empty((a.shape[0], n), dtype=out_dtype)
    one_a, one_b = (one_or_each(scale, (1, 1), a).reshape(1) for scale in (a_scale, b_scale))
    bias = None if bias is None else bias.contiguous()
    vllm_op("_rocm_C", "wvSplitKQ")(dense(b.t()), dense(a), bias, out, one_a, one_b, compute_units(a.device))
    return out


register_op("rocm_float8", by_rows(MAX_ROWS, _skinny, scaled_mm))

for _feature, _pairs, _suffix in ROCM_FLOAT8:
    register_kernel(
        Kernel(
            name=f"rocm_float8{_suffix}",
            provider="rocm",
            linear_kernel="ROCmFP8ScaledMMLinearKernel",
            op="rocm_float8",
            # What both matmuls take.
            requires=Requires(
                platforms=ROCM,
                features=frozenset({_feature}),
                packages={"vllm": "0.13"},
                codes=_pairs,
                granularities=TENSOR_SCALES,
                out_dtypes=HALF_DTYPES,
                bias_dtypes=HALF_DTYPES,
                bias_as_out=True,
                align=16,
            ),
            numerics=Numerics.SAME_ACCUM,
            note="vLLM's wvSplitKQ for up to 4 rows, torch._scaled_mm for more",
        ),
        priority=40,
    )
