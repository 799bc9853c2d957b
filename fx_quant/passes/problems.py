"""A proven product as data: its scheme, and the GEMM that a kernel is asked to run for it."""

from __future__ import annotations

import torch

from fx_quant.passes.inputs import Inputs
from fx_quant.passes.matrices import integer_range, stored_dtype
from fx_quant.passes.nodes import dtype, dtype_of
from fx_quant.passes.ranges import bounds_of, is_near
from fx_quant.passes.values import Codes, Product, Tile
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Granularity, OperandSpec, Scheme


def corrects_weight(product: Product) -> bool:
    """Whether the sum holds a zero point of the weight beside codes of the activation.

    No kernel takes one: its correction is arithmetic around the raw sum.
    """
    return isinstance(product.a, Codes) and (bool(product.b_zero_points) or product.b.offset != 0)


def corrects_outside(product: Product) -> bool:
    """Whether zero points are corrected by arithmetic around the raw sum: the weight's, and those that may be far off.

    A zero point that is not proven to lie where its codes do can make an int32 sum wrap around that the source takes in
    floating point or 64 bits.
    """
    return corrects_weight(product) or bool(isinstance(product.a, Codes) and not product.wraps and far_points(product))


def near_range(codes: Codes, point: Tile) -> tuple[int, int]:
    """The bounds of what the integer sum holds of a zero point of integer ``codes``: all of it, or its near part."""
    proven, of_codes = bounds_of(point.source) if is_near(point) else None, integer_range(codes)
    assert of_codes is not None
    return proven or (min(of_codes[0], 0), max(of_codes[1], 0))


def far_points(product: Product) -> list[Tile]:
    """The zero points of ``product`` that may lie anywhere."""
    return [point for point in (*product.a_zero_points, *product.b_zero_points) if not is_near(point)]


def is_unsigned(product: Product) -> bool:
    """Whether the activation's codes are bytes, which kernels are given as int8, 128 less."""
    return isinstance(product.a, Codes) and stored_dtype(product.a) is torch.uint8


def scheme_of(product: Product, inputs: Inputs) -> Scheme:
    """How the source of ``product`` quantizes its operands."""
    return Scheme(_activation(product, inputs), _weight(product))


def _activation(product: Product, inputs: Inputs) -> OperandSpec:
    if not isinstance(product.a, Codes):
        return OperandSpec(dtype_of(product.a))
    if product.block is not None and product.rows:
        granularity = Granularity.per_group(product.block[1])
    else:
        granularity = _granularity(product.rows, Granularity.PER_TOKEN)
    return OperandSpec(
        torch.int8 if is_unsigned(product) else _stored(product.a),
        granularity,
        dynamic=any(factor.source in inputs.runtime for factor in product.rows),
        symmetric=not product.a_zero_points and product.offset == 0 and not is_unsigned(product),
    )


def _weight(product: Product) -> OperandSpec:
    if product.block is not None:
        granularity = Granularity.of_block(*product.block)
    else:
        granularity = _granularity(product.columns, Granularity.PER_CHANNEL)
    symmetric = not product.b_zero_points and product.b.offset == 0
    return OperandSpec(_code_dtype(product.b), granularity, symmetric=symmetric)


def _code_dtype(codes: Codes) -> torch.dtype:
    """The narrowest dtype that is known to hold the codes: int4 for 16 values, whatever they are stored in."""
    bounds = integer_range(codes)
    if bounds is not None and bounds[1] - bounds[0] < 16:
        return torch.int4  # pyrefly: ignore[missing-attribute]
    return _stored(codes)


def _stored(codes: Codes) -> torch.dtype:
    kind = stored_dtype(codes)
    assert kind is not None
    return kind


def _granularity(factors: tuple[Tile, ...], named: Granularity) -> Granularity:
    if not factors:
        return Granularity.UNSCALED
    return Granularity.PER_TENSOR if all(factor.row_block is None for factor in factors) else named


def problem_of(product: Product, scheme: Scheme, rows: SizeRange, n: int, k: int, constant_weight: bool) -> Problem:
    """What a kernel is asked to run for ``product``."""
    bias = None if product.bias is None else dtype(product.bias.source) or torch.float32
    if not corrects_outside(product):
        return Problem(scheme, rows, n, k, product.dtype, bias, constant_weight)
    plain = Scheme(
        OperandSpec(scheme.activation.dtype, symmetric=scheme.activation.symmetric), OperandSpec(scheme.weight.dtype)
    )
    return Problem(plain, rows, n, k, torch.int32, None, constant_weight)
