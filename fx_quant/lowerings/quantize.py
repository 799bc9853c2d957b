"""``fx_quant::quantize`` as pointwise and reduction IR, which Inductor fuses with whatever made ``x``.

Each step rounds where the op's body in ``ops.py`` rounds.
"""

from __future__ import annotations

import torch
from torch._inductor import ir
from torch._inductor import lowering as L
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import lowerings, register_lowering, to_dtype
from torch._inductor.ops_handler import OpsHandler
from torch._inductor.virtualized import V, ops

import fx_quant.ops  # noqa: F401  (registers the ops)
from fx_quant.compat import widened

aten = torch.ops.aten
fxq = torch.ops.fx_quant


def _divide(x: TensorBox, y: TensorBox | float) -> TensorBox:
    """``x / y`` in float32, rounded once as eager does; Inductor would multiply by the reciprocal of a constant."""
    # Triton's own division is not correctly rounded; torch 2.11 has no other.
    exact = ops.div_rn if x.get_device_or_error().type != "cpu" and hasattr(OpsHandler, "div_rn") else ops.truediv
    if isinstance(y, TensorBox):
        return L.make_pointwise(exact)(*L.broadcast_tensors(x, y))
    return L.make_pointwise(lambda value: exact(value, ops.constant(y, torch.float32)))(x)


def _codes(
    x: TensorBox,
    scale: TensorBox,
    dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
    *,
    nan_to_zero: bool = True,
) -> TensorBox:
    if isinstance(scale, ir.Constant):
        # Freezing makes a number of a scale that is a parameter.
        scale = L._full(scale.value, x.get_device_or_error(), scale.dtype, [])
    x, scale = to_dtype(x, torch.float32), to_dtype(scale, torch.float32)
    if reciprocal:
        multiply = L.make_pointwise(lambda value, s: ops.mul(value, ops.reciprocal(s)))
        y = multiply(*L.broadcast_tensors(x, scale))
    else:
        y = _divide(x, scale)

    def to_range(value):
        if not dtype.is_floating_point:
            value = ops.round(value)
            if nan_to_zero:
                # As eager's cast has it; Inductor's would saturate. (isnan is not vectorized.)
                value = ops.where(ops.ne(value, value), ops.constant(0.0, torch.float32), value)
        value = ops.maximum(value, ops.constant(lo, torch.float32))
        return ops.minimum(value, ops.constant(hi, torch.float32))

    return to_dtype(L.make_pointwise(to_range)(y), dtype)


@register_lowering(fxq.quantize.default, type_promotion_kind=None)
def quantize(
    x: TensorBox, scale: TensorBox, *, dtype: torch.dtype, reciprocal: bool, lo: float, hi: float
) -> TensorBox:
    """Codes of ``x`` under ``scale``; see ``fx_quant.ops.quantize``."""
    return _codes(x, scale, dtype, reciprocal, lo, hi)


def _rounded_to(x: TensorBox, dtype: torch.dtype) -> TensorBox:
    """``x`` in float32, rounded to ``dtype`` and back; without ``use_compute_types`` Inductor keeps the wide value."""
    if dtype is torch.float32:
        return x

    device = x.get_device_or_error().type

    def narrow_and_widen(value):
        narrow = ops.to_dtype(value, dtype, src_dtype=torch.float32, use_compute_types=False)
        return widened(narrow, dtype, device)

    return L.make_pointwise(narrow_and_widen)(x)


def _at_least(x: TensorBox, floor: float) -> TensorBox:
    return L.make_pointwise(lambda value: ops.maximum(value, ops.constant(floor, torch.float32)))(x)


# Ops that cost more than writing a value and reading it back.
_HEAVY = frozenset({"erf", "exp", "log", "pow", "sigmoid", "tanh"})


def _compute_once(x: TensorBox) -> None:
    """Store ``x`` if computing it again costs more: on CPU, its maximum and its codes are two loops.

    An activation function is one case. A matmul's epilogue is another: stored, it is fused into the template; inlined
    into both loops, it would make the template store the bare accumulator.
    """
    box = x.data
    while isinstance(box, ir.BaseView):
        box = box.data
    if not isinstance(box, ir.StorageBox):
        return
    if x.get_device_or_error().type != "cpu" or not isinstance(box.data, ir.Pointwise):
        return
    reads = [V.graph.try_get_buffer(name) for name in box.data.get_read_names()]
    if _HEAVY & set(box.data.inner_fn_opcount().used_ops) or any(isinstance(r, ir.TemplateBuffer) for r in reads):
        box.realize()


@register_lowering(fxq.quantize.dynamic, type_promotion_kind=None)
def quantize_dynamic(
    x: TensorBox,
    *,
    dtype: torch.dtype,
    granularity: str,
    divisor: float,
    divide_dtype: torch.dtype,
    floor: float,
    floor_on: str,
    scale_dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
) -> tuple[TensorBox, TensorBox]:
    """``(codes, scale)`` of ``x``; see ``fx_quant.ops.quantize_dynamic``."""
    _compute_once(x)
    # |x| and its maximum are exact in every dtype, so taking them in float32 changes nothing.
    magnitude = lowerings[aten.abs.default](to_dtype(x, torch.float32))
    if granularity == "per_token":
        amax = lowerings[aten.amax.default](magnitude, [-1], keepdims=True)
    else:
        amax = lowerings[aten.amax.default](magnitude)
    if floor_on == "amax":
        amax = _at_least(amax, floor)
    scale = _rounded_to(_divide(amax, divisor), divide_dtype)
    if floor_on == "scale":
        scale = _at_least(scale, floor)
    scale = _rounded_to(scale, scale_dtype)
    # Computed once for a row, not once for each of its codes and again in each epilogue.
    scale.realize()
    # NaN needs a scale of 0, NaN or infinity, which hides the code in any product; the check would cost a third.
    return _codes(x, scale, dtype, reciprocal, lo, hi, nan_to_zero=False), scale
