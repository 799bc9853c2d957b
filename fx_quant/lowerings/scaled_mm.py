"""Scaled matrix products: something that yields the accumulator, then the epilogue as ordinary lowerings.

The epilogue ``cast(float32(acc) * a_scale * b_scale + bias)`` is left to the scheduler, which fuses it, and whatever
pointwise follows, into the template that made the accumulator.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch._inductor import ir
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering, to_dtype
from torch._inductor.virtualized import V

import fx_quant.kernels.cpu.tiled_kernels  # noqa: F401
from fx_quant.kernels.cpu.decode import INT4_BYTES, decode_of, groups_of, scales_in_place
from fx_quant.kernels.cpu.decoded_kernels import DECODED_OPS, fixed_name
from fx_quant.kernels.cpu.groups_kernels import GROUP_LEVELS
from fx_quant.kernels.cpu.int8_kernels import LEVELS
from fx_quant.kernels.cpu.native import BFLOAT16, Dot
from fx_quant.kernels.pytorch import CUDA_INT_MM_ROWS
from fx_quant.lowerings.cpu_decoded_template import decoded_matmul
from fx_quant.lowerings.cpu_template import can_render, tile_matmul
from fx_quant.target import int_mm_is_exact

aten = torch.ops.aten
fxq = torch.ops.fx_quant


def _reshape(x: TensorBox, shape: list) -> TensorBox:
    return lowerings[aten.reshape.default](x, shape)


def _dequantize(
    acc: TensorBox,
    a_scale: TensorBox | None,
    b_scale: TensorBox | None,
    bias: TensorBox | None,
    out_dtype: torch.dtype,
) -> TensorBox:
    """The canonical epilogue of ``fx_quant.ops.dequantize``, step for step."""
    if out_dtype is torch.int32:
        return acc
    y = to_dtype(acc, torch.float32)
    for scale in (a_scale, b_scale):
        if scale is not None:
            y = lowerings[aten.mul.Tensor](y, scale)
    if bias is not None:
        y = lowerings[aten.add.Tensor](y, to_dtype(bias, torch.float32))
    y = to_dtype(y, out_dtype)
    if len(V.current_node.users) > 1:
        # Inlined into several consumers, the epilogue would be computed in each, from a stored accumulator.
        y.realize()
    return y


def _correct(acc: TensorBox, a_zero_point: TensorBox | None = None, b_sum: TensorBox | None = None, **_) -> TensorBox:
    """``fx_quant.ops.correct``: the accumulator without what the activation's zero point added."""
    if a_zero_point is None or b_sum is None:
        return acc
    mul, sub = lowerings[aten.mul.Tensor], lowerings[aten.sub.Tensor]
    return sub(acc, mul(a_zero_point, b_sum))


def _extern(op: torch._ops.OpOverload) -> Callable:
    return fallback_handler(op, add_to_fallback_set=False)


# --- kernels of the CPU provider ------------------------------------------------------------------------------


def _tiled(op: torch._ops.OpOverload, dot: Dot) -> Callable:
    """The lowering of an int8 kernel of ours: the accumulator by its tiles, epilogue fused."""

    def lowering(a, b, a_scale, b_scale, bias, n, out_dtype, **zero_point) -> TensorBox:
        if not can_render(dot, a, n):
            return _extern(op)(a, b, a_scale, b_scale, bias, n, out_dtype, **zero_point)
        acc = _correct(tile_matmul(dot, a, b, n), **zero_point)
        return _dequantize(acc, a_scale, b_scale, bias, out_dtype)

    return lowering


for _level in LEVELS:
    _op = getattr(fxq, _level.kernel).default
    register_lowering(_op, type_promotion_kind=None)(_tiled(_op, _level.dot))


@register_lowering(fxq.cpu_float8_bf16.default, type_promotion_kind=None)
def cpu_float8_bf16(a, b, a_scale, b_scale, bias, n, out_dtype) -> TensorBox:
    """Our vdpbf16ps tiles, epilogue fused."""
    if not can_render(BFLOAT16, a, n):
        return _extern(fxq.cpu_float8_bf16.default)(a, b, a_scale, b_scale, bias, n, out_dtype)
    return _dequantize(tile_matmul(BFLOAT16, a, b, n), a_scale, b_scale, bias, out_dtype)


