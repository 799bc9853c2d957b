"""Ops of quantization by Triton on NVIDIA and AMD GPUs, alone and behind RMSNorm.

Each computes its canonical op bit for bit (the sum of squares of a norm is taken in another order), and is that op's
plain PyTorch where Triton does not run or ``gpu.quantize.unfit`` says why it cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_quant.activation import quantize_activation
from fx_quant.gpu.architectures import architecture_of
from fx_quant.gpu.launch import runs
from fx_quant.gpu.quantize import Norm, plan_asymmetric, plan_dynamic, plan_static, unfit
from fx_quant.ops import (
    QUANTIZE_TAGS,
    check_quantize,
    check_quantize_dynamic,
    quantize,
    quantize_groups,
    register,
    rms_norm_quantize,
    rms_norm_quantize_dynamic,
)
from fx_quant.ops.quantize import DYNAMIC_ARGS
from fx_quant.ops.quantize_groups import check_group, quantize_groups_fake
from fx_quant.ops.rms_norm_quantize import (
    DYNAMIC_SCHEMA,
    STATIC_SCHEMA,
    check_rms_norm,
    rms_norm_quantize_dynamic_fake,
    rms_norm_quantize_fake,
)
from fx_quant.scheme import Granularity, OperandSpec

_GRANULARITIES = {"per_token": Granularity.PER_TOKEN, "per_tensor": Granularity.PER_TENSOR}
_ASYMMETRIC_CODES: dict[str, Any] = {"dtype": torch.int8, "lo": -128.0, "hi": 127.0}


def _runs(x: Tensor, **asked: Any) -> bool:
    return runs(x) and unfit(x, architecture_of(x.device), **asked) is None


def triton_quantize_static(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
    zero_point: Tensor | None = None,
) -> Tensor:
    """``fx_quant::quantize``, and with ``zero_point`` of the shape of ``scale`` int8 or uint8 codes that it shifts.

    ``codes = clamp(round(x / scale) + zero_point, lo, hi)``.
    """
    _check_static(x, scale, dtype, zero_point)
    formula: dict[str, Any] = {"dtype": dtype, "reciprocal": reciprocal, "lo": lo, "hi": hi}
    if _runs(x, **formula):
        return plan_static(x, scale, zero_point, **formula, on=architecture_of(x.device)).run()[0]
    if zero_point is None:
        return quantize(x, scale, **formula)
    y = x.float() * scale.reciprocal() if reciprocal else x.float() / scale
    return (y.round() + zero_point).clamp(lo, hi).to(dtype).contiguous()


def _static_fake(x, scale, *, dtype, reciprocal, lo, hi, zero_point=None):
    _check_static(x, scale, dtype, zero_point)
    return x.new_empty(x.shape, dtype=dtype)


def _check_static(x: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None) -> None:
    check_quantize(x, scale, dtype)
    if zero_point is None:
        return
    integers = not zero_point.dtype.is_floating_point and not dtype.is_floating_point
    torch._check(
        integers and zero_point.shape == scale.shape,
        lambda: (
            f"triton_quantize_static: zero_point must be integers of the shape of scale, {list(scale.shape)}, beside "
            f"integer codes, got {zero_point.dtype} {list(zero_point.shape)} beside {dtype}"
        ),
    )


def triton_quantize_dynamic(x: Tensor, *, group: int = 0, **formula: Any) -> tuple[Tensor, Tensor]:
    """``quantize_groups``: ``fx_quant::quantize.dynamic``, and with ``group`` a scale for each group of a row."""
    check_quantize_dynamic(x, formula["dtype"], formula["granularity"], formula["floor_on"])
    check_group(group, formula["granularity"])
    if not _runs(x, group=group, **formula):
        return quantize_groups(x, group, **formula)
    codes, scale = plan_dynamic(x, group=group, on=architecture_of(x.device), **formula).run()
    return codes, scale


def triton_quantize_asymmetric(x: Tensor, *, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes, scale and zero point (int32), chosen as ``quantize_activation`` chooses them.

    Where the scale is NaN or infinite, codes and zero point are unspecified.
    """
    check_quantize_dynamic(x, torch.int8, granularity, "none")
    if _runs(x, **_ASYMMETRIC_CODES):
        codes, scale, zero_point = plan_asymmetric(x, granularity=granularity, on=architecture_of(x.device)).run()
        return codes, scale, zero_point
    spec = OperandSpec(torch.int8, _GRANULARITIES[granularity], dynamic=True, symmetric=False)
    codes, scale, zero_point = quantize_activation(x.reshape(-1, x.shape[-1]), spec)
    assert zero_point is not None
    shape = (*x.shape[:-1], 1) if granularity == "per_token" else ()
    return codes.reshape(x.shape).contiguous(), scale.view(shape), zero_point.view(shape)


def _asymmetric_fake(x, *, granularity):
    check_quantize_dynamic(x, torch.int8, granularity, "none")
    shape = (*x.shape[:-1], 1) if granularity == "per_token" else ()
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int32),
    )


def triton_rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, scale: Tensor, **formula: Any
) -> list[Tensor]:
    """``fx_quant::rms_norm_quantize`` in one kernel."""
    check_rms_norm(x, weight, residual)
    check_quantize(x, scale, formula["dtype"])
    norm = Norm(weight, eps, residual)
    if not _runs(x, norm=norm, **formula):
        return rms_norm_quantize(x, weight, eps, residual, scale, **formula)
    return list(plan_static(x, scale, **formula, norm=norm, on=architecture_of(x.device)).run())


def triton_rms_norm_quantize_dynamic(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *, group: int = 0, **formula: Any
) -> list[Tensor]:
    """``fx_quant::rms_norm_quantize.dynamic``, in one kernel unless there is one scale for the tensor."""
    check_rms_norm(x, weight, residual)
    check_quantize_dynamic(x, formula["dtype"], formula["granularity"], formula["floor_on"])
    check_group(group, formula["granularity"])
    norm = Norm(weight, eps, residual)
    if formula["granularity"] == "per_token" and _runs(x, norm=norm, group=group, **formula):
        return list(plan_dynamic(x, group=group, **formula, norm=norm, on=architecture_of(x.device)).run())
    return rms_norm_quantize_dynamic(x, weight, eps, residual, group=group, **formula)


register(
    "triton_quantize_static(Tensor x, Tensor scale, *, ScalarType dtype, bool reciprocal, float lo, float hi, "
    "Tensor? zero_point=None) -> Tensor",
    triton_quantize_static,
    _static_fake,
    QUANTIZE_TAGS,
)
register(
    f"triton_quantize_dynamic(Tensor x, {DYNAMIC_ARGS}, int group=0) -> (Tensor codes, Tensor scale)",
    triton_quantize_dynamic,
    lambda x, *, group=0, **formula: quantize_groups_fake(x, group, **formula),
    QUANTIZE_TAGS,
)
register(
    "triton_quantize_asymmetric(Tensor x, *, str granularity) -> (Tensor codes, Tensor scale, Tensor zero_point)",
    triton_quantize_asymmetric,
    _asymmetric_fake,
    QUANTIZE_TAGS,
)
register(f"triton_rms_norm_quantize{STATIC_SCHEMA}", triton_rms_norm_quantize, rms_norm_quantize_fake, QUANTIZE_TAGS)
register(
    f"triton_rms_norm_quantize{DYNAMIC_SCHEMA}",
    triton_rms_norm_quantize_dynamic,
    rms_norm_quantize_dynamic_fake,
    QUANTIZE_TAGS,
)
