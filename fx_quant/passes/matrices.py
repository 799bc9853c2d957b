"""What can be read off nodes that stand for matrices: the axis of a factor, the range of codes, a weight's base."""

from __future__ import annotations

import torch
from torch.fx import Node

from fx_quant.passes.nodes import (
    COPIES,
    EXPANDS,
    PERMUTES,
    RESHAPES,
    args_of,
    aten,
    constant,
    dtype,
    is_one,
    is_op,
    same_shape,
    same_size,
    shape,
    tensor,
)
from fx_quant.passes.values import Axis, Codes

EPILOGUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

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


def integer_range(codes: Codes) -> tuple[int, int] | None:
    """Inclusive range of integer codes with their offset; None for float8."""
    code_dtype = dtype(codes.node)
    if code_dtype is None or code_dtype.is_floating_point:
        return None
    info = torch.iinfo(code_dtype)
    return info.min + codes.offset, info.max + codes.offset


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


def matrix_base(codes: Codes) -> tuple[Node, bool] | None:
    """The tensor that 2-D ``codes`` are a view of, and whether transposed; None behind any other view."""
    transposed = False
    node: Node = codes.node
    for view in reversed(codes.views):
        if is_transpose(view):
            transposed = not transposed
        elif view.target not in COPIES and not _is_identity_view(view):
            return None
    while isinstance(node, Node) and node.op == "call_function":
        if is_transpose(node):
            transposed = not transposed
        elif node.target not in COPIES and not _is_identity_view(node):
            break
        node = args_of(node)[0]
    return (node, transposed) if len(shape(node)) == 2 else None


def is_transpose(node: Node) -> bool:
    """Whether ``node`` swaps the two dims of a matrix."""
    if len(shape(node)) != 2 or not is_op(node, *PERMUTES):
        return False
    if node.target is aten.permute.default:
        return [d % 2 for d in args_of(node)[1]] == [1, 0]
    if node.target is aten.transpose.int:
        return {d % 2 for d in args_of(node)[1:3]} == {0, 1}
    return True


def _is_identity_view(node: Node) -> bool:
    """Whether a view leaves the matrix as it is; leading dims of one may come and go."""
    return is_op(node, *RESHAPES, *EXPANDS) and same_shape(_matrix_shape(node), _matrix_shape(args_of(node)[0]))


def _matrix_shape(node: object) -> tuple[int | torch.SymInt, ...]:
    sizes = shape(node)
    while len(sizes) > 2 and is_one(sizes[0]):
        sizes = sizes[1:]
    return sizes


def is_full(operand: object, node: Node) -> bool:
    """Whether ``operand`` is a tensor of ``node``'s whole shape, rather than one that broadcasts."""
    return tensor(operand) is not None and same_shape(shape(operand), shape(node))
