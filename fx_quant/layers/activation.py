"""Quantizing activations for the eager layers, by the formulas that their schemes stand for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.ops import quantize_dynamic  # noqa: F401  (registers the ops)
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, Granularity, OperandSpec, dtype_name, float8_max

# Least scale of a dynamic float8 quantization is 1 / (max * 512), as in vLLM: an all-zero row has finite codes.
_FLOAT8_FLOOR_DIVISOR = 512.0
_INT8_STEPS = 255
# The least normal float32: below it a scale loses precision, and zero does not divide.
_TINY = torch.finfo(torch.float32).tiny

Quantized = tuple[Tensor, Tensor, Tensor | None]
# (x, input_scale, input_zero_point) -> (codes, scale, zero_point); see quantize_by.
Quantizer = Callable[[Tensor, Tensor | None, Tensor | None], Quantized]


def quantize_activation(
    x: Tensor,
    spec: OperandSpec,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    scale_ub: Tensor | None = None,
    pad: int = 0,
) -> Quantized:
    """``(codes, scale, zero_point)`` of ``x [m, k]``.

    Computed in float32; rounding is to the nearest, ties to even::

        float8            codes = cast(clamp(x * (1 / scale), -max, max))     scale = max(amax / max, 1 / (512 max))
        int8 symmetric    codes = clamp(round(x / scale))                     scale = max(amax / 127, 2**-126)
        int8 asymmetric   codes = clamp(round(x / scale) + zero_point)        scale = max((high - low) / 255, 2**-126)
                          zero_point = round(-128 - low / scale)

    ``amax = max |x|``, ``low = min(0, min x)`` and ``high = max(0, max x)`` are taken over a row, a group of a row or
    everything; a static spec has its scale (and zero point) given. As the asymmetric range always holds 0, 0 has an
    exact code, a constant row a finite scale, and the zero point is an int8; a row of zeros has scale 1.

    Values beyond the range saturate. NaN stays NaN in float8. int8 has no NaN: with a dynamic scale the scale of its
    row (group, tensor) is NaN instead, so that no product hides it; under a static scale its code is unspecified. An
    infinity saturates under a static scale; a dynamic one it makes infinite, and the row's products infinite or NaN.

    Args:
        x: ``[m, k]``, float32, bfloat16 or float16; k > 0.
        spec: int8, or symmetric float8; per_tensor, or if dynamic also per_token and, for float8, per_group.
        scale: the given scale of a static spec: one float element, finite and positive, which is not checked.
        zero_point: the given zero point of a static asymmetric spec, one integer.
        scale_ub: one float element: bound of ``amax``, per-token dynamic float8 only. Larger values saturate.
        pad: how many codes of 0 to put behind those of each row.

    Returns:
        codes ``[m, k + pad]``; scale ``[]`` or ``[m, 1]`` or ``[m, ceil(k / g)]``, float32; zero point int32 of the
        scale's shape, or None. No rows have the scale of zeros, where it is one for all.

    Raises:
        ValueError: a spec that no activation can have; ``x`` or a given tensor that is not what the spec needs.
    """
    check_activation(spec)
    _check_given(x, spec, scale, zero_point, scale_ub)
    if not spec.dynamic:
        assert scale is not None
        point = None if zero_point is None else zero_point.reshape(())
        return _static(x, spec, scale.reshape(()).float(), point, pad)
    if spec.granularity == Granularity.PER_TENSOR and _no_rows(x):
        codes, dynamic_scale, dynamic_zero_point = _dynamic(F.pad(x, (0, 0, 0, 1)), spec, None, pad)
        return codes[:0], dynamic_scale, dynamic_zero_point
    return _dynamic(x, spec, scale_ub, pad)


def quantize_by(
    quantizer: Quantizer, x: Tensor, spec: OperandSpec, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Quantized:
    """``quantize_activation`` of the rows of ``x [..., k]``, by the formula of ``quantizer``.

    ``quantizer(x, scale, zero_point)`` sees ``x`` with all its dims, and the given scale and zero point of a static
    spec, or None. It returns::

        codes         x's shape, in the dtype of ``spec``
        scale         float: one element per_tensor, [..., 1] per_token (one element is that of every token),
                      [..., ceil(k / g)] per_group(g); every dim may be 1 where it could be larger
        zero_point    integers like scale, from -128 to 127, if ``spec`` is asymmetric; else None

    Its float scale is widened to float32. Written in plain PyTorch it is traced as it is; a function of a module, or a
    ``functools.partial`` of one, survives pickling too. It is not asked about an ``x`` without rows.

    Returns:
        codes ``[m, k]``; scale ``[]``, ``[m, 1]`` or ``[m, ceil(k / g)]``, float32; zero point int32 like the scale.

    Raises:
        ValueError: the quantizer returned something else.
    """
    rows = x.reshape(-1, x.shape[-1])
    if _no_rows(rows):
        return quantize_activation(rows, spec, scale, zero_point)
    codes, row_scale, row_zero_point = _checked(quantizer(x, scale, zero_point), x, spec)
    return (
        codes.reshape(rows.shape).contiguous(),
        _by_row(row_scale.float(), x, spec),
        None if row_zero_point is None else _by_row(row_zero_point.to(torch.int32), x, spec),
    )


def _by_row(scale: Tensor, x: Tensor, spec: OperandSpec) -> Tensor:
    """``scale``, which broadcasts over the leading dims of ``x``, with a row for each of ``x``'s."""
    if spec.granularity == Granularity.PER_TENSOR:
        return scale.reshape(())
    columns = spec.scales_along(x.shape[-1])
    return scale.expand(*x.shape[:-1], columns).reshape(-1, columns).contiguous()


