"""The swapped form, for decoding: the weight's rows are the rows of the tensor cores, and k is split among programs.

The source is ``kernels/triton/source/swapped.py``. It is right for any number of rows of ``a`` and any strides, and
meant for at most 64 rows, where reading the weight is all that takes time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.launch import Configuration, Launch
from fx_quant.kernels.triton.operands import ScaledOperands, scale_arguments
from fx_quant.kernels.triton.split import split_arguments, split_by_steps, unfit_split
from fx_quant.scheme import FLOAT8_DTYPES, dtype_name


def _form(*sizes: tuple[int, int, int, int, int]) -> tuple[Configuration, ...]:
    return tuple(Configuration("swapped", *size) for size in sizes)


# Up to 64 rows at block_n = 64 read as many bytes of tokens as of weights, hence 128 there.
_HOPPER = _form(
    (16, 64, 256, 4, 4),
    (16, 128, 128, 4, 5),
    (32, 64, 256, 4, 4),
    (64, 128, 128, 8, 5),
    (64, 64, 256, 4, 4),
)
_HOPPER_BLOCK = _form(
    (16, 64, 128, 4, 7),
    (16, 128, 128, 4, 5),
    (32, 64, 128, 4, 7),
    (64, 128, 128, 8, 5),
)
# At most 99 KB of shared memory.
_SMALL = _form((16, 64, 256, 4, 4), (32, 64, 256, 4, 4), (64, 64, 128, 4, 6))
_SMALL_BLOCK = _form((16, 64, 128, 4, 7), (32, 64, 128, 4, 6), (64, 64, 128, 4, 5))
# The tensor cores of sm89 add float8 with about 14 bits, and leave their sums after each step.
_ADA_FLOAT8 = _form((16, 64, 128, 4, 7), (32, 64, 128, 4, 7), (64, 64, 128, 4, 6))
# At most 64 KB, and what is loaded ahead lies in registers. Tiles are narrow, as k is not split there.
_AMD = _form((16, 32, 256, 2, 2), (32, 32, 256, 2, 2), (64, 64, 128, 4, 2))
_AMD_BLOCK = _form((16, 32, 128, 2, 2), (32, 32, 128, 2, 2), (64, 64, 128, 4, 2))

# Recipe -> architecture -> configurations, by the rows of ``a`` that they take. Each keeps some 48 KB of weights in
# flight where shared memory allows it. ``split_k`` follows from the sizes (``split_by_steps``).
CONFIGURATIONS: Mapping[str, Mapping[str, tuple[Configuration, ...]]] = MappingProxyType(
    {
        "float8": {
            "sm89": _ADA_FLOAT8,
            "sm90": _HOPPER,
            "sm100": _HOPPER,
            "sm120": _SMALL,
            "gfx942": _AMD,
            "gfx950": _AMD,
        },
        "int8": {
            "sm80": _SMALL,
            "sm89": _SMALL,
            "sm90": _HOPPER,
            # Triton 3.6 multiplies int8 by `mma.sync` there, for which the last one spills.
            "sm100": _HOPPER[:-1],
            "sm120": _SMALL,
            "gfx942": _AMD,
            "gfx950": _AMD,
        },
        "block": {
            "sm89": _SMALL_BLOCK,
            "sm90": _HOPPER_BLOCK,
            "sm100": _HOPPER_BLOCK,
            "sm120": _SMALL_BLOCK,
            "gfx942": _AMD_BLOCK,
            "gfx950": _AMD_BLOCK,
        },
    }
)


def best_split(configuration: Configuration, n: int, k: int, architecture: Architecture) -> int:
    """``split_by_steps`` of the sizes of ``configuration``; 1 where k cannot be split."""
    if unfit_split(2, architecture) is not None:
        return 1
    return split_by_steps(n, k, configuration.block_n, configuration.block_k, architecture.processors)


def unfit(operands: ScaledOperands, configuration: Configuration, architecture: Architecture) -> str | None:
    """Why this form cannot compute these operands there, in one line; None if it can."""
    reason = unfit_codes(operands.a.dtype, architecture) or unfit_codes(operands.b.dtype, architecture)
    reason = reason or unfit_split(configuration.split_k, architecture)
    if reason is None and operands.block is not None and _block_k(operands.block[1], configuration) < 32:
        reason = f"swapped: needs groups of a multiple of 32 codes along k, got {operands.block[1]}"
    return reason


def unfit_codes(dtype: torch.dtype, architecture: Architecture) -> str | None:
    """Why there are no products of codes of ``dtype`` there, in one line; None if there are."""
    if dtype not in FLOAT8_DTYPES:
        return None
    if not architecture.float8:
        return f"swapped: {architecture.name} has no products of float8; use int8 codes"
    has_fnuz, is_fnuz = architecture.name == "gfx942", dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
    if has_fnuz != is_fnuz:
        kinds = "only the" if has_fnuz else "no"
        return f"swapped: {architecture.name} has {kinds} fnuz kinds of float8, got {dtype_name(dtype)}"
    return None


def _block_k(group_k: int, configuration: Configuration) -> int:
    """The largest step along k that divides a group."""
    return min(configuration.block_k, group_k & -group_k)


def _descriptor(b: Tensor, block_n: int, block_k: int, architecture: Architecture) -> Any:
    """A tensor descriptor of the weight ``b.t()``, or None where its memory has no such form."""
    k, n = b.shape
    aligned = b.stride(0) == 1 and b.stride(1) % 16 == 0 and b.stride(1) >= k and b.data_ptr() % 16 == 0
    # On sm120, what Triton 3.6 makes of descriptors uses the stack.
    if not (architecture.tma and architecture.name != "sm120" and aligned and n and k):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor  # pyrefly: ignore[missing-import]

    return TensorDescriptor(b.t(), [n, k], [b.stride(1), 1], [block_n, block_k])


def plan_scaled_mm(operands: ScaledOperands, configuration: Configuration, architecture: Architecture) -> Launch:
    """The launch of a scaled matmul.

    Raises:
        ValueError: this form cannot compute these operands there.
    """
    from fx_quant.kernels.triton.source import swapped as triton_swapped

    reason = unfit(operands, configuration, architecture)
    if reason is not None:
        raise ValueError(reason)
    (a, b), (m, n, k) = (operands.a, operands.b), (operands.m, operands.n, operands.k)
    kernel, launched = triton_swapped.scaled_mm_kernel, configuration
    sums = torch.int32 if a.dtype is torch.int8 else torch.float32
    if operands.block is not None:
        kernel, sums = triton_swapped.block_scaled_mm_kernel, torch.float32
        launched = replace(configuration, block_k=_block_k(operands.block[1], configuration))
    descriptor = _descriptor(b, launched.block_n, launched.block_k, architecture)
    tiles, out = launched.tiles(m, n), a.new_empty((m, n), dtype=operands.out_dtype)
    arguments: dict[str, Any] = {
        "a_ptr": a,
        "b_ptr": b if descriptor is None else descriptor,
        "out_ptr": out,
        "m": m,
        "n": n,
        "k": k,
        "stride_am": a.stride(0),
        "stride_ak": a.stride(1),
        "stride_bk": b.stride(0),
        "stride_bn": b.stride(1),
        "DESCRIPTOR": descriptor is not None,
        **scale_arguments(operands),
        **split_arguments(a, tiles, launched, sums),
        **launched.blocks,
    }
    return Launch(kernel, arguments, launched.options, tiles * launched.split_k, out, launched)
