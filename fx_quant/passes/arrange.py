"""Emitting what a product is made of as the matrices and vectors that canonical ops take."""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
import torch
from torch.fx import Node

from fx_quant.passes.axes import REPEAT, Piece, Segment, flat, length, own_dims
from fx_quant.passes.emit import Emitter
from fx_quant.passes.nodes import aten, rounded_number, shape, uniform_value
from fx_quant.passes.values import Codes, Tile
from fx_quant.scheme import dtype_name


def matrix(emitter: Emitter, codes: Codes, like: Node) -> Node:
    """``codes`` as a 2-D tensor of their low-bit dtype; an offset is left out, as its correction is.

    Raises:
        LookupError: the axes are mixed in a way that needs a symbolic size that no node holds.
    """
    node, dims, own = codes.node, codes.dims, own_dims(codes.node)
    columns = length(dims[-1])
    if flat(dims) == flat(own):
        return node if len(shape(node)) == 2 and dims[-2:] == own else emitter.reshape(node, [-1, columns], like=like)
    if len(own) == 2 and dims[-2:] == own[::-1] and not any(dims[:-2]):
        return emitter.call(aten.permute.default, node, [1, 0], like=like)
    pieces = flat(dims)
    moved = _ordered(emitter, node, [piece for piece in pieces if piece.axis != REPEAT], like)
    if any(piece.axis == REPEAT for piece in pieces):
        sizes = [emitter.size_argument(piece.size, like) for piece in pieces]
        once = [1 if piece.axis == REPEAT else size for piece, size in zip(pieces, sizes, strict=True)]
        moved = emitter.call(aten.expand.default, emitter.reshape(moved, once, like=like), sizes, like=like)
    return emitter.reshape(moved, [-1, columns], like=like)


def _ordered(emitter: Emitter, node: Node, pieces: Sequence[Piece], like: Node) -> Node:
    """``node`` with its elements in the order of ``pieces``: one dim each, unless they are in that order already."""
    if flat([tuple(pieces)]) == flat(own_dims(node)):
        return node
    if not all(isinstance(piece.inner, (int, sympy.Integer)) for piece in pieces):
        raise LookupError(f"the parts of {node} are of symbolic sizes, in another order than its own")
    natural = sorted(pieces, key=lambda piece: (piece.axis, -int(piece.inner)))
    if flat([tuple(natural)]) != flat(own_dims(node)):
        raise LookupError(f"a scale or zero point varies along a part of {node} only")
    node = emitter.reshape(node, [emitter.size_argument(piece.size, like) for piece in natural], like=like)
    order = [natural.index(piece) for piece in pieces]
    return emitter.call(aten.permute.default, node, order, like=like)


def vectors(emitter: Emitter, factors: Sequence[Tile], like: Node, to: torch.dtype, sizes: list[int]) -> list[Node]:
    """Each factor in dtype ``to``: ``[]`` for a scalar, else flattened to ``sizes``, which has one ``-1``."""
    return [_vector(emitter, factor, like, to, sizes) for factor in factors]


def combined(emitter: Emitter, parts: Sequence[Node], like: Node, target=aten.mul.Tensor) -> Node | None:
    """The product (or, with ``target``, the sum) of broadcasting parts; None without any."""
    out = None
    for part in parts:
        out = part if out is None else emitter.call(target, out, part, like=like)
    return out


def _vector(emitter: Emitter, factor: Tile, like: Node, to: torch.dtype, sizes: list[int]) -> Node:
    """``factor`` in dtype ``to``, flattened over the axis along which it varies; ``[]`` for a scalar."""
    if not isinstance(factor.source, Node):
        if factor.inverse and factor.source == 0:
            raise LookupError("the codes are divided by 0")
        return number(emitter, 1.0 / factor.source if factor.inverse else factor.source, like, to)
    if factor.row_block is None:
        return emitter.reshape(_cast(emitter, factor.source, factor, like, to), [], like=like)
    return emitter.reshape(_rows(emitter, factor, 1, 1, like, to), sizes, like=like)


