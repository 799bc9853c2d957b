"""What a proof of row independence says of a tensor, and the call of an op as its rules see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_quant.passes.axes import Extent, extent
from fx_quant.passes.nodes import arguments, module_path, qualified_name, source_line


@dataclass(frozen=True)
class Rows:
    """Where a tensor has the rows: its dim ``dim`` has size ``outer * m * inner``, and only row i is in ``(:, i, :)``.

    What stands at row i follows from row i of the inputs and from what has no rows, for every m alike.

    Args:
        positional: it follows from the number i too, so that a row more may hold what no row before it holds.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    positional: bool = False

    def at(self, dim: int) -> Rows:
        """The same rows in another dim."""
        return replace(self, dim=dim)

    def is_like(self, other: Rows) -> bool:
        """Whether row i of both is at the same places of their dims."""
        return (self.outer, self.inner) == (other.outer, other.inner)


# None: the tensor does not depend on the rows, nor on how many there are.
State = Rows | None


class MixesRowsError(Exception):
    """Why it is not proven that each row of the outputs follows from its own row of the inputs."""


@dataclass(frozen=True)
class Call:
    """A call of an op: its arguments by name, and what is proven of its operands.

    Args:
        states: of every tensor before it; a tuple where a call gives several.
        symbol: the number of rows, a ``sympy.Symbol``.
    """

    node: Node
    given: Mapping[str, Any]
    states: Mapping[Node, Any]
    symbol: Any

    @classmethod
    def of(cls, node: Node, states: Mapping[Node, Any], symbol: Any) -> Call:
        """The call that ``node`` is, of an op with a schema."""
        return cls(node, arguments(node), states, symbol)

    def fail(self, why: str) -> MixesRowsError:
        """To be raised: the op, what it does to the rows, and where it stands."""
        return not_proven(self.node, why)

    def state(self, operand: object) -> State:
        """What is proven of an operand; None for a number and for no operand at all."""
        return self.states.get(operand) if isinstance(operand, Node) else None

    def operands(self) -> Iterator[tuple[str, Node]]:
        """Each tensor that the op is given, with the name of its argument."""
        for name, value in self.given.items():
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, Node) and isinstance(each.meta.get("val"), Tensor):
                    yield name, each

    def only(self, *names: str) -> Rows:
        """The rows of the one argument that has them, which must be one of ``names``.

        Raises:
            MixesRowsError: another argument has them, or several do.
        """
        having = [(name, self.state(node)) for name, node in self.operands() if self.state(node) is not None]
        wrong = [name for name, _ in having if name not in names]
        if wrong or len(having) != 1:
            raise self.fail(f"has rows in {' and in '.join(wrong or [name for name, _ in having])}")
        rows = having[0][1]
        assert rows is not None
        return rows

    def sizes(self, node: Any) -> tuple[Extent, ...]:
        """The sizes of the tensor that ``node`` gives, as ints and expressions."""
        return sizes(node.meta["val"])

    def rank(self, name: str) -> int:
        """How many dims the argument ``name`` has."""
        return len(self.sizes(self.given[name]))

    def dims(self, name: str, rank: int) -> tuple[int, ...]:
        """The dims that the argument ``name`` says, from the front; none where it says nothing."""
        value = self.given.get(name)
        return tuple(dim % rank for dim in ((value,) if isinstance(value, int) else value or ()))

    def depends(self, value: object) -> bool:
        """Whether a number, or one in a list, depends on the number of rows."""
        if isinstance(value, (list, tuple)):
            return any(map(self.depends, value))
        return isinstance(value, Node) and depends(value.meta.get("val"), self.symbol)


def sizes(value: Tensor) -> tuple[Extent, ...]:
    """The sizes of a tensor, as ints and expressions."""
    return tuple(map(extent, value.shape))


def depends(value: object, symbol: Any) -> bool:
    """Whether a symbolic number has ``symbol`` in it."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and symbol in value.node.expr.free_symbols


def has(size: Extent, symbol: Any) -> bool:
    """Whether ``symbol`` is in a size."""
    return not isinstance(size, int) and symbol in size.free_symbols


def factor(size: Extent, symbol: Any) -> int | None:
    """``c`` of the size ``c * symbol``; None where it is no such size."""
    if isinstance(size, int):
        return None
    ratio = size / symbol
    return int(ratio) if ratio.is_Integer and ratio > 0 else None


def rows_by_shape(shape: tuple[Extent, ...], symbol: Any) -> State:
    """The rows of an input of this shape, or of what is the same in each row.

    Raises:
        ValueError: it has them in several dims, or in one whose size is no multiple of their number.
    """
    dims = [dim for dim, size in enumerate(shape) if has(size, symbol)]
    if not dims:
        return None
    inner = factor(shape[dims[0]], symbol)
    if len(dims) > 1:
        raise ValueError("has the rows in several dims")
    if inner is None:
        raise ValueError(f"has {shape[dims[0]]} of {symbol} rows in dim {dims[0]}")
    return Rows(dims[0], 1, inner)


def not_proven(node: Node, why: str) -> MixesRowsError:
    """To be raised of ``node``: the op, what it does to the rows, and where it stands."""
    place = ", ".join(filter(None, (module_path(node), source_line(node))))
    return MixesRowsError(f"{qualified_name(node.target)} {why}, at {node.name}{f' ({place})' if place else ''}")
