"""The int8 matmul of a CPU, once for each instruction set that multiplies bytes or 16-bit lanes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fx_quant.kernels.cpu.native import (
    INT8_AMX,
    INT8_AVX2,
    INT8_AVX512,
    INT8_AVX_VNNI,
    INT8_PORTABLE,
    INT8_VNNI,
    Dot,
)
from fx_quant.kernels.cpu.tiled_kernels import matmul_body
from fx_quant.kernels.registry import (
    ACTIVATION,
    CPU,
    INT8_MAX_K,
    INT8_PAIRS,
    ROW_SCALES,
    Kernel,
    Requires,
    register_kernel,
    register_op,
)
from fx_quant.ops import accumulate
from fx_quant.scheme import FLOAT_DTYPES, Numerics


@dataclass(frozen=True)
class Level:
    """One instruction set: the kernel and its op have one name.

    Args:
        kernel: name.
        dot: the native code.
        priority: among all kernels.
        note: how it multiplies.
    """

    kernel: str
    dot: Dot
    priority: int
    note: str


LEVELS = (
    Level("cpu_int8_amx", INT8_AMX, 32, "our AMX tiles over packed panels"),
    Level("cpu_int8_vnni", INT8_VNNI, 30, "our vpdpbusd tiles over packed panels"),
    Level("cpu_int8_avx_vnni", INT8_AVX_VNNI, 28, "our 256-bit vpdpbusd tiles over packed panels"),
    # Below torch._int_mm, which multiplies by vpdpbusd where it is exact.
    Level("cpu_int8_avx512", INT8_AVX512, 8, "our 512-bit vpmaddwd tiles over packed panels"),
    Level("cpu_int8_avx2", INT8_AVX2, 7, "our 256-bit vpmaddwd tiles over packed panels"),
    Level("cpu_int8_portable", INT8_PORTABLE, 5, "C++ that the compiler vectorizes, the weight as it is stored"),
)

for _level in LEVELS:
    register_op(_level.kernel, matmul_body(_level.dot.layout, _level.dot, accumulate))
    register_kernel(
        Kernel(
            name=_level.kernel,
            provider="cpu",
            linear_kernel="CPUInt8ScaledMMLinearKernel",
            op=_level.kernel,
            requires=Requires(
                platforms=CPU,
                features=_level.dot.features | {"cpp_compiler"},
                codes=INT8_PAIRS,
                granularities=ROW_SCALES,
                asymmetric=ACTIVATION,
                out_dtypes=FLOAT_DTYPES | {torch.int32},
                max_k=INT8_MAX_K if _level.dot.packed else None,
                constant_weight=_level.dot.packed,
            ),
            numerics=Numerics.EXACT,
            note=f"{_level.note}, epilogue fused",
            layout=_level.dot.layout,
        ),
        priority=_level.priority,
    )