def number(emitter: Emitter, value: float, like: Node, to: torch.dtype) -> Node:
    """``value`` as a tensor ``[]``.

    Raises:
        LookupError: ``to`` does not hold it, or it is no finite number there.
    """
    value = _as_held(value, to)
    return emitter.call(aten.full.default, [], value, dtype=to, device=like.meta["val"].device, like=like)


def _as_held(value: float, to: torch.dtype) -> float:
    """``value``, as an integer where ``to`` is of integers.

    Scales leave the sum, in which an infinite one makes NaN of what it makes infinite outside.

    Raises:
        LookupError: ``to`` does not hold it, or it is no finite number there.
    """
    if to.is_floating_point:
        if not math.isfinite(rounded_number(value, to)):
            raise LookupError(f"the scale {value:g} is no finite {dtype_name(to)}")
        return value
    if not math.isfinite(value) or not _fits(value, to):
        raise LookupError(f"the zero point {value:g} is no {dtype_name(to)}")
    return int(value)


def _fits(value: float, to: torch.dtype) -> bool:
    return torch.iinfo(to).min <= value <= torch.iinfo(to).max


def _cast(emitter: Emitter, node: Node, factor: Tile, like: Node, to: torch.dtype) -> Node:
    _as_held(uniform_value(factor.source) or 0, to)
    node = emitter.cast(node, to, like=like)
    return emitter.call(aten.reciprocal.default, node, like=like) if factor.inverse else node


def _pieces(parts: Sequence[Segment]) -> list[Piece]:
    return [part.factor for part in parts if part.factor is not None]


def blocks(
    emitter: Emitter, factors: Sequence[Tile], high: int, groups: int, like: Node, to: torch.dtype
) -> list[Node]:
    """Each factor as a matrix with one element, or 1 that broadcasts, for each block of an operand ``[rows, k]``.

    Args:
        high: rows of a block; several blocks of a factor may not share one.
        groups: number of blocks along k.

    Raises:
        LookupError: a factor that does not follow blocks of that size.
    """
    return [
        _block(emitter, factor, high, groups, like, to)
        if isinstance(factor.source, Node)
        else _vector(emitter, factor, like, to, [-1, 1])
        for factor in factors
    ]


def _block(emitter: Emitter, tile: Tile, high: int, groups: int, like: Node, to: torch.dtype) -> Node:
    """``tile`` as ``[rows / high, groups]`` in dtype ``to``; a side along which it does not vary has size one."""
    columns = 1 if tile.group is None else groups
    node = _rows(emitter, tile, high, columns, like, to)
    return emitter.reshape(node, [1 if tile.row_block is None else -1, columns], like=like)


def _rows(emitter: Emitter, tile: Tile, high: int, columns: int, like: Node, to: torch.dtype) -> Node:
    """``tile`` in dtype ``to``, of some shape that holds the elements of ``[rows / high, columns]`` in order.

    A side along which it does not vary has size one.
    """
    assert isinstance(tile.source, Node)
    own = tile.row_block
    if own not in (None, high) and high != 1:
        raise LookupError(f"scales of {own} rows beside scales of {high}")
    node = _ordered(emitter, tile.source, [*_pieces(tile.rows), *_pieces(tile.along_k)], like)
    node = _cast(emitter, node, tile, like, to)
    if own not in (None, high):
        # One row for each row of the operand: what several share is repeated.
        sizes = [part.size if part.factor is not None else 1 for part in tile.rows]
        node = emitter.reshape(node, [*(emitter.size_argument(size, like) for size in sizes), columns], like=like)
        full = [emitter.size_argument(part.size, like) for part in tile.rows]
        node = emitter.call(aten.expand.default, node, [*full, columns], like=like)
    return node
