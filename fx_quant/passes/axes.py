"""How the dims of a node are made of the axes of the tensor it is a view of.

Views, permutations and expansions only regroup axes. So a value under any chain of them is known by the tensor at its
head and, for each dim of the node, the pieces of that tensor's axes that it runs over. A factor that broadcasts against
such a node is a relation between the pieces of two tensors, and what it is to a matrix (one for each row, group or
block) is read off the pieces, whatever shapes it was computed in.

Sizes are ints or symbolic expressions, compared as expressions: nothing here adds a guard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fx_quant.passes.nodes import COPIES, EXPANDS, PERMUTES, RESHAPES, VIEWS, args_of, aten, is_op, shape

# An int, or the sympy expression of a symbolic size.
Extent = Any
REPEAT = -1


@dataclass(frozen=True)
class Piece:
    """A run of one axis of a tensor: its index there is ``... + index * inner + ...``.

    Args:
        axis: the axis of the tensor; ``REPEAT`` for a dim along which the tensor only repeats.
        size: how many values the piece's index takes.
        inner: product of the sizes of the less significant pieces of the same axis.
    """

    axis: int
    size: Extent
    inner: Extent = 1

    @property
    def stop(self) -> Extent:
        """``inner`` of the next more significant piece."""
        return self.inner * self.size


# For each dim of a node, its pieces, most significant first; a dim of size one has none.
Dims = tuple[tuple[Piece, ...], ...]


def extent(size: int | torch.SymInt) -> Extent:
    """``size`` as an int or a sympy expression."""
    return size if isinstance(size, int) else _plain(size.node.expr)


def _plain(expression: Any) -> Extent:
    """``expression``, as an int where it turned out to be one."""
    return int(expression) if expression.is_Integer else expression


def own_dims(node: object) -> Dims:
    """The dims of a node in terms of its own axes."""
    sizes = map(extent, shape(node))
    return tuple(() if size == 1 else (Piece(axis, size),) for axis, size in enumerate(sizes))


def length(pieces: Iterable[Piece]) -> Extent:
    """The size of a dim with these pieces."""
    return math.prod(piece.size for piece in pieces)


def flat(dims: Iterable[tuple[Piece, ...]]) -> tuple[Piece, ...]:
    """The pieces of ``dims`` in order, neighbours of one axis joined."""
    joined: list[Piece] = []
    for piece in (piece for dim in dims for piece in dim):
        last = joined[-1] if joined else None
        if last is not None and last.axis == piece.axis and last.inner == piece.stop and piece.axis != REPEAT:
            joined[-1] = replace(piece, size=last.size * piece.size)
        else:
            joined.append(piece)
    return tuple(joined)


def viewed(node: Node, dims: Dims) -> Dims | None:
    """The dims of the view ``node``, whose input has ``dims``; None when it does more than regroup axes."""
    if is_op(node, *COPIES):
        return dims
    if is_op(node, *RESHAPES):
        return _reshaped(dims, [extent(size) for size in shape(node)])
    if is_op(node, *PERMUTES):
        order = order_of(node)
        return None if order is None else tuple(dims[i] for i in order)
    if is_op(node, *EXPANDS):
        return _expanded(dims, args_of(node)[0], node)
    return None


def order_of(node: Node) -> list[int] | None:
    """For each dim of the permutation ``node`` the dim of its input."""
    rank = len(shape(node))
    if node.target is aten.permute.default:
        return [int(d) % rank for d in args_of(node)[1]]
    order = list(range(rank))
    if node.target is aten.transpose.int:
        i, j = (int(d) % rank for d in args_of(node)[1:3])
        order[i], order[j] = order[j], order[i]
    elif rank == 2:
        order.reverse()
    return order


def _reshaped(dims: Dims, sizes: Sequence[Extent]) -> Dims | None:
    pieces = list(reversed(flat(dims)))
    out = []
    for size in sizes:
        dim, missing = [], size
        while missing != 1:
            if not pieces:
                return None
            piece = pieces.pop()
            outer = _quotient(missing, piece.size)
            if outer is not None:
                dim.append(piece)
                missing = outer
                continue
            rest = _quotient(piece.size, missing)
            if rest is None:
                return None
            dim.append(Piece(piece.axis, missing, piece.inner * rest))
            pieces.append(Piece(piece.axis, rest, piece.inner))
            missing = 1
        out.append(tuple(dim))
    return None if pieces else tuple(out)


def _quotient(size: Extent, by: Extent) -> Extent | None:
    """``size / by`` when that is known to be whole."""
    if size == by:
        return 1
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    if by == 0:
        return None
    quotient = size / by
    denominator = quotient.as_numer_denom()[1]
    return _plain(quotient) if denominator == 1 else None


def _expanded(dims: Dims, before: object, after: Node) -> Dims | None:
    old, new = shape(before), shape(after)
    dims = ((),) * (len(new) - len(old)) + dims
    sizes = [1] * (len(new) - len(old)) + [extent(size) for size in old]
    return tuple(
        (Piece(REPEAT, extent(size)),) if was == 1 and extent(size) != 1 else dim
        for dim, was, size in zip(dims, sizes, new, strict=True)
    )


def seen_through(node: Node, cast: Callable[[Node], bool] = lambda _: False) -> tuple[Node, Dims]:
    """The tensor that ``node`` is a view of, and the dims of ``node`` in terms of its axes.

    Args:
        cast: which casts to look through as well.
    """
    chain = [node]
    while is_op(chain[-1], *VIEWS) or cast(chain[-1]):
        chain.append(args_of(chain[-1])[0])
    # Where a view is more than a regrouping, what it returns is a tensor of its own.
    base, dims = chain[-1], own_dims(chain[-1])
    for view in reversed(chain[:-1]):
        regrouped = viewed(view, dims) if is_op(view, *VIEWS) else dims
        base, dims = (view, own_dims(view)) if regrouped is None else (base, regrouped)
    return base, dims


Pair = tuple[Piece, Piece]


def broadcast_pairs(
    dims: Dims, sizes: Sequence[Extent], factor: Dims, factor_sizes: Sequence[Extent]
) -> tuple[Pair, ...] | None:
    """Which pieces of a tensor a factor varies along, each with the factor's own piece; ``()`` for a scalar.

    Args:
        dims, sizes: of a node, in terms of a tensor's axes.
        factor, factor_sizes: of what is broadcast to its shape, in terms of the factor's axes.

    Returns None where the factor does not broadcast to that shape or is not a relation of pieces.
    """
    missing = len(sizes) - len(factor_sizes)
    if missing < 0:
        return None
    pairs: list[Pair] = []
    for i, (own, size) in enumerate(zip(factor, factor_sizes, strict=True)):
        if size == 1:
            continue
        if size != sizes[missing + i]:
            return None
        refined = _refined(dims[missing + i], own)
        if refined is None:
            return None
        pairs += refined
    varied = [(tensor_piece, factor_piece) for tensor_piece, factor_piece in pairs if factor_piece.axis != REPEAT]
    return None if any(tensor_piece.axis == REPEAT for tensor_piece, _ in varied) else _joined(varied)


def _joined(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """``pairs`` with neighbours on both sides as one."""
    out: list[Pair] = []
    for tensor_piece, factor_piece in pairs:
        if out:
            joined = flat([(out[-1][0], tensor_piece)]), flat([(out[-1][1], factor_piece)])
            if len(joined[0]) == len(joined[1]) == 1:
                out[-1] = joined[0][0], joined[1][0]
                continue
        out.append((tensor_piece, factor_piece))
    return tuple(out)


def _refined(left: tuple[Piece, ...], right: tuple[Piece, ...]) -> list[Pair] | None:
    """The two sides of one dim cut into pieces of equal sizes."""
    lefts, rights, pairs = list(left), list(right), []
    while lefts and rights:
        one, other = lefts.pop(), rights.pop()
        if one.size != other.size:
            rest, lefts_is_larger = _quotient(one.size, other.size), True
            if rest is None:
                rest, lefts_is_larger = _quotient(other.size, one.size), False
            if rest is None:
                return None
            larger, size = (one, other.size) if lefts_is_larger else (other, one.size)
            (lefts if lefts_is_larger else rights).append(Piece(larger.axis, rest, larger.inner * size))
            cut = Piece(larger.axis, size, larger.inner)
            one, other = (cut, other) if lefts_is_larger else (one, cut)
        pairs.append((one, other))
    return None if lefts or rights else pairs[::-1]


def cut(pairs: Sequence[Pair], pieces: Iterable[Piece]) -> tuple[Pair, ...]:
    """``pairs`` cut where one of ``pieces`` starts, so that a factor may run over the rows and along k at once."""
    starts: dict[int, set[Extent]] = {}
    for piece in pieces:
        starts.setdefault(piece.axis, set()).add(piece.inner)
    return tuple(part for pair in pairs for part in _cut(*pair, starts.get(pair[0].axis, ())))


def _cut(tensor_piece: Piece, factor_piece: Piece, starts: Iterable[Extent]) -> list[Pair]:
    if not isinstance(tensor_piece.size, int) or not isinstance(tensor_piece.inner, int):
        return [(tensor_piece, factor_piece)]
    parts: list[Pair] = []
    low, inner = tensor_piece.inner, factor_piece.inner
    inside = sorted(start for start in starts if isinstance(start, int) and low < start < tensor_piece.stop)
    for high in (*inside, tensor_piece.stop):
        size = _quotient(high, low)
        if size is None:
            return [(tensor_piece, factor_piece)]
        parts.append((Piece(tensor_piece.axis, size, low), Piece(factor_piece.axis, size, inner)))
        low, inner = high, inner * size
    return parts[::-1]


@dataclass(frozen=True)
class Segment:
    """A run of one side of a matrix: ``size`` indices, and the factor's piece that varies along it, or None."""

    size: Extent
    factor: Piece | None


