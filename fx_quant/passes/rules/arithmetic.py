"""Values behind multiplication, division, addition, subtraction and sums."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.fx import Node

from fx_quant.passes.axes import REPEAT, seen_through
from fx_quant.passes.matrices import (
    ACCUMULATORS,
    axis_of,
    holds_exactly,
    integer_range,
    is_full,
    matrix_base,
    rounds_difference,
    rounds_integers,
    tile_along,
)
from fx_quant.passes.nodes import (
    ADDITIONS,
    CASTS,
    DIVISIONS,
    EXPANDS,
    MULTIPLICATIONS,
    SUBTRACTIONS,
    VIEWS,
    args_of,
    arguments,
    aten,
    dtype,
    is_one,
    is_op,
    is_widening,
    rounded_number,
    same_shape,
    shape,
    summed_size,
    uniform_value,
)
from fx_quant.passes.ranges import is_near
from fx_quant.passes.rules.packing import GATHERED, is_gathered
from fx_quant.passes.rules.steps import (
    as_affine,
    difference_fits,
    is_integer,
    is_whole,
    may_wrap,
    rounded,
    scale_of,
    stepped,
    varies_everywhere,
    zero_point_of,
)
from fx_quant.passes.values import (
    Affine,
    Axis,
    Codes,
    ColumnSum,
    Decode,
    Environment,
    Product,
    Rule,
    Stage,
    Tile,
    Unknown,
    Value,
)
from fx_quant.scheme import FLOAT_DTYPES, INT8_DTYPES, Numerics


def _in_float32(product: Product, node: Node, other: object) -> bool:
    """Whether this step is float32 arithmetic on exact operands, as in the canonical epilogue."""
    other_dtype = dtype(other)
    return (
        dtype(node) is torch.float32
        and product.dtype in (*ACCUMULATORS, torch.float32)
        and (other_dtype is None or is_widening(other_dtype, torch.float32))
    )


def _operands(env: Environment, node: Node, kinds: tuple[type, ...]) -> tuple[Value, object, bool] | None:
    """``(value, other operand, value is on the left)`` for the operand of one of ``kinds`` that has the full shape."""
    left, right = args_of(node)[0], args_of(node)[1]
    if left is right:
        return None  # one row times itself would fit as a scale, and be computed twice
    fitting = []
    for operand, other, on_left in ((left, right, True), (right, left, False)):
        value = env.value(operand)
        if isinstance(value, kinds) and same_shape(shape(operand), shape(node)):
            fitting.append((value, other, on_left))
    # Of two dequantized tensors, one that was repeated to the full shape is a scale that is itself quantized.
    return min(fitting, key=lambda operands: _repeats(operands[0]), default=None)


def _repeats(value: Value) -> bool:
    codes = value.codes if isinstance(value, Affine) else value
    return isinstance(codes, Codes) and any(piece.axis == REPEAT for dim in codes.dims for piece in dim)


def _scale(env: Environment, node: Node) -> Value | None:
    """Multiplication or division by a factor."""
    divides = node.target in DIVISIONS
    operands = _operands(env, node, (Product,))
    if operands is None:
        operands = _operands(env, node, (Codes, Affine))
    if operands is None:
        return _scaled_sum(env, node)
    value, other, on_left = operands
    if divides and not on_left:
        return None
    other = _unexpanded(other)
    if isinstance(value, Product):
        return _scale_product(value, node, other, axis_of(other, node), divides)
    if isinstance(env.value(other), Unknown) and dtype(node) in FLOAT_DTYPES:
        return None
    affine = as_affine(value)
    assert affine is not None
    return _scale_affine(affine, node, other, divides)


def _scale_affine(affine: Affine, node: Node, other: object, divides: bool) -> Affine | Unknown:
    to = dtype(node)
    if to is None or to not in FLOAT_DTYPES:
        return Unknown(node, f"the codes are scaled in {to}, which has no rule")
    scale = scale_of(affine.codes, node, other, inverse=divides)
    if scale is None:
        return Unknown(node, "the scale does not follow the rows, columns, groups or blocks of the codes")
    if varies_everywhere(affine.codes, scale.pairs):
        return Unknown(node, GATHERED if is_gathered(other) else "every code has a scale of its own")
    offsets = tuple((*offset, scale) for offset in affine.offsets)
    return rounded(dataclasses.replace(affine, scales=(*affine.scales, scale), offsets=offsets), to)


def _unexpanded(other: object) -> object:
    """A factor before it was expanded to the shape that it would be broadcast to anyhow."""
    while is_op(other, *EXPANDS):
        other = args_of(other)[0]
    return other


def _scale_product(product: Product, node: Node, other: object, axis: Axis | None, divides: bool) -> Product | None:
    to = dtype(node)
    if to not in FLOAT_DTYPES or product.bias is not None:
        return None
    if isinstance(other, Node) and dtype(other) not in FLOAT_DTYPES:
        return None
    number = uniform_value(other)
    if number is not None and not _is_scale(number, divides):
        return None
    weight_only = isinstance(product.a, Node)
    if weight_only and axis not in (Axis.SCALAR, Axis.COLUMN):
        return None  # the canonical op has no scale of its rows
    if axis is None:
        return _scale_product_by_both(product, node, other, divides)
    first = not product.rows and product.stage is Stage.ACCUMULATOR
    on_rows = not weight_only and (axis is Axis.ROW or (axis is Axis.SCALAR and first))
    side, stage = ("rows", Stage.A_SCALE) if on_rows else ("columns", Stage.B_SCALE)
    factors = getattr(product, side)
    exact = _in_float32(product, node, other) and not divides and not factors
    tile = tile_along(axis, other, node, inverse=divides)
    changes: dict[str, Any] = {side: (*factors, tile)}
    if side == "columns":
        changes["b_offsets"] = _scaled(product, tile)
    if product.block is not None and side == "columns" and axis is Axis.COLUMN:
        # A scale for each column parts the rows of a block, which must be whole for that.
        (high, group), n = product.block, shape(product.gemm)[-1]
        if not isinstance(n, int) or n % high:
            return None
        changes["block"] = (1, group)
    return stepped(product, to, stage, exact=exact, **changes)


def _is_scale(number: float, divides: bool) -> bool:
    """Whether a product may be scaled by ``number`` in another order: what 0 / 0 is in the source has no scale."""
    if divides and number == 0:
        return False
    held = rounded_number(number, torch.float32)
    return math.isfinite(held) and math.isfinite(1 / held if divides and held else held)


def _scale_product_by_both(product: Product, node: Node, other: object, divides: bool) -> Product | None:
    """``product * (row * column)``: the scales were multiplied with each other first, maybe as ``row @ column``."""
    outer = is_op(other, aten.mm.default) and is_one(summed_size(other))
    if not (outer or is_op(other, aten.mul.Tensor)) or not same_shape(shape(other), shape(node)):
        return None
    factors: dict[Axis, Tile] = {}
    for operand in args_of(other)[:2]:
        axis = axis_of(operand, other)
        if axis is None or axis is Axis.SCALAR or dtype(operand) not in FLOAT_DTYPES:
            return None
        factors[axis] = tile_along(axis, operand, other, inverse=divides)
    if len(factors) != 2:
        return None
    rows, of_columns = (*product.rows, factors[Axis.ROW]), factors[Axis.COLUMN]
    changes = {"rows": rows, "columns": (*product.columns, of_columns), "b_offsets": _scaled(product, of_columns)}
    to = dtype(node)
    assert to is not None
    return stepped(product, to, Stage.B_SCALE, exact=False, **changes)


def _scaled(product: Product, factor: Tile) -> tuple[tuple[Tile, ...], ...]:
    """The weight's offsets times ``factor``."""
    return tuple((*offset, factor) for offset in product.b_offsets)


