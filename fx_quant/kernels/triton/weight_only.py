"""Half-precision rows by a packed weight of 4 or 8 bits a code: the weight is decoded in registers, beside the sum.

The source is ``kernels/triton/source/weight_only.py``; how weights are packed is in ``packed_codes.py``. It is right
for any number of rows and any strides of ``x``. The weight's rows are the rows of the tensor cores, so that few rows of
``x`` waste none of them, and k is split among programs where there are too few tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.launch import TILES_M, Configuration, Launch
from fx_quant.kernels.triton.operands import weight_only_arguments
from fx_quant.kernels.triton.packed_codes import PackedCodes
from fx_quant.kernels.triton.split import split_arguments, split_by_blocks, unfit_split
from fx_quant.ops import check_weight_only_mm
from fx_quant.scheme import HALF_DTYPES, dtype_name


@dataclass(frozen=True)
class PackedOperands:
    """Operands of ``fx_quant::weight_only_mm`` with a packed weight, checked.

    Args:
        x: ``[m, k]``, bfloat16 or float16.
        packed: the weight, as ``codes.pack`` made it.
        codes: how it is packed.
        scale, zero_point, bias, block: as in ``fx_quant::weight_only_mm``.
        n: columns of the result.
        out_dtype: dtype of the result.
    """

    x: Tensor
    packed: Tensor
    codes: PackedCodes
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    n: int
    out_dtype: torch.dtype
    block: tuple[int, int] | None


def packed_operands(
    x: Tensor,
    packed: Tensor,
    codes: PackedCodes,
    scale: Tensor,
    bias: Tensor | None,
    n: int,
    out_dtype: torch.dtype,
    *,
    zero_point: Tensor | None = None,
    block: Sequence[int] | None = None,
) -> PackedOperands:
    """Check the operands of a matmul with a packed weight.

    Raises:
        RuntimeError: dtypes or shapes do not fit.
    """
    name = f"triton_weight_only_{codes.name}_packed"
    check_weight_only_mm(x, packed, n, scale, zero_point, bias, out_dtype, name, block=block)
    k = x.shape[1]
    torch._check(
        x.dtype in HALF_DTYPES,
        lambda: f"{name}: x must be [m, k] of bfloat16 or float16, got {dtype_name(x.dtype)} {list(x.shape)}",
    )
    shape = codes.shape(n, k // codes.per_byte)
    torch._check(
        packed.shape == shape and packed.dtype in (codes.weights if codes.dtype is None else {codes.dtype}),
        lambda: (
            f"{name}: b must be a weight [{n}, {k}] packed as {list(shape)}, "
            f"got {dtype_name(packed.dtype)} {list(packed.shape)}"
        ),
    )
    sizes = None if block is None else (block[0], block[1])
    return PackedOperands(x, packed, codes, scale, zero_point, bias, n, out_dtype, sizes)


# --- configurations ---------------------------------------------------------------------------------------------


def _sizes(block: int, *sizes: tuple[int, int, int, int]) -> tuple[Configuration, ...]:
    return tuple(Configuration("weight_only", m, n, block, warps, stages) for m, n, warps, stages in sizes)


# Family of architectures -> codes along k of a block -> tiles by the rows of ``x`` that they hold, the last for more.
# Larger tiles spill where groups have sums of their own. Nothing was timed.
CONFIGURATIONS: Mapping[str, Mapping[int, tuple[Configuration, ...]]] = MappingProxyType(
    {
        "sm80": {
            128: _sizes(128, (16, 64, 4, 5), (32, 64, 4, 4), (64, 64, 4, 3), (64, 128, 8, 3)),
            64: _sizes(64, (16, 64, 4, 6), (32, 64, 4, 5), (64, 64, 4, 4), (64, 128, 8, 4)),
        },
        "sm90": {
            128: _sizes(128, (16, 64, 4, 6), (32, 64, 4, 5), (64, 64, 4, 4), (128, 128, 8, 3)),
            64: _sizes(64, (16, 64, 4, 8), (32, 64, 4, 7), (64, 64, 4, 6), (128, 128, 8, 4)),
        },
        "rocm": {
            128: _sizes(128, (16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2), (128, 128, 8, 2)),
            64: _sizes(64, (16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2), (128, 128, 8, 2)),
        },
    }
)


def family(architecture: Architecture) -> str:
    """Whose configurations an architecture has: those of ``sm90`` need its tensor cores and its shared memory."""
    if architecture.platform == "rocm":
        return "rocm"
    return "sm90" if 90 <= (architecture.capability or 0) < 120 else "sm80"


def configuration(operands: PackedOperands, architecture: Architecture) -> Configuration:
    """The configuration for these operands on that architecture."""
    m, block = operands.x.shape[0], operands.codes.block
    sizes = CONFIGURATIONS[family(architecture)][block]
    least = next((size for size in sizes if m <= size.block_m), sizes[-1])
    if unfit_split(2, architecture) is not None:
        return least
    tiles = least.tiles(m, operands.n)
    return replace(least, split_k=split_by_blocks(tiles, operands.packed.shape[0], architecture.processors))


def unfit(operands: PackedOperands, configuration: Configuration, architecture: Architecture) -> str | None:
    """Why this form cannot compute these operands on that architecture, or None."""
    if unfit_split(configuration.split_k, architecture) is not None:
        return unfit_split(configuration.split_k, architecture)
    group, block = (operands.block or (1, 0))[1], operands.codes.block
    least = 64 if operands.codes.name == "float8" else 32
    if group and (group % least or (group % block and block % group)):
        return f"groups along k must divide {block} or be multiples of it, and hold {least} codes or more, got {group}"
    if operands.codes.name == "float8" and architecture.capability is not None and architecture.capability < 89:
        return f"float8 codes are decoded from sm89 on, the architecture is {architecture.name}"
    return None


def plan_weight_only_mm(operands: PackedOperands, configuration: Configuration, architecture: Architecture) -> Launch:
    """The launch of a matmul with a packed weight.

    Raises:
        RuntimeError: the operands are ``unfit``.
    """
    from fx_quant.kernels.triton.source import weight_only as triton_weight_only

    reason = unfit(operands, configuration, architecture)
    torch._check(reason is None, lambda: f"triton_weight_only_{operands.codes.name}_packed: {reason}")
    x, codes, n = operands.x, operands.codes, operands.n
    m, k = x.shape
    group, tiles = (operands.block or (1, 0))[1], configuration.tiles(m, n)
    out = x.new_empty((m, n), dtype=operands.out_dtype)
    arguments: dict[str, Any] = {
        "packed_ptr": operands.packed,
        "out_ptr": out,
        "scale_ptr": operands.scale,
        "zero_point_ptr": operands.zero_point,
        "m": m,
        "n": n,
        "k": k,
        "CODES": codes.name,
        "PARTS": max(codes.block // group, 1) if group else 1,
        "TILES_M": TILES_M,
        **weight_only_arguments(x, operands.scale, operands.zero_point, operands.bias, operands.block),
        **split_arguments(x, tiles, configuration, torch.float32),
        **configuration.blocks,
    }
    kernel = triton_weight_only.packed_weight_kernel
    return Launch(kernel, arguments, configuration.options, tiles * configuration.split_k, out, configuration)
