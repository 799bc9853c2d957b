"""The value algebra: one forward walk that gives each node what can be proven of its value.

Rules are about values, not spellings: each op maps the values of its inputs to a value. A node whose value cannot be
proven carries the rule that failed, so a miss explains itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_quant.passes.nodes import (
    CASTS,
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
    is_widening,
    same_shape,
    same_size,
    shape,
    tensor,
    through,
    uniform_value,
)
from fx_quant.passes.values import (
    Affine,
    Axis,
    Broadcast,
    Codes,
    ColumnSum,
    Factor,
    Product,
    Stage,
    Unknown,
    Value,
)
from fx_quant.scheme import CODE_DTYPES, FLOAT8_DTYPES, Numerics

EPILOGUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Largest integer n for which every integer of magnitude up to n is exact.
_EXACT_INTEGERS = {
    torch.float64: 2**53,
    torch.float32: 2**24,
    torch.float16: 2**11,
    torch.bfloat16: 2**8,
}

Rule = Callable[["Annotation", Node], Value | None]


class Annotation:
    """Values of the nodes of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._values: dict[Node, Value] = {}
        for node in graph.nodes:
            value = self._evaluate(node)
            if value is not None:
                self._values[node] = value

    def value(self, node: object) -> Value | None:
        """What is proven of ``node``; None for plain floating point and for what is not a tensor node."""
        return self._values.get(node) if isinstance(node, Node) else None

    def _evaluate(self, node: Node) -> Value | None:
        if tensor(node) is None:
            return None
        if node.op == "call_function":
            rule = _RULES.get(node.target)
            if rule is not None:
                value = rule(self, node)
                if value is not None:
                    return value
        # Whatever computed them, low-bit values are codes of something.
        if dtype(node) in CODE_DTYPES:
            return Codes(node)
        if node.op == "call_function" and node.target in _CARRIERS:
            return self._carried(node)
        return None

    def _carried(self, node: Node) -> Unknown | None:
        """A dequantize step that no rule proves: remember why, unless it is rather a float tensor that met codes."""
        inputs = node.all_input_nodes
        floats = [source for source in inputs if self.value(source) is None and _is_full(source, node)]
        if floats and (node.target in _ADDITIONS | _SUBTRACTIONS or not all(_is_full(s, node) for s in inputs)):
            return None
        for source in inputs:
            value = None if source.target in MATMULS else self.value(source)
            if isinstance(value, Unknown):
                return value
            if isinstance(value, (Codes, Affine, Broadcast)):
                return Unknown(node, f"no rule proves {_op_name(node)} of {_describe(value)}")
        return None


def _op_name(node: Node) -> str:
    return str(node.target).removesuffix(".default")


def _describe(value: Value) -> str:
    names: dict[type, str] = {
        Codes: "quantized codes",
        Affine: "a dequantized tensor",
        Broadcast: "a broadcast quantized tensor",
    }
    return names.get(type(value), "a quantized value")


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
        if _is_transpose(view):
            transposed = not transposed
        elif view.target not in COPIES and not _is_identity_view(view):
            return None
    while isinstance(node, Node) and node.op == "call_function":
        if _is_transpose(node):
            transposed = not transposed
        elif node.target not in COPIES and not _is_identity_view(node):
            break
        node = args_of(node)[0]
    return (node, transposed) if len(shape(node)) == 2 else None


def _is_transpose(node: Node) -> bool:
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


# --- views ----------------------------------------------------------------------------------------------------


def _keeps_columns(node: Node) -> bool:
    """Whether a reshape leaves the last dim alone, so that rows keep their flattened order."""
    before, after = shape(args_of(node)[0]), shape(node)
    return bool(before) and bool(after) and same_size(before[-1], after[-1])


def _viewed(codes: Codes, node: Node) -> Codes:
    if not codes.views and codes.offset == 0 and dtype(codes.node) == dtype(node):
        return Codes(node)
    return dataclasses.replace(codes, views=(*codes.views, node))


