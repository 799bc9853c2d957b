"""A proven product as data: its scheme, and the GEMM that a kernel is asked to run for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fx_quant.passes.inputs import Inputs
from fx_quant.passes.matrices import holds_exactly, integer_range, stored_dtype
from fx_quant.passes.nodes import dtype, dtype_of
from fx_quant.passes.ranges import bounds_of, is_near
from fx_quant.passes.values import Codes, Product, Tile
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Granularity, OperandSpec, Scheme
from fx_quant.weights import INT4


def corrects_outside(product: Product, *, packed: bool = False, constant: bool = False) -> bool:
    """Whether the raw sum is corrected by arithmetic around it: offsets, zero points of the weight, and far ones.

    Beside codes of the activation kernels take no offset, and a zero point of the weight where they scale the sums of
    groups and where its codes are ``packed``. A zero point that is not proven to lie where its codes do can make an
    int32 sum wrap around that the source takes in floating point or 64 bits.
    """
    if not isinstance(product.a, Codes):
        return False
    if product.b_offsets:
        return True
    if product.block is not None or packed:
        return False
    shifted = bool(product.b_zero_points) or code_shift(product, packed=False, constant=constant) != 0
    return shifted or bool(not product.wraps and far_points(product))


def can_pack(product: Product, k: int) -> bool:
    """Whether kernels can be given the weight two codes to a byte, beside codes of the activation.

    They add in float32 what are exact sums of pieces, so the source may not return the sum, nor let it wrap around.
    """
    if _code_dtype(product.b) is not INT4 or k % 2 or product.dtype is torch.int32 or product.b_offsets:
        return False
    return product.block is not None or (not far_points(product) and _fits_int32(product, k))


def fits_int32(product: Product, k: int) -> bool:
    """Whether the canonical sum of ``k`` products, taken in int32, is that of the source.

    Where the source sums in int32 too, both wrap around alike. Of zero points that may lie anywhere only what is near
    is in the sum.
    """
    return product.wraps or _fits_int32(product, k)


def _fits_int32(product: Product, k: int) -> bool:
    if not isinstance(product.a, Codes):
        return True
    largest = _largest(product.a, product.a_zero_points), _largest(product.b, product.b_zero_points)
    if largest[0] is None or largest[1] is None:
        return True
    return largest[0] * largest[1] * (k if product.block is None else product.block[1]) < 2**31


def _largest(codes: Codes, zero_points: Sequence[Tile]) -> int | None:
    """Largest magnitude of integer codes less the near part of their zero points."""
    bounds = integer_range(codes)
    if bounds is None:
        return None
    low, high = bounds
    for point in zero_points:
        least, most = near_range(codes, point)
        low, high = low - most, high - least
    return max(-low, high)


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
    if any(factor.group is not None for factor in product.rows):
        assert product.block is not None
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
    has_offset, kind = bool(product.b_offsets), _code_dtype(product.b)
    if product.block is not None:
        granularity = Granularity.of_block(*product.block)
    else:
        shifts = [*product.b_zero_points, *(tile for offset in product.b_offsets for tile in offset)]
        granularity = _granularity([*product.columns, *(shifts if has_offset else ())], Granularity.PER_CHANNEL)
    # Zero points are taken off an offset.
    symmetric = has_offset or (not product.b_zero_points and not code_shift(product, packed=kind is INT4))
    return OperandSpec(kind, granularity, symmetric=symmetric, offset=has_offset)


def code_shift(product: Product, *, packed: bool, constant: bool = False) -> int:
    """What is added to the weight's codes as a kernel is given them, to get those of the source."""
    return product.b.offset + taken_off(product, packed=packed, constant=constant)


def taken_off(product: Product, *, packed: bool, constant: bool = False) -> int:
    """What is subtracted from the weight's codes, as they are stored, for a kernel.

    Args:
        packed: codes of 16 values become -8 to 7, those of the source where these are such.
        constant: the subtraction costs nothing, so others become int8 beside codes of the activation.
    """
    codes, bounds = product.b, integer_range(product.b)
    if packed:
        assert bounds is not None
        return -codes.offset if _fits(bounds, 8) else bounds[0] - codes.offset + 8
    if not constant or bounds is None or not isinstance(product.a, Codes):
        return 0
    return -codes.offset if _fits(bounds, 128) else 128 if _stored(codes) is torch.uint8 else 0


def _fits(bounds: tuple[int, int], half: int) -> bool:
    return bounds[0] >= -half and bounds[1] < half


def _code_dtype(codes: Codes) -> torch.dtype:
    """The narrowest dtype that is known to hold the codes: int4 for 16 values, whatever they are stored in."""
    bounds = integer_range(codes)
    return INT4 if bounds is not None and bounds[1] - bounds[0] < 16 else _stored(codes)


def _wide_dtype(product: Product, constant: bool) -> torch.dtype:
    """The dtype of a byte in which a kernel is given the weight's codes beside codes of the activation."""
    moved = dataclasses.replace(product.b, offset=-taken_off(product, packed=False, constant=constant))
    return torch.int8 if holds_exactly(moved, torch.int8) else _stored(product.b)


def _stored(codes: Codes) -> torch.dtype:
    kind = stored_dtype(codes)
    assert kind is not None
    return kind


def _granularity(factors: Sequence[Tile], named: Granularity) -> Granularity:
    if not factors:
        return Granularity.UNSCALED
    return Granularity.PER_TENSOR if all(factor.row_block is None for factor in factors) else named


def problems_of(
    product: Product, scheme: Scheme, rows: SizeRange, n: int, k: int, constant_weight: bool
) -> tuple[Problem, ...]:
    """What a kernel may be asked to run for ``product``, best first.

    Codes of 4 bits are packed or have a byte each; scales of the activation's rows stand for whole rows beside groups
    of the weight, or are repeated for each group.
    """
    bias = None if product.bias is None else dtype(product.bias.source) or torch.float32

    def asked(activation: OperandSpec, weight: OperandSpec) -> Problem:
        if not corrects_outside(product, packed=weight.packed, constant=constant_weight):
            return Problem(Scheme(activation, weight), rows, n, k, product.dtype, bias, constant_weight)
        plain = Scheme(OperandSpec(activation.dtype, symmetric=activation.symmetric), OperandSpec(weight.dtype))
        return Problem(plain, rows, n, k, torch.int32, None, constant_weight)

    if not isinstance(product.a, Codes):
        return (asked(scheme.activation, scheme.weight),)
    kind = _wide_dtype(product, constant_weight)
    symmetric = not product.b_zero_points and not code_shift(product, packed=False, constant=constant_weight)
    weights = [dataclasses.replace(scheme.weight, dtype=kind, symmetric=symmetric)]
    if can_pack(product, k):
        weights.insert(0, scheme.weight)
    activations = [scheme.activation]
    if product.block is not None and product.rows and scheme.activation.group is None:
        by_group = Granularity.per_group(product.block[1])
        activations.append(dataclasses.replace(scheme.activation, granularity=by_group))
    return tuple(asked(activation, weight) for activation in activations for weight in weights)
