"""Between which integers codes or a zero point lie: what is proven by the dtype and the steps that computed them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from fx_quant.passes.nodes import (
    ADDITIONS,
    ANDS,
    CASTS,
    JOINS,
    MULTIPLICATIONS,
    RIGHT_SHIFTS,
    SUBTRACTIONS,
    VIEWS,
    arguments,
    aten,
    dtype,
    is_op,
    rounded_number,
    uniform_value,
)
from fx_quant.passes.values import Tile

Range = tuple[float, float]
_ANY: Range = (-math.inf, math.inf)
_RangeOf = Callable[[object], Range]
# How many steps are looked back: clamps and casts stand right before what they bound.
_DEPTH = 16
# Zero points are those of bytes, perhaps with another added: what lies further out is none that fits its codes.
_NEAR = 512


def bounds_of(source: object) -> tuple[int, int] | None:
    """Inclusive bounds of the integers that a number or the tensor of a node holds; None where none are proven."""
    low, high = _range(source, _DEPTH, {})
    return (int(low), int(high)) if math.isfinite(low) and math.isfinite(high) else None


def is_near(point: Tile) -> bool:
    """Whether a zero point is proven to lie about where codes of a byte do, so that integer sums have room for it."""
    bounds = bounds_of(point.source)
    return bounds is not None and bounds[0] >= -_NEAR and bounds[1] <= _NEAR


def _range(value: object, depth: int, known: dict[tuple[Node, int], Range]) -> Range:
    if not isinstance(value, Node):
        return _proven(value, depth, known)
    # Both operands of a step may go back to the same one, and so on.
    if (value, depth) not in known:
        known[value, depth] = _proven(value, depth, known)
    return known[value, depth]


def _proven(value: object, depth: int, known: dict[tuple[Node, int], Range]) -> Range:
    number = uniform_value(value)
    if number is not None:
        return (number, number) if math.isfinite(number) else _ANY
    if not isinstance(value, Node):
        return _ANY
    bounds = (
        _computed(value, lambda source: _range(source, depth - 1, known))
        if depth and value.op == "call_function"
        else _ANY
    )
    to = dtype(value)
    if to is None or to.is_floating_point or to.is_complex:
        return bounds
    least, most = (0, 1) if to is torch.bool else (torch.iinfo(to).min, torch.iinfo(to).max)
    # What leaves the dtype wraps around, to anywhere in it.
    return bounds if least <= bounds[0] and bounds[1] <= most else (least, most)


def _computed(node: Node, range_of: _RangeOf) -> Range:
    if node.target in _FIRST or is_op(node, *VIEWS):
        return range_of(node.args[0])
    if is_op(node, *CASTS):
        return _cast(range_of(node.args[0]), dtype(node))
    rule = _RULES.get(node.target)
    return _ANY if rule is None else rule(node, range_of)


def _cast(bounds: Range, to: torch.dtype | None) -> Range:
    if to is None or not all(map(math.isfinite, bounds)):
        return bounds
    if to.is_floating_point:
        low, high = (rounded_number(end, to) for end in bounds)
        return (low, high) if math.isfinite(low) and math.isfinite(high) else _ANY
    return math.trunc(bounds[0]), math.trunc(bounds[1])


def _clamp(node: Node, range_of: _RangeOf) -> Range:
    given = arguments(node)
    low, high = range_of(given["self"])
    if given.get("min") is not None:
        least = range_of(given["min"])
        low, high = max(low, least[0]), max(high, least[1])
    if given.get("max") is not None:
        most = range_of(given["max"])
        low, high = min(low, most[0]), min(high, most[1])
    return low, high


def _add(node: Node, range_of: _RangeOf) -> Range:
    given, sign = arguments(node), -1 if node.target in SUBTRACTIONS else 1
    if given["alpha"] != 1:
        return _ANY
    left, right = range_of(given["self"]), range_of(given["other"])
    if sign < 0:
        right = -right[1], -right[0]
    return left[0] + right[0], left[1] + right[1]


def _multiply(node: Node, range_of: _RangeOf) -> Range:
    left, right = (range_of(arguments(node)[name]) for name in ("self", "other"))
    if not all(map(math.isfinite, (*left, *right))):
        return _ANY
    products = [x * y for x in left for y in right]
    return min(products), max(products)


def _negate(node: Node, range_of: _RangeOf) -> Range:
    low, high = range_of(node.args[0])
    return -high, -low


def _larger(node: Node, range_of: _RangeOf) -> Range:
    left, right = range_of(node.args[0]), range_of(node.args[1])
    return max(left[0], right[0]), max(left[1], right[1])


def _smaller(node: Node, range_of: _RangeOf) -> Range:
    left, right = range_of(node.args[0]), range_of(node.args[1])
    return min(left[0], right[0]), min(left[1], right[1])


def _either(node: Node, range_of: _RangeOf) -> Range:
    left, right = range_of(node.args[1]), range_of(node.args[2])
    return min(left[0], right[0]), max(left[1], right[1])


def _any_of(node: Node, range_of: _RangeOf) -> Range:
    parts = node.args[0]
    ranges = [range_of(part) for part in parts] if isinstance(parts, (list, tuple)) else []
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else _ANY


def _mask(node: Node, range_of: _RangeOf) -> Range:
    mask = uniform_value(node.args[1])
    return (0, mask) if isinstance(mask, int) and mask >= 0 else _ANY


def _shift(node: Node, range_of: _RangeOf) -> Range:
    (low, high), bits = range_of(node.args[0]), uniform_value(node.args[1])
    if not isinstance(bits, int) or not 0 <= bits < 32 or not math.isfinite(low) or not math.isfinite(high):
        return _ANY
    return int(low) >> bits, int(high) >> bits


def _rounded(to_integer: Callable[[float], int]) -> Callable[[Node, _RangeOf], Range]:
    def rule(node: Node, range_of: _RangeOf) -> Range:
        low, high = (to_integer(end) if math.isfinite(end) else end for end in range_of(node.args[0]))
        return low, high

    return rule


# Ops whose result holds elements of their first argument only.
_FIRST = frozenset(
    {
        aten.slice.Tensor,
        aten.select.int,
        aten.index.Tensor,
        aten.index_select.default,
        aten.repeat.default,
        aten.amax.default,
        aten.amin.default,
    }
)
_RULES: dict[object, Callable[[Node, _RangeOf], Range]] = {
    **dict.fromkeys((aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_min.Tensor), _clamp),
    **dict.fromkeys((aten.clamp_max.default, aten.clamp_max.Tensor), _clamp),
    **dict.fromkeys(ADDITIONS | SUBTRACTIONS, _add),
    **dict.fromkeys(MULTIPLICATIONS, _multiply),
    aten.neg.default: _negate,
    aten.maximum.default: _larger,
    aten.minimum.default: _smaller,
    aten.where.self: _either,
    **dict.fromkeys(JOINS, _any_of),
    **dict.fromkeys(ANDS, _mask),
    **dict.fromkeys(RIGHT_SHIFTS, _shift),
    aten.round.default: _rounded(round),
    aten.floor.default: _rounded(math.floor),
    aten.ceil.default: _rounded(math.ceil),
    aten.trunc.default: _rounded(math.trunc),
}
