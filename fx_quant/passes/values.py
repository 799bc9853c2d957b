"""The value algebra's domain: what is proven of a node's value. A node without a value here is plain floating point."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch.fx import Node

from fx_quant.passes.axes import Dims, Extent, Pair, Segment, block_size, own_dims
from fx_quant.scheme import Numerics


class Axis(Enum):
    """Along what a factor varies, relative to the matrix ``[rows, columns]`` (leading dims flattened to rows)."""

    SCALAR = "scalar"
    ROW = "row"
    COLUMN = "column"


@dataclass(frozen=True)
class Codes:
    """``value == codes + offset``, exactly, in whatever dtype and under whatever views it stands.

    Args:
        node: the tensor of low-bit codes.
        dims: the dims of the value in terms of ``node``'s axes.
        offset: integer that was added.
        bounds: inclusive range of integer codes where it is narrower than their dtype's.
    """

    node: Node
    dims: Dims
    offset: int = 0
    bounds: tuple[int, int] | None = None

    @classmethod
    def of(cls, node: Node, bounds: tuple[int, int] | None = None) -> Codes:
        """The codes that ``node`` holds."""
        return cls(node, own_dims(node), bounds=bounds)


@dataclass(frozen=True)
class Decode:
    """A scale or a zero point of codes, by the pieces of their axes along which it varies.

    Args:
        source: the tensor behind all views, or a Python number.
        pairs: pieces of the codes' axes, each with the piece of ``source``'s that it runs along.
        inverse: the factor is ``1 / source``.
    """

    source: Node | float
    pairs: tuple[Pair, ...] = ()
    inverse: bool = False


@dataclass(frozen=True)
class Affine:
    """``value == (codes - sum(zero_points)) * product(scales) + sum(offsets)``, up to the roundings of its dtypes.

    Args:
        codes: what was dequantized.
        scales: what it was multiplied by.
        zero_points: integers that were subtracted before.
        offsets: what else was added, each a product of factors.
        epsilon: machine epsilon of the coarsest dtype that it was computed in.
        wraps: where a zero point was subtracted in integers and the difference is not proven to fit their dtype: the
            value holds modulo the dtype's range only.
    """

    codes: Codes
    scales: tuple[Decode, ...] = ()
    zero_points: tuple[Decode, ...] = ()
    offsets: tuple[tuple[Decode, ...], ...] = ()
    epsilon: float = 0.0
    wraps: Node | None = None


@dataclass(frozen=True)
class Tile:
    """A scale, zero point or bias as what it is to a matrix: an operand of a matmul, or its result.

    Args:
        source: the tensor behind all views, or a Python number.
        rows: the segments of the free side: m of the activation, n of the weight.
        along_k: the segments of the summed side.
        inverse: the factor is ``1 / source``.
    """

    source: Node | float
    rows: tuple[Segment, ...] = ()
    along_k: tuple[Segment, ...] = ()
    inverse: bool = False

    @property
    def row_block(self) -> Extent | None:
        """How many neighbours of the free side share a value; None when all do, 0 when they are no neighbours."""
        return block_size(self.rows)

    @property
    def group(self) -> Extent | None:
        """How many neighbours along k share a value; None when all do, 0 when they are no neighbours."""
        return block_size(self.along_k)


@dataclass(frozen=True)
class ColumnSum:
    """``value == multiplier * zero_point * (sum of base over dim)``, an exact integer vector, or matrix with rows.

    Args:
        base: codes ``[n, k]`` or ``[k, n]``.
        dim: the dim of ``base`` that was summed.
        multiplier: an integer.
        zero_point: an integer factor, a scalar or one for each row; None is 1.
    """

    base: Node
    dim: int
    multiplier: int
    zero_point: Tile | None = None


class Stage(Enum):
    """How far along the canonical epilogue ``cast(float32(acc) * a_scale * b_scale + bias)`` a value is."""

    ACCUMULATOR = 0
    A_SCALE = 1
    B_SCALE = 2
    BIAS = 3
    CAST = 4


@dataclass(frozen=True)
class Product:
    """``value == cast(sum_k (a + offset - a_zero_points) (b - b_zero_points) * product(rows, columns) + bias)``.

    With offsets ``(b - b_zero_points) * product(columns) + sum(b_offsets)`` is the weight. A float activation has no
    ``rows``.

    Args:
        gemm: the matmul node.
        a: codes of the activation ``[..., k]``, or the float activation itself (weight-only).
        b: codes of the weight ``[k, n]``.
        rows, columns: scales on the activation's and the weight's side, in the order they were met: those of the
            operands, then those that the result was multiplied by.
        bias: what is added last.
        dtype: dtype of the value.
        stage: the last canonical step that was met.
        numerics: class of replacing the value by the canonical op.
        wraps: the source takes the sum, zero points and all, in int32 modulo 2**32, as the canonical op does.
        offset: integer that was added to ``a``'s codes.
        a_zero_points, b_zero_points: integers subtracted from the codes.
        b_offsets: what was added to the scaled codes of the weight, each a product of factors.
        block: rows and columns of the weight ``[n, k]`` that share one scale, where scales vary along k.
        skipped: roundings to a narrower dtype on the way to the value that the canonical op does not make.
        decoded: the source has the activation in floating point too, decoded from these codes.
        obstacle: why the activation's codes are none here, though there are some; ``""`` where there are none.
    """

    gemm: Node
    a: Codes | Node
    b: Codes
    rows: tuple[Tile, ...]
    columns: tuple[Tile, ...]
    bias: Tile | None
    dtype: torch.dtype
    stage: Stage
    numerics: Numerics
    wraps: bool = False
    offset: int = 0
    a_zero_points: tuple[Tile, ...] = ()
    b_zero_points: tuple[Tile, ...] = ()
    b_offsets: tuple[tuple[Tile, ...], ...] = ()
    block: tuple[int, int] | None = None
    skipped: int = 0
    decoded: bool = False
    obstacle: str = ""


def sources(product: Product) -> Iterator[Node]:
    """The nodes that a rewrite of ``product`` reads."""
    yield product.a.node if isinstance(product.a, Codes) else product.a
    yield product.b.node
    points = (*product.a_zero_points, *product.b_zero_points)
    offsets = (factor for offset in product.b_offsets for factor in offset)
    for factor in (*product.rows, *product.columns, *points, *offsets, product.bias):
        if factor is not None and isinstance(factor.source, Node):
            yield factor.source


@dataclass(frozen=True)
class Unknown:
    """Derived from codes, but no rule proves its value: ``rule`` failed at ``node``."""

    node: Node
    rule: str


Value = Codes | Affine | ColumnSum | Product | Unknown


class Environment(Protocol):
    """What a rule may ask: the values of the nodes before its own."""

    weight_only: Collection[Node]  # matmuls of which the activation is a float, whatever it was before

    def value(self, node: object) -> Value | None:
        """What is proven of ``node``; None for plain floating point and for what is not a tensor node."""
        ...


# Maps the values of a node's inputs to the node's value; None leaves it plain.
Rule = Callable[[Environment, Node], Value | None]