def _scaled_and_shifted(env: Environment, node: Node) -> Value | None:
    """``addcmul(bias, product, scale)``, or of codes and their offset."""
    bias, *factors = args_of(node)[:3]
    if node.kwargs.get("value", 1) != 1:
        return None
    for operand, other in (factors, reversed(factors)):
        product = env.value(operand)
        if not same_shape(shape(operand), shape(node)) or operand is other:
            continue
        scale, affine = _unexpanded(other), as_affine(product)
        if affine is not None and (not is_full(bias, node) or _spreads(bias)) and env.value(other) is None:
            scaled, to = _scale_affine(affine, node, scale, divides=False), dtype(node)
            return scaled if isinstance(scaled, Unknown) or to is None else _offset(scaled, node, bias, False, to)
        if isinstance(product, Product):
            scaled = _scale_product(product, node, scale, axis_of(scale, node), divides=False)
            shifted = None if scaled is None else _shift_product(env, scaled, node, bias, subtracts=False)
            # One op may round once where two round twice.
            return shifted and dataclasses.replace(shifted, numerics=max(shifted.numerics, Numerics.SAME_ACCUM))
    return None


def _scaled_sum(env: Environment, node: Node) -> Value | None:
    """A column sum times an integer, or times an integer zero point."""
    if node.target not in MULTIPLICATIONS or dtype(node) not in ACCUMULATORS:
        return None
    for operand, other in ((args_of(node)[0], args_of(node)[1]), (args_of(node)[1], args_of(node)[0])):
        value = env.value(operand)
        if not isinstance(value, ColumnSum):
            continue
        number = uniform_value(other)
        if isinstance(number, int):
            return dataclasses.replace(value, multiplier=value.multiplier * number)
        axis = axis_of(other, node)
        # Beside one zero point for each row the sums must lie along the columns; a square hides where they do not.
        lies = axis is Axis.SCALAR or (axis is Axis.ROW and axis_of(operand, node) in (Axis.COLUMN, Axis.SCALAR))
        if value.zero_point is None and is_integer(dtype(other)) and lies:
            assert axis is not None
            return dataclasses.replace(value, zero_point=tile_along(axis, other, node))
    return None


