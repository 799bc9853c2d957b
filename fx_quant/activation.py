"""Quantizing activations for the eager layers, by the formulas that their schemes stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.ops import quantize_dynamic  # noqa: F401  (registers the ops)
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, Granularity, OperandSpec, dtype_name

# Least scale of a dynamic float8 quantization is 1 / (max * 512), as in vLLM: an all-zero row has finite codes.
_FLOAT8_FLOOR_DIVISOR = 512.0
_INT8_STEPS = 255

Quantized = tuple[Tensor, Tensor, Tensor | None]


def float8_max(dtype: torch.dtype) -> float:
    """Largest code that quantization gives: the dtype's largest value, but 224 for e4m3fnuz, as in vLLM."""
    return 224.0 if dtype is torch.float8_e4m3fnuz else torch.finfo(dtype).max


def quantize_activation(
    x: Tensor,
    spec: OperandSpec,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    scale_ub: Tensor | None = None,
) -> Quantized:
    """``(codes, scale, zero_point)`` of ``x [m, k]``.

    float8: ``codes = cast(clamp(x * (1 / scale), -max, max))``; a dynamic scale is
    ``max(amax / max, 1 / (512 max))`` over a row, a group of a row or everything. int8 symmetric:
    ``round(x / scale)`` with ``scale = amax / 127``. int8 asymmetric: ``round(x / scale) + zero_point`` with
    ``scale = (high - low) / 255`` and ``zero_point = round(-128 - low / scale)`` over a range that always holds 0, so
    that a constant row has a finite scale and a zero point stays within int8.

    Args:
        x: ``[m, k]``, float32, bfloat16 or float16.
        spec: what to quantize to; per_tensor, per_token or per_group.
        scale: the given scale of a static spec: one element, float32, finite and positive.
        zero_point: the given int32 zero point of a static asymmetric spec, one element.
        scale_ub: one element: bound of ``amax``, per-token dynamic float8 only. Larger values saturate.

    Returns:
        codes ``[m, k]``; scale ``[]`` or ``[m, 1]`` or ``[m, ceil(k / g)]``, float32; zero point int32 of the scale's
        shape, or None.

    Raises:
        ValueError: ``x`` or a given scale is not what the spec needs.
    """
    _check(x, spec, scale, zero_point, scale_ub)
    if not spec.dynamic:
        assert scale is not None
        return _static(x, spec, scale.reshape(()).float(), None if zero_point is None else zero_point.reshape(()))
    if not spec.symmetric:
        return _dynamic_asymmetric(x, spec)
    if spec.granularity.kind == "per_group":
        return _grouped(x, spec)
    if scale_ub is not None:
        largest = float8_max(spec.dtype)
        amax = x.float().abs().amax(-1, keepdim=True).minimum(scale_ub.reshape(()).float())
        bounded = (amax / largest).clamp(min=1 / (largest * _FLOAT8_FLOOR_DIVISOR))
        return _float8_codes(x, spec.dtype, bounded), bounded, None
    codes, found = torch.ops.fx_quant.quantize.dynamic(x, **_formula(spec))
    return codes, found, None


def _formula(spec: OperandSpec) -> dict:
    per_token = spec.granularity == Granularity.PER_TOKEN
    common = {
        "dtype": spec.dtype,
        "granularity": "per_token" if per_token else "per_tensor",
        "divide_dtype": torch.float32,
        "scale_dtype": torch.float32,
    }
    if spec.dtype in FLOAT8_DTYPES:
        largest = float8_max(spec.dtype)
        floor = 1 / (largest * _FLOAT8_FLOOR_DIVISOR)
        limits = {"divisor": largest, "floor": floor, "reciprocal": True, "lo": -largest, "hi": largest}
    else:
        # The least normal float32, so that an all-zero row divides by something.
        floor = torch.finfo(torch.float32).tiny
        limits = {"divisor": 127.0, "floor": floor, "reciprocal": False, "lo": -127.0, "hi": 127.0}
    return {**common, **limits, "floor_on": "scale"}


def _float8_codes(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    largest = float8_max(dtype)
    return torch.ops.fx_quant.quantize(x, scale, dtype=dtype, reciprocal=True, lo=-largest, hi=largest)


def _static(x: Tensor, spec: OperandSpec, scale: Tensor, zero_point: Tensor | None) -> Quantized:
    if spec.dtype in FLOAT8_DTYPES:
        return _float8_codes(x, spec.dtype, scale), scale, None
    if zero_point is None:
        codes = torch.ops.fx_quant.quantize(x, scale, dtype=spec.dtype, reciprocal=False, lo=-128.0, hi=127.0)
        return codes, scale, None
    return _shifted(x, scale, zero_point), scale, zero_point.to(torch.int32)


def _shifted(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return ((x.float() / scale).round() + zero_point).clamp(-128, 127).to(torch.int8)


def _dynamic_asymmetric(x: Tensor, spec: OperandSpec) -> Quantized:
    wide = x.float()
    if spec.granularity == Granularity.PER_TOKEN:
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    else:
        low, high = wide.amin(), wide.amax()
    low, high = low.clamp(max=0), high.clamp(min=0)
    # Divided before subtracted, so that the range itself cannot overflow.
    scale = high / _INT8_STEPS - low / _INT8_STEPS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = (-128 - low / scale).round().clamp(-128, 127).to(torch.int32)
    return _shifted(x, scale, zero_point), scale, zero_point


def _grouped(x: Tensor, spec: OperandSpec) -> Quantized:
    (size,) = spec.granularity.size
    largest = float8_max(spec.dtype)
    k = x.shape[1]
    groups = -(-k // size)
    padded = torch.nn.functional.pad(x.float(), (0, groups * size - k)).unflatten(-1, (groups, size))
    scale = (padded.abs().amax(-1) / largest).clamp(min=1 / (largest * _FLOAT8_FLOOR_DIVISOR))
    codes = (padded * scale.reciprocal().unsqueeze(-1)).clamp(-largest, largest).flatten(1)
    return codes[:, :k].to(spec.dtype).contiguous(), scale, None


def _check(
    x: Tensor, spec: OperandSpec, scale: Tensor | None, zero_point: Tensor | None, scale_ub: Tensor | None
) -> None:
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x must be [m, k] of float32, bfloat16 or float16, got {dtype_name(x.dtype)} {list(x.shape)}; "
            "reshape or cast it first"
        )
    if not spec.dynamic and (scale is None or scale.numel() != 1):
        found = "none" if scale is None else f"shape {list(scale.shape)}"
        raise ValueError(f"static quantization to {spec} needs an input scale of one element, got {found}")
    if spec.dynamic and scale is not None:
        raise ValueError(f"dynamic quantization to {spec} computes its scale, got one of shape {list(scale.shape)}")
    if not spec.dynamic and spec.symmetric != (zero_point is None):
        raise ValueError(f"{spec} {'takes no' if spec.symmetric else 'needs a'} zero point beside its scale")
    if scale_ub is not None and not (
        spec.dynamic and spec.granularity == Granularity.PER_TOKEN and spec.dtype in FLOAT8_DTYPES
    ):
        raise ValueError(f"scale_ub bounds dynamic per-token float8 scales, got it with {spec}")
