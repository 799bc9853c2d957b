"""The skinny float8 matmul for AMD GPUs, from vLLM's op library: few rows, one scale for each operand.

Written to the signatures of vLLM 0.13.0 and 0.33.0 (``csrc/rocm/torch_bindings.cpp``) and to the checks of
``csrc/rocm/skinny_gemms.cu``::

    _rocm_C::wvSplitKQ(Tensor in_a, Tensor in_b, Tensor? in_bias, Tensor! out_c, Tensor scale_a, Tensor scale_b,
                       int CuCount) -> ()

``in_a`` is the weight ``[n, k]`` and ``in_b`` the activation ``[m, k]`` of at most 4 rows. vLLM is imported when a
matmul runs, never before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.kernels.base import KERNEL_SCHEMA, Kernel, Requires, fake_kernel, register_kernel
from fx_quant.kernels.operands import dense, one_or_each, vllm_op
from fx_quant.ops import MATMUL_TAGS, register
from fx_quant.scheme import Granularity, Numerics

_HALF = frozenset({torch.bfloat16, torch.float16})
_TENSOR = Granularity.PER_TENSOR

# It has one kernel for each number of rows.
MAX_ROWS = 4


def compute_units(device: torch.device) -> int:
    """How many compute units the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _skinny(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``wvSplitKQ``: scales and bias are applied before its only rounding."""
    out = a.new_empty((a.shape[0], n), dtype=out_dtype)
    if not a.shape[0]:
        return out
    one_a, one_b = (one_or_each(scale, (1, 1), a).reshape(1) for scale in (a_scale, b_scale))
    bias = None if bias is None else bias.contiguous()
    vllm_op("_rocm_C", "wvSplitKQ")(dense(b.t()), dense(a), bias, out, one_a, one_b, compute_units(a.device))
    return out


register(f"rocm_skinny_float8{KERNEL_SCHEMA}", _skinny, fake_kernel("rocm_skinny_float8"), MATMUL_TAGS)

for _suffix, _feature, _codes in (
    ("", "float8", torch.float8_e4m3fn),
    ("_fnuz", "float8_fnuz", torch.float8_e4m3fnuz),
):
    register_kernel(
        Kernel(
            name=f"rocm_skinny_float8{_suffix}",
            provider="rocm",
            op="rocm_skinny_float8",
            requires=Requires(
                platforms=frozenset({"rocm"}),
                features=frozenset({_feature}),
                packages={"vllm": "0.13"},
                codes=frozenset({(_codes, _codes)}),
                granularities=frozenset({(_TENSOR, _TENSOR)}),
                out_dtypes=_HALF,
                bias_dtypes=_HALF,
                bias_as_out=True,
                align=16,
                max_m=MAX_ROWS,
            ),
            numerics=Numerics.SAME_ACCUM,
            note="vLLM's wvSplitKQ, for up to 4 rows",
        ),
        priority=40,
    )