def _shift(env: Environment, node: Node) -> Value | None:
    """Addition or subtraction of an offset, a bias or a correction."""
    if arguments(node)["alpha"] != 1:
        return None
    subtracts = node.target in SUBTRACTIONS
    operands = _operands(env, node, (Product,))
    if operands is not None:
        value, other, on_left = operands
        assert isinstance(value, Product)
        return None if subtracts and not on_left else _shift_product(env, value, node, other, subtracts)
    operands = _operands(env, node, (Codes, Affine))
    if operands is None:
        return None
    value, other, on_left = operands
    if subtracts and not on_left:
        return None
    number = uniform_value(other)
    if number == 0:
        return value if _same_kind(value, node) else None
    if isinstance(value, Codes) and number is not None and is_whole(number):
        moved = dataclasses.replace(value, offset=value.offset + int(-number if subtracts else number))
        node_dtype = dtype(node)
        if integer_range(value) is not None and node_dtype is not None and holds_exactly(moved, node_dtype):
            return moved
    if is_gathered(other):
        return Unknown(node, GATHERED)
    if is_full(other, node) and not _spreads(other):
        return None
    return _zero_point(value, node, other, subtracts)


def _spreads(operand: object) -> bool:
    """Whether a tensor of the full shape only repeats the elements of a smaller one."""
    return isinstance(operand, Node) and any(piece.axis == REPEAT for dim in seen_through(operand)[1] for piece in dim)


def _zero_point(value: Value, node: Node, other: object, subtracts: bool) -> Value:
    """Codes minus an integer that one scale's worth of them share; whatever else they share is an offset."""
    affine, to = as_affine(value), dtype(node)
    assert affine is not None
    assert to is not None
    is_point = subtracts and not affine.scales and integer_range(affine.codes) is not None
    zero_point = zero_point_of(affine.codes, node, other) if is_point else None
    if zero_point is None:
        return _offset(affine, node, other, subtracts, to)
    if varies_everywhere(affine.codes, zero_point.pairs):
        return Unknown(node, "every code has a zero point of its own")
    moved = dataclasses.replace(affine, zero_points=(*affine.zero_points, zero_point))
    if not to.is_floating_point:
        if difference_fits(moved, to):
            return moved
        if to not in ACCUMULATORS:
            return Unknown(node, f"a zero point is subtracted in {to}, where the difference may wrap around")
        return dataclasses.replace(moved, wraps=node)
    kind = dtype(zero_point.source)
    if affine.zero_points or rounds_difference(affine.codes, kind, to):
        moved = rounded(moved, to)
    # The zero point itself may have been rounded on its way to the subtraction.
    while is_op(other, *CASTS, *VIEWS):
        cast = dtype(other)
        if cast is not None and cast.is_floating_point and rounds_integers(kind, cast):
            moved = rounded(moved, cast)
        other = args_of(other)[0]
    return moved


