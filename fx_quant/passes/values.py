"""The value algebra's domain: what is proven of a node's value. A node without a value here is plain floating point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch.fx import Node

from fx_quant.scheme import Numerics


class Axis(Enum):
    """Along what a factor varies, relative to the matrix ``[rows, columns]`` (leading dims flattened to rows)."""

    SCALAR = "scalar"
    ROW = "row"
    COLUMN = "column"

    def transposed(self) -> Axis:
        """The axis after the matrix is transposed."""
        return {Axis.ROW: Axis.COLUMN, Axis.COLUMN: Axis.ROW}.get(self, self)


@dataclass(frozen=True)
class Factor:
    """A tensor or number that broadcasts along one axis of a matrix.

    Args:
        source: the node, or a Python number.
        axis: along what it varies.
        like: the node whose shape it broadcast against where it was met; gives the flattening of its rows.
        inverse: the factor is ``1 / source``.
    """

    source: Node | float
    axis: Axis
    like: Node
    inverse: bool = False


@dataclass(frozen=True)
class Codes:
    """``value == views(node) + offset``, exactly, in whatever dtype holds it.

    Args:
        node: a tensor of low-bit codes.
        views: view nodes to apply to it, in order.
        offset: integer that was added.
    """

    node: Node
    views: tuple[Node, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Affine:
    """``value == codes * product(factors)``, up to the rounding of the dtypes it was computed in.

    Args:
        codes: what was dequantized.
        factors: what it was multiplied by.
        epsilon: machine epsilon of the coarsest of those dtypes.
    """

    codes: Codes
    factors: tuple[Factor, ...]
    epsilon: float = 0.0


@dataclass(frozen=True)
class Broadcast:
    """``value`` repeats the matrix ``of``, which may have leading dims of one, along leading dims."""

    of: Codes | Affine


@dataclass(frozen=True)
class ColumnSum:
    """``value == multiplier * sum of base over dim``, an exact integer vector."""

    base: Node
    dim: int
    multiplier: int


class Stage(Enum):
    """How far along the canonical epilogue ``cast(float32(acc) * a_scale * b_scale + bias)`` a value is."""

    ACCUMULATOR = 0
    A_SCALE = 1
    B_SCALE = 2
    BIAS = 3
    CAST = 4


@dataclass(frozen=True)
class Product:
    """``value == cast(sum_k (a + a_offset)(b) * product(rows) * product(columns) + bias)``.

    Args:
        gemm: the matmul node.
        a, b: codes of the operands, ``[..., k]`` and ``[k, n]``.
        rows, columns: factors on the activation's and the weight's side, in the order they were met.
        bias: what is added last.
        dtype: dtype of the value.
        stage: the last canonical step that was met.
        offset: integer still to be corrected: the value holds an extra ``offset * sum_k b``.
        numerics: class of replacing the value by the canonical op.
        skipped: roundings to a narrower dtype on the way to the value that the canonical op does not make.
    """

    gemm: Node
    a: Codes
    b: Codes
    rows: tuple[Factor, ...]
    columns: tuple[Factor, ...]
    bias: Factor | None
    dtype: torch.dtype
    stage: Stage
    offset: int
    numerics: Numerics
    skipped: int = 0


@dataclass(frozen=True)
class Unknown:
    """Derived from codes, but no rule proves its value: ``rule`` failed at ``node``."""

    node: Node
    rule: str


Value = Codes | Affine | Broadcast | ColumnSum | Product | Unknown


class Environment(Protocol):
    """What a rule may ask: the values of the nodes before its own."""

    def value(self, node: object) -> Value | None:
        """What is proven of ``node``; None for plain floating point and for what is not a tensor node."""
        ...


# Maps the values of a node's inputs to the node's value; None leaves it plain.
Rule = Callable[[Environment, Node], Value | None]
