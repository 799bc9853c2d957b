"""How the source quantizes a matmul, in the words of a scheme, where what a kernel is asked does not tell."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fx_quant.passes.annotate import Annotation
from fx_quant.passes.inputs import Inputs
from fx_quant.passes.matrices import stored_dtype
from fx_quant.passes.nodes import (
    CASTS,
    DIVISIONS,
    MULTIPLICATIONS,
    VIEWS,
    args_of,
    aten,
    dtype,
    is_one,
    is_op,
    is_single,
    shape,
    through,
)
from fx_quant.passes.origins import Kind, Origins
from fx_quant.passes.rules.matmuls import Operand, operand
from fx_quant.passes.rules.steps import as_affine
from fx_quant.passes.values import Codes, Product
from fx_quant.scheme import FLOAT_DTYPES, Granularity, OperandSpec, Scheme, dtype_name


def source_scheme(product: Product, scheme: Scheme, inputs: Inputs) -> Scheme:
    """``scheme`` as the source means it where the activation has a single row, so that shapes do not tell.

    One scale is then per token where it was computed along the row alone, and what varies along the columns may be the
    product of that and the weight's scale.
    """
    if not isinstance(product.a, Codes) or not all(map(is_one, shape(product.gemm)[:-1])):
        return scheme
    rows = [factor.source for factor in product.rows if isinstance(factor.source, Node)]
    for factor in product.columns:
        if factor.row_block is not None and isinstance(factor.source, Node):
            rows += _single_factors(factor.source)
    rows = [source for source in rows if source in inputs.runtime]
    if scheme.activation.granularity not in (Granularity.UNSCALED, Granularity.PER_TENSOR) or not rows:
        return scheme
    per_token = any(map(_is_computed_along_rows, rows))
    granularity = Granularity.PER_TOKEN if per_token else Granularity.PER_TENSOR
    return replace(scheme, activation=replace(scheme.activation, granularity=granularity, dynamic=True))


def _single_factors(node: Node) -> list[Node]:
    """The factors of one element in a product of vectors."""
    node = through(node, VIEWS | CASTS)
    if not is_op(node, *MULTIPLICATIONS, aten.mm.default):
        return []
    return [source for source in node.all_input_nodes if is_single(source)]


_REDUCTIONS = frozenset({aten.amax.default, aten.amin.default, aten.sum.dim_IntList, aten.linalg_vector_norm.default})
_ALL = frozenset({aten.max.default, aten.min.default, aten.sum.default})
_ONE_DIM = frozenset({aten.max.dim, aten.min.dim})


def _is_computed_along_rows(scale: Node) -> bool:
    """Whether the nearest statistic behind ``scale`` is one over the last dim of its input, and of no other."""
    seen, waiting = {scale}, [scale]
    while waiting:
        node = waiting.pop()
        if is_op(node, *_ALL):
            return False
        if is_op(node, *_REDUCTIONS, *_ONE_DIM):
            dims, rank = args_of(node)[1:2], len(shape(args_of(node)[0]))
            if not dims:
                return False
            given = [dims[0]] if isinstance(dims[0], int) else dims[0]
            return rank > 1 and [int(dim) % rank for dim in given] == [rank - 1]
        for source in node.all_input_nodes:
            if source not in seen and node.op == "call_function":
                seen.add(source)
                waiting.append(source)
    return False


def scheme_in_words(
    scheme: Scheme, product: Product, last: Node, annotation: Annotation, inputs: Inputs, origins: Origins
) -> str:
    """``scheme`` as a report prints it.

    Args:
        last: the last node of which anything is proven; what scales it is not in ``scheme``.
    """
    decoded = _decoded_activation(product, annotation, inputs, origins)
    if decoded:
        return f"{scheme.activation} (decoded from {decoded}) x {scheme.weight}"
    unscaled = {scheme.activation.granularity, scheme.weight.granularity} == {Granularity.UNSCALED}
    if unscaled and any(_scales(user, last) for user in last.users):
        codes = f"{dtype_name(scheme.activation.dtype)} x {dtype_name(scheme.weight.dtype)}"
        return f"{codes} (scaled in a way no rule follows)"
    return str(scheme)


def _scales(user: Node, value: Node) -> bool:
    if not is_op(user, *MULTIPLICATIONS, *DIVISIONS, aten.addcmul.default):
        return False
    return any(dtype(n) in FLOAT_DTYPES for n in user.all_input_nodes if n is not value)


def _decoded_activation(product: Product, annotation: Annotation, inputs: Inputs, origins: Origins) -> str:
    """How a float activation was quantized before it was decoded for the matmul; ``""`` where it was not."""
    x = product.a
    origin = None if isinstance(x, Codes) else origins.coded(x)
    if origin is None or origin.stored or isinstance(x, Codes):
        return ""
    affine = as_affine(annotation.value(x))
    activation = None if affine is None else operand(affine, "a", product.gemm)
    to = None if affine is None else stored_dtype(affine.codes)
    if affine is None or to is None or not isinstance(activation, Operand):
        return "fake-quantized" if origin.kind in (Kind.ROUNDED, Kind.DECODED) else "quantized"
    if activation.group is not None:
        granularity = Granularity.per_group(activation.group)
    elif any(tile.row_block is not None for tile in activation.scales):
        granularity = Granularity.PER_TOKEN
    else:
        along = [tile.source for tile in activation.scales if isinstance(tile.source, Node)]
        one_row = all(map(is_one, shape(product.gemm)[:-1]))
        per_token = one_row and any(map(_is_computed_along_rows, along))
        granularity = Granularity.PER_TOKEN if per_token else Granularity.PER_TENSOR
    dynamic = any(tile.source in inputs.runtime for tile in activation.scales)
    symmetric = not activation.zero_points and affine.codes.offset == 0 and to is not torch.uint8
    spec = OperandSpec(
        torch.int8 if to is torch.uint8 else to,
        granularity,
        dynamic=dynamic,
        symmetric=symmetric,
        offset=bool(activation.offsets),
    )
    return f"{spec} ({'dynamic' if dynamic else 'static'})"
