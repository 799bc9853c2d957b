"""Contractions of quantized operands that no rule claims, and the reason, in words."""

from __future__ import annotations

from torch.fx import Node

from fx_quant.passes.annotate import Annotation
from fx_quant.passes.contractions import (
    SUMS,
    called,
    is_contraction,
    is_quantized_contraction,
    op_name,
    operands_of_contraction,
    outer_product,
)
from fx_quant.passes.nodes import (
    ADDING_MATMULS,
    CASTS,
    MULTIPLICATIONS,
    VIEWS,
    args_of,
    aten,
    is_op,
    qualified_name,
    through,
)
from fx_quant.passes.origins import Kind, Origin, Origins, is_library_matmul
from fx_quant.passes.rulebook import is_matmul
from fx_quant.passes.values import Unknown, Value


def unclaimed_contraction(
    gemm: Node, value: Value | None, annotation: Annotation, origins: Origins
) -> tuple[Node, str] | None:
    """Where and why nothing is proven of ``gemm``; None where it is no contraction of quantized operands.

    Args:
        value: what is proven of ``gemm``, which is no product.
    """
    name = qualified_name(called(gemm))
    if is_op(gemm, *SUMS):
        return _multiplied_and_summed(gemm, origins)
    if is_library_matmul(gemm, origins):
        return gemm, f"{name} takes stored codes, and no rule knows what it computes"
    if not (is_contraction(gemm) or is_matmul(gemm)):
        return None
    named = is_quantized_contraction(gemm)
    operands = operands_of_contraction(gemm)
    coded = [(operand, origin) for operand in operands if (origin := origins.coded(operand)) is not None]
    if not coded or outer_product(gemm):
        if isinstance(value, Unknown) and named:
            return value.node, value.rule
        return (gemm, f"{name} multiplies quantized operands, and no rule knows it") if named else None
    if _is_on_the_left(operands, coded) and is_op(gemm, *_MATRICES):
        return coded[0][0], "the quantized weight is the left operand of the matmul; only one on the right is rewritten"
    if not is_matmul(gemm):
        kind = "a convolution" if "conv" in op_name(called(gemm)) else name
        return gemm, f"{kind} of {_described(coded)}, which no rule rewrites: only matmuls of two operands are"
    if isinstance(value, Unknown):
        return value.node, value.rule
    return _lost(gemm, operands, coded, annotation)


_MATRICES = (aten.mm.default, aten.bmm.default, *ADDING_MATMULS)


def _is_on_the_left(operands: list[Node], coded: list[tuple[Node, Origin]]) -> bool:
    """Whether the only weight among the codes is the first operand."""
    weights = [operand for operand, origin in coded if origin.stored and origin.kind is not Kind.WEIGHTED]
    return bool(weights) and weights == operands[:1] and len(operands) > 1


def _described(coded: list[tuple[Node, Origin]]) -> str:
    origin = max((origin for _, origin in coded), key=lambda origin: (origin.stored, origin.kind))
    if origin.kind is Kind.ROUNDED or (origin.stored is False and is_op(origin.source, aten.round.default)):
        return "values that are rounded in floating point, as fake quantization does"
    if not origin.stored:
        return "codes that are computed in the graph, or decoded from such"
    return "stored codes" if origin.kind is Kind.CODES else "a weight that is decoded from stored codes"


def _lost(
    gemm: Node, operands: list[Node], coded: list[tuple[Node, Origin]], annotation: Annotation
) -> tuple[Node, str]:
    """Why a matmul that has rules has no value."""
    operand, origin = max(coded, key=lambda pair: (pair[1].stored, pair[1].kind))
    if is_op(origin.source, aten.round.default, aten.round.decimals):
        return origin.source, _ROUNDED
    decoded = "the weight is decoded from stored codes" if origin.stored else "an operand is decoded from codes"
    if origin.lost is not None:
        value = annotation.value(origin.lost)
        if isinstance(value, Unknown):
            return value.node, value.rule
        return origin.lost, f"{decoded}, and no rule proves {origin.lost.target}"
    if operand is operands[0] and len(coded) == 1:
        return operand, "only the activation is quantized; the weight is floating point"
    return operand, f"{decoded} by steps that no rule proves"


_ROUNDED = (
    "an operand is rounded in floating point, as fake quantization does, so there are no codes to multiply: convert "
    "the model first"
)


def _multiplied_and_summed(node: Node, origins: Origins) -> tuple[Node, str] | None:
    """A matmul spelled as a product that broadcasts, then a sum."""
    operand = args_of(node)[0]
    origin = origins.of(operand)
    if origin is None or not origin.weighted:
        return None
    product = through(operand, VIEWS | CASTS)
    if not is_op(product, *MULTIPLICATIONS):
        return None
    return (
        product,
        "a weight decoded from stored codes is multiplied and summed without a matmul, which no rule rewrites",
    )
