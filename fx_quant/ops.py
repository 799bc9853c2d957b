"""The canonical ops: schema, plain-PyTorch body (reference and test oracle) and fake function in one place.

A canonical op states mathematics and names no provider. Bodies are registered as CompositeExplicitAutograd: the op
stays opaque to AOTAutograd, runs eagerly on every device, and Inductor may still lower it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.scheme import FLOAT8_DTYPES, INT8_DTYPES, dtype_name

LIBRARY = torch.library.Library("fx_quant", "DEF")

# Quantize lowers to pointwise/reduction IR: a stride constraint would realize its producer and stop fusion.
QUANTIZE_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
MATMUL_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

GRANULARITIES = ("per_token", "per_tensor")
FLOORS = ("none", "amax", "scale")
OUT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.int32})


def register(schema: str, body, fake, tags) -> None:
    """Define ``fx_quant::<schema>`` with a body that runs on every device and a fake function."""
    LIBRARY.define(schema, tags=tags)
    name = schema.split("(", maxsplit=1)[0]
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fx_quant::{name}", fake, lib=LIBRARY)


# --- quantize -------------------------------------------------------------------------------------------------


def _check_quantize(x: Tensor, dtype: torch.dtype) -> None:
    torch._check(
        x.dtype.is_floating_point and x.dtype not in FLOAT8_DTYPES,
        lambda: f"quantize: x must be a float tensor (float32, bfloat16, float16), got {dtype_name(x.dtype)}",
    )
    torch._check(
        dtype in FLOAT8_DTYPES or dtype in INT8_DTYPES,
        lambda: f"quantize: dtype must be int8, uint8 or a float8, got {dtype_name(dtype)}",
    )


def _check_scale(x: Tensor, scale: Tensor) -> None:
    # A size of 1 is asked of Python integers only: no guard on a symbolic one.
    fits = scale.dim() <= x.dim() and all(
        (isinstance(s, int) and s == 1) or s == size
        for s, size in zip(reversed(scale.shape), reversed(x.shape), strict=False)
    )
    torch._check(fits, lambda: f"quantize: scale must broadcast to x of shape {list(x.shape)}, got {list(scale.shape)}")


def _codes(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
) -> Tensor:
    y = x.float() * scale.reciprocal() if reciprocal else x.float() / scale
    if not dtype.is_floating_point:
        y = y.round()
    return y.clamp(lo, hi).to(dtype).contiguous()


def quantize(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
) -> Tensor:
    """Codes of ``x`` under a given scale.

    ``codes = cast(clamp(round(x / scale), lo, hi))`` in float32; ``x * (1 / scale)`` with ``reciprocal`` (a different
    rounding); float8 codes are not rounded before the cast.

    Args:
        x: ``[..., k]``, float.
        scale: broadcastable to ``x``, float32. Zero gives NaN or infinity before the clamp, as the formula says.
        dtype: int8, uint8 or float8.
        lo, hi: the range of the codes, inclusive.
    """
    _check_quantize(x, dtype)
    _check_scale(x, scale)
    return _codes(x, scale, dtype, reciprocal, lo, hi)


def _quantize_fake(x, scale, dtype, reciprocal, lo, hi):
    _check_quantize(x, dtype)
    _check_scale(x, scale)
    return x.new_empty(x.shape, dtype=dtype)


register(
    "quantize(Tensor x, Tensor scale, *, ScalarType dtype, bool reciprocal, float lo, float hi) -> Tensor",
    lambda x, scale, *, dtype, reciprocal, lo, hi: quantize(x, scale, dtype, reciprocal, lo, hi),
    lambda x, scale, *, dtype, reciprocal, lo, hi: _quantize_fake(x, scale, dtype, reciprocal, lo, hi),
    QUANTIZE_TAGS,
)

_DYNAMIC_ARGS = (
    "*, ScalarType dtype, str granularity, float divisor, ScalarType divide_dtype, float floor, str floor_on, "
    "ScalarType scale_dtype, bool reciprocal, float lo, float hi"
)


def choose_scale(
    x: Tensor,
    *,
    granularity: str,
    divisor: float,
    divide_dtype: torch.dtype,
    floor: float,
    floor_on: str,
    scale_dtype: torch.dtype,
) -> Tensor:
    """Scale of a dynamic symmetric quantization, float32.

    ``scale = round_to(scale_dtype, max(round_to(divide_dtype, amax / divisor), floor))`` with ``amax = max |x|`` over
    the last dim (``per_token``, ``[..., 1]``) or over everything (``per_tensor``, ``[]``). ``floor_on`` says what the
    floor bounds: ``amax`` before the division, ``scale`` after it, or ``none``. NaN propagates.
    """
    magnitude = x.abs()
    if granularity == "per_token":
        amax = magnitude.amax(-1, keepdim=True)
    else:
        amax = magnitude.amax()
    amax = amax.float()
    if floor_on == "amax":
        amax = amax.clamp(min=floor)
    scale = (amax / divisor).to(divide_dtype).float()
    if floor_on == "scale":
        scale = scale.clamp(min=floor)
    return scale.to(scale_dtype).float()


def _check_dynamic(x: Tensor, dtype: torch.dtype, granularity: str, floor_on: str) -> None:
    _check_quantize(x, dtype)
    torch._check(
        granularity in GRANULARITIES,
        lambda: f"quantize: granularity must be one of {GRANULARITIES}, got {granularity!r}",
    )
    torch._check(
        floor_on in FLOORS,
        lambda: f"quantize: floor_on must be one of {FLOORS}, got {floor_on!r}",
    )


def quantize_dynamic(
    x: Tensor,
    *,
    dtype: torch.dtype,
    granularity: str,
    divisor: float,
    divide_dtype: torch.dtype,
    floor: float,
    floor_on: str,
    scale_dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
) -> tuple[Tensor, Tensor]:
    """``(codes, scale)`` of ``x``, the scale chosen from ``x`` itself: ``choose_scale`` then ``quantize``.

    An all-zero row with ``floor_on="none"`` has scale 0 and codes of ``0 / 0``, as its source formula has. Where the
    scale is 0, NaN or infinite, integer codes are unspecified: no product with that scale depends on them.
    """
    _check_dynamic(x, dtype, granularity, floor_on)
    scale = choose_scale(
        x,
        granularity=granularity,
        divisor=divisor,
        divide_dtype=divide_dtype,
        floor=floor,
        floor_on=floor_on,
        scale_dtype=scale_dtype,
    )
    return _codes(x, scale, dtype, reciprocal, lo, hi), scale.contiguous()


def _quantize_dynamic_fake(x, *, dtype, granularity, floor_on, **_):
    _check_dynamic(x, dtype, granularity, floor_on)
    shape = (*x.shape[:-1], 1) if granularity == "per_token" else ()
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(shape, dtype=torch.float32)


register(
    f"quantize.dynamic(Tensor x, {_DYNAMIC_ARGS}) -> (Tensor codes, Tensor scale)",
    quantize_dynamic,
    _quantize_dynamic_fake,
    QUANTIZE_TAGS,
)


# --- scaled_mm ------------------------------------------------------------------------------------------------


def accumulate(a: Tensor, b: Tensor) -> Tensor:
    """``sum_k a[m, k] * b[k, n]`` of codes: int32 (modulo 2**32) for integer codes, float32 for float8."""
    if a.dtype in FLOAT8_DTYPES:
        return a.float() @ b.float()
    # Exact for every k below 2**38 on every device, and BLAS-fast, which integer matmul is not.
    return (a.double() @ b.double()).to(torch.int64).to(torch.int32)


def dequantize(
    acc: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``cast(float32(acc) * a_scale * b_scale + bias)``, each step in float32 and in this order."""
    if out_dtype is torch.int32:
        return acc
    y = acc.float()
    if a_scale is not None:
        y = y * a_scale
    if b_scale is not None:
        y = y * b_scale
    if bias is not None:
        y = y + bias
    return y.to(out_dtype)