def _view(env: Annotation, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    if isinstance(value, Codes):
        return _viewed(value, node)
    if isinstance(value, Affine):
        if _keeps_columns(node) or all(f.axis is Axis.SCALAR for f in value.factors):
            return dataclasses.replace(value, codes=_viewed(value.codes, node))
        return Unknown(node, "a reshape splits the dimension along which the scale varies")
    if isinstance(value, Broadcast):
        return value if same_shape(shape(node), shape(args_of(node)[0])) else None
    if isinstance(value, Product):
        return value if _keeps_columns(node) else None
    if isinstance(value, ColumnSum):
        return value
    return None


def _permute(env: Annotation, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    if isinstance(value, Codes):
        return _viewed(value, node)
    if isinstance(value, Affine):
        codes = _viewed(value.codes, node)
        if all(f.axis is Axis.SCALAR for f in value.factors):
            return dataclasses.replace(value, codes=codes)
        if _is_transpose(node):
            factors = tuple(dataclasses.replace(f, axis=f.axis.transposed()) for f in value.factors)
            return dataclasses.replace(value, codes=codes, factors=factors)
        return Unknown(node, "a permutation mixes the rows along which the scale varies")
    return None


def _expand(env: Annotation, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    before, after = shape(args_of(node)[0]), shape(node)
    if same_shape(after, before):
        return value
    repeats = len(before) >= 2 and same_shape(after[-2:], before[-2:])
    if isinstance(value, Broadcast):
        return value if repeats else None
    if isinstance(value, (Codes, Affine)) and repeats and all(map(is_one, before[:-2])):
        return Broadcast(value)
    return _viewed(value, node) if isinstance(value, Codes) else None


def _copy(env: Annotation, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    if isinstance(value, Codes):
        return _viewed(value, node)
    if isinstance(value, Affine):
        return dataclasses.replace(value, codes=_viewed(value.codes, node))
    return value


def _slice(env: Annotation, node: Node) -> Value | None:
    """A slice that keeps everything, such as the unpad of an operand that was not padded."""
    if same_shape(shape(node), shape(args_of(node)[0])):
        return _copy(env, node) if not isinstance(env.value(args_of(node)[0]), Codes) else env.value(args_of(node)[0])
    return None


# --- casts ----------------------------------------------------------------------------------------------------


def _cast(env: Annotation, node: Node) -> Value | None:
    value, to = env.value(args_of(node)[0]), dtype(node)
    assert to is not None
    if isinstance(value, Codes):
        if holds_exactly(value, to):
            return value
        if to in CODE_DTYPES:
            return None
        return Unknown(node, f"a cast of the codes to {to} is not exact")
    if isinstance(value, Affine):
        return _rounded(value, to) if to in EPILOGUE_DTYPES else None
    if isinstance(value, ColumnSum):
        return value if to in (torch.int32, torch.int64) else None
    if isinstance(value, Product):
        if to not in EPILOGUE_DTYPES:
            return value if to == value.dtype else None
        if value.dtype == to:
            return value
        if value.dtype is torch.int32:
            stage = value.stage if to is torch.float32 else Stage.CAST
            return dataclasses.replace(value, dtype=to, stage=stage)
        if value.dtype is torch.float32:
            return dataclasses.replace(value, dtype=to, stage=Stage.CAST)
        # The value still holds the narrow rounding, which the canonical op would not make.
        return _stepped(value, to, Stage.CAST, exact=False)
    return None


def _rounded(value: Affine, to: torch.dtype) -> Affine:
    return dataclasses.replace(value, epsilon=max(value.epsilon, torch.finfo(to).eps))


# --- arithmetic -----------------------------------------------------------------------------------------------


def _stepped(product: Product, to: torch.dtype, stage: Stage, *, exact: bool, **changes) -> Product:
    in_order = stage.value > product.stage.value
    numerics = product.numerics if exact and in_order else max(product.numerics, Numerics.SAME_ACCUM)
    skipped = product.skipped + (product.dtype in (torch.bfloat16, torch.float16))
    return dataclasses.replace(product, dtype=to, stage=stage, numerics=numerics, skipped=skipped, **changes)


def _in_float32(product: Product, node: Node, other: object) -> bool:
    """Whether this step is float32 arithmetic on exact operands, as in the canonical epilogue."""
    other_dtype = dtype(other)
    return (
        dtype(node) is torch.float32
        and product.dtype in (torch.int32, torch.float32)
        and (other_dtype is None or is_widening(other_dtype, torch.float32))
    )


def _operands(env: Annotation, node: Node, kinds: tuple[type, ...]) -> tuple[Value, object, bool] | None:
    """``(value, other operand, value is on the left)`` for the operand of one of ``kinds`` that has the full shape."""
    left, right = args_of(node)[0], args_of(node)[1]
    if left is right:
        return None  # one row times itself would fit as a scale, and be computed twice
    for operand, other, on_left in ((left, right, True), (right, left, False)):
        value = env.value(operand)
        if isinstance(value, kinds) and same_shape(shape(operand), shape(node)):
            return value, other, on_left
    return None


def _scale(env: Annotation, node: Node) -> Value | None:
    """Multiplication or division by a factor."""
    divides = node.target in _DIVISIONS
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
    affine = _as_affine(value)
    assert affine is not None
    factors = (*affine.factors, Factor(_source(other), axis, node, divides))
    return _rounded(dataclasses.replace(affine, factors=factors), to)


def _source(operand: object) -> Node | float:
    number = constant(operand)
    if number is not None:
        return float(number)
    assert isinstance(operand, Node)
    return operand


def _is_full(operand: object, node: Node) -> bool:
    return tensor(operand) is not None and same_shape(shape(operand), shape(node))


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
    changes = {side: (*factors, Factor(_source(other), axis, node, divides))}
    return _stepped(product, to, stage, exact=exact, **changes)


def _scale_product_by_both(product: Product, node: Node, other: object, divides: bool) -> Product | None:
    """``product * (row * column)``: the scales were multiplied with each other first."""
    if not is_op(other, aten.mul.Tensor) or not same_shape(shape(other), shape(node)):
        return None
    factors: dict[Axis, Factor] = {}
    for operand in args_of(other)[:2]:
        axis = axis_of(operand, other)
        if axis is None or axis is Axis.SCALAR or dtype(operand) not in EPILOGUE_DTYPES:
            return None
        factors[axis] = Factor(_source(operand), axis, other, divides)
    if len(factors) != 2:
        return None
    rows, columns = (*product.rows, factors[Axis.ROW]), (*product.columns, factors[Axis.COLUMN])
    to = dtype(node)
    assert to is not None
    return _stepped(product, to, Stage.B_SCALE, exact=False, rows=rows, columns=columns)


def _scaled_sum(env: Annotation, node: Node) -> Value | None:
    """A column sum times an integer."""
    for operand, other in ((args_of(node)[0], args_of(node)[1]), (args_of(node)[1], args_of(node)[0])):
        value = env.value(operand)
        number = uniform_value(other)
        if (
            isinstance(value, ColumnSum)
            and isinstance(number, int)
            and node.target in _MULTIPLICATIONS
            and dtype(node) in (torch.int32, torch.int64)
        ):
            return dataclasses.replace(value, multiplier=value.multiplier * number)
    return None


def _shift(env: Annotation, node: Node) -> Value | None:
    """Addition or subtraction of an offset, a bias or a correction."""
    if node.kwargs.get("alpha", 1) != 1:
        return None
    subtracts = node.target in _SUBTRACTIONS
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
    if _is_full(other, node):
        return None
    return Unknown(node, "a zero point or offset is added to the codes: asymmetric quantization has no rule yet")


def _same_kind(value: Value, node: Node) -> bool:
    return not isinstance(value, Codes) or holds_exactly(value, dtype(node) or torch.bool)


def _shift_product(env: Annotation, product: Product, node: Node, other: object, subtracts: bool) -> Product | None:
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
    bias = Factor(_source(other), axis, node)
    return _stepped(product, to, Stage.BIAS, exact=_in_float32(product, node, other), bias=bias)


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


def _sum(env: Annotation, node: Node) -> Value | None:
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


# --- matmuls --------------------------------------------------------------------------------------------------


def _as_affine(value: Value | None) -> Affine | None:
    if isinstance(value, Codes):
        return Affine(value, ())
    return value if isinstance(value, Affine) else None


def _operand_error(side: str, operand: Affine, gemm: Node) -> Unknown | None:
    """A scale that varies along k cannot leave the sum."""
    along_k = Axis.COLUMN if side == "a" else Axis.ROW
    if any(factor.axis is along_k for factor in operand.factors):
        return Unknown(gemm, f"the scale of {side} varies along k, so it cannot leave the sum")
    return None


def _matmul(env: Annotation, node: Node) -> Value | None:
    """``mm``, ``bmm``, ``addmm`` and ``_int_mm`` of codes, dequantized or not."""
    operands = args_of(node)[1:3] if is_op(node, aten.addmm.default) else args_of(node)[:2]
    values = [env.value(operand) for operand in operands]
    if is_op(node, aten.bmm.default):
        weight = values[1]
        if isinstance(weight, Broadcast):
            values[1] = weight.of
        elif isinstance(weight, (Codes, Affine)) and not is_one(shape(operands[1])[0]):
            return Unknown(node, "a batched matmul whose second operand differs from batch to batch")
    for value in values:
        if isinstance(value, Broadcast):
            return Unknown(node, "an operand is repeated along the batch, which has no rule yet")
        if isinstance(value, Unknown):
            return value
    a, b = map(_as_affine, values)
    if a is None or b is None:
        return _one_sided(node, a, b)
    for side, operand in (("a", a), ("b", b)):
        error = _operand_error(side, operand, node)
        if error is not None:
            return error
    if b.codes.offset != 0:
        return Unknown(node, "the weight's codes carry an offset: asymmetric weights have no rule yet")
    if (dtype(a.codes.node) in FLOAT8_DTYPES) != (dtype(b.codes.node) in FLOAT8_DTYPES):
        return Unknown(node, "one operand is float8 and the other integer")
    return _start(node, a, b)


def _one_sided(node: Node, a: Affine | None, b: Affine | None) -> Unknown | None:
    if b is not None:
        return Unknown(node, "weight-only quantization: the activation is floating point, and no kernel takes that yet")
    # Integer inputs such as images are no quantized activations; only what was computed as codes is.
    if a is not None and a.codes.node.op == "call_function" and through(a.codes.node, CASTS) is not a.codes.node:
        return Unknown(node, "only the activation is quantized; the weight is floating point")
    return None


def _start(node: Node, a: Affine, b: Affine) -> Value | None:
    to = dtype(node)
    integer = dtype(a.codes.node) not in FLOAT8_DTYPES
    numerics, stage = Numerics.EXACT, Stage.ACCUMULATOR
    if to is not torch.int32 or not integer:
        if to not in EPILOGUE_DTYPES:
            return Unknown(node, f"a matmul of codes that returns {to} has no rule")
        numerics = (
            Numerics.SAME_ACCUM if not integer else _float_sum_class(a.codes, b.codes, shape(args_of(node)[-1])[-2], to)
        )
        stage = Stage.ACCUMULATOR if to is torch.float32 else Stage.CAST
    if a.factors or b.factors:
        # Operands that were rounded more coarsely than the result are another value, not another order.
        coarse = max(a.epsilon, b.epsilon) > (0.0 if to is torch.int32 else torch.finfo(to).eps)
        numerics = Numerics.APPROXIMATE if coarse else Numerics.REASSOCIATED
    product = Product(
        gemm=node,
        a=a.codes,
        b=b.codes,
        rows=a.factors,
        columns=b.factors,
        bias=None,
        dtype=to,
        stage=stage,
        offset=a.codes.offset,
        numerics=numerics,
    )
    if not is_op(node, aten.addmm.default):
        return product
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return Unknown(node, "addmm with alpha or beta other than 1")
    axis = axis_of(args_of(node)[0], node)
    if axis not in (Axis.COLUMN, Axis.SCALAR) or dtype(args_of(node)[0]) not in EPILOGUE_DTYPES:
        return Unknown(node, "addmm adds a matrix, not a bias along n")
    return dataclasses.replace(
        product,
        bias=Factor(args_of(node)[0], axis, node),
        stage=Stage.BIAS if stage is Stage.ACCUMULATOR else stage,
        numerics=max(numerics, Numerics.SAME_ACCUM),
    )


def _float_sum_class(a: Codes, b: Codes, k: int | torch.SymInt, to: torch.dtype) -> Numerics:
    """Integer codes summed in float32 are exact as long as no partial sum can pass 2**24."""
    a_range, b_range = integer_range(a), integer_range(b)
    if to is not torch.float32 or not isinstance(k, int) or a_range is None or b_range is None:
        return Numerics.SAME_ACCUM
    largest = max(-a_range[0], a_range[1]) * max(-b_range[0], b_range[1]) * k
    return Numerics.EXACT if largest <= 2**24 else Numerics.SAME_ACCUM


def _scaled_mm(env: Annotation, node: Node) -> Value | None:
    """``aten._scaled_mm``: scales and bias inside the op."""
    names = ("self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum")
    given: dict[str, Any] = dict(zip(names, args_of(node), strict=False)) | dict(node.kwargs)
    a, b = env.value(given["self"]), env.value(given["mat2"])
    if not isinstance(a, Codes) or not isinstance(b, Codes):
        return Unknown(node, "_scaled_mm of operands that are not plain codes")
    if given.get("scale_result") is not None:
        return Unknown(node, "_scaled_mm with scale_result, which compiled code ignores")
    to = dtype(node)
    if to not in EPILOGUE_DTYPES:
        return Unknown(node, f"_scaled_mm that returns {to} has no rule")
    factors = []
    for operand, wanted in ((given["scale_a"], Axis.ROW), (given["scale_b"], Axis.COLUMN)):
        axis = axis_of(operand, node)
        if axis is None or axis not in (Axis.SCALAR, wanted) or dtype(operand) is not torch.float32:
            return Unknown(node, "_scaled_mm with scales that are neither per tensor nor row-wise float32")
        factors.append(() if uniform_value(operand) == 1 else (Factor(operand, axis, node),))
    bias, stage = given.get("bias"), Stage.B_SCALE
    if bias is not None:
        stage = Stage.BIAS
    return Product(
        gemm=node,
        a=a,
        b=b,
        rows=factors[0],
        columns=factors[1],
        bias=None if bias is None else Factor(bias, Axis.COLUMN, node),
        dtype=to,
        stage=stage if to is torch.float32 else Stage.CAST,
        offset=0,
        numerics=Numerics.SAME_ACCUM,
    )


_MULTIPLICATIONS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIVISIONS = frozenset({aten.div.Tensor, aten.div.Scalar})
_SUBTRACTIONS = frozenset({aten.sub.Tensor, aten.sub.Scalar})
_ADDITIONS = frozenset({aten.add.Tensor, aten.add.Scalar})

MATMULS = frozenset(
    {aten.mm.default, aten.bmm.default, aten.addmm.default, aten._int_mm.default, aten._scaled_mm.default}
)

_RULES: dict[object, Rule] = {
    **dict.fromkeys(RESHAPES, _view),
    **dict.fromkeys(PERMUTES, _permute),
    **dict.fromkeys(EXPANDS, _expand),
    **dict.fromkeys(COPIES, _copy),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(_MULTIPLICATIONS | _DIVISIONS, _scale),
    **dict.fromkeys(_ADDITIONS | _SUBTRACTIONS, _shift),
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.addmm.default, aten._int_mm.default), _matmul),
    aten._scaled_mm.default: _scaled_mm,
    aten.slice.Tensor: _slice,
    aten.sum.dim_IntList: _sum,
}

# Ops through which a dequantize may run that no rule proves; any other op ends in plain floating point.
_CARRIERS = frozenset(
    {
        *RESHAPES,
        *PERMUTES,
        *EXPANDS,
        *COPIES,
        *CASTS,
        *_MULTIPLICATIONS,
        *_DIVISIONS,
        *_SUBTRACTIONS,
        *_ADDITIONS,
        aten.slice.Tensor,
        aten.index.Tensor,
        aten.cat.default,
        aten.bitwise_and.Scalar,
        aten.bitwise_and.Tensor,
        aten.bitwise_right_shift.Tensor_Scalar,
        aten.bitwise_right_shift.Tensor,
        aten.__rshift__.Scalar,
        aten.where.self,
    }
)
