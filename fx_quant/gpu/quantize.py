"""Quantization on a GPU, alone or behind RMSNorm: which tiles, which arguments, one launch or two.

The source is ``kernels/native/triton_quantize.py``. A row that fits into one program's registers is read once: its
scale is chosen and its codes are written by one launch. A longer row, and a large tensor with one scale, whose elements
are then one row, takes a launch for the extremes of its parts, and another that has every program reduce those few. No
atomics: results do not depend on who comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fx_quant.gpu.architectures import Architecture
from fx_quant.gpu.launch import Launch
from fx_quant.ops import empty_group_scale
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, INT8_DTYPES, dtype_name

# Columns of a row that one program holds: 64 float32 registers of each of the threads of 16 warps.
LONGEST_ROW = 32768
# Columns of a tile where a tile need not hold a row, and of one that only looks for extremes.
_STATIC_WIDTH, _PART_WIDTH = 1024, 8192
# Elements of a tile of short rows, up to that many rows; None is any number. Few rows are spread over more programs.
_TILE_ELEMENTS = MappingProxyType({8: 0, 256: 1024, None: 4096})
_ELEMENTS_OF_LANE = 16
_MOST_WARPS = 16

# Formula of int8 codes with a zero point, as ``fx_quant.activation`` has it; the kernel states its scale.
_ASYMMETRIC = {"dtype": torch.int8, "reciprocal": False, "lo": -128.0, "hi": 127.0}
_OCP = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_UNUSED = {
    "divisor": 1.0,
    "floor": 0.0,
    "floor_on": "none",
    "divide_dtype": torch.float32,
    "scale_dtype": torch.float32,
}


@dataclass(frozen=True)
class Norm:
    """What is computed before the codes: ``rms_norm(x + residual)``.

    Args:
        weight: ``[k]``.
        eps: added to the mean of squares.
        residual: like ``x``, or None.
    """

    weight: Tensor
    eps: float
    residual: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Launches in their order, and what they write.

    Args:
        launches: one, or two where a row is longer than a program.
        results: the codes; then, where they are chosen, scale and zero point; then the sum with a residual.
    """

    launches: tuple[Launch, ...]
    results: tuple[Tensor, ...]

    def run(self) -> tuple[Tensor, ...]:
        """Launch all, and return the results."""
        for launch in self.launches:
            launch.run()
        return self.results


def unfit(
    x: Tensor,
    on: Architecture,
    *,
    dtype: torch.dtype,
    lo: float,
    hi: float,
    norm: Norm | None = None,
    group: int = 0,
    divide_dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float32,
    **_: Any,
) -> str | None:
    """Why these kernels cannot give the codes of the canonical op there; None where they can."""
    if x.dtype not in FLOAT_DTYPES:
        return f"x must be float32, bfloat16 or float16, got {dtype_name(x.dtype)}"
    if not x.numel():
        return f"x must not be empty, got {list(x.shape)}"
    if dtype in FLOAT8_DTYPES and dtype not in _float8_of(on):
        return f"Triton has no {dtype_name(dtype)} on {on.name}"
    limits = torch.finfo(dtype) if dtype in FLOAT8_DTYPES else torch.iinfo(dtype)
    if not limits.min <= lo <= hi <= limits.max:
        return f"lo and hi must be codes of {dtype_name(dtype)}, got {lo:g} and {hi:g}"
    if dtype in INT8_DTYPES and not (lo.is_integer() and hi.is_integer()):
        return f"lo and hi must be integers, got {lo:g} and {hi:g}"
    if not {divide_dtype, scale_dtype} <= FLOAT_DTYPES:
        names = f"{dtype_name(divide_dtype)} and {dtype_name(scale_dtype)}"
        return f"divide_dtype and scale_dtype must be float32, bfloat16 or float16, got {names}"
    if norm is not None and x.shape[-1] > LONGEST_ROW:
        return f"a norm must be of at most {LONGEST_ROW} elements, got {x.shape[-1]}"
    if norm is not None and group and group != _power_of_2(group):
        return f"groups behind a norm must be a power of 2, got {group}"
    return None


def plan_static(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
    on: Architecture,
    norm: Norm | None = None,
    stored: torch.dtype | None = None,
) -> Plan:
    """The launch of ``quantize``: the codes of ``x``, or of its norm, under a given scale.

    Args:
        x: ``[..., k]``, not empty, any strides.
        scale: broadcastable to ``x``.
        zero_point: integers of the shape of ``scale``, added after rounding; None is 0.
        dtype, reciprocal, lo, hi: as in ``fx_quant::quantize``.
        on: where it runs.
        norm: computed first, in the same kernel.
        stored: dtype that the codes are written in, for tests; None is ``dtype``.
    """
    rows = _rows(x)
    scale, zero_point = _like_rows(scale, x), None if zero_point is None else _like_rows(zero_point, x)
    formula = {**_UNUSED, "dtype": dtype, "reciprocal": reciprocal, "lo": lo, "hi": hi}
    width = _power_of_2(rows.shape[1])
    tile = _Tile(width if norm else min(width, _STATIC_WIDTH))
    by_row = scale.stride(1) == 0 and (zero_point is None or zero_point.stride(1) == 0)
    arguments = _scale_arguments(scale, zero_point) | {"SCALE_OF_ROW": by_row}
    return _plan(x, rows, tile, formula, arguments, on, norm=norm, stored=stored)


