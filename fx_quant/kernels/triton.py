"""Portable Triton kernels for NVIDIA (sm80 and newer) and AMD GPUs: correct everywhere, tuned nowhere yet.

Their source is ``native/triton_gemm.py``. Triton is imported when a matmul runs, never before. A tensor that is not on
a GPU is left to the canonical op, unless Triton's interpreter is on (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fx_quant.kernels.base import (
    ACTIVATION,
    CUDA,
    FLOAT8_PAIRS,
    INT8_MAX_K,
    INT8_PAIRS,
    KERNEL_SCHEMA,
    ROCM,
    ROW_SCALES,
    WEIGHT,
    Kernel,
    Requires,
    fake_kernel,
    register_kernel,
    weight_scales,
)
from fx_quant.ops import (
    MATMUL_TAGS,
    check_scaled_mm,
    check_weight_only_mm,
    column_sums,
    register,
    scaled_mm,
    unpack_codes,
    weight_only_mm,
)
from fx_quant.scheme import FLOAT_DTYPES, HALF_DTYPES, INT4_DTYPES, Granularity, Numerics

_GPUS = CUDA | ROCM
# The oldest that a torch we support brings (2.11), and that these kernels were compiled by.
_TRITON = MappingProxyType({"triton": "3.6"})

# Tiles that share their operands through the L2 cache, counted along m.
_TILES_M = 8


@dataclass(frozen=True)
class Configuration:
    """Tile sizes and resources of one launch.

    Args:
        block_m: rows of the tile.
        block_n: columns of the tile.
        block_k: products that are summed in one step.
        warps: warps of a program.
        stages: depth of the software pipeline on NVIDIA; AMD has 2, because its local memory is small.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# Kind of operands -> the configuration up to that many rows. Chosen to fit every GPU (99 KB of shared memory on sm89
# and sm120, 64 KB on gfx942); nothing was timed.
_CONFIGURATIONS: Mapping[str, Mapping[int | None, Configuration]] = {
    "codes": {
        16: Configuration(16, 64, 128, 4, 4),
        64: Configuration(64, 64, 128, 4, 4),
        None: Configuration(128, 128, 128, 8, 3),
    },
    "weight_only": {
        16: Configuration(16, 64, 128, 4, 4),
        64: Configuration(64, 64, 64, 4, 4),
        None: Configuration(128, 128, 64, 8, 3),
    },
}


def configuration(kind: str, m: int) -> Configuration:
    """The configuration of ``kind`` (``codes`` or ``weight_only``) for ``m`` rows."""
    table = _CONFIGURATIONS[kind]
    return next(found for limit, found in table.items() if limit is None or m <= limit)


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, as data: so that it can also be compiled for a GPU that is not here.

    Args:
        kernel: the ``@triton.jit`` function.
        arguments: its arguments by name, constants included.
        options: options of the compiler.
        programs: size of the grid.
        out: the result, which is also among the arguments.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    programs: int
    out: Tensor

    def run(self) -> Tensor:
        """Launch on the result's device; nothing is launched for an empty result."""
        if self.programs:
            # Triton launches on the current device, whatever the tensors' own is.
            with torch.cuda.device_of(self.out):
                self.kernel[(self.programs,)](**self.arguments, **self.options)
        return self.out


def _launch(
    kernel: Any, found: Configuration, m: int, n: int, k: int, group_k: int, arguments: dict[str, Any], hip: bool
) -> Launch:
    block_k = found.block_k
    if group_k:
        # The smallest step that tensor cores take is 32 codes; more than a group would be masked away.
        block_k = min(block_k, max(32, 1 << (group_k - 1).bit_length()))
    blocks = {"BLOCK_M": found.block_m, "BLOCK_N": found.block_n, "BLOCK_K": block_k, "TILES_M": _TILES_M}
    # Fused, the epilogue's product and sum would be rounded once, where the canonical op rounds twice.
    options = {"num_warps": found.warps, "num_stages": 2 if hip else found.stages, "enable_fp_fusion": False}
    programs = -(-m // found.block_m) * -(-n // found.block_n)
    return Launch(kernel, {**arguments, "m": m, "n": n, "k": k, **blocks}, options, programs, arguments["out_ptr"])


def _stride(x: Tensor | None, dim: int) -> int:
    """Stride of a scale, zero point or bias; 0 repeats a single element."""
    return 0 if x is None or x.numel() == 1 else x.stride(dim)


def _strides(x: Tensor | None, grouped: bool) -> tuple[int, int]:
    """Strides of a weight's scale or zero point along n and k."""
    if x is None:
        return 0, 0
    return (x.stride(0), x.stride(1)) if grouped else (_stride(x, -1), 0)


def plan_scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    out_dtype: torch.dtype,
    *,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
    block: Sequence[int] | None = None,
    hip: bool = False,
) -> Launch:
    """The launch of ``triton_scaled_mm`` on these operands; ``hip`` asks for the one of an AMD GPU."""
    from fx_quant.kernels.native import triton_gemm

    name = "triton_scaled_mm"
    (m, k), (b_k, b_n) = a.shape, b.shape
    torch._check(
        (b_k, b_n) == (k, n) and (a.dtype, b.dtype) in INT8_PAIRS | FLOAT8_PAIRS,
        lambda: (
            f"{name}: a [m, k] and b [k, n] must both be int8 or both float8, "
            f"got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)} for n={n}"
        ),
    )
    check_scaled_mm(m, a.dtype, k, n, a_scale, b_scale, bias, out_dtype, name, a_zero_point=a_zero_point, block=block)
    found = configuration("codes", m)
    arguments: dict[str, Any] = {
        "a_ptr": a,
        "b_ptr": b,
        "out_ptr": a.new_empty((m, n), dtype=out_dtype),
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "bias_ptr": bias,
        "stride_am": a.stride(0),
        "stride_ak": a.stride(1),
        "stride_bk": b.stride(0),
        "stride_bn": b.stride(1),
        "stride_bias": _stride(bias, 0),
    }
    if block is not None:
        torch._check(a_zero_point is None, lambda: f"{name}: a_zero_point cannot be combined with block")
        (scale_n, scale_k), (rows, columns) = _strides(b_scale, True), block
        arguments |= {
            "stride_a_scale_m": 0 if a_scale is None else a_scale.stride(0),
            "stride_a_scale_k": 0 if a_scale is None else a_scale.stride(1),
            "stride_b_scale_n": scale_n,
            "stride_b_scale_k": scale_k,
            "GROUP_N": rows,
            "GROUP_K": columns,
        }
        return _launch(triton_gemm.block_scaled_mm_kernel, found, m, n, k, columns, arguments, hip)
    if a_zero_point is not None and b_sum is None:
        b_sum = column_sums(b)
    arguments |= {
        "a_zero_point_ptr": a_zero_point,
        "b_sum_ptr": None if a_zero_point is None else b_sum,
        "stride_a_scale": _stride(a_scale, 0),
        "stride_b_scale": _stride(b_scale, -1),
        "stride_a_zero_point": _stride(a_zero_point, 0),
        "stride_b_sum": 0 if a_zero_point is None else _stride(b_sum, 0),
    }
    return _launch(triton_gemm.scaled_mm_kernel, found, m, n, k, 0, arguments, hip)


