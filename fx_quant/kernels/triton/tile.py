"""The portable form: tiles of any operands, with any strides, on every GPU that Triton compiles for.

The source is ``kernels/triton/source/gemm.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.launch import Configuration, Launch
from fx_quant.kernels.triton.operands import ScaledOperands, grouped_strides, vector_stride
from fx_quant.ops import check_weight_only_mm, unpack_codes

# Tiles that share their operands through the L2 cache, counted along m.
_TILES_M = 8


# Kind of operands -> the configuration up to that many rows. Chosen to fit every GPU (99 KB of shared memory on sm89
# and sm120, 64 KB on gfx942); nothing was timed.
_CONFIGURATIONS: Mapping[str, Mapping[int | None, Configuration]] = {
    "codes": {
        16: Configuration("tile", 16, 64, 128, 4, 4),
        64: Configuration("tile", 64, 64, 128, 4, 4),
        None: Configuration("tile", 128, 128, 128, 8, 3),
    },
    "weight_only": {
        16: Configuration("tile", 16, 64, 128, 4, 4),
        64: Configuration("tile", 64, 64, 64, 4, 4),
        None: Configuration("tile", 128, 128, 64, 8, 3),
    },
}


def _found(m: int, n: int, k: int, warps: int, stages: int) -> Configuration:
    return Configuration("tile", m, n, k, warps, stages)


_SMALL = (_found(16, 64, 128, 4, 4), _found(64, 64, 128, 4, 4))
_MMA = (*_SMALL, _found(64, 128, 64, 4, 4), _found(128, 128, 64, 8, 3), _found(128, 128, 128, 8, 3))
_MFMA = (
    *_SMALL,
    _found(64, 128, 128, 4, 2),
    _found(128, 128, 128, 8, 2),
    _found(256, 128, 64, 8, 2),
    _found(256, 128, 128, 8, 2),
)

# Architecture without tensor descriptors -> recipe, named as in `persistent` -> what may be launched: all that was
# found to compile without spilling, by Triton 3.6 and 3.9.
CONFIGURATIONS: Mapping[str, Mapping[str, tuple[Configuration, ...]]] = {
    "sm80": {"int8": _MMA},
    "sm89": {
        "int8": _MMA,
        "float8": _MMA,
        # Sums of a block have registers of their own, and so have scales of each column.
        "float8_block": _MMA[:-1],
        "float8_group": _MMA[:-2],
    },
    "gfx942": {
        "int8": (*_MFMA, _found(256, 256, 64, 8, 2)),
        "float8": _MFMA,
        "float8_block": _MFMA[:-2],
        "float8_group": _MFMA[:-2],
    },
    "gfx950": {
        "int8": _MFMA,
        "float8": _MFMA,
        "float8_block": (*_MFMA[:-2], _MFMA[-1]),
        "float8_group": _MFMA[:-2],
    },
}


def unfit(operands: ScaledOperands, configuration: Configuration, on: Architecture) -> str | None:
    """Why this form cannot compute these operands there, in a line, or None."""
    if on.platform == "cuda" and operands.a.dtype is not torch.int8 and not on.float8:
        return f"needs int8 on {on.name}, which has no float8, got {operands.a.dtype}"
    return None


def configuration(kind: str, m: int) -> Configuration:
    """The configuration of ``kind`` (``codes`` or ``weight_only``) for ``m`` rows."""
    table = _CONFIGURATIONS[kind]
    return next(found for limit, found in table.items() if limit is None or m <= limit)


def _launch(
    kernel: Any, found: Configuration, m: int, n: int, k: int, group_k: int, arguments: dict[str, Any], on: Architecture
) -> Launch:
    block_k = found.block_k
    if group_k:
        # The smallest step that tensor cores take is 32 codes; more than a group would be masked away.
        block_k = min(block_k, max(32, 1 << (group_k - 1).bit_length()))
    blocks = {"BLOCK_M": found.block_m, "BLOCK_N": found.block_n, "BLOCK_K": block_k, "TILES_M": _TILES_M}
    # Local memory of AMD's is small.
    stages = min(found.stages, 2) if on.platform == "rocm" else found.stages
    # Fused, the epilogue's product and sum would be rounded once, where the canonical op rounds twice.
    options = {"num_warps": found.warps, "num_stages": stages, "enable_fp_fusion": False}
    programs = -(-m // found.block_m) * -(-n // found.block_n)
    arguments |= {"m": m, "n": n, "k": k, **blocks}
    return Launch(kernel, arguments, options, programs, arguments["out_ptr"], found)


def plan_scaled_mm(operands: ScaledOperands, found: Configuration, on: Architecture) -> Launch:
    """The launch of a scaled matmul on any operands."""
    from fx_quant.kernels.triton.source import gemm

    a, b, a_scale, b_scale, bias = operands.a, operands.b, operands.a_scale, operands.b_scale, operands.bias
    arguments: dict[str, Any] = {
        "a_ptr": a,
        "b_ptr": b,
        "out_ptr": a.new_empty((operands.m, operands.n), dtype=operands.out_dtype),
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "bias_ptr": bias,
        "stride_am": a.stride(0),
        "stride_ak": a.stride(1),
        "stride_bk": b.stride(0),
        "stride_bn": b.stride(1),
        "stride_bias": vector_stride(bias, 0),
    }
    sizes = (operands.m, operands.n, operands.k)
    if operands.block is not None:
        (scale_n, scale_k), (rows, columns) = grouped_strides(b_scale, True), operands.block
        arguments |= {
            "stride_a_scale_m": 0 if a_scale is None else a_scale.stride(0),
            "stride_a_scale_k": 0 if a_scale is None else a_scale.stride(1),
            "stride_b_scale_n": scale_n,
            "stride_b_scale_k": scale_k,
            "GROUP_N": rows,
            "GROUP_K": columns,
        }
        return _launch(gemm.block_scaled_mm_kernel, found, *sizes, columns, arguments, on)
    arguments |= {
        "a_zero_point_ptr": operands.a_zero_point,
        "b_sum_ptr": operands.b_sum,
        "stride_a_scale": vector_stride(a_scale, 0),
        "stride_b_scale": vector_stride(b_scale, -1),
        "stride_a_zero_point": vector_stride(operands.a_zero_point, 0),
        "stride_b_sum": vector_stride(operands.b_sum, 0),
    }
    return _launch(gemm.scaled_mm_kernel, found, *sizes, 0, arguments, on)


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
    on: Architecture,
) -> Launch:
    """The launch of ``triton_weight_only_mm`` on these operands."""
    from fx_quant.kernels.triton.source import gemm

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
    scale_n, scale_k = grouped_strides(b_scale, block is not None)
    zero_point_n, zero_point_k = grouped_strides(b_zero_point, block is not None)
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
        "stride_bias": vector_stride(bias, 0),
        "GROUP_N": 1 if block is None else block[0],
        "GROUP_K": 0 if block is None else block[1],
        "PACKED": b.shape[0] != k,
    }
    kernel, found = gemm.weight_only_mm_kernel, configuration("weight_only", m)
    return _launch(kernel, found, m, n, k, arguments["GROUP_K"], arguments, on)