def plan_dynamic(
    x: Tensor,
    *,
    granularity: str,
    on: Architecture,
    group: int = 0,
    norm: Norm | None = None,
    stored: torch.dtype | None = None,
    **formula: Any,
) -> Plan:
    """The launch or launches of ``quantize.dynamic`` of ``x``, or of its norm.

    Args:
        x: ``[..., k]``, not empty, any strides.
        granularity: ``per_token`` or ``per_tensor``; a norm is quantized per token.
        on: where it runs.
        group: neighbours along k that share a scale, as in ``quantize_groups``; 0 is all.
        norm, stored: as in ``plan_static``.
        formula: the other arguments of ``fx_quant::quantize.dynamic``.
    """
    if group:
        scale = empty_group_scale(x, group)
        tile = _Tile(_power_of_2(group), step=group)
        if norm is not None:
            # The norm needs the whole row, whose groups are then the rows of a reshaped tile.
            width = max(_power_of_2(x.shape[-1]), group)
            tile = _Tile(width, groups=width // group)
        by_group = {"scale_ptr": scale, "stride_scale_m": 1, "stride_scale_k": scale.stride(-1)}
        return _plan(x, _rows(x), tile, formula, by_group, on, results=(scale,), norm=norm, stored=stored)
    return _plan_rows(x, granularity, formula, on, symmetric=True, norm=norm, stored=stored)


def plan_asymmetric(x: Tensor, *, granularity: str, on: Architecture, stored: torch.dtype | None = None) -> Plan:
    """The launch or launches of int8 codes with a zero point: codes, scale and zero point (int32, like the scale).

    The formula is that of ``fx_quant.activation.quantize_activation``. Arguments are those of ``plan_dynamic``.
    """
    return _plan_rows(x, granularity, _UNUSED | _ASYMMETRIC, on, symmetric=False, stored=stored)


# --- one kernel -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """Columns of a tile; the distance between tiles where it is less; the groups of a row in one; parts of a row."""

    width: int
    step: int = 0
    groups: int = 1
    parts: int = 0


def _plan_rows(
    x: Tensor,
    granularity: str,
    formula: dict[str, Any],
    on: Architecture,
    *,
    symmetric: bool,
    norm: Norm | None = None,
    stored: torch.dtype | None = None,
) -> Plan:
    """One scale for each row, or for all of them as one."""
    per_tensor = granularity == "per_tensor"
    rows = x.reshape(1, -1) if per_tensor else _rows(x)
    shape = () if per_tensor else (*x.shape[:-1], 1)
    results = [x.new_empty(shape, dtype=torch.float32)]
    if not symmetric:
        results.append(x.new_empty(shape, dtype=torch.int32))
    m, k = rows.shape
    arguments: dict[str, Any] = _scale_arguments(*(each.view(m, 1) for each in results))
    launches = []
    tile = _Tile(_power_of_2(k))
    if k > LONGEST_ROW:
        tile = _Tile(_PART_WIDTH, parts=_parts(m, k, on))
        extremes = [x.new_empty((m, tile.parts), dtype=torch.int32) for _ in results]
        arguments |= {"high_ptr": extremes[0], "low_ptr": None if symmetric else extremes[1]}
        launches = [_extremes(rows, arguments, tile, on)]
    return _plan(
        x, rows, tile, formula, arguments, on, results=tuple(results), norm=norm, stored=stored, first=launches
    )


def _plan(
    x: Tensor,
    rows: Tensor,
    tile: _Tile,
    formula: dict[str, Any],
    arguments: dict[str, Any],
    on: Architecture,
    *,
    results: tuple[Tensor, ...] = (),
    norm: Norm | None,
    stored: torch.dtype | None,
    first: list[Launch] | None = None,
) -> Plan:
    import triton.language as tl  # pyrefly: ignore[missing-import]

    from fx_quant.kernels.native import triton_quantize

    m, k = rows.shape
    dtype, step = formula["dtype"], tile.step or tile.width
    codes = torch.empty_like(x, dtype=stored or dtype, memory_format=torch.contiguous_format)
    block, warps = _rows_of_tile(m, tile, on)
    residual = None if norm is None or norm.residual is None else _rows(norm.residual)
    total = None if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    named = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    every = {
        "x_ptr": rows,
        "residual_ptr": residual,
        "weight_ptr": None if norm is None else norm.weight,
        "sum_ptr": total,
        "low_ptr": None,
        "high_ptr": None,
        "zero_point_ptr": None,
        "codes_ptr": codes,
        "m": m,
        "k": k,
        "stride_xm": rows.stride(0),
        "stride_xk": rows.stride(1),
        "stride_residual_m": 0 if residual is None else residual.stride(0),
        "stride_residual_k": 0 if residual is None else residual.stride(1),
        "stride_weight": 0 if norm is None else norm.weight.stride(0),
        "stride_zero_point_m": 0,
        "stride_zero_point_k": 0,
        "eps": 0.0 if norm is None else float(norm.eps),
        "divisor": float(formula["divisor"]),
        "floor": float(formula["floor"]),
        "lo": float(formula["lo"]),
        "hi": float(formula["hi"]),
        "DYNAMIC": bool(results),
        "SYMMETRIC": len(results) < 2,
        "FLOOR_ON": formula["floor_on"],
        "DIVIDE_DTYPE": named[formula["divide_dtype"]],
        "SCALE_DTYPE": named[formula["scale_dtype"]],
        "RECIPROCAL": formula["reciprocal"],
        "INTEGER": dtype in INT8_DTYPES,
        "SCALE_OF_ROW": True,
        "PARTS": tile.parts,
        "GROUPS": tile.groups,
        "STEP": step,
        "ROWS": block,
        "WIDTH": tile.width,
    }
    programs = -(-m // block) * -(-k // step)
    launch = Launch(triton_quantize.quantize_kernel, every | arguments, _options(warps), programs, codes)
    return Plan((*(first or ()), launch), (codes, *results, *(() if total is None else (total,))))


def _extremes(rows: Tensor, arguments: dict[str, Any], tile: _Tile, on: Architecture) -> Launch:
    from fx_quant.kernels.native import triton_quantize

    m, k = rows.shape
    high, low = arguments["high_ptr"], arguments["low_ptr"]
    given = {
        "x_ptr": rows,
        "low_ptr": low,
        "high_ptr": high,
        "k": k,
        "stride_xm": rows.stride(0),
        "stride_xk": rows.stride(1),
        "SYMMETRIC": low is None,
        "PARTS": tile.parts,
        "WIDTH": tile.width,
    }
    warps = _warps(tile.width, on)
    return Launch(triton_quantize.extremes_kernel, given, _options(warps), m * tile.parts, high)


def _options(warps: int) -> dict[str, Any]:
    # Fused, a product and a sum would be rounded once, where the canonical op rounds twice.
    return {"num_warps": warps, "enable_fp_fusion": False}


def _rows_of_tile(m: int, tile: _Tile, on: Architecture) -> tuple[int, int]:
    """Rows and warps of a tile."""
    elements = next(found for limit, found in _TILE_ELEMENTS.items() if limit is None or m <= limit)
    rows = 1 if tile.groups > 1 else max(1, elements // tile.width)
    return rows, _warps(rows * tile.width, on)


def _warps(elements: int, on: Architecture) -> int:
    return min(max(elements // (on.lanes * _ELEMENTS_OF_LANE), 1), _MOST_WARPS * 32 // on.lanes)


def _parts(m: int, k: int, on: Architecture) -> int:
    """Parts of a row, a power of two: enough for two programs a processor, each with a tile at least."""
    wanted = min(max(2 * on.processors // m, 1), -(-k // _PART_WIDTH))
    return 1 << (wanted.bit_length() - 1)


def _power_of_2(size: int) -> int:
    """The least that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _like_rows(scale: Tensor, x: Tensor) -> Tensor:
    """``scale``, which broadcasts to ``x``, as a matrix with a row for each of ``x``'s."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(_rows(x).shape)
    return _rows(scale.expand(x.shape))


def _scale_arguments(scale: Tensor, zero_point: Tensor | None = None) -> dict[str, Any]:
    found = {"scale_ptr": scale, "stride_scale_m": scale.stride(0), "stride_scale_k": scale.stride(1)}
    if zero_point is not None:
        strides = {"stride_zero_point_m": zero_point.stride(0), "stride_zero_point_k": zero_point.stride(1)}
        found |= {"zero_point_ptr": zero_point, **strides}
    return found


def _float8_of(on: Architecture) -> frozenset[torch.dtype]:
    """The float8 dtypes that every Triton we support converts to there."""
    if on.platform == "rocm":
        return FLOAT8_DTYPES
    return _OCP if (on.capability or 0) >= 89 else frozenset()