def segments(side: Sequence[Piece], pairs: Sequence[Pair]) -> tuple[Segment, ...] | None:
    """``side`` cut where the factor of ``pairs`` starts or stops varying, most significant first.

    None where a piece of the factor lies across two pieces of the side.
    """
    out: list[Segment] = []
    for piece in side:
        inside = [pair for pair in pairs if pair[0].axis == piece.axis and _within(pair[0], piece)]
        rest = piece.stop
        for tensor_piece, factor_piece in sorted(inside, key=lambda pair: _order_key(pair[0].inner), reverse=True):
            gap = _quotient(rest, tensor_piece.stop)
            if gap is None:
                return None
            if gap != 1:
                out.append(Segment(gap, None))
            out.append(Segment(tensor_piece.size, factor_piece))
            rest = tensor_piece.inner
        gap = _quotient(rest, piece.inner)
        if gap is None:
            return None
        if gap != 1:
            out.append(Segment(gap, None))
    return tuple(out)


def _within(part: Piece, whole: Piece) -> bool:
    sizes = (part.inner, part.stop, whole.inner, whole.stop)
    if all(isinstance(size, int) for size in sizes):
        return whole.inner <= part.inner and part.stop <= whole.stop
    # Of symbolic sizes only the most and the least significant part are told apart from their neighbours.
    return part.stop == whole.stop or part.inner == whole.inner


def _order_key(inner: Extent) -> float:
    return inner if isinstance(inner, int) else math.inf


def block_size(parts: Sequence[Segment]) -> Extent | None:
    """How many neighbours of a side share one value of the factor; None when all do, 0 when they are no neighbours."""
    varied = [i for i, part in enumerate(parts) if part.factor is not None]
    if not varied:
        return None
    if varied != list(range(len(varied))):
        return 0
    return math.prod(part.size for part in parts[len(varied) :])
