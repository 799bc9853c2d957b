"""Values of matmuls of codes, dequantized or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.fx import Node

from fx_quant.passes.axes import REPEAT, Dims, Piece, cut, flat, segments
from fx_quant.passes.contractions import op_name
from fx_quant.passes.matrices import axis_of, integer_range, tile_along
from fx_quant.passes.nodes import (
    ADDING_MATMULS,
    CASTS,
    args_of,
    arguments,
    aten,
    dtype,
    dtype_of,
    is_op,
    multiplied,
    shape,
    summed_size,
    through,
)
from fx_quant.passes.ranges import is_near
from fx_quant.passes.rules.steps import as_affine
from fx_quant.passes.values import (
    Affine,
    Axis,
    Codes,
    Decode,
    Environment,
    Product,
    Rule,
    Stage,
    Tile,
    Unknown,
    Value,
)
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, Numerics, dtype_name


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of a matmul, its scales and zero points as what they are to a matrix.

    Args:
        codes: ``[..., k]`` or ``[k, n]``.
        scales, zero_points: tiles of the free side x k.
        offsets: the same, each a product of factors.
        epsilon: machine epsilon of the coarsest dtype it was dequantized in.
    """

    codes: Codes
    scales: tuple[Tile, ...] = ()
    zero_points: tuple[Tile, ...] = ()
    offsets: tuple[tuple[Tile, ...], ...] = ()
    epsilon: float = 0.0

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All of them."""
        return (*self.scales, *self.zero_points, *(tile for offset in self.offsets for tile in offset))

    @property
    def group(self) -> int | None:
        """How many neighbours along k share a scale, zero point or offset; None when all do."""
        return next((tile.group for tile in self.tiles if tile.group is not None), None)


def operand(affine: Affine, side: str, gemm: Node) -> Operand | Unknown:
    """``affine`` as operand ``side`` (``a [..., k]`` or ``b [k, n]``) of ``gemm``, or why it is none."""
    # A sum in int32 wraps around as its terms do.
    if affine.wraps is not None and dtype(gemm) is not torch.int32:
        kind = dtype_name(dtype_of(affine.wraps))
        return Unknown(affine.wraps, f"the zero point of {side} is subtracted in {kind}, where it may wrap around")
    dims = affine.codes.dims
    if side == "a":
        free, along_k = flat(dims[:-1]), dims[-1]
    else:
        free, along_k = dims[-1], dims[-2]
    named = [("scale", affine.scales), ("zero point", affine.zero_points)]
    placed: list[tuple[Tile, ...]] = []
    for name, factors in (*named, *(("offset", offset) for offset in affine.offsets)):
        tiles = tuple(tile for factor in factors if (tile := _tile(factor, free, along_k)) is not None)
        if len(tiles) < len(factors) or any(tile.group in (0, 1) for tile in tiles):
            return Unknown(gemm, f"the {name} of {side} varies along k, so it cannot leave the sum")
        placed.append(tiles)
    scales, points, *offsets = placed
    of_side = Operand(affine.codes, scales, points, tuple(offsets), affine.epsilon)
    if len({tile.group for tile in of_side.tiles} - {None}) > 1:
        beside = "offsets" if affine.offsets else "zero points"
        return Unknown(gemm, f"scales and {beside} of {side} have groups of different sizes along k")
    return of_side


def _tile(factor: Decode, free: Sequence[Piece], along_k: Sequence[Piece]) -> Tile | None:
    pairs = cut(factor.pairs, (*free, *along_k))
    rows, columns = segments(free, pairs), segments(along_k, pairs)
    if rows is None or columns is None:
        return None
    placed = sum(part.factor is not None for part in (*rows, *columns))
    return Tile(factor.source, rows, columns, factor.inverse) if placed == len(pairs) else None


def _matmul(env: Environment, node: Node) -> Value | None:
    """``mm``, ``mv``, ``bmm``, ``addmm``, ``baddbmm`` and ``_int_mm`` of codes, dequantized or not."""
    operands = multiplied(node)
    left, right = map(env.value, operands)
    if isinstance(right, Unknown):
        return right
    a, b = as_affine(left), as_affine(right)
    if a is not None and a.offsets:
        a = None  # no matmul of codes: what it was decoded to is a float like any other
    if b is None:
        return left if isinstance(left, Unknown) else _float_weight(node, a)
    dims = b.codes.dims[::-1] if is_op(node, aten.mv.default) else _without_batch(b.codes.dims)
    if dims is None:
        return Unknown(node, "a batched matmul whose second operand differs from batch to batch")
    b = dataclasses.replace(b, codes=dataclasses.replace(b.codes, dims=dims))
    if a is None:
        return _weight_only(node, operands[0], b)
    product = _both(node, a, b)
    if dtype(operands[0]) not in FLOAT_DTYPES or not (a.scales or a.zero_points or b.offsets):
        return product
    # What is no matmul of codes is at least one of a float activation and a quantized weight.
    fallback = _weight_only(node, operands[0], b)
    if isinstance(fallback, Unknown):
        return product
    if isinstance(product, Unknown):
        return dataclasses.replace(fallback, obstacle=product.rule)
    is_coarse = product.block is not None and product.numerics > max(fallback.numerics, Numerics.REASSOCIATED)
    if is_coarse or node in env.weight_only:
        return fallback
    return dataclasses.replace(product, decoded=True)


def _without_batch(dims: Dims) -> Dims | None:
    """``[k, n]`` of a weight that is the same for each matmul of a batch; None when it is not."""
    batch, matrix = dims[:-2], dims[-2:]
    if any(piece.axis != REPEAT for dim in batch for piece in dim):
        return None
    return None if any(piece.axis == REPEAT for dim in matrix for piece in dim) else matrix


def _float_weight(node: Node, a: Affine | None) -> Unknown | None:
    # Integer inputs such as images are no quantized activations; only what was computed as codes is.
    if a is not None and a.codes.node.op == "call_function" and through(a.codes.node, CASTS) is not a.codes.node:
        return Unknown(node, "only the activation is quantized; the weight is floating point")
    return None


def _both(node: Node, a: Affine, b: Affine) -> Product | Unknown:
    """A matmul whose operands are both codes."""
    if (dtype(a.codes.node) in FLOAT8_DTYPES) != (dtype(b.codes.node) in FLOAT8_DTYPES):
        return Unknown(node, "one operand is float8 and the other integer")
    of_a, of_b = operand(a, "a", node), operand(b, "b", node)
    for side in (of_a, of_b):
        if isinstance(side, Unknown):
            return side
    assert isinstance(of_a, Operand)
    assert isinstance(of_b, Operand)
    groups, integer = {of_a.group, of_b.group} - {None}, dtype(a.codes.node) not in FLOAT8_DTYPES
    if of_b.offsets and (groups or not integer):
        beside = "groups along k" if groups else "float8 codes"
        return Unknown(node, f"the weight has an offset beside {beside}, which only floats are multiplied with")
    if len(groups) > 1:
        return Unknown(node, "the scales of a and b have groups of different sizes along k")
    to = dtype(node)
    if groups:
        # The op sums each group by itself, less one zero point for each row of a, and adds the groups in float32.
        if any(point.group is not None for point in of_a.zero_points):
            return Unknown(node, "the zero point of a varies along k, so it cannot leave the sum")
        if not all(map(is_near, of_a.zero_points)):
            return Unknown(node, "a zero point of a that may lie far out, beside scales that vary along k")
        if to is torch.int32:
            return Unknown(node, "an int32 sum of codes whose zero points vary along k has no rule")
    if to is torch.int32 and integer:
        numerics = Numerics.EXACT
    elif to in FLOAT_DTYPES:
        numerics = _float_sum_class(of_a, of_b, summed_size(node), to) if integer else Numerics.SAME_ACCUM
    else:
        return Unknown(node, f"a matmul of codes that returns {to} has no rule")
    if of_a.scales or of_b.scales or groups or max(of_a.epsilon, of_b.epsilon):
        numerics = _moved_out_class(max(of_a.epsilon, of_b.epsilon), to)
    return _started(node, of_a.codes, of_a, of_b, numerics)


def _weight_only(node: Node, x: object, b: Affine) -> Product | Unknown:
    """A float activation times a quantized weight."""
    weight, to = operand(b, "b", node), dtype(node)
    if isinstance(weight, Unknown):
        return weight
    if to not in FLOAT_DTYPES or dtype(x) is not to or not isinstance(x, Node):
        return Unknown(node, f"a weight-only matmul of {dtype(x)} that returns {to} has no rule")
    moves_out = weight.scales or weight.offsets or weight.epsilon
    numerics = _moved_out_class(weight.epsilon, to) if moves_out else Numerics.SAME_ACCUM
    return _started(node, x, None, weight, numerics)


def _moved_out_class(epsilon: float, to: torch.dtype | None) -> Numerics:
    """Operands that were rounded more coarsely than the result are another value, not another order."""
    coarse = epsilon > (0.0 if to is None or not to.is_floating_point else torch.finfo(to).eps)
    return Numerics.APPROXIMATE if coarse else Numerics.REASSOCIATED


def _started(node: Node, a: Codes | Node, of_a: Operand | None, of_b: Operand, numerics: Numerics) -> Product | Unknown:
    to = dtype(node)
    assert to is not None
    block = _block(of_a, of_b, shape(node)[-1])
    if isinstance(block, str):
        return Unknown(node, block)
    stage, a_is_codes = Stage.ACCUMULATOR if to in (torch.int32, torch.float32) else Stage.CAST, isinstance(a, Codes)
    product = Product(
        gemm=node,
        a=a,
        b=of_b.codes,
        rows=() if of_a is None else of_a.scales,
        columns=of_b.scales,
        bias=None,
        dtype=to,
        stage=stage,
        numerics=numerics,
        wraps=to is torch.int32,
        offset=a.offset if isinstance(a, Codes) else 0,
        a_zero_points=() if of_a is None else of_a.zero_points,
        b_zero_points=of_b.zero_points,
        b_offsets=of_b.offsets,
        block=block,
    )
    if a_is_codes and not product.wraps and not all(map(is_near, (*product.a_zero_points, *product.b_zero_points))):
        # The part of a zero point that lies far out is taken off the sum in float32.
        product = dataclasses.replace(product, numerics=max(product.numerics, Numerics.REASSOCIATED))
    if not is_op(node, *ADDING_MATMULS):
        return product
    if arguments(node)["alpha"] != 1 or arguments(node)["beta"] != 1:
        return Unknown(node, f"{op_name(node.target)} with alpha or beta other than 1")
    axis = axis_of(args_of(node)[0], node)
    if axis not in (Axis.COLUMN, Axis.SCALAR) or dtype(args_of(node)[0]) not in FLOAT_DTYPES:
        return Unknown(node, f"{op_name(node.target)} adds a matrix, not a bias along n")
    return dataclasses.replace(
        product,
        bias=tile_along(axis, args_of(node)[0], node),
        stage=Stage.BIAS if stage is Stage.ACCUMULATOR else stage,
        numerics=max(product.numerics, Numerics.SAME_ACCUM),
    )


def _block(of_a: Operand | None, of_b: Operand, n: int | torch.SymInt) -> tuple[int, int] | str | None:
    """Rows and columns of the weight ``[n, k]`` that share one scale, where any scale varies along k; else None."""
    group = of_b.group if of_a is None or of_a.group is None else of_a.group
    if group is None:
        return None
    blocks = {tile.row_block for tile in of_b.tiles if isinstance(tile.source, Node)}
    if not isinstance(group, int) or not isinstance(n, int):
        return "groups along k must be of a static size"
    rows = next(iter(blocks)) if len(blocks) == 1 else 1
    # One scale for all rows is a block as high as the weight; rows that are no neighbours have a scale each.
    return (n if rows is None else rows or 1, group)


def _float_sum_class(a: Operand, b: Operand, k: int | torch.SymInt, to: torch.dtype) -> Numerics:
    """Integer codes summed in float32 are exact as long as no partial sum can pass 2**24."""
    a_range, b_range = integer_range(a.codes), integer_range(b.codes)
    if to is not torch.float32 or not isinstance(k, int) or a_range is None or b_range is None:
        return Numerics.SAME_ACCUM
    if a.zero_points or b.zero_points:
        return Numerics.SAME_ACCUM
    largest = max(-a_range[0], a_range[1]) * max(-b_range[0], b_range[1]) * k
    return Numerics.EXACT if largest <= 2**24 else Numerics.SAME_ACCUM


RULES: dict[object, Rule] = dict.fromkeys(
    (aten.mm.default, aten.mv.default, aten.bmm.default, aten._int_mm.default, *ADDING_MATMULS), _matmul
)
