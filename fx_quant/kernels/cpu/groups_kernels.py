"""int8 products of an activation and a weight of 8 or 4 bits whose scales vary along k, once for each instruction set.

The products of a group are summed in int32, and the sums scaled in registers; see ``kernels/cpu/source/groups.h``.
Where the CPU has AMX, its tiles take over from ``vpdpbusd`` for many rows, to the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor

from fx_quant.kernels.cpu.decode import decoded_matmul, groups_of
from fx_quant.kernels.cpu.decoded_kernels import fake_of_panels, rows_of_panels, scales_of
from fx_quant.kernels.cpu.int8_kernels import Level
from fx_quant.kernels.cpu.native import INT8_AVX2, INT8_AVX512, INT8_AVX_VNNI, INT8_VNNI, Dot
from fx_quant.kernels.layouts import packed_layout
from fx_quant.kernels.registry import (
    ACTIVATION,
    BLOCK_SCALES,
    CPU,
    INT4_PAIRS,
    INT8_PAIRS,
    ROW_SCALES,
    ROWS_BY_GROUPS,
    WEIGHT,
    Kernel,
    Requires,
    register_kernel,
    register_op,
)
from fx_quant.ops import scaled_mm
from fx_quant.scheme import FLOAT_DTYPES, Numerics

# The op takes weights of 8 and of 4 bits, and has the name of the kernel of 8.
GROUP_LEVELS = (
    Level("cpu_int8_groups_vnni", INT8_VNNI, 33, "vpdpbusd"),
    Level("cpu_int8_groups_avx_vnni", INT8_AVX_VNNI, 28, "256-bit vpdpbusd"),
    Level("cpu_int8_groups_avx512", INT8_AVX512, 27, "512-bit vpmaddwd"),
    Level("cpu_int8_groups_avx2", INT8_AVX2, 26, "256-bit vpmaddwd"),
)


def is_packed(b: Tensor) -> bool:
    """Whether packed ``b`` holds two codes to a byte."""
    return b.dim() == 3


def _groups(
    a,
    b,
    a_scale,
    b_scale,
    bias,
    n,
    out_dtype,
    *,
    dot: Dot,
    a_zero_point=None,
    b_sum=None,
    b_zero_point=None,
    block=None,
) -> Tensor:
    """The native matmul, or the canonical op of the unpacked weight where it cannot run."""
    decode = groups_of(dot, is_packed(b), scales_of(b_scale))
    extras = {"a_zero_point": a_zero_point, "b_sum": b_sum}
    out = decoded_matmul(decode, a, b, n, a_scale, b_scale, b_zero_point, bias, out_dtype, block, **extras)
    if out is not None:
        return out
    unpack = packed_layout("vnni_int4" if is_packed(b) else "vnni").unpack
    assert unpack is not None
    weight = unpack(b, n, a.shape[1] // 2 if is_packed(b) else a.shape[1])
    b_scale, b_zero_point = rows_of_panels(b_scale, n), rows_of_panels(b_zero_point, n)
    if b_zero_point is not None and b_scale is not None and b_scale.numel() == 1:
        b_zero_point = b_zero_point.reshape(b_scale.shape)
    return scaled_mm(
        a,
        weight.t(),
        a_scale,
        b_scale,
        bias,
        out_dtype,
        a_zero_point=a_zero_point,
        b_zero_point=b_zero_point,
        block=block,
    )


for _level in GROUP_LEVELS:
    register_op(_level.kernel, functools.partial(_groups, dot=_level.dot), fake_of_panels(_level.kernel))
    _suffix = _level.kernel.removeprefix("cpu_int8_groups_")
    _requires = Requires(
        platforms=CPU,
        features=_level.dot.features | {"cpp_compiler"},
        codes=INT8_PAIRS,
        granularities=ROWS_BY_GROUPS | BLOCK_SCALES,
        asymmetric=ACTIVATION | WEIGHT,
        out_dtypes=FLOAT_DTYPES,
        group_multiple=32,
        constant_weight=True,
    )
    _kernel = Kernel(
        name=_level.kernel,
        provider="cpu",
        linear_kernel="CPUInt8ScaledMMLinearKernel",
        op=_level.kernel,
        # Integers have no order, and a row's sums of groups are added in one whatever stands beside it.
        fixed_op=_level.kernel,
        requires=_requires,
        numerics=Numerics.SAME_ACCUM,
        note=f"int32 sums of each group by our {_level.note} tiles, scaled in registers, epilogue fused",
        layout="vnni",
        panel_factors=True,
    )
    register_kernel(_kernel, priority=_level.priority)
    register_kernel(
        replace(
            _kernel,
            name=f"cpu_int8_int4_{_suffix}",
            requires=replace(_requires, codes=INT4_PAIRS, granularities=_requires.granularities | ROW_SCALES),
            note=f"packed int4 widened in registers, {_kernel.note}",
            layout="vnni_int4",
        ),
        priority=_level.priority,
    )
