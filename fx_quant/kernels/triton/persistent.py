"""The persistent form, for many rows: one program a processor, whose tiles are loaded by tensor descriptors (TMA).

The source is ``kernels/triton/source/persistent.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.descriptors import described, undescribed
from fx_quant.kernels.triton.launch import TILES_M, Configuration, Launch
from fx_quant.kernels.triton.operands import ScaledOperands, grouped_strides, vector_stride

# More bytes of a result's tile, for each of the warps that hold it, spill or leave no shared memory for the stages.
_TILE_BYTES = 8 * 1024
_CODES = frozenset({torch.int8, torch.float8_e4m3fn, torch.float8_e5m2})
# The tensor cores of sm90 add float8 products with about 14 bits. Those of sm100 and sm120 do not: there, cuBLASLt has
# nothing to gain by fast accumulation either (docs.nvidia.com/cuda/cublas, CUBLASLT_MATMUL_DESC_FAST_ACCUM).
_IMPRECISE = frozenset({"sm90"})
_IMPRECISE_K = 128


_persistent = partial(Configuration, "persistent")
_specialized = partial(_persistent, warp_specialized=True)
_flattened = partial(_persistent, flattened=True)

_SPECIALIZED = _specialized(128, 128, 128, 4, 5)
_LARGEST = (_specialized(128, 256, 128, 4, 4), _specialized(256, 128, 128, 4, 4), _SPECIALIZED)
_BLOCKS = (
    _SPECIALIZED,
    _persistent(128, 128, 128, 8, 4),
    _persistent(64, 128, 128, 4, 5),
    _persistent(128, 64, 128, 4, 5),
)
# Larger tiles spill when they leave the tensor memory; Triton 3.6 compiles no warp specialization here.
_SM100 = (_flattened(128, 128, 128, 8, 4), _persistent(128, 64, 128, 8, 6), _persistent(64, 128, 128, 8, 6))
_SM120 = (
    _persistent(128, 128, 128, 8, 3),
    _persistent(128, 128, 64, 8, 4),
    _persistent(64, 128, 128, 4, 3),
    _persistent(128, 64, 128, 4, 3),
)
_RECIPES = ("float8", "float8_block", "float8_group", "int8")

# Architecture -> recipe -> what may be launched: all that was found to compile without spilling, by Triton 3.6 and 3.9.
CONFIGURATIONS: Mapping[str, Mapping[str, tuple[Configuration, ...]]] = {
    "sm90": {
        # A sum that leaves the tensor cores takes twice its registers: larger tiles spill.
        "float8": (
            _SPECIALIZED,
            _flattened(128, 128, 128, 8, 5),
            _persistent(128, 128, 128, 8, 5),
            _persistent(64, 256, 128, 8, 4),
            _persistent(64, 128, 128, 4, 6),
        ),
        "float8_block": _BLOCKS,
        "float8_group": _BLOCKS,
        "int8": (
            *_LARGEST,
            _persistent(128, 256, 128, 8, 3),
            _persistent(128, 128, 128, 8, 5),
            _persistent(64, 128, 128, 4, 6),
        ),
    },
    # Scales of each column take registers too.
    "sm100": dict.fromkeys(_RECIPES, _SM100) | {"float8_group": _SM100[1:]},
    "sm120": dict.fromkeys(_RECIPES, _SM120) | {"float8_group": _SM120[:3]},
}


def unfit(operands: ScaledOperands, configuration: Configuration, architecture: Architecture) -> str | None:
    """Why this form cannot compute these operands there, in a line, or None."""
    if not {operands.a.dtype, operands.b.dtype} <= _CODES and architecture.tma:
        return f"needs int8, float8_e4m3fn or float8_e5m2, got {operands.a.dtype} and {operands.b.dtype}"
    reason = undescribed({"a": operands.a, "the weight": operands.b.t()}, architecture)
    if reason is not None:
        return reason
    if operands.block is not None and (operands.a.dtype is torch.int8 or operands.block[1] % configuration.block_k):
        return (
            f"needs float8 and blocks of a multiple of {configuration.block_k} along k, "
            f"got {operands.a.dtype} and {operands.block[1]}"
        )
    # Warp specialization gives the tile to two groups of warps.
    most = _TILE_BYTES * configuration.warps * (2 if configuration.warp_specialized else 1)
    size = configuration.block_m * configuration.block_n * operands.out_dtype.itemsize
    return (
        None if size <= most else f"needs a tile of the result of at most {most} bytes, got {size}; use a smaller one"
    )


def plan_scaled_mm(operands: ScaledOperands, configuration: Configuration, architecture: Architecture) -> Launch:
    """The launch of a scaled matmul by tiles of tensor descriptors.

    A float8 sum leaves tensor cores that add imprecisely every 128 products.

    Raises:
        RuntimeError: the operands are ``unfit``.
    """
    from fx_quant.kernels.triton.source import persistent as triton_persistent

    m, n, k = operands.m, operands.n, operands.k
    reason = unfit(operands, configuration, architecture)
    torch._check(reason is None, lambda: f"triton_scaled_mm: the persistent form {reason}")

    a, weight, a_scale, b_scale = operands.a, operands.b.t(), operands.a_scale, operands.b_scale
    if operands.block is None:
        group_n = group_k = 0
        a_scale_strides, b_scale_strides = (vector_stride(a_scale, 0), 0), (vector_stride(b_scale, -1), 0)
    else:
        group_n, group_k = operands.block
        a_scale_strides, b_scale_strides = grouped_strides(a_scale, True), grouped_strides(b_scale, True)
    imprecise = operands.recipe == "float8" and architecture.name in _IMPRECISE
    arguments: dict[str, Any] = {
        "a": a if configuration.warp_specialized else described(a, configuration.block_m, configuration.block_k),
        "b": described(weight, configuration.block_n, configuration.block_k),
        "out_ptr": a.new_empty((m, n), dtype=operands.out_dtype),
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "bias_ptr": operands.bias,
        "a_zero_point_ptr": operands.a_zero_point,
        "b_sum_ptr": operands.b_sum,
        "m": m,
        "n": n,
        "k": k,
        "stride_am": a.stride(0),
        "stride_a_scale_m": a_scale_strides[0],
        "stride_a_scale_k": a_scale_strides[1],
        "stride_b_scale_n": b_scale_strides[0],
        "stride_b_scale_k": b_scale_strides[1],
        "stride_bias": vector_stride(operands.bias, 0),
        "stride_a_zero_point": vector_stride(operands.a_zero_point, 0),
        "stride_b_sum": vector_stride(operands.b_sum, 0),
        "GROUP_N": group_n,
        "GROUP_K": group_k,
        "IMPRECISE_K": min(_IMPRECISE_K, configuration.block_k) if imprecise else 0,
        "TILES_M": TILES_M,
        "WARP_SPECIALIZED": configuration.warp_specialized,
        "FLATTENED": configuration.flattened,
        **configuration.blocks,
    }
    programs = min(architecture.processors, configuration.tiles(m, n))
    return Launch(
        triton_persistent.scaled_mm_kernel,
        arguments,
        configuration.options,
        programs,
        arguments["out_ptr"],
        configuration,
        scratch=configuration.warp_specialized,
    )
