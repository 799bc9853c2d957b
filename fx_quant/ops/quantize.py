"""``quantize``: codes under a given scale, or under one chosen from the tensor itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.ops.library import QUANTIZE_TAGS, register
from fx_quant.scheme import FLOAT8_DTYPES, INT8_DTYPES, dtype_name

FLOORS = ("none", "amax", "scale")
GRANULARITIES = ("per_token", "per_tensor")


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


def check_quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Raise unless ``quantize`` takes these."""
    _check_quantize(x, dtype)
    _check_scale(x, scale)


def _codes(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
    pad: int,
) -> Tensor:
    y = x.float() * scale.reciprocal() if reciprocal else x.float() / scale
    if not dtype.is_floating_point:
        y = y.round()
    y = y.clamp(lo, hi)
    if not pad:
        return y.to(dtype).contiguous()
    codes = y.new_zeros(_padded(y, pad), dtype=dtype)
    codes[..., : y.shape[-1]] = y
    return codes


def _padded(x: Tensor, pad: int) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] + pad)


def quantize(
    x: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
    pad: int = 0,
) -> Tensor:
    """Codes of ``x`` under a given scale, ``[..., k + pad]``.

    ``codes = cast(clamp(round(x / scale), lo, hi))`` in float32; ``x * (1 / scale)`` with ``reciprocal`` (a different
    rounding); float8 codes are not rounded before the cast.

    Args:
        x: ``[..., k]``, float.
        scale: broadcastable to ``x``, float32. Zero gives NaN or infinity before the clamp, as the formula says.
        dtype: int8, uint8 or float8.
        lo, hi: the range of the codes, inclusive.
        pad: how many codes of 0 stand behind those of each row, for a kernel that wants k in multiples.
    """
    check_quantize(x, scale, dtype)
    return _codes(x, scale, dtype, reciprocal, lo, hi, pad)


def _quantize_fake(x, scale, *, dtype, pad=0, **_):
    check_quantize(x, scale, dtype)
    return x.new_empty(_padded(x, pad), dtype=dtype)


register(
    "quantize(Tensor x, Tensor scale, *, ScalarType dtype, bool reciprocal, float lo, float hi, int pad=0) -> Tensor",
    quantize,
    _quantize_fake,
    QUANTIZE_TAGS,
)

DYNAMIC_ARGS = (
    "*, ScalarType dtype, str granularity, float divisor, ScalarType divide_dtype, float floor, str floor_on, "
    "ScalarType scale_dtype, bool reciprocal, float lo, float hi, int pad=0"
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


def check_quantize_dynamic(x: Tensor, dtype: torch.dtype, granularity: str, floor_on: str) -> None:
    """Raise unless ``quantize_dynamic`` takes these."""
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
    pad: int = 0,
) -> tuple[Tensor, Tensor]:
    """``(codes, scale)`` of ``x``, the scale chosen from ``x`` itself: ``choose_scale`` then ``quantize``.

    An all-zero row with ``floor_on="none"`` has scale 0 and codes of ``0 / 0``, as its source formula has. Where the
    scale is 0, NaN or infinite, integer codes are unspecified: no product with that scale depends on them.
    """
    check_quantize_dynamic(x, dtype, granularity, floor_on)
    scale = choose_scale(
        x,
        granularity=granularity,
        divisor=divisor,
        divide_dtype=divide_dtype,
        floor=floor,
        floor_on=floor_on,
        scale_dtype=scale_dtype,
    )
    return _codes(x, scale, dtype, reciprocal, lo, hi, pad), scale.contiguous()


def quantize_dynamic_fake(x, *, dtype, granularity, floor_on, pad=0, **_):
    """The shapes and dtypes of ``quantize_dynamic``."""
    check_quantize_dynamic(x, dtype, granularity, floor_on)
    shape = (*x.shape[:-1], 1) if granularity == "per_token" else ()
    return x.new_empty(_padded(x, pad), dtype=dtype), x.new_empty(shape, dtype=torch.float32)


register(
    f"quantize.dynamic(Tensor x, {DYNAMIC_ARGS}) -> (Tensor codes, Tensor scale)",
    quantize_dynamic,
    quantize_dynamic_fake,
    QUANTIZE_TAGS,
)
