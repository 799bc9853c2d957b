"""Values of matmuls of codes, dequantized or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from fx_quant.passes.matrices import EPILOGUE_DTYPES, axis_of, integer_range
from fx_quant.passes.nodes import CASTS, args_of, aten, dtype, is_one, is_op, shape, through, uniform_value
from fx_quant.passes.rules.steps import as_affine
from fx_quant.passes.values import (
    Affine,
    Axis,
    Broadcast,
    Codes,
    Environment,
    Factor,
    Product,
    Rule,
    Stage,
    Unknown,
    Value,
)
from fx_quant.scheme import FLOAT8_DTYPES, Numerics


def _operand_error(side: str, operand: Affine, gemm: Node) -> Unknown | None:
    """A scale that varies along k cannot leave the sum."""
    along_k = Axis.COLUMN if side == "a" else Axis.ROW
    if any(factor.axis is along_k for factor in operand.factors):
        return Unknown(gemm, f"the scale of {side} varies along k, so it cannot leave the sum")
    return None


def _matmul(env: Environment, node: Node) -> Value | None:
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
    a, b = map(as_affine, values)
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


def _scaled_mm(env: Environment, node: Node) -> Value | None:
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


RULES: dict[object, Rule] = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.addmm.default, aten._int_mm.default), _matmul),
    aten._scaled_mm.default: _scaled_mm,
}
