"""Portable Triton kernels for NVIDIA (sm80 and newer) and AMD GPUs: correct everywhere, tuned nowhere yet.

The other files here plan their launches. Triton is imported when a matmul runs, never before. A tensor that is not on a
GPU is left to the canonical op, unless Triton's interpreter is on (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from fx_quant.kernels.registry import (
    ACTIVATION,
    CUDA,
    INT8_MAX_K,
    INT8_PAIRS,
    ROCM,
    ROW_SCALES,
    WEIGHT,
    Kernel,
    Requires,
    register_kernel,
    register_op,
    weight_scales,
)
from fx_quant.kernels.triton.architectures import architecture_of
from fx_quant.kernels.triton.launch import runs
from fx_quant.kernels.triton.operands import scaled_operands
from fx_quant.kernels.triton.scaled_mm import plan_scaled_mm
from fx_quant.kernels.triton.tile import plan_weight_only_mm
from fx_quant.ops import (
    scaled_mm,
    weight_only_mm,
)
from fx_quant.scheme import FLOAT_DTYPES, HALF_DTYPES, INT4_DTYPES, Granularity, Numerics

_GPUS = CUDA | ROCM
# The oldest that a torch we support brings (2.11), and that these kernels were compiled by.
_TRITON = MappingProxyType({"triton": "3.6"})


def _scaled_mm(
    a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, b_zero_point=None, block=None
) -> Tensor:
    torch._check(b_zero_point is None, lambda: "triton_scaled_mm: the weight can have no zero point")
    if not runs(a):
        return scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, a_zero_point=a_zero_point, block=block)
    zero_point = {"a_zero_point": a_zero_point, "b_sum": b_sum}
    operands = scaled_operands(a, b, a_scale, b_scale, bias, n, out_dtype, **zero_point, block=block)
    return plan_scaled_mm(operands, architecture_of(a.device)).run()


def _weight_only_mm(
    a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, b_zero_point=None, block=None
) -> Tensor:
    torch._check(
        a_scale is None and a_zero_point is None,
        lambda: "triton_weight_only_mm: a float activation has no scale and no zero point",
    )
    if not runs(a):
        return weight_only_mm(a, b, b_scale, b_zero_point, bias, out_dtype, block=block)
    architecture = architecture_of(a.device)
    launch = plan_weight_only_mm(
        a, b, b_scale, bias, n, out_dtype, b_zero_point=b_zero_point, block=block, architecture=architecture
    )
    return launch.run()


for _name, _body in (("triton_scaled_mm", _scaled_mm), ("triton_weight_only_mm", _weight_only_mm)):
    register_op(_name, _body)


# --- what may be asked of them --------------------------------------------------------------------------------

_OCP = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_FNUZ = frozenset({torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
_GROUPS = frozenset({(Granularity.ANY_GROUP, Granularity.ANY_BLOCK), (Granularity.ANY_GROUP, Granularity.ANY_GROUP)})
_WEIGHTS = weight_scales(Granularity.PER_TENSOR, Granularity.PER_CHANNEL, Granularity.ANY_GROUP, Granularity.ANY_BLOCK)

# Below every matmul of PyTorch, above dequantizing first: what was not measured yet is not preferred.
_PRIORITY = 5

register_kernel(
    Kernel(
        name="triton_int8",
        provider="triton",
        linear_kernel="TritonInt8ScaledMMLinearKernel",
        op="triton_scaled_mm",
        requires=Requires(
            platforms=_GPUS,
            min_capability=80,
            packages=_TRITON,
            codes=INT8_PAIRS,
            granularities=ROW_SCALES,
            asymmetric=ACTIVATION,
            out_dtypes=FLOAT_DTYPES | {torch.int32},
            # `mma.sync` saturates where the canonical sum wraps.
            max_k=INT8_MAX_K,
        ),
        numerics=Numerics.EXACT,
        note="our Triton tiles of int8, epilogue in the kernel",
    ),
    priority=_PRIORITY,
)
# gfx942 has codes of its own; the others have the OCP ones.
for _feature, _platforms, _codes, _suffix in (
    ("float8", _GPUS, _OCP, ""),
    ("float8_fnuz", ROCM, _FNUZ, "_fnuz"),
):
    _requires = Requires(
        platforms=_platforms,
        features=frozenset({_feature}),
        packages=_TRITON,
        codes=frozenset(itertools.product(_codes, _codes)),
        out_dtypes=FLOAT_DTYPES,
    )
    register_kernel(
        Kernel(
            name=f"triton_float8{_suffix}",
            provider="triton",
            linear_kernel="TritonFP8ScaledMMLinearKernel",
            op="triton_scaled_mm",
            requires=replace(_requires, granularities=ROW_SCALES),
            numerics=Numerics.SAME_ACCUM,
            note="our Triton tiles of float8, epilogue in the kernel",
        ),
        priority=_PRIORITY,
    )
    register_kernel(
        Kernel(
            name=f"triton_float8_block{_suffix}",
            provider="triton",
            linear_kernel="TritonFP8BlockScaledMMLinearKernel",
            op="triton_scaled_mm",
            requires=replace(_requires, granularities=_GROUPS),
            numerics=Numerics.SAME_ACCUM,
            note="our Triton tiles of float8, scales of blocks applied along k",
        ),
        priority=_PRIORITY,
    )
_requires = Requires(
    platforms=_GPUS, min_capability=80, packages=_TRITON, granularities=_WEIGHTS, out_dtypes=FLOAT_DTYPES
)
# Triton converts e4m3 from sm89 on, and every float8 on AMD.
for _suffix, _codes, _needs, _note in (
    ("", frozenset({torch.int8, torch.uint8}), replace(_requires, asymmetric=WEIGHT), "8-bit integer"),
    ("_float8", _OCP, replace(_requires, min_capability=89), "float8"),
    ("_float8_fnuz", _FNUZ, replace(_requires, platforms=ROCM, min_capability=None), "float8"),
    ("_int4", INT4_DTYPES, replace(_requires, asymmetric=WEIGHT), "packed int4"),
):
    register_kernel(
        Kernel(
            name=f"triton_weight_only{_suffix}",
            provider="triton",
            linear_kernel="TritonMPLinearKernel",
            op="triton_weight_only_mm",
            requires=replace(_needs, codes=frozenset(itertools.product(HALF_DTYPES, _codes))),
            numerics=Numerics.REASSOCIATED,
            note=f"our Triton tiles of a half-precision activation and {_note} weights",
        ),
        priority=_PRIORITY,
    )