def _one_element(scale: Tensor) -> bool:
    """Whether ``scale`` is known to have one element, without a guard on a symbolic size."""
    numel = scale.numel()
    if isinstance(numel, int):
        return numel == 1 and scale.dim() <= 2
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return scale.dim() <= 2 and statically_known_true(numel == 1)


def check_scaled_mm(a_rows, a_dtype, n, a_scale, b_scale, bias, out_dtype, op: str) -> None:
    """Raise unless scales, bias and out_dtype fit ``out[m, n]``; shapes may be symbolic."""
    torch._check(
        out_dtype in OUT_DTYPES,
        lambda: f"{op}: out_dtype must be float32, bfloat16, float16 or int32, got {dtype_name(out_dtype)}",
    )
    torch._check(
        a_scale is None
        or _one_element(a_scale)
        or (a_scale.dim() == 2 and a_scale.shape[1] == 1 and a_scale.shape[0] == a_rows),
        lambda: f"{op}: a_scale must have one element or shape [m, 1] = [{a_rows}, 1], got {list(a_scale.shape)}",
    )
    torch._check(
        b_scale is None
        or _one_element(b_scale)
        or (b_scale.dim() == 1 and b_scale.shape[0] == n)
        or (b_scale.dim() == 2 and b_scale.shape[0] == 1 and b_scale.shape[1] == n),
        lambda: f"{op}: b_scale must have one element or shape [n] = [{n}], got {list(b_scale.shape)}",
    )
    torch._check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == n),
        lambda: f"{op}: bias must have shape [n] = [{n}], got {list(bias.shape)}",
    )
    if out_dtype is torch.int32:
        torch._check(
            a_scale is None and b_scale is None and bias is None and a_dtype in INT8_DTYPES,
            lambda: f"{op}: out_dtype int32 is the raw accumulator of integer codes; it takes no scale and no bias",
        )


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Matrix product of two quantized operands.

    ``out[m, n] = cast(float32(sum_k a[m, k] * b[k, n]) * a_scale * b_scale + bias[n])``; the sum is int32 for integer
    codes and float32 for float8, the rest float32 in this order.

    Args:
        a: ``[m, k]``, int8 or float8.
        b: ``[k, n]``, same family as ``a``; usually a transposed ``[n, k]`` weight.
        a_scale: one element or ``[m, 1]``, float32; None is 1.
        b_scale: one element, ``[n]`` or ``[1, n]``, float32; None is 1.
        bias: ``[n]``, any float dtype, added in float32.
        out_dtype: dtype of the result; ``torch.int32`` returns the raw accumulator of integer codes.

    A zero scale gives zeros. ``m == 0`` returns an empty tensor.
    """
    _check_operands(a, b)
    check_scaled_mm(a.shape[0], a.dtype, b.shape[1], a_scale, b_scale, bias, out_dtype, "scaled_mm")
    return dequantize(accumulate(a, b), a_scale, b_scale, bias, out_dtype).contiguous()


def _check_operands(a, b) -> None:
    torch._check(
        a.dim() == 2 and b.dim() == 2 and a.shape[1] == b.shape[0],
        lambda: f"scaled_mm: a and b must be [m, k] and [k, n], got {list(a.shape)} and {list(b.shape)}",
    )
    both_float8 = a.dtype in FLOAT8_DTYPES and b.dtype in FLOAT8_DTYPES
    both_int8 = a.dtype in INT8_DTYPES and b.dtype in INT8_DTYPES
    torch._check(
        both_float8 or both_int8,
        lambda: (
            f"scaled_mm: a and b must both be int8 or both float8, got {dtype_name(a.dtype)} and {dtype_name(b.dtype)}"
        ),
    )


def _scaled_mm_fake(a, b, a_scale, b_scale, bias, out_dtype):
    _check_operands(a, b)
    check_scaled_mm(a.shape[0], a.dtype, b.shape[1], a_scale, b_scale, bias, out_dtype, "scaled_mm")
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


register(
    "scaled_mm(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
    scaled_mm,
    _scaled_mm_fake,
    MATMUL_TAGS,
)


# --- quantized_linear -----------------------------------------------------------------------------------------


def quantized_linear(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    **quantize_args,
) -> Tensor:
    """Dynamic quantization of ``x`` and the scaled matrix product, in one.

    ``scaled_mm(*quantize(x), b, b_scale, bias)`` over the last dim of ``x``: ``[..., k] -> [..., n]``.
    The keyword arguments are those of ``quantize_dynamic``.
    """
    _check_linear(x, b)
    rows = x.reshape(-1, x.shape[-1])
    codes, scale = quantize_dynamic(rows, **quantize_args)
    out = scaled_mm(codes, b, scale, b_scale, bias, out_dtype)
    return out.reshape(*x.shape[:-1], b.shape[1])


def _check_linear(x: Tensor, b: Tensor) -> None:
    torch._check(
        x.shape[-1] == b.shape[0],
        lambda: f"quantized_linear: x must end in k = {b.shape[0]}, got {list(x.shape)}",
    )


def _quantized_linear_fake(x, b, b_scale, bias, out_dtype, **quantize_args):
    _check_linear(x, b)
    _quantize_dynamic_fake(x, **quantize_args)
    return x.new_empty((*x.shape[:-1], b.shape[1]), dtype=out_dtype)


register(
    "quantized_linear(Tensor x, Tensor b, Tensor b_scale, Tensor? bias, ScalarType out_dtype, "
    f"{_DYNAMIC_ARGS}) -> Tensor",
    quantized_linear,
    _quantized_linear_fake,
    MATMUL_TAGS,
)