def _offset(affine: Affine, node: Node, other: object, subtracts: bool, to: torch.dtype) -> Value:
    """Codes, scaled or not, plus or minus a number that one scale's worth of them share."""
    if to not in FLOAT_DTYPES:
        return Unknown(node, f"something else than a zero point is added to the codes in {to}, which has no rule")
    offset = scale_of(affine.codes, node, other)
    if offset is None:
        return Unknown(node, "what is added to the codes does not follow their rows, columns, groups or blocks")
    if varies_everywhere(affine.codes, offset.pairs):
        return Unknown(node, "every code has an offset of its own")
    added = (offset, Decode(-1.0)) if subtracts else (offset,)
    return rounded(dataclasses.replace(affine, offsets=(*affine.offsets, added)), to)


def _same_kind(value: Value, node: Node) -> bool:
    return not isinstance(value, Codes) or holds_exactly(value, dtype(node) or torch.bool)


def _shift_product(env: Environment, product: Product, node: Node, other: object, subtracts: bool) -> Product | None:
    correction = env.value(other)
    if isinstance(correction, ColumnSum):
        return _correct(product, node, other, correction, subtracts)
    to, axis = dtype(node), axis_of(other, node)
    if (
        subtracts
        or product.bias is not None
        or to not in FLOAT_DTYPES
        or axis not in (Axis.COLUMN, Axis.SCALAR)
        or (isinstance(other, Node) and dtype(other) not in FLOAT_DTYPES)
    ):
        return None
    bias = tile_along(axis, other, node)
    return stepped(product, to, Stage.BIAS, exact=_in_float32(product, node, other), bias=bias)


def _correct(product: Product, node: Node, other: object, correction: ColumnSum, subtracts: bool) -> Product | None:
    """``sum_k a b  -  zero_point * sum_k b``: the correction of codes that have a zero point, or were shifted."""
    base = matrix_base(product.b.node, product.b.dims)
    to = dtype(node)
    if base is None or product.dtype not in ACCUMULATORS or to not in ACCUMULATORS:
        return None
    # In 64 bits nothing wraps around; what did in 32 bits before is no sum less a zero point.
    wraps = product.wraps and to is torch.int32
    if product.wraps and not wraps and (product.a_zero_points or may_wrap(correction, dtype(other))):
        return None
    node_of_b, transposed = base
    sums_k = correction.base is node_of_b and correction.dim == (1 if transposed else 0)
    multiplier = correction.multiplier if subtracts else -correction.multiplier
    if not sums_k or product.stage is not Stage.ACCUMULATOR:
        return None
    # The sums are those of the weight's codes, not of what is left when its own zero point is subtracted.
    if product.b.offset != 0 or product.b_zero_points:
        return None
    along_n = axis_of(other, node) in (Axis.COLUMN, Axis.SCALAR)
    if correction.zero_point is not None:
        of_rows = correction.zero_point.row_block is not None and is_full(other, node)
        if multiplier != 1 or product.offset != 0 or not (along_n or of_rows):
            return None
        exact = wraps or is_near(correction.zero_point)
        return dataclasses.replace(
            product,
            dtype=to,
            wraps=wraps,
            numerics=product.numerics if exact else max(product.numerics, Numerics.REASSOCIATED),
            a_zero_points=(*product.a_zero_points, correction.zero_point),
        )
    offset_is_gone = along_n and multiplier == product.offset
    return dataclasses.replace(product, dtype=to, wraps=wraps, offset=0) if offset_is_gone else None


def _sum(env: Environment, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    if not isinstance(value, Codes) or value.offset != 0 or len(shape(args_of(node)[0])) != 2:
        return None
    base, dims = matrix_base(value.node, value.dims), args_of(node)[1]
    if base is None or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    if dtype(node) not in ACCUMULATORS:
        return None
    source, transposed = base
    if dtype(source) not in INT8_DTYPES:
        return None
    dim = int(dims[0]) % 2
    return ColumnSum(source, 1 - dim if transposed else dim, 1)


RULES: dict[object, Rule] = {
    **dict.fromkeys(MULTIPLICATIONS | DIVISIONS, _scale),
    **dict.fromkeys(ADDITIONS | SUBTRACTIONS, _shift),
    aten.sum.dim_IntList: _sum,
    aten.addcmul.default: _scaled_and_shifted,
}