def _scales_of(b_scale: TensorBox | None) -> torch.dtype:
    """What native code is made for, of ``b_scale``."""
    return torch.float32 if b_scale is None else scales_in_place(b_scale.get_dtype(), len(b_scale.get_size()))


def _decoded(op: torch._ops.OpOverload, *, fixed: bool) -> Callable:
    """The lowering of a kernel that decodes its weight: scales along k inside, the rest as the epilogue.

    Args:
        fixed: each row is summed in one order.
    """

    def lowering(
        a, b, a_scale, b_scale, bias, n, out_dtype, *, b_zero_point=None, block=None, b_offset=None, **_
    ) -> TensorBox:
        is_int4 = b.get_size()[-1] == INT4_BYTES
        decode = decode_of(a.get_dtype(), b.get_dtype(), is_int4, fixed, _scales_of(b_scale))
        has_both = b_zero_point is not None and b_offset is not None
        if has_both or not (can_render(decode.dot, a, n) and decode.takes(block)):
            extras = {"b_zero_point": b_zero_point, "block": block, "b_offset": b_offset}
            return _extern(op)(a, b, a_scale, b_scale, bias, n, out_dtype, **extras)
        acc = decoded_matmul(decode, a, b, n, a_scale, b_scale, b_zero_point, block, b_offset=b_offset)
        a_scale, b_scale = (a_scale, None if b_offset is not None else b_scale) if block is None else (None, None)
        return _dequantize(acc, a_scale, b_scale, bias, out_dtype)

    return lowering


for _name in DECODED_OPS:
    for _op, _fixed in ((getattr(fxq, _name).default, False), (getattr(fxq, fixed_name(_name)).default, True)):
        register_lowering(_op, type_promotion_kind=None)(_decoded(_op, fixed=_fixed))


def _groups(op: torch._ops.OpOverload, dot: Dot) -> Callable:
    """The lowering of int8 products with scales along k: these inside, those of whole rows as the epilogue."""

    def lowering(
        a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, b_zero_point=None, block=None
    ) -> TensorBox:
        decode = groups_of(dot, len(b.get_size()) == 3, _scales_of(b_scale))
        if not (can_render(dot, a, n) and decode.takes(block)):
            extras = {"a_zero_point": a_zero_point, "b_sum": b_sum, "b_zero_point": b_zero_point, "block": block}
            return _extern(op)(a, b, a_scale, b_scale, bias, n, out_dtype, **extras)
        by_row = block is None or a_scale is None or len(a_scale.get_size()) < 2 or a_scale.get_size()[1] == 1
        of_groups = None if by_row else a_scale
        acc = decoded_matmul(decode, a, b, n, of_groups, b_scale, b_zero_point, block, a_zero_point, b_sum)
        return _dequantize(acc, a_scale if by_row else None, b_scale if block is None else None, bias, out_dtype)

    return lowering


for _groups_level in GROUP_LEVELS:
    _op = getattr(fxq, _groups_level.kernel).default
    register_lowering(_op, type_promotion_kind=None)(_groups(_op, _groups_level.dot))


@register_lowering(fxq.cpu_float8_float32.default, type_promotion_kind=None)
def cpu_float8_float32(a, b, a_scale, b_scale, bias, n, out_dtype) -> TensorBox:
    """Float matmul of widened codes, epilogue fused by Inductor."""
    return _dequantize(lowerings[aten.mm.default](a, b), a_scale, b_scale, bias, out_dtype)


# --- kernels of PyTorch ---------------------------------------------------------------------------------------


def _dense(x: TensorBox) -> TensorBox:
    """A matrix as ``torch._int_mm`` and ``_scaled_mm`` read it: row by row or column by column without repeats."""
    rows = ir.ExternKernel.realize_input(x)
    # A flexible layout is not decided yet, and will be dense.
    if isinstance(rows.get_layout(), ir.FixedLayout):
        (m, n), (down, across) = map(sympy.sympify, rows.get_size()), map(sympy.sympify, rows.get_stride())
        known = V.graph.sizevars.statically_known_geq
        if not (across == 1 and known(down, n)) and not (down == 1 and known(across, m)):
            return lowerings[aten.clone.default](x, memory_format=torch.contiguous_format)
    return x


