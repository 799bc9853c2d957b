"""What can be read off nodes that stand for matrices: the axis of a factor, the range of codes, a weight's base."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from fx_quant.passes.axes import Dims, Segment, extent, own_dims, seen_through
from fx_quant.passes.nodes import constant, dtype, is_one, same_shape, same_size, shape, tensor
from fx_quant.passes.values import Axis, Codes, Tile
from fx_quant.scheme import CODE_DTYPES

# Dtypes of an integer matmul's sum, which an epilogue in floating point follows.
ACCUMULATORS = (torch.int32, torch.int64)

# Largest integer n for which every integer of magnitude up to n is exact.
_EXACT_INTEGERS = {
    torch.float64: 2**53,
    torch.float32: 2**24,
    torch.float16: 2**11,
    torch.bfloat16: 2**8,
}


def axis_of(factor: object, like: Node) -> Axis | None:
    """Along which axis of the matrix ``like[..., columns]`` the tensor or number ``factor`` varies.

    None when it varies along both or does not broadcast to the same shape.
    """
    if constant(factor) is not None:
        return Axis.SCALAR
    if tensor(factor) is None:
        return None
    sizes, full = shape(factor), shape(like)
    if all(map(is_one, sizes)):
        return Axis.SCALAR if len(sizes) <= len(full) else None
    if len(sizes) > len(full):
        return None
    sizes = (1,) * (len(full) - len(sizes)) + sizes
    if not all(is_one(s) or same_size(s, f) for s, f in zip(sizes, full, strict=True)):
        return None
    if is_one(sizes[-1]):
        return Axis.ROW
    return Axis.COLUMN if all(map(is_one, sizes[:-1])) else None


def tile_along(axis: Axis, factor: object, like: Node, *, inverse: bool = False) -> Tile:
    """The tensor or number ``factor``, which varies along ``axis`` of the matrix ``like``, as a factor of that side."""
    source = factor_source(factor)
    if axis is Axis.SCALAR or not isinstance(source, Node):
        return Tile(source, inverse=inverse)
    sizes, own, rows = shape(like), own_dims(source), []
    for dim, size in enumerate(sizes, start=len(own) - len(sizes)):
        if dim >= 0 and own[dim]:
            rows += [Segment(piece.size, piece) for piece in own[dim]]
        elif axis is Axis.ROW and dim < len(own) - 1 and not is_one(size):
            rows.append(Segment(extent(size), None))
    return Tile(source, tuple(rows), inverse=inverse)


def factor_source(operand: object) -> Node | float:
    """``operand`` as a factor's source: a node, or a Python float."""
    number = constant(operand)
    if number is not None:
        return float(number)
    assert isinstance(operand, Node)
    return operand


def integer_range(codes: Codes) -> tuple[int, int] | None:
    """Inclusive range of integer codes with their offset; None for float8."""
    bounds, code_dtype = codes.bounds, dtype(codes.node)
    if bounds is None:
        if code_dtype is None or code_dtype.is_floating_point:
            return None
        info = torch.iinfo(code_dtype)
        bounds = (info.min, info.max)
    return bounds[0] + codes.offset, bounds[1] + codes.offset


def holds_exactly(codes: Codes, to: torch.dtype) -> bool:
    """Whether every possible value of ``codes`` is exact in dtype ``to``."""
    bounds = integer_range(codes)
    if bounds is None:
        source = dtype(codes.node)
        return source == to or (to in _EXACT_INTEGERS and to.is_floating_point)
    low, high = bounds
    if to.is_floating_point:
        return to in _EXACT_INTEGERS and max(-low, high) <= _EXACT_INTEGERS[to]
    if to is torch.bool:
        return False
    info = torch.iinfo(to)
    return info.min <= low and high <= info.max


def stored_dtype(codes: Codes) -> torch.dtype | None:
    """The low-bit dtype in which an op is given ``codes`` without their offset; None where none holds them all."""
    own = dtype(codes.node)
    if own in CODE_DTYPES:
        return own
    whole = dataclasses.replace(codes, offset=0)
    return next((to for to in (torch.int8, torch.uint8) if holds_exactly(whole, to)), None)


def rounds_difference(codes: Codes, zero_point: torch.dtype | None, to: torch.dtype) -> bool:
    """Whether ``codes`` minus an integer of dtype ``zero_point`` may be no number of the float dtype ``to``."""
    bounds = integer_range(codes)
    if bounds is None or zero_point is None or to not in _EXACT_INTEGERS:
        return True
    points = torch.iinfo(zero_point)
    return max(bounds[1] - points.min, points.max - bounds[0]) > _EXACT_INTEGERS[to]


def rounds_integers(kind: torch.dtype | None, to: torch.dtype) -> bool:
    """Whether some integer of dtype ``kind`` is no number of the float dtype ``to``."""
    if kind is None or to not in _EXACT_INTEGERS:
        return True
    info = torch.iinfo(kind)
    return max(-info.min, info.max) > _EXACT_INTEGERS[to]


def matrix_base(node: Node, dims: Dims | None = None) -> tuple[Node, bool] | None:
    """The 2-D tensor that a matrix is a view of, and whether transposed; None behind any other view.

    Args:
        node: the matrix, or the tensor behind it where ``dims`` are given; leading dims of one may come and go.
        dims: the dims of the matrix in terms of ``node``'s axes.
    """
    base, seen = seen_through(node)
    if dims is not None:
        base, seen = node, dims
    own = own_dims(base)
    if len(own) != 2 or len(seen) < 2 or any(seen[:-2]):
        return None
    if seen[-2:] == own:
        return base, False
    return (base, True) if seen[-2:] == own[::-1] else None


def is_full(operand: object, node: Node) -> bool:
    """Whether ``operand`` is a tensor of ``node``'s whole shape, rather than one that broadcasts."""
    return tensor(operand) is not None and same_shape(shape(operand), shape(node))
