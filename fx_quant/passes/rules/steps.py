"""Steps that rules share: rounding a dequantized value, its scales and zero points, and one more step down a matmul's
epilogue.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fx_quant.passes.axes import Pair, broadcast_pairs, extent, length, own_dims, seen_through
from fx_quant.passes.matrices import integer_range
from fx_quant.passes.nodes import CASTS, args_of, constant, dtype, is_op, is_widening, shape, tensor, uniform_value
from fx_quant.passes.ranges import bounds_of
from fx_quant.passes.values import Affine, Codes, ColumnSum, Decode, Product, Stage, Value
from fx_quant.scheme import HALF_DTYPES, Numerics


def as_affine(value: Value | None) -> Affine | None:
    """Codes as the affine value without scales; None for anything but codes and affine values."""
    if isinstance(value, Codes):
        return Affine(value)
    return value if isinstance(value, Affine) else None


def scale_of(codes: Codes, node: Node, operand: object, *, inverse: bool = False) -> Decode | None:
    """``operand`` as a scale of the codes at ``node``, where it broadcasts; None where it does not.

    Args:
        codes: as they stand at ``node``.
        node: gives the shape that ``operand`` broadcasts to.
    """
    number = constant(operand)
    if number is not None:
        return None if inverse and number == 0 else Decode(float(number), inverse=inverse)
    return _decode(codes, node, operand, lambda _: False, inverse) if isinstance(operand, Node) else None


def zero_point_of(codes: Codes, node: Node, operand: object) -> Decode | None:
    """``operand``, of an integer tensor in whatever dtype, as a zero point of the codes at ``node``; else None."""
    number = uniform_value(operand)
    if number is not None:
        return Decode(float(number)) if is_whole(number) else None
    if not isinstance(operand, Node):
        return None
    point = _decode(codes, node, operand, _holds_integers, inverse=False)
    return point if point is not None and is_integer(dtype(point.source)) else None


def _decode(codes: Codes, node: Node, operand: Node, cast: Callable[[Node], bool], inverse: bool) -> Decode | None:
    if tensor(operand) is None:
        return None  # a number that depends on sizes
    base, dims = seen_through(operand, cast)
    sizes = [extent(size) for size in shape(node)]
    pairs = broadcast_pairs(codes.dims, sizes, dims, [extent(size) for size in shape(operand)])
    return None if pairs is None else Decode(base, pairs, inverse)


def _holds_integers(node: Node) -> bool:
    """Whether ``node`` casts what may hold integers to a dtype that may round large ones, but wraps none around."""
    if not is_op(node, *CASTS):
        return False
    source, to = dtype(args_of(node)[0]), dtype(node)
    if source is None or to is None:
        return False
    if source.is_floating_point:
        return to.is_floating_point and is_widening(source, to)
    if not is_integer(source):
        return False
    if to.is_floating_point:
        return True
    inner, outer = torch.iinfo(source), torch.iinfo(to)
    return is_integer(to) and outer.min <= inner.min and inner.max <= outer.max


def is_whole(number: float) -> bool:
    """Whether ``number`` is an integer; infinities and NaN are none."""
    return math.isfinite(number) and number == int(number)


def difference_fits(value: Affine, to: torch.dtype) -> bool:
    """Whether integer codes less all of their zero points are proven to be within the integer dtype ``to``."""
    code_range = integer_range(value.codes)
    if code_range is None:
        return False
    low, high = code_range
    for point in value.zero_points:
        bounds = bounds_of(point.source)
        if bounds is None:
            return False
        low, high = low - bounds[1], high - bounds[0]
    return torch.iinfo(to).min <= low and high <= torch.iinfo(to).max


def is_integer(kind: torch.dtype | None) -> bool:
    """Whether ``kind`` is an integer dtype."""
    return kind is not None and not kind.is_floating_point and not kind.is_complex and kind is not torch.bool


def along_dim(codes: Codes, dim: int, operand: Node) -> Decode | None:
    """The vector ``operand`` as a scale or zero point with one element for each index of dim ``dim`` of the codes."""
    if all(extent(size) == 1 for size in shape(operand)):
        return Decode(operand)
    dims = (codes.dims[dim],)
    pairs = broadcast_pairs(dims, [length(dims[0])], own_dims(operand), [extent(s) for s in shape(operand)])
    return None if pairs is None else Decode(operand, pairs)


def varies_everywhere(codes: Codes, pairs: tuple[Pair, ...]) -> bool:
    """Whether each code has an element of its own."""
    size = sum(1 for dim in codes.dims for _ in dim)
    return size > 0 and {varied for varied, _ in pairs} == {piece for dim in codes.dims for piece in dim}


def rounded(value: Affine, to: torch.dtype) -> Affine:
    """``value`` after it was computed in or cast to dtype ``to``."""
    return dataclasses.replace(value, epsilon=max(value.epsilon, torch.finfo(to).eps))


def stepped(product: Product, to: torch.dtype, stage: Stage, *, exact: bool, **changes: Any) -> Product:
    """``product`` after one more step, in dtype ``to``.

    Args:
        exact: the step is the canonical epilogue's own, on exact operands.
        changes: the fields that the step sets.
    """
    in_order = stage.value > product.stage.value
    numerics = product.numerics if exact and in_order else max(product.numerics, Numerics.SAME_ACCUM)
    skipped = product.skipped + (product.dtype in HALF_DTYPES)
    return dataclasses.replace(product, dtype=to, stage=stage, numerics=numerics, skipped=skipped, **changes)


def may_wrap(sums: ColumnSum, kind: torch.dtype | None) -> bool:
    """Whether a column sum of bytes, times its multiplier and zero point, may have left dtype ``kind``."""
    k = shape(sums.base)[sums.dim]
    bounds = (1, 1) if sums.zero_point is None else bounds_of(sums.zero_point.source)
    if kind is torch.int64:
        return False
    largest = None if bounds is None else max(-bounds[0], bounds[1]) * abs(sums.multiplier)
    return not isinstance(k, int) or largest is None or k * 255 * largest >= 2**31
