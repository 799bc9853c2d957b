"""The portable form: tiles of any operands, with any strides, on every GPU that Triton compiles for.

The source is ``kernels/triton/source/gemm.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.launch import TILES_M, Configuration, Launch
from fx_quant.kernels.triton.operands import ScaledOperands, scale_arguments, weight_only_arguments
from fx_quant.ops import check_weight_only_mm, unpack_codes

_tile = partial(Configuration, "tile")

# Kind of operands -> the configuration up to that many rows. Chosen to fit every GPU (99 KB of shared memory on sm89
# and sm120, 64 KB on gfx942); nothing was timed.
_CONFIGURATIONS: Mapping[str, Mapping[int | None, Configuration]] = {
    "codes": {
        16: _tile(16, 64, 128, 4, 4),
        64: _tile(64, 64, 128, 4, 4),
        None: _tile(128, 128, 128, 8, 3),
    },
    "weight_only": {
        16: _tile(16, 64, 128, 4, 4),
        64: _tile(64, 64, 64, 4, 4),
        None: _tile(128, 128, 64, 8, 3),
    },
}


_SMALL = (_tile(16, 64, 128, 4, 4), _tile(64, 64, 128, 4, 4))
_MMA = (*_SMALL, _tile(64, 128, 64, 4, 4), _tile(128, 128, 64, 8, 3), _tile(128, 128, 128, 8, 3))
_MFMA = (
    *_SMALL,
    _tile(64, 128, 128, 4, 2),
    _tile(128, 128, 128, 8, 2),
    _tile(256, 128, 64, 8, 2),
    _tile(256, 128, 128, 8, 2),
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
        "int8": (*_MFMA, _tile(256, 256, 64, 8, 2)),
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


def unfit(operands: ScaledOperands, configuration: Configuration, architecture: Architecture) -> str | None:
    """Why this form cannot compute these operands there, in a line, or None."""
    if architecture.platform == "cuda" and operands.a.dtype is not torch.int8 and not architecture.float8:
        return f"needs int8 on {architecture.name}, which has no float8, got {operands.a.dtype}"
    return None


def configuration(kind: str, m: int) -> Configuration:
    """The configuration of ``kind`` (``codes`` or ``weight_only``) for ``m`` rows."""
    table = _CONFIGURATIONS[kind]
    return next(tile for limit, tile in table.items() if limit is None or m <= limit)


def _launch(
    kernel: Any,
    configuration: Configuration,
    m: int,
    n: int,
    k: int,
    group_k: int,
    arguments: dict[str, Any],
    architecture: Architecture,
) -> Launch:
    launched = configuration
    if group_k:
        # The smallest step that tensor cores take is 32 codes; more than a group would be masked away.
        launched = replace(launched, block_k=min(configuration.block_k, max(32, 1 << (group_k - 1).bit_length())))
    if architecture.platform == "rocm":
        # Local memory of AMD's is small.
        launched = replace(launched, stages=min(configuration.stages, 2))
    arguments |= {"m": m, "n": n, "k": k, **launched.blocks, "TILES_M": TILES_M}
    return Launch(kernel, arguments, launched.options, configuration.tiles(m, n), arguments["out_ptr"], configuration)


def plan_scaled_mm(operands: ScaledOperands, configuration: Configuration, architecture: Architecture) -> Launch:
    """The launch of a scaled matmul on any operands."""
    from fx_quant.kernels.triton.source import gemm

    a, b = operands.a, operands.b
    arguments = {
        "a_ptr": a,
        "b_ptr": b,
        "out_ptr": a.new_empty((operands.m, operands.n), dtype=operands.out_dtype),
        "stride_am": a.stride(0),
        "stride_ak": a.stride(1),
        "stride_bk": b.stride(0),
        "stride_bn": b.stride(1),
        **scale_arguments(operands),
    }
    kernel, group_k = gemm.scaled_mm_kernel, 0
    if operands.block is not None:
        kernel, group_k = gemm.block_scaled_mm_kernel, operands.block[1]
    return _launch(kernel, configuration, operands.m, operands.n, operands.k, group_k, arguments, architecture)


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
    architecture: Architecture,
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
    arguments = {
        "b_ptr": b,
        "out_ptr": x.new_empty((m, n), dtype=out_dtype),
        "b_scale_ptr": b_scale,
        "b_zero_point_ptr": b_zero_point,
        "stride_bk": b.stride(0),
        "stride_bn": b.stride(1),
        "PACKED": b.shape[0] != k,
        **weight_only_arguments(x, b_scale, b_zero_point, bias, block),
    }
    group_k = 0 if block is None else block[1]
    tile = configuration("weight_only", m)
    return _launch(gemm.weight_only_mm_kernel, tile, m, n, k, group_k, arguments, architecture)