@register_lowering(fxq.pytorch_int_mm.default, type_promotion_kind=None)
def pytorch_int_mm(a, b, a_scale, b_scale, bias, n, out_dtype, **zero_point) -> TensorBox:
    """``torch._int_mm``, epilogue fused by Inductor; the op's own body, which pads, where CUDA may get too few rows."""
    (m, k), is_cpu = a.get_size(), a.get_device_or_error().type == "cpu"
    enough = V.graph.sizevars.statically_known_geq(m, CUDA_INT_MM_ROWS)
    # The body knows what torch._int_mm does not: sizes of 0 and 1.
    if {0, 1}.intersection((m, n, k)) or not (is_cpu or enough):
        return _extern(fxq.pytorch_int_mm.default)(a, b, a_scale, b_scale, bias, n, out_dtype, **zero_point)
    acc = _correct(lowerings[aten._int_mm.default](_dense(a), _dense(b)), **zero_point)
    return _dequantize(acc, a_scale, b_scale, bias, out_dtype)


def _one(like: TensorBox) -> TensorBox:
    return lowerings[aten.full.default]([], 1.0, dtype=torch.float32, device=like.get_device())


def _is_single(scale: TensorBox | None) -> bool:
    return scale is None or all(size == 1 for size in scale.get_size())


def _rows(scale: TensorBox | None, like: TensorBox, shape: list) -> TensorBox:
    """``scale`` as contiguous float32 of ``shape``, which is ``[m, 1]`` or ``[1, n]``."""
    scale = _one(like) if scale is None else scale
    scale = _reshape(scale, [1, 1] if _is_single(scale) else shape)
    return lowerings[aten.clone.default](
        lowerings[aten.expand.default](scale, shape), memory_format=torch.contiguous_format
    )


@register_lowering(fxq.pytorch_scaled_mm.default, type_promotion_kind=None)
def pytorch_scaled_mm(a, b, a_scale, b_scale, bias, n, out_dtype) -> TensorBox:
    """``torch._scaled_mm`` with its own scales and bias."""
    m = a.get_size()[0]
    if _is_single(a_scale) and _is_single(b_scale):
        scales = [_one(a) if scale is None else _reshape(scale, []) for scale in (a_scale, b_scale)]
    else:
        scales = [_rows(a_scale, a, [m, 1]), _rows(b_scale, a, [1, n])]
    return lowerings[aten._scaled_mm.default](_dense(a), _dense(b), *scales, bias=bias, out_dtype=out_dtype)


@register_lowering(fxq.pytorch_channelwise.default, type_promotion_kind=None)
def pytorch_channelwise(a, b, a_scale, b_scale, bias, n, out_dtype) -> TensorBox:
    """``torch._scaled_mm`` with unit scales to float32, epilogue fused by Inductor."""
    acc = lowerings[aten._scaled_mm.default](_dense(a), _dense(b), _one(a), _one(a), out_dtype=torch.float32)
    return _dequantize(acc, a_scale, b_scale, bias, out_dtype)


# --- canonical ops that no kernel was assigned to -----------------------------------------------------------------


@register_lowering(fxq.scaled_mm.default, type_promotion_kind=None)
def scaled_mm(
    a, b, a_scale, b_scale, bias, out_dtype, *, a_zero_point=None, b_zero_point=None, block=None
) -> TensorBox:
    """``torch._int_mm`` and the epilogue for int8 on a CPU where that is exact; the op's own body elsewhere."""
    plain = a_zero_point is None and b_zero_point is None and block is None and 0 not in (*a.get_size(), *b.get_size())
    if plain and int_mm_is_exact() and a.get_device().type == "cpu" and a.get_dtype() == b.get_dtype() == torch.int8:
        return pytorch_int_mm(a, b, a_scale, b_scale, bias, b.get_size()[1], out_dtype)
    extras = {"a_zero_point": a_zero_point, "b_zero_point": b_zero_point, "block": block}
    return _extern(fxq.scaled_mm.default)(a, b, a_scale, b_scale, bias, out_dtype, **extras)
