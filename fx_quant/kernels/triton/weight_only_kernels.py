"""Triton kernels of a half-precision activation and a weight that is packed once, for NVIDIA and AMD GPUs.

The other files here plan their launches; weights that change, and groups of other sizes, are left to the portable
kernels of ``scaled_mm_kernels.py``. Triton is imported when a matmul runs, never before. A tensor that is not on a GPU
is left to the canonical op, unless Triton's interpreter is on (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor

from fx_quant.kernels.layouts import Layout, register_layout
from fx_quant.kernels.registry import (
    CUDA,
    ROCM,
    WEIGHT,
    Kernel,
    Requires,
    register_kernel,
    register_op,
    weight_scales,
)
from fx_quant.kernels.triton.architectures import architecture_of
from fx_quant.kernels.triton.launch import runs
from fx_quant.kernels.triton.packed_codes import PACKED_CODES, PackedCodes
from fx_quant.kernels.triton.weight_only import configuration, packed_operands, plan_weight_only_mm
from fx_quant.ops import weight_only_mm
from fx_quant.scheme import FLOAT_DTYPES, HALF_DTYPES, INT4_DTYPES, Granularity, Numerics

_OCP = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_FNUZ = frozenset({torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
# Rows of a block may be any: a scale is looked up for each row.
_GROUPS = (32, 64, 128)
_BLOCK = Granularity.per_block(128, 128)


def _weight_only_mm(
    codes: PackedCodes,
    a,
    b,
    a_scale,
    b_scale,
    bias,
    n,
    out_dtype,
    *,
    a_zero_point=None,
    b_sum=None,
    b_zero_point=None,
    block=None,
) -> Tensor:
    torch._check(
        a_scale is None and a_zero_point is None,
        lambda: f"{_op(codes.name)}: a float activation has no scale and no zero point",
    )
    operands = packed_operands(a, b, codes, b_scale, bias, n, out_dtype, zero_point=b_zero_point, block=block)
    if not runs(a):
        weight = codes.unpack(b, n, a.shape[1] // codes.per_byte)
        return weight_only_mm(a, weight.t(), b_scale, b_zero_point, bias, out_dtype, block=block)
    architecture = architecture_of(a.device)
    return plan_weight_only_mm(operands, configuration(operands, architecture), architecture).run()


def _op(name: str) -> str:
    return f"triton_weight_only_{name}_packed"


for _codes in PACKED_CODES.values():
    _name = _op(_codes.name)
    register_layout(
        Layout(
            name=f"triton_{_codes.name}",
            weights=_codes.weights,
            dtype=_codes.dtype,
            shape=_codes.shape,
            pack=_codes.pack,
            unpack=_codes.unpack,
        )
    )
    register_op(_name, partial(_weight_only_mm, _codes))

# Triton decodes e4m3 from sm89 on, and every float8 on AMD.
for _name, _suffix, _dtypes, _platforms, _capability, _asymmetric, _sizes in (
    ("int4", "", INT4_DTYPES, CUDA | ROCM, 80, WEIGHT, _GROUPS),
    ("int8", "", frozenset({torch.int8}), CUDA | ROCM, 80, WEIGHT, _GROUPS),
    ("uint8", "", frozenset({torch.uint8}), CUDA | ROCM, 80, WEIGHT, _GROUPS),
    ("float8", "", _OCP, CUDA | ROCM, 89, frozenset(), _GROUPS[1:]),
    ("float8", "_fnuz", _FNUZ, ROCM, None, frozenset(), _GROUPS[1:]),
):
    register_kernel(
        Kernel(
            name=f"triton_weight_only_{_name}{_suffix}_packed",
            provider="triton",
            linear_kernel="TritonMPLinearKernel",
            op=_op(_name),
            requires=Requires(
                platforms=_platforms,
                min_capability=_capability,
                packages={"triton": "3.6"},
                codes=frozenset(itertools.product(HALF_DTYPES, _dtypes)),
                granularities=weight_scales(
                    Granularity.PER_TENSOR, Granularity.PER_CHANNEL, _BLOCK, *map(Granularity.per_group, _sizes)
                ),
                out_dtypes=FLOAT_DTYPES,
                asymmetric=_asymmetric,
                constant_weight=True,
            ),
            numerics=Numerics.REASSOCIATED,
            note=f"our Triton tiles of a half-precision activation and {_name} weights that are packed once",
            layout=f"triton_{_name}",
        ),
        # Above the portable kernels (5), which decode by more instructions, and below all others: nothing was timed.
        priority=6,
    )