def plan_weight_only_mm(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    n: int,
    out_dtype: torch.dtype,
    *,
    b_zero_point: Tensor | None = None,
    block: Sequence[int] | None = None,
    hip: bool = False,
) -> Launch:
    """The launch of ``triton_weight_only_mm`` on these operands; ``hip`` asks for the one of an AMD GPU."""
    from fx_quant.kernels.native import triton_gemm

    name = "triton_weight_only_mm"
    check_weight_only_mm(x, b, n, b_scale, b_zero_point, bias, out_dtype, name, block=block)
    torch._check(
        b.dim() == 2 and b.shape[1] == n,
        lambda: f"{name}: b must have n = {n} columns, got {list(b.shape)}",
    )
    m, k = x.shape
    if block is not None and block[1] % 2:
        # A byte of two codes would belong to two groups.
        b = unpack_codes(b, k)
    scale_n, scale_k = _strides(b_scale, block is not None)
    zero_point_n, zero_point_k = _strides(b_zero_point, block is not None)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "b_ptr": b,
        "out_ptr": x.new_empty((m, n), dtype=out_dtype),
        "b_scale_ptr": b_scale,
        "b_zero_point_ptr": b_zero_point,
        "bias_ptr": bias,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_bk": b.stride(0),
        "stride_bn": b.stride(1),
        "stride_scale_n": scale_n,
        "stride_scale_k": scale_k,
        "stride_zero_point_n": zero_point_n,
        "stride_zero_point_k": zero_point_k,
        "stride_bias": _stride(bias, 0),
        "GROUP_N": 1 if block is None else block[0],
        "GROUP_K": 0 if block is None else block[1],
        "PACKED": b.shape[0] != k,
    }
    kernel, found = triton_gemm.weight_only_mm_kernel, configuration("weight_only", m)
    return _launch(kernel, found, m, n, k, arguments["GROUP_K"], arguments, hip)


def _runs(a: Tensor) -> bool:
    """Whether Triton can run on this tensor's device."""
    return a.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _scaled_mm(
    a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, b_zero_point=None, block=None
) -> Tensor:
    torch._check(b_zero_point is None, lambda: "triton_scaled_mm: the weight can have no zero point")
    if not _runs(a):
        return scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, a_zero_point=a_zero_point, block=block)
    zero_point = {"a_zero_point": a_zero_point, "b_sum": b_sum}
    hip = torch.version.hip is not None
    return plan_scaled_mm(a, b, a_scale, b_scale, bias, n, out_dtype, **zero_point, block=block, hip=hip).run()


def _weight_only_mm(
    a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, b_zero_point=None, block=None
) -> Tensor:
    torch._check(
        a_scale is None and a_zero_point is None,
        lambda: "triton_weight_only_mm: a float activation has no scale and no zero point",
    )
    if not _runs(a):
        return weight_only_mm(a, b, b_scale, b_zero_point, bias, out_dtype, block=block)
    hip = torch.version.hip is not None
    return plan_weight_only_mm(a, b, b_scale, bias, n, out_dtype, b_zero_point=b_zero_point, block=block, hip=hip).run()


for _name, _body in (("triton_scaled_mm", _scaled_mm), ("triton_weight_only_mm", _weight_only_mm)):
    register(f"{_name}{KERNEL_SCHEMA}", _body, fake_kernel(_name), MATMUL_TAGS)


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
            op="triton_weight_only_mm",
            requires=replace(_needs, codes=frozenset(itertools.product(HALF_DTYPES, _codes))),
            numerics=Numerics.REASSOCIATED,
            note=f"our Triton tiles of a half-precision activation and {_note} weights",
        ),
        priority=_PRIORITY,
    )
