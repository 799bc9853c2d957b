"""Recognising how codes were computed: the quantize formula as data, or why it is none that an op states.

Needed only to compute the quantize by an op of its own; the matmul is rewritten without it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fx_quant.passes.nodes import (
    ADDITIONS,
    CASTS,
    RESHAPES,
    args_of,
    aten,
    constant,
    dtype,
    is_one,
    is_op,
    is_single,
    is_widening,
    rounded_number,
    same_shape,
    shape,
    through,
    through_widening,
    uniform_value,
)
from fx_quant.passes.rules.steps import is_whole
from fx_quant.scheme import CODE_DTYPES, FLOAT_DTYPES, HALF_DTYPES, dtype_name


@dataclass(frozen=True)
class Quantizer:
    """Codes that are exactly ``fx_quant::quantize`` of ``x``.

    Args:
        codes: the node that holds them.
        x: what was quantized.
        scale: the float32 node that ``x`` was divided by.
        arguments: keyword arguments of ``quantize``.
        dynamic: keyword arguments that ``quantize.dynamic`` takes beside them, when the scale is computed from ``x``
            by a formula that it states; else None.
    """

    codes: Node
    x: Node
    scale: Node
    arguments: dict[str, Any]
    dynamic: dict[str, Any] | None

    def __str__(self) -> str:
        by = "* 1/scale" if self.arguments["reciprocal"] else "/ scale"
        bounds = f"[{self.arguments['lo']:g}, {self.arguments['hi']:g}]"
        if self.dynamic is None:
            return f"x {by}, clamp {bounds}, given scale"
        return f"x {by}, clamp {bounds}, scale = amax / {self.dynamic['divisor']:g} {self.dynamic['granularity']}"


def recognise_quantizer(codes: Node) -> Quantizer | str:
    """The quantize formula of ``codes``, or why it is not one that ``quantize`` states."""
    codes = through(codes, RESHAPES)
    if _is_canonical(codes):
        return "fx_quant::quantize in the source"
    to = dtype(codes)
    if not is_op(codes, *CASTS) or to not in CODE_DTYPES:
        return "the codes are not the result of a cast"
    source = args_of(codes)[0]
    clamped = _Clamp.of(source)
    kind = dtype(source)
    if clamped is None and kind in HALF_DTYPES and _Clamp.of(through(source, CASTS)) is not None:
        return f"the codes are computed in {dtype_name(kind)}, not in float32"
    if clamped is None:
        return "the codes are not clamped on both sides by constants"
    integer = not to.is_floating_point
    node, rounds = clamped.x, clamped.rounds
    if integer and is_op(node, *ADDITIONS) and any(is_op(n, aten.round.default) for n in node.all_input_nodes):
        return "a zero point is added to what is rounded, which quantize does not"
    if integer and not rounds:
        return "integer codes are cut off, not rounded"
    if not integer and rounds:
        return "float8 codes are rounded to integers"
    if integer and not (is_whole(clamped.lo) and is_whole(clamped.hi)):
        return "the clamp bounds of integer codes are not integers"
    if dtype(node) is not torch.float32:
        return f"x is scaled in {dtype(node)}, not in float32"
    scaled = _scaled(node)
    if scaled is None:
        return "x is not divided by a scale per token or per tensor"
    x, scale, reciprocal = scaled
    arguments = {"dtype": to, "reciprocal": reciprocal, "lo": clamped.lo, "hi": clamped.hi}
    return Quantizer(codes, x, scale, arguments, _scale_formula(scale, x))


def _is_canonical(codes: Node) -> bool:
    source = args_of(codes)[0] if is_op(codes, operator.getitem) else codes
    return is_op(source, torch.ops.fx_quant.quantize.default, torch.ops.fx_quant.quantize.dynamic)


@dataclass(frozen=True)
class _Clamp:
    x: Node
    lo: float
    hi: float
    rounds: bool

    @classmethod
    def of(cls, node: object) -> _Clamp | None:
        """``clamp`` and ``round`` in either order: they commute, as the bounds of integer codes are integers."""
        lo = hi = None
        rounds = False
        while True:
            if is_op(node, aten.round.default) and not rounds:
                rounds, node = True, args_of(node)[0]
            elif is_op(node, aten.clamp_min.default) and lo is None and constant(args_of(node)[1]) is not None:
                lo, node = constant(args_of(node)[1]), args_of(node)[0]
            elif is_op(node, aten.clamp_max.default) and hi is None and constant(args_of(node)[1]) is not None:
                hi, node = constant(args_of(node)[1]), args_of(node)[0]
            elif is_op(node, aten.clamp.default) and lo is None and hi is None:
                bounds = [*args_of(node)[1:3], None, None]
                lo = constant(node.kwargs.get("min", bounds[0]))
                hi = constant(node.kwargs.get("max", bounds[1]))
                if lo is None or hi is None:
                    return None
                node = args_of(node)[0]
            else:
                break
        if lo is None or hi is None or lo > hi or not isinstance(node, Node):
            return None
        return cls(node, float(lo), float(hi), rounds)


def _scaled(node: Node) -> tuple[Node, Node, bool] | None:
    """``(x, scale, reciprocal)`` of ``x / scale`` or ``x * (1 / scale)``."""
    if is_op(node, aten.div.Tensor):
        return _with_scale(node, args_of(node)[0], args_of(node)[1], reciprocal=False)
    if is_op(node, aten.mul.Tensor):
        for x, other in (args_of(node)[:2], args_of(node)[1::-1]):
            if is_op(other, aten.reciprocal.default):
                return _with_scale(node, x, args_of(other)[0], reciprocal=True)
    return None


def _with_scale(node: Node, x: object, scale: object, *, reciprocal: bool) -> tuple[Node, Node, bool] | None:
    if not isinstance(x, Node) or not isinstance(scale, Node) or dtype(scale) is not torch.float32:
        return None
    if not same_shape(shape(x), shape(node)):
        return None
    per_token = len(shape(scale)) == len(shape(node)) and is_one(shape(scale)[-1])
    if per_token:
        per_token = same_shape(shape(scale)[:-1], shape(node)[:-1])
    if not per_token and not is_single(scale):
        return None
    x = through_widening(x)
    return (x, scale, reciprocal) if dtype(x) in FLOAT_DTYPES else None


def _scale_formula(scale: Node, x: Node) -> dict[str, Any] | None:
    """Arguments of ``choose_scale`` that give exactly ``scale`` from ``x``, or None."""
    steps: list[tuple[str, Any]] = []
    node = scale
    while True:
        if is_op(node, *CASTS):
            steps.append(("cast", dtype(node)))
        elif is_op(node, aten.div.Tensor, aten.div.Scalar) and constant(args_of(node)[1]) is not None:
            steps.append(("divide", float(args_of(node)[1])))
        elif is_op(node, aten.clamp_min.default) and constant(args_of(node)[1]) is not None:
            steps.append(("floor", float(args_of(node)[1])))
        elif not is_op(node, *RESHAPES):
            break
        node = args_of(node)[0]
    amax = _amax(node, x)
    if amax is None:
        return None
    granularity, reduced = amax
    if not _fits(granularity, scale, x):
        return None
    current = dtype(reduced)
    assert current is not None
    return _formula(reversed(steps), current, granularity)


def _fits(granularity: str, scale: Node, x: Node) -> bool:
    if granularity == "per_tensor":
        return is_single(scale)
    return same_shape(shape(scale), (*shape(x)[:-1], 1))


def _formula(steps: Iterable[tuple[str, Any]], current: torch.dtype, granularity: str) -> dict[str, Any] | None:
    """Replay the steps from amax to scale; None unless they are the steps of ``choose_scale`` in its order."""
    result: dict[str, Any] = {
        "granularity": granularity,
        "divisor": None,
        "divide_dtype": torch.float32,
        "floor": 0.0,
        "floor_on": "none",
        "scale_dtype": torch.float32,
    }
    for kind, argument in steps:
        if kind == "cast":
            if is_widening(current, argument):
                current = argument
            elif result["divisor"] is not None and result["scale_dtype"] is torch.float32 and argument in FLOAT_DTYPES:
                result["scale_dtype"] = current = argument
            else:
                return None
        elif result["floor_on"] == "scale" or result["scale_dtype"] is not torch.float32:
            return None
        elif kind == "divide":
            if result["divisor"] is not None:
                return None
            result["divisor"], result["divide_dtype"] = argument, current
        else:
            rounded = rounded_number(argument, current)
            if current is not torch.float32 and rounded != argument:
                return None
            if result["floor_on"] != "none":
                return None
            result["floor"] = argument
            result["floor_on"] = "amax" if result["divisor"] is None else "scale"
    if current is not torch.float32 or result["divisor"] is None:
        return None
    return result


def _amax(node: Node, x: Node) -> tuple[str, Node] | None:
    """``("per_token" | "per_tensor", the node whose magnitudes were reduced)`` when ``node`` is amax of ``|x|``."""
    if is_op(node, aten.maximum.default):
        return _amax_of_extrema(node, x)
    if is_op(node, operator.getitem) and args_of(node)[1] == 0 and is_op(args_of(node)[0], aten.max.dim):
        reduced, dims = args_of(node)[0].args[0], [args_of(node)[0].args[1]]
    elif is_op(node, aten.amax.default):
        reduced, dims = args_of(node)[0], list(args_of(node)[1]) if len(args_of(node)) > 1 else []
    elif is_op(node, aten.max.default):
        reduced, dims = args_of(node)[0], []
    else:
        return None
    # A widening cast commutes with abs and amax, which do not round.
    inner = through_widening(reduced)
    if not is_op(inner, aten.abs.default):
        return None
    source = through_widening(args_of(inner)[0])
    granularity = _reduction(dims, source, x)
    return None if granularity is None else (granularity, reduced)


def _amax_of_extrema(node: Node, x: Node) -> tuple[str, Node] | None:
    """``max(-min(amin(x), 0), max(amax(x), 0))`` is amax of ``|x|``."""
    for negated, positive in (args_of(node)[:2], args_of(node)[1::-1]):
        if not is_op(negated, aten.neg.default):
            continue
        low = _bounded_by_zero(args_of(negated)[0], aten.minimum.default)
        high = _bounded_by_zero(positive, aten.maximum.default)
        if not is_op(low, aten.amin.default) or not is_op(high, aten.amax.default):
            continue
        of_low, of_high = through_widening(args_of(low)[0]), through_widening(args_of(high)[0])
        dims = [list(args_of(n)[1]) if len(args_of(n)) > 1 else [] for n in (low, high)]
        if of_low is not of_high or dims[0] != dims[1]:
            continue
        granularity = _reduction(dims[0], of_low, x)
        if granularity is not None:
            return granularity, high
    return None


def _bounded_by_zero(node: object, target) -> object:
    if is_op(node, target):
        for value, bound in (args_of(node)[:2], args_of(node)[1::-1]):
            if uniform_value(bound) == 0:
                return value
    return None


def _reduction(dims: list, source: Node, x: Node) -> str | None:
    """Granularity of a reduction of ``source`` over ``dims``, when ``source`` holds the values of ``x``."""
    rank = len(shape(source))
    reduced = {d % rank for d in dims} if dims and rank else set(range(rank))
    if reduced == set(range(rank)) and len(shape(x)) != 1:
        granularity = "per_tensor"
    elif reduced == {rank - 1}:
        granularity = "per_token"
    else:
        return None
    if source is x:
        return granularity
    # The same values under another view: any for per_tensor, one that keeps rows for per_token.
    same_base = through(source, RESHAPES) is through(x, RESHAPES)
    keeps_rows = granularity == "per_tensor" or same_shape(shape(source)[-1:], shape(x)[-1:])
    return granularity if same_base and keeps_rows else None