def _no_rows(x: Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(x.shape[0] == 0)


def _dynamic(x: Tensor, spec: OperandSpec, scale_ub: Tensor | None, pad: int) -> Quantized:
    if not spec.symmetric:
        return _dynamic_asymmetric(x, spec, pad)
    if scale_ub is not None:
        return _bounded(x, spec, scale_ub, pad)
    if spec.group is not None:
        return _grouped(x, spec, spec.group, pad)
    codes, scale = torch.ops.fx_quant.quantize.dynamic(x, **_formula(spec), pad=pad)
    return codes, scale, None


def _formula(spec: OperandSpec) -> dict:
    per_tensor = spec.granularity == Granularity.PER_TENSOR
    common = {
        "dtype": spec.dtype,
        "granularity": "per_tensor" if per_tensor else "per_token",
        "divide_dtype": torch.float32,
        "scale_dtype": torch.float32,
    }
    if spec.dtype in FLOAT8_DTYPES:
        largest = float8_max(spec.dtype)
        limits = {
            "divisor": largest,
            "floor": _float8_floor(largest),
            "reciprocal": True,
            "lo": -largest,
            "hi": largest,
        }
    else:
        limits = {"divisor": 127.0, "floor": _TINY, "reciprocal": False, "lo": -127.0, "hi": 127.0}
    return {**common, **limits, "floor_on": "scale"}


def _float8_floor(largest: float) -> float:
    return 1 / (largest * _FLOAT8_FLOOR_DIVISOR)


def _float8_codes(x: Tensor, dtype: torch.dtype, scale: Tensor, pad: int) -> Tensor:
    largest = float8_max(dtype)
    return torch.ops.fx_quant.quantize(x, scale, dtype=dtype, reciprocal=True, lo=-largest, hi=largest, pad=pad)


def _static(x: Tensor, spec: OperandSpec, scale: Tensor, zero_point: Tensor | None, pad: int) -> Quantized:
    if spec.dtype in FLOAT8_DTYPES:
        return _float8_codes(x, spec.dtype, scale, pad), scale, None
    if zero_point is None:
        codes = torch.ops.fx_quant.quantize(x, scale, dtype=spec.dtype, reciprocal=False, lo=-128.0, hi=127.0, pad=pad)
        return codes, scale, None
    return _shifted(x, scale, zero_point, pad), scale, zero_point.to(torch.int32)


def _shifted(x: Tensor, scale: Tensor, zero_point: Tensor, pad: int) -> Tensor:
    codes = ((x.float() / scale).round() + zero_point).clamp(-128, 127).to(torch.int8)
    return F.pad(codes, (0, pad)) if pad else codes


def _dynamic_asymmetric(x: Tensor, spec: OperandSpec, pad: int) -> Quantized:
    wide = x.float()
    if spec.granularity == Granularity.PER_TOKEN:
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    else:
        low, high = wide.amin(), wide.amax()
    low, high = low.clamp(max=0), high.clamp(min=0)
    # Divided before subtracted, so that the range itself cannot overflow.
    scale = (high / _INT8_STEPS - low / _INT8_STEPS).clamp(min=_TINY)
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    zero_point = (-128 - low / scale).round().clamp(-128, 127).to(torch.int32)
    return _shifted(x, scale, zero_point, pad), scale, zero_point


def _bounded(x: Tensor, spec: OperandSpec, scale_ub: Tensor, pad: int) -> Quantized:
    largest = float8_max(spec.dtype)
    amax = x.float().abs().amax(-1, keepdim=True).minimum(scale_ub.reshape(()).float())
    scale = (amax / largest).clamp(min=_float8_floor(largest))
    return _float8_codes(x, spec.dtype, scale, pad), scale, None


def _grouped(x: Tensor, spec: OperandSpec, size: int, pad: int) -> Quantized:
    k = x.shape[1]
    groups = spec.scales_along(k)
    # A group is a row of its own; zeros beyond k change no amax.
    rows = F.pad(x, (0, groups * size - k)).unflatten(-1, (groups, size))
    codes, scale = torch.ops.fx_quant.quantize.dynamic(rows, **_formula(spec))
    codes = codes.flatten(1)[:, :k]
    return F.pad(codes, (0, pad)) if pad else codes.contiguous(), scale.squeeze(-1), None


# --- what must hold -----------------------------------------------------------------------------------------------


def check_activation(spec: OperandSpec) -> None:
    """Raise ``ValueError`` unless ``quantize_activation`` can quantize to ``spec``."""
    granularity = spec.granularity
    if spec.dtype not in FLOAT8_DTYPES and spec.dtype is not torch.int8:
        raise ValueError(f"an activation must be quantized to int8 or float8, got {spec}")
    if not spec.symmetric and spec.dtype is not torch.int8:
        raise ValueError(f"an asymmetric activation must be int8, got {spec}; say symmetric=True")
    if not spec.dynamic and granularity != Granularity.PER_TENSOR:
        raise ValueError(f"a static activation must be per_tensor, got {spec}; say dynamic=True")
    if not granularity.of_activation:
        raise ValueError(f"an activation must be per_tensor, per_token or per_group(g), got {spec}")
    if spec.scale_dtype is not torch.float32:
        raise ValueError(f"an activation must have float32 scales, got {spec}")
    if spec.group is not None and (spec.dtype not in FLOAT8_DTYPES or not granularity.is_sized):
        raise ValueError(f"an activation in groups must be float8 per_group(g) with g > 0, got {spec}")


def _check_given(
    x: Tensor, spec: OperandSpec, scale: Tensor | None, zero_point: Tensor | None, scale_ub: Tensor | None
) -> None:
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES or x.shape[1] == 0:
        raise ValueError(
            f"x must be [m, k] of float32, bfloat16 or float16 with k > 0, got {_describe(x)}; reshape or cast it first"
        )
    if spec.dynamic and scale is not None:
        raise ValueError(f"dynamic quantization to {spec} computes its scale, got one of shape {list(scale.shape)}")
    if not spec.dynamic and (scale is None or scale.numel() != 1 or not scale.is_floating_point()):
        raise ValueError(f"static quantization to {spec} needs an input scale of one float, got {_describe(scale)}")
    if (spec.dynamic or spec.symmetric) and zero_point is not None:
        raise ValueError(f"{'dynamic' if spec.dynamic else 'static'} {spec} takes no zero point, got one")
    if not spec.dynamic and not spec.symmetric and not _is_one_integer(zero_point):
        raise ValueError(f"static {spec} needs a zero point of one integer, got {_describe(zero_point)}")
    if scale_ub is None:
        return
    if not spec.dynamic or spec.granularity != Granularity.PER_TOKEN or spec.dtype not in FLOAT8_DTYPES:
        raise ValueError(
            "scale_ub bounds dynamic per_token float8 scales, got it with "
            f"{'dynamic' if spec.dynamic else 'static'} {spec}"
        )
    if scale_ub.numel() != 1 or not scale_ub.is_floating_point():
        raise ValueError(f"scale_ub must be one float, got {_describe(scale_ub)}")


def _checked(result: object, x: Tensor, spec: OperandSpec) -> Quantized:
    """``result`` of a quantizer, or ``ValueError`` with what is wrong with it."""
    if not isinstance(result, tuple) or len(result) != 3 or not all(isinstance(part, Tensor) for part in result[:2]):
        raise ValueError(f"a quantizer must return (codes, scale, zero_point), got {type(result).__name__}")
    codes, scale, zero_point = result
    if codes.dtype is not spec.dtype or codes.shape != x.shape:
        raise ValueError(
            f"a quantizer to {spec} must return {dtype_name(spec.dtype)} codes of x's shape {list(x.shape)}, "
            f"got {_describe(codes)}"
        )
    if not scale.is_floating_point() or not _is_scale_of(scale, x, spec):
        raise ValueError(
            f"a quantizer to {spec} must return a float scale {_scale_text(x, spec)}, got {_describe(scale)}"
        )
    if spec.symmetric != (zero_point is None):
        raise ValueError(
            f"a quantizer to {spec} must return {'no' if spec.symmetric else 'a'} zero point, "
            f"got {_describe(zero_point)}"
        )
    if zero_point is not None and (_is_not_integer(zero_point) or not _is_scale_of(zero_point, x, spec)):
        raise ValueError(
            f"a quantizer to {spec} must return integer zero points {_scale_text(x, spec)}, got {_describe(zero_point)}"
        )
    # Traced there are no values, and elsewhere looking at them would wait for the device.
    traced = torch.compiler.is_compiling() or type(zero_point) is not Tensor
    if not traced and zero_point.device.type == "cpu" and zero_point.numel():
        low, high = map(int, zero_point.aminmax())
        if low < -128 or high > 127:
            raise ValueError(
                f"a quantizer to {spec} must return zero points of int8 codes, -128 to 127, as sums of integers have "
                f"room for no other, got {low if low < -128 else high}"
            )
    return codes, scale, zero_point


def _is_scale_of(scale: Tensor, x: Tensor, spec: OperandSpec) -> bool:
    if spec.granularity == Granularity.PER_TENSOR:
        return scale.numel() == 1
    whole = (*x.shape[:-1], spec.scales_along(x.shape[-1]))
    # A size of 1 is asked of Python integers only: no guard on a symbolic one.
    return scale.dim() <= x.dim() and all(
        (isinstance(size, int) and size == 1) or size == wanted
        for size, wanted in zip(reversed(scale.shape), reversed(whole), strict=False)
    )


def _scale_text(x: Tensor, spec: OperandSpec) -> str:
    if spec.granularity == Granularity.PER_TENSOR:
        return "of one element"
    return f"that broadcasts to {[*x.shape[:-1], spec.scales_along(x.shape[-1])]}"


def _is_not_integer(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex() or x.dtype is torch.bool


def _is_one_integer(x: Tensor | None) -> bool:
    return x is not None and x.numel() == 1 and not _is_not_integer(x)


def _describe(x: Tensor | None) -> str:
    return "none" if x is None else f"{dtype_name(x.dtype)} {list(x.shape)}"
