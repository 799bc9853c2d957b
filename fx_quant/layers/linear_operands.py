"""The tensors of a quantized linear: their shapes, the GEMM that they make, and what must hold of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fx_quant.errors import must
from fx_quant.layers.activation import check_activation
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import (
    CODE_DTYPES,
    FLOAT8_DTYPES,
    FLOAT_DTYPES,
    HALF_DTYPES,
    INT4_DTYPES,
    OperandSpec,
    Scheme,
    dtype_name,
    scale_dtype_of,
)

_ANY_ROWS = SizeRange(0, None)


def linear_problem(
    scheme: Scheme, shape: tuple[int, int], x_dtype: torch.dtype, out_dtype: torch.dtype, bias: Tensor | None
) -> Problem:
    """The GEMM of a linear with a weight of ``shape`` ``(n, k)`` for any number of rows of ``x_dtype``."""
    scale_dtype = scale_dtype_of(scheme.weight.scale_dtype)
    if scheme.weight_only:
        scheme = replace(scheme, activation=OperandSpec(x_dtype))
    if scheme.weight.scale_dtype is not scale_dtype:
        scheme = replace(scheme, weight=replace(scheme.weight, scale_dtype=scale_dtype))
    bias_dtype = None if bias is None else bias.dtype
    return Problem(scheme, _ANY_ROWS, *shape, out_dtype, bias_dtype, constant_weight=True)


def check_scheme(scheme: Scheme) -> None:
    """Raise ``ValueError`` unless a linear can have ``scheme``."""
    activation, spec = scheme.activation, scheme.weight
    must(
        spec.dtype in CODE_DTYPES | INT4_DTYPES,
        lambda: f"the weight of a scheme must be quantized, got {scheme}; use nn.Linear for float weights",
    )
    must(
        spec.granularity.of_weight and spec.granularity.is_sized,
        lambda: f"a weight must be per_tensor, per_channel, per_group(g) or per_block(r, c), got {scheme}",
    )
    must(not spec.dynamic, lambda: f"a weight is quantized once, got a dynamic one in {scheme}; say dynamic=False")
    must(
        not (spec.offset or activation.offset),
        lambda: f"a linear has zero points and no offsets, got {scheme}; say asymmetric",
    )
    must(
        spec.symmetric or spec.dtype not in FLOAT8_DTYPES,
        lambda: f"an asymmetric weight must have an integer dtype, got {scheme}",
    )
    takes_zero_point = activation.dtype is torch.int8 and (spec.packed or spec.group is not None)
    must(
        scheme.weight_only or spec.symmetric or takes_zero_point,
        lambda: (
            f"beside a quantized activation the weight must be symmetric, got {scheme}; a zero point is for int4 or "
            "groups beside int8"
        ),
    )
    if scheme.weight_only:
        return
    check_activation(activation)
    whole_rows = activation.dtype is torch.int8 and activation.group is None
    must(
        activation.group == spec.group or whole_rows,
        lambda: (
            f"scales vary along k in groups of one size or not at all, got {scheme}"
            + ("" if spec.group is None else f"; the activation must be per_group({spec.group})")
        ),
    )


def check_operands(
    scheme: Scheme,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> None:
    """Raise ``ValueError`` unless the tensors are those of a linear of ``scheme``; see ``QuantizedLinear``.

    The values of scales are looked at, so that it wants real tensors; those on ``meta`` or traced are trusted.
    """
    check_scheme(scheme)
    spec = scheme.weight
    must(
        weight.dim() == 2 and weight.dtype == spec.storage and weight.shape[1] > 0,
        lambda: f"weight must be {dtype_name(spec.storage)} [n, k] with k > 0, got {describe(weight)}",
    )
    n, k = weight.shape[0], weight.shape[1] * spec.codes_per_element
    shape = spec.scale_shape(n, k)
    must(
        weight_scale.is_floating_point() and _is_shape(weight_scale, shape),
        lambda: f"weight_scale of {spec} must be float of shape {list(shape)}, got {describe(weight_scale)}",
    )
    must(
        spec.scale_dtype in (torch.float32, weight_scale.dtype),
        lambda: f"weight_scale of {spec} must be {dtype_name(spec.scale_dtype)}, got {describe(weight_scale)}",
    )
    _check_positive(weight_scale, "weight_scale")
    must(
        spec.symmetric == (weight_zero_point is None),
        lambda: f"weight of {spec} {'takes no' if spec.symmetric else 'needs a'} weight_zero_point",
    )
    must(
        weight_zero_point is None or (_is_integer(weight_zero_point) and _is_shape(weight_zero_point, shape)),
        lambda: f"weight_zero_point must be integers of shape {list(shape)}, got {describe(weight_zero_point)}",
    )
    check_bias(bias, n)
    _check_input(scheme, input_scale, input_zero_point)


def weight_scale_dtype(scale: Tensor, spec: OperandSpec) -> torch.dtype:
    """What scales of a weight of ``spec`` are kept in: 16 bits that are given stay, where scales vary along k.

    Kernels read those beside the codes, in groups of 32 a byte of scales for each 8 of int4 codes at 16 bits, and widen
    them exactly; scales of whole rows are few.
    """
    stays = spec.scale_dtype is torch.float32 and spec.group is not None and scale.dtype in HALF_DTYPES
    return scale.dtype if stays else spec.scale_dtype


def zero_point_dtype(zero_point: Tensor, spec: OperandSpec) -> torch.dtype:
    """What zero points of a weight of ``spec`` are kept in: int32, or int8 for 4-bit codes where that holds them.

    In groups of 32 a zero point is read for every 16 bytes of codes. Those that int32 does not hold are kept in int64,
    those on ``meta`` or traced in int32.
    """
    if not _has_values(zero_point) or zero_point.numel() == 0:
        return torch.int32
    low, high = int(zero_point.min()), int(zero_point.max())
    # Less 8, as packed uint4 is read, they must fit too.
    if spec.packed and low >= -120 and high <= 127:
        return torch.int8
    return torch.int32 if low >= 8 - 2**31 and high < 2**31 else torch.int64


def check_quantizer(scheme: Scheme, quantizer: object) -> None:
    """Raise ``ValueError`` unless ``quantizer`` is None, or a function where ``scheme`` quantizes activations."""
    must(
        quantizer is None or callable(quantizer),
        lambda: f"quantizer must be a function (x, input_scale, input_zero_point), got {type(quantizer).__name__}",
    )
    must(
        quantizer is None or not scheme.weight_only,
        lambda: f"a quantizer is for quantized activations, got one with {scheme}; leave it out",
    )


def check_bias(bias: Tensor | None, n: int) -> None:
    """Raise ``ValueError`` unless ``bias`` is that of a linear with ``n`` outputs, or None."""
    must(
        bias is None or (bias.dtype in FLOAT_DTYPES and bias.shape == (n,)),
        lambda: f"bias must be float32, bfloat16 or float16 of shape [{n}], got {describe(bias)}",
    )


def _check_input(scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None) -> None:
    static = not scheme.weight_only and not scheme.activation.dynamic
    shifted = static and not scheme.activation.symmetric
    for name, value, needed in (("input_scale", scale, static), ("input_zero_point", zero_point, shifted)):
        must(
            (value is not None) == needed and (value is None or value.numel() == 1),
            lambda name=name, value=value, needed=needed: (
                f"{scheme} {'needs' if needed else 'takes no'} {name}{' of one element' if needed else ''}, "
                f"got {describe(value)}"
            ),
        )
    must(
        zero_point is None or _is_integer(zero_point),
        lambda: f"input_zero_point must be an integer, got {describe(zero_point)}",
    )
    if zero_point is not None:
        wrong = wrong_input_zero_point(zero_point)
        must(wrong is None, lambda: str(wrong))
    if scale is not None:
        must(scale.is_floating_point(), lambda: f"input_scale must be float, got {describe(scale)}")
        _check_positive(scale, "input_scale")


def wrong_input_zero_point(zero_point: Tensor) -> str | None:
    """What is wrong with the value of a static activation's zero point; None where nothing is, or it is not known."""
    if not _has_values(zero_point) or -128 <= int(zero_point) <= 127:
        return None
    return (
        "input_zero_point must be one of int8 codes, -128 to 127, as sums of integers have room for no other, "
        f"got {int(zero_point)}"
    )


def _has_values(x: Tensor) -> bool:
    return x.device.type != "meta" and not torch.compiler.is_compiling()


def _check_positive(scale: Tensor, name: str) -> None:
    if not _has_values(scale):
        return
    # float8 scales have no isfinite.
    scale = scale.float()
    wrong = ~(scale.isfinite() & (scale > 0))
    must(
        not wrong.any(),
        lambda: (
            f"{name} must be finite and positive, got {scale.flatten()[wrong.flatten()][0].item()} "
            f"({int(wrong.sum())} of {scale.numel()} elements are not)"
        ),
    )


def describe(x: Tensor | None) -> str:
    """``int8 [4, 8]``, or ``none``."""
    return "none" if x is None else f"{dtype_name(x.dtype)} {list(x.shape)}"


def _is_integer(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex() and x.dtype is not torch.bool


def _is_shape(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``x`` has ``shape``, or one that differs in dims of one only."""
    return [size for size in x.shape if size != 1] == [size for size in shape if size != 1]
