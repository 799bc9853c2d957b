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
    pad: int,
    *,
    nan_to_zero: bool = True,
    in_range: bool = False,
) -> TensorBox:
    """The codes, and ``pad`` of 0 behind those of each row.

    ``in_range`` says that none but those of NaN and infinity leave ``lo`` to ``hi``.
    """
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
        if in_range:
            return value
        value = ops.maximum(value, ops.constant(lo, torch.float32))
        return ops.minimum(value, ops.constant(hi, torch.float32))

    codes = to_dtype(L.make_pointwise(to_range)(y), dtype)
    return lowerings[aten.constant_pad_nd.default](codes, [0, pad], 0) if pad else codes


@register_lowering(fxq.quantize.default, type_promotion_kind=None)
def quantize(
    x: TensorBox, scale: TensorBox, *, dtype: torch.dtype, reciprocal: bool, lo: float, hi: float, pad: int = 0
) -> TensorBox:
    """Codes of ``x`` under ``scale``; see ``fx_quant.ops.quantize``."""
    return _codes(x, scale, dtype, reciprocal, lo, hi, pad)


def _rounded_to(x: TensorBox, dtype: torch.dtype) -> TensorBox:
    """``x`` in float32, rounded to ``dtype`` and back; without ``use_compute_types`` Inductor keeps the wide value."""
    if dtype is torch.float32:
        return x

    device = x.get_device_or_error().type

    def narrow_and_widen(value):
        narrow = ops.to_dtype(value, dtype, src_dtype=torch.float32, use_compute_types=False)
        return widened(narrow, dtype, device)

    return L.make_pointwise(narrow_and_widen)(x)


_LEAST_FLOOR = 2.0**-100  # far above what is subnormal, where a scale may be off by anything


def _amax(x: TensorBox, dims: list[int] | None) -> TensorBox:
    """The largest magnitude of ``x`` along ``dims``, which are kept, in float32; None is all. NaN where one is.

    On CPU it is the largest of the magnitudes' bits, which are in the same order and end in NaN: Inductor's maximum of
    floats takes three instructions, each of which waits for the last, and three times as long.
    """
    x = to_dtype(x, torch.float32)
    keep = {} if dims is None else {"axis": dims, "keepdims": True}
    if x.get_device_or_error().type != "cpu":
        return lowerings[aten.amax.default](lowerings[aten.abs.default](x), **keep)
    bits = L.make_pointwise(
        lambda value: ops.bitwise_and(
            ops.to_dtype_bitcast(value, torch.int32, torch.float32), ops.constant(0x7FFFFFFF, torch.int32)
        ),
        override_return_dtype=torch.int32,
    )
    back = L.make_pointwise(
        lambda value: ops.to_dtype_bitcast(value, torch.float32, torch.int32), override_return_dtype=torch.float32
    )
    return back(lowerings[aten.amax.default](bits(x), **keep))


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
    pad: int = 0,
) -> tuple[TensorBox, TensorBox]:
    """``(codes, scale)`` of ``x``; see ``fx_quant.ops.quantize_dynamic``."""
    _compute_once(x)
    # |x| and its maximum are exact in every dtype, so taking them in float32 changes nothing.
    amax = _amax(x, [-1] if granularity == "per_token" else None)
    if floor_on == "amax":
        amax = _at_least(amax, floor)
    scale = _rounded_to(_divide(amax, divisor), divide_dtype)
    if floor_on == "scale":
        scale = _at_least(scale, floor)
    scale = _rounded_to(scale, scale_dtype)
    # Computed once for a row, not once for each of its codes and again in each epilogue.
    scale.realize()
    # By a scale of at least amax / hi, and normal, nothing leaves the range before it is rounded to an integer.
    wide = divide_dtype is scale_dtype is torch.float32 and not dtype.is_floating_point and not reciprocal
    in_range = wide and floor_on != "none" and floor >= _LEAST_FLOOR and divisor <= min(-lo, hi) and divisor % 1 == 0
    # NaN needs a scale of 0, NaN or infinity, which hides the code in any product; the check would cost a third.
    return _codes(x, scale, dtype, reciprocal, lo, hi, pad, nan_to_zero=False, in_range=in_range), scale


@register_lowering(fxq.split_zero_point.default, type_promotion_kind=None)
def split_zero_point(zero_point: TensorBox, lo: int, hi: int) -> tuple[TensorBox, TensorBox]:
    """``(near, rest)``; see ``fx_quant.ops.split_zero_point``."""
    kind = zero_point.get_dtype()
    clamp = L.make_pointwise(
        lambda value: ops.minimum(ops.maximum(value, ops.constant(lo, kind)), ops.constant(hi, kind))
    )
    near = clamp(zero_point)
    rest = to_dtype(lowerings[aten.sub.Tensor](zero_point, near), torch.float32)
    near = to_dtype(near, torch.int32)
    for part in (near, rest):
        # Computed once, not again for each element of an epilogue.
        part.realize()
    return near, rest
