"""Values behind multiplication, division, addition, subtraction and sums."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from fx_quant.passes.matrices import EPILOGUE_DTYPES, axis_of, holds_exactly, integer_range, is_full, matrix_base
from fx_quant.passes.nodes import (
    ADDITIONS,
    DIVISIONS,
    MULTIPLICATIONS,
    SUBTRACTIONS,
    args_of,
    aten,
    dtype,
    is_op,
    is_widening,
    same_shape,
    shape,
    uniform_value,
)
from fx_quant.passes.rules.steps import as_affine, factor_source, rounded, stepped
from fx_quant.passes.values import (
    Affine,
    Axis,
    Codes,
    ColumnSum,
    Environment,
    Factor,
    Product,
    Rule,
    Stage,
    Unknown,
    Value,
)


def _in_float32(product: Product, node: Node, other: object) -> bool:
    """Whether this step is float32 arithmetic on exact operands, as in the canonical epilogue."""
    other_dtype = dtype(other)
    return (
        dtype(node) is torch.float32
        and product.dtype in (torch.int32, torch.float32)
        and (other_dtype is None or is_widening(other_dtype, torch.float32))
    )


def _operands(env: Environment, node: Node, kinds: tuple[type, ...]) -> tuple[Value, object, bool] | None:
    """``(value, other operand, value is on the left)`` for the operand of one of ``kinds`` that has the full shape."""
    left, right = args_of(node)[0], args_of(node)[1]
    if left is right:
        return None  # one row times itself would fit as a scale, and be computed twice
    for operand, other, on_left in ((left, right, True), (right, left, False)):
        value = env.value(operand)
        if isinstance(value, kinds) and same_shape(shape(operand), shape(node)):
            return value, other, on_left
    return None


def _scale(env: Environment, node: Node) -> Value | None:
    """Multiplication or division by a factor."""
    divides = node.target in DIVISIONS
    found = _operands(env, node, (Product,))
    if found is None:
        found = _operands(env, node, (Codes, Affine))
    if found is None:
        return _scaled_sum(env, node)
    value, other, on_left = found
    if divides and not on_left:
        return None
    axis = axis_of(other, node)
    if isinstance(value, Product):
        return _scale_product(value, node, other, axis, divides)
    to = dtype(node)
    if to is None or to not in EPILOGUE_DTYPES:
        return Unknown(node, f"the codes are scaled in {to}, which has no rule")
    if isinstance(env.value(other), Unknown):
        return None
    if axis is None:
        return Unknown(node, "the scale is neither scalar, per row nor per column (groups and blocks have no rule yet)")
    affine = as_affine(value)
    assert affine is not None
    factors = (*affine.factors, Factor(factor_source(other), axis, node, divides))
    return rounded(dataclasses.replace(affine, factors=factors), to)


def _scale_product(product: Product, node: Node, other: object, axis: Axis | None, divides: bool) -> Product | None:
    to = dtype(node)
    if to not in EPILOGUE_DTYPES or product.bias is not None:
        return None
    if isinstance(other, Node) and dtype(other) not in EPILOGUE_DTYPES:
        return None
    if axis is None:
        return _scale_product_by_both(product, node, other, divides)
    on_rows = axis is Axis.ROW or (axis is Axis.SCALAR and not product.rows and product.stage is Stage.ACCUMULATOR)
    side, stage = ("rows", Stage.A_SCALE) if on_rows else ("columns", Stage.B_SCALE)
    factors = getattr(product, side)
    exact = _in_float32(product, node, other) and not divides and not factors
    changes = {side: (*factors, Factor(factor_source(other), axis, node, divides))}
    return stepped(product, to, stage, exact=exact, **changes)


def _scale_product_by_both(product: Product, node: Node, other: object, divides: bool) -> Product | None:
    """``product * (row * column)``: the scales were multiplied with each other first."""
    if not is_op(other, aten.mul.Tensor) or not same_shape(shape(other), shape(node)):
        return None
    factors: dict[Axis, Factor] = {}
    for operand in args_of(other)[:2]:
        axis = axis_of(operand, other)
        if axis is None or axis is Axis.SCALAR or dtype(operand) not in EPILOGUE_DTYPES:
            return None
        factors[axis] = Factor(factor_source(operand), axis, other, divides)
    if len(factors) != 2:
        return None
    rows, columns = (*product.rows, factors[Axis.ROW]), (*product.columns, factors[Axis.COLUMN])
    to = dtype(node)
    assert to is not None
    return stepped(product, to, Stage.B_SCALE, exact=False, rows=rows, columns=columns)


def _scaled_sum(env: Environment, node: Node) -> Value | None:
    """A column sum times an integer."""
    for operand, other in ((args_of(node)[0], args_of(node)[1]), (args_of(node)[1], args_of(node)[0])):
        value = env.value(operand)
        number = uniform_value(other)
        if (
            isinstance(value, ColumnSum)
            and isinstance(number, int)
            and node.target in MULTIPLICATIONS
            and dtype(node) in (torch.int32, torch.int64)
        ):
            return dataclasses.replace(value, multiplier=value.multiplier * number)
    return None


def _shift(env: Environment, node: Node) -> Value | None:
    """Addition or subtraction of an offset, a bias or a correction."""
    if node.kwargs.get("alpha", 1) != 1:
        return None
    subtracts = node.target in SUBTRACTIONS
    found = _operands(env, node, (Product,))
    if found is not None:
        value, other, on_left = found
        assert isinstance(value, Product)
        return None if subtracts and not on_left else _shift_product(env, value, node, other, subtracts)
    found = _operands(env, node, (Codes, Affine))
    if found is None:
        return None
    value, other, on_left = found
    if subtracts and not on_left:
        return None
    number = uniform_value(other)
    if number == 0:
        return value if _same_kind(value, node) else None
    if isinstance(value, Codes) and isinstance(number, int):
        moved = dataclasses.replace(value, offset=value.offset + (-number if subtracts else number))
        node_dtype = dtype(node)
        if integer_range(value) is not None and node_dtype is not None and holds_exactly(moved, node_dtype):
            return moved
    if is_full(other, node):
        return None
    return Unknown(node, "a zero point or offset is added to the codes: asymmetric quantization has no rule yet")


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
        or to not in EPILOGUE_DTYPES
        or axis not in (Axis.COLUMN, Axis.SCALAR)
        or (isinstance(other, Node) and dtype(other) not in EPILOGUE_DTYPES)
    ):
        return None
    bias = Factor(factor_source(other), axis, node)
    return stepped(product, to, Stage.BIAS, exact=_in_float32(product, node, other), bias=bias)


def _correct(product: Product, node: Node, other: object, correction: ColumnSum, subtracts: bool) -> Product | None:
    """``sum (a + offset) b  -  offset * sum b``: the correction of codes that were shifted before the matmul."""
    base = matrix_base(product.b)
    if base is None or product.dtype is not torch.int32 or dtype(node) is not torch.int32:
        return None
    node_of_b, transposed = base
    along_n = axis_of(other, node) in (Axis.COLUMN, Axis.SCALAR)
    sums_k = along_n and correction.base is node_of_b and correction.dim == (1 if transposed else 0)
    multiplier = correction.multiplier if subtracts else -correction.multiplier
    if not sums_k or product.stage is not Stage.ACCUMULATOR or multiplier != product.offset:
        return None
    return dataclasses.replace(product, offset=0)


def _sum(env: Environment, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    if not isinstance(value, Codes) or value.offset != 0 or len(shape(args_of(node)[0])) != 2:
        return None
    base, dims = matrix_base(value), args_of(node)[1]
    if base is None or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    if dtype(node) not in (torch.int32, torch.int64):
        return None
    source, transposed = base
    if dtype(source) not in (torch.int8, torch.uint8):
        return None
    dim = int(dims[0]) % 2
    return ColumnSum(source, 1 - dim if transposed else dim, 1)


RULES: dict[object, Rule] = {
    **dict.fromkeys(MULTIPLICATIONS | DIVISIONS, _scale),
    **dict.fromkeys(ADDITIONS | SUBTRACTIONS, _shift),
    aten.sum.dim_IntList: _sum,
}
