"""``silu(a @ gate) * (a @ up)`` of codes in one launch, its result quantized in it where that is asked for.

The source is ``kernels/native/triton_gated.py``. Three forms: ``persistent`` loads tiles by tensor descriptors (TMA),
``tile`` takes any strides, and ``swapped``, for few rows, makes rows of the weight the rows of the tensor cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fx_quant.gpu.architectures import Architecture
from fx_quant.gpu.descriptors import described, undescribed
from fx_quant.gpu.launch import Configuration, Launch
from fx_quant.gpu.operands import vector_stride
from fx_quant.ops import empty_group_scale
from fx_quant.ops.gated_mm import check_gated_mm
from fx_quant.scheme import FLOAT8_DTYPES

# Tiles that share their operands through the L2 cache, counted along m.
_TILES_M = 8
# Columns of a tile where each of its rows has a scale: one group.
GROUP = 128


@dataclass(frozen=True)
class ResultCodes:
    """How the result is quantized.

    Args:
        dtype: of the codes; float32 keeps them unrounded, which tests read.
        reciprocal, lo, hi: as in ``fx_quant::quantize``.
        scale: the given scale, one element, or None: each group of ``GROUP`` neighbours of a row gets its own.
        divisor, floor, floor_on: as in ``fx_quant::quantize.dynamic``, for scales of groups.
    """

    dtype: torch.dtype
    reciprocal: bool
    lo: float
    hi: float
    scale: Tensor | None = None
    divisor: float = 1.0
    floor: float = 0.0
    floor_on: str = "none"


@dataclass(frozen=True)
class GatedOperands:
    """Operands of ``fx_quant::gated_mm``, checked.

    Args:
        a, b, a_scale, b_scale, out_dtype: as there.
        codes: how the result is quantized, or None.
    """

    a: Tensor
    b: Tensor
    a_scale: Tensor | None
    b_scale: Tensor | None
    out_dtype: torch.dtype
    codes: ResultCodes | None = None

    @property
    def n(self) -> int:
        """Columns of the result."""
        return self.b.shape[1] // 2


def gated_operands(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    out_dtype: torch.dtype,
    codes: ResultCodes | None = None,
) -> GatedOperands:
    """Check the operands of ``triton_gated_mm``.

    Raises:
        RuntimeError: dtypes or shapes do not fit.
    """
    name = "triton_gated_mm"
    check_gated_mm(a, b, a_scale, b_scale, out_dtype, name)
    dtypes = {a.dtype, b.dtype}
    torch._check(
        dtypes == {torch.int8} or dtypes <= FLOAT8_DTYPES,
        lambda: f"{name}: a and b must both be int8 or both float8, got {a.dtype} and {b.dtype}",
    )
    return GatedOperands(a, b, a_scale, b_scale, out_dtype, codes)


def _found(
    form: str, m: int, n: int, warps: int, stages: int, k: int = 128, specialized: bool = False
) -> Configuration:
    return Configuration(form, m, n, k, warps, stages, warp_specialized=specialized)


_FEW_ROWS = (
    _found("swapped", 16, 64, 4, 4),
    _found("swapped", 16, 128, 4, 3),
    _found("swapped", 32, 64, 4, 4),
    _found("swapped", 32, 128, 4, 3),
    _found("swapped", 64, 64, 4, 3),
    _found("swapped", 64, 128, 8, 3),
)

# Family of architectures -> what may be launched, by the rows that a tile holds; the last that fits for more rows.
# All of it compiles by Triton 3.6 and 3.9 without spilling: where larger tiles are missing they do not. Nothing was
# timed.
CONFIGURATIONS: Mapping[str, tuple[Configuration, ...]] = MappingProxyType(
    {
        "sm80": (
            _found("swapped", 16, 64, 4, 4),
            _found("swapped", 16, 128, 4, 4, k=64),
            _found("swapped", 32, 64, 4, 4, k=64),
            _found("swapped", 32, 128, 8, 4, k=64),
            _found("tile", 64, 64, 8, 4, k=64),
        ),
        "sm90": (*_FEW_ROWS, _found("tile", 64, 128, 8, 3), _found("persistent", 128, 128, 4, 4, specialized=True)),
        # There, Triton 3.6 compiles no warp specialization, and spills for 128 persistent columns and this one.
        "sm100": (
            *(found for found in _FEW_ROWS if (found.block_m, found.block_n) != (32, 64)),
            _found("tile", 64, 128, 8, 3),
            _found("persistent", 128, 64, 8, 4),
        ),
        "rocm": (
            _found("swapped", 16, 64, 4, 2),
            _found("swapped", 16, 128, 4, 2),
            _found("swapped", 64, 64, 4, 2),
            _found("tile", 128, 128, 8, 2, k=64),
        ),
    }
)


def unfit(operands: GatedOperands, found: Configuration, on: Architecture) -> str | None:
    """Why this configuration cannot compute these operands there, in a line, or None."""
    codes = operands.codes
    if codes is not None and codes.scale is None and found.block_n != GROUP:
        return f"needs tiles of {GROUP} columns where each group has a scale, got {found.block_n}"
    if found.form != "persistent":
        return None
    return undescribed({"a": operands.a, "the weight": operands.b.t()}, on)


def family(on: Architecture) -> str:
    """Whose configurations an architecture has; sm120 has the shared memory of sm89."""
    if on.platform == "rocm":
        return "rocm"
    capability = on.capability or 0
    return "sm80" if capability < 90 or capability >= 120 else "sm90" if capability < 100 else "sm100"


def configuration(operands: GatedOperands, on: Architecture) -> Configuration:
    """The configuration for these operands on that architecture."""
    fitting = [found for found in CONFIGURATIONS[family(on)] if unfit(operands, found, on) is None]
    return next((found for found in fitting if operands.a.shape[0] <= found.block_m), fitting[-1])


def plan_gated_mm(operands: GatedOperands, found: Configuration, on: Architecture) -> tuple[Launch, Tensor | None]:
    """The launch of a gated matmul, and the scale of its groups where they have one.

    Raises:
        RuntimeError: the configuration is ``unfit``.
    """
    from fx_quant.kernels.native import triton_gated

    reason = unfit(operands, found, on)
    torch._check(reason is None, lambda: f"triton_gated_mm: {found} {reason}")
    a, b, codes, n = operands.a, operands.b, operands.codes, operands.n
    m, k = a.shape
    out = a.new_empty((m, n), dtype=operands.out_dtype if codes is None else codes.dtype)
    scale = None
    if codes is not None:
        scale = empty_group_scale(out, GROUP) if codes.scale is None else codes.scale
    arguments: dict[str, Any] = {
        "out_ptr": out,
        "out_scale_ptr": scale,
        "a_scale_ptr": operands.a_scale,
        "b_scale_ptr": operands.b_scale,
        "m": m,
        "n": n,
        "k": k,
        "stride_am": a.stride(0),
        "stride_a_scale": vector_stride(operands.a_scale, 0),
        "stride_b_scale": vector_stride(operands.b_scale, -1),
        "divisor": 1.0 if codes is None else codes.divisor,
        "floor": 0.0 if codes is None else codes.floor,
        "lo": 0.0 if codes is None else codes.lo,
        "hi": 0.0 if codes is None else codes.hi,
        "ROUNDED": _triton_dtype(operands.out_dtype),
        "QUANTIZED": "no" if codes is None else "groups" if codes.scale is None else "static",
        "FLOOR_ON": "none" if codes is None else codes.floor_on,
        "RECIPROCAL": codes is not None and codes.reciprocal,
        "BLOCK_M": found.block_m,
        "BLOCK_N": found.block_n,
        "BLOCK_K": found.block_k,
        "TILES_M": _TILES_M,
    }
    tiles = -(-m // found.block_m) * -(-n // found.block_n)
    if found.form == "persistent":
        weight = b.t()
        arguments |= {
            "a": a if found.warp_specialized else described(a, found.block_m, found.block_k),
            "gate_weight": described(weight[:n], found.block_n, found.block_k),
            "up_weight": described(weight[n:], found.block_n, found.block_k),
            "WARP_SPECIALIZED": found.warp_specialized,
        }
        kernel, programs = triton_gated.persistent_kernel, min(on.processors, tiles)
    else:
        arguments |= {
            "a_ptr": a,
            "b_ptr": b,
            "stride_ak": a.stride(1),
            "stride_bk": b.stride(0),
            "stride_bn": b.stride(1),
            "SWAPPED": found.form == "swapped",
        }
        kernel, programs = triton_gated.tile_kernel, tiles
    # Fused, the epilogue's product and sum would be rounded once, where the canonical op rounds twice.
    options = {"num_warps": found.warps, "num_stages": found.stages, "enable_fp_fusion": False}
    launch = Launch(kernel, arguments, options, programs, out, found, scratch=found.warp_specialized)
    return launch, scale


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl  # pyrefly: ignore[missing-import]

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
