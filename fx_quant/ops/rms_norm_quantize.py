"""``rms_norm_quantize``: RMSNorm, with or without a residual before it, and the codes of its result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_quant.ops.library import QUANTIZE_TAGS, register
from fx_quant.ops.quantize import DYNAMIC_ARGS, quantize
from fx_quant.ops.quantize_groups import quantize_groups, quantize_groups_fake
from fx_quant.scheme import FLOAT_DTYPES, dtype_name

_NORM_ARGS = "Tensor x, Tensor weight, float eps, Tensor? residual"
STATIC_SCHEMA = f"({_NORM_ARGS}, Tensor scale, *, ScalarType dtype, bool reciprocal, float lo, float hi) -> Tensor[]"
DYNAMIC_SCHEMA = f".dynamic({_NORM_ARGS}, {DYNAMIC_ARGS}, int group=0) -> Tensor[]"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``round_to(x.dtype, x / sqrt(mean(x ** 2) + eps) * weight)`` over the last dim, all else in float32."""
    wide = x.float()
    mean = wide.square().mean(-1, keepdim=True)
    return (wide * (mean + eps).rsqrt() * weight.float()).to(x.dtype)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    reciprocal: bool,
    lo: float,
    hi: float,
) -> list[Tensor]:
    """``[codes]``, or with ``residual`` ``[codes, sum]``: ``quantize(rms_norm(sum), scale)``.

    ``sum = round_to(x.dtype, x + residual)``, or ``x`` without; ``rms_norm(s) = round_to(x.dtype, s * r * weight)``
    with ``r = 1 / sqrt(mean(s ** 2) + eps)``, computed in float32.

    Args:
        x: ``[..., k]``, float32, bfloat16 or float16; k > 0.
        weight: ``[k]``, any of these dtypes.
        residual: like ``x``, or None.
        scale: as ``quantize`` takes it, and the keyword arguments too.

    Raises:
        RuntimeError: dtypes or shapes do not fit.
    """
    check_rms_norm(x, weight, residual)
    total = x if residual is None else x + residual
    codes = quantize(rms_norm(total, weight, eps), scale, dtype, reciprocal, lo, hi)
    return [codes] if residual is None else [codes, total.contiguous()]


def rms_norm_quantize_dynamic(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *, group: int = 0, **quantize_args: Any
) -> list[Tensor]:
    """``[codes, scale]``, or ``[codes, scale, sum]``: as ``rms_norm_quantize``, the scale chosen from the norm.

    The keyword arguments are those of ``quantize_dynamic``, and the ``group`` of ``quantize_groups``, which says how
    codes and scale are laid out.
    """
    check_rms_norm(x, weight, residual)
    total = x if residual is None else x + residual
    results = quantize_groups(rms_norm(total, weight, eps), group, **quantize_args)
    return [*results] if residual is None else [*results, total.contiguous()]


def check_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Raise unless the operands of a norm fit together; the rows of ``x`` may be symbolic."""
    torch._check(
        x.dim() > 0 and x.dtype in FLOAT_DTYPES,
        lambda: (
            f"rms_norm_quantize: x must be [..., k] of float32, bfloat16 or float16, "
            f"got {dtype_name(x.dtype)} {list(x.shape)}"
        ),
    )
    torch._check(
        weight.dim() == 1 and weight.shape[0] == x.shape[-1] and weight.dtype in FLOAT_DTYPES,
        lambda: (
            f"rms_norm_quantize: weight must be floats of shape [k] = [{x.shape[-1]}], "
            f"got {dtype_name(weight.dtype)} {list(weight.shape)}"
        ),
    )
    if residual is None:
        return
    torch._check(
        residual.dtype is x.dtype and residual.shape == x.shape,
        lambda: (
            f"rms_norm_quantize: residual must be {dtype_name(x.dtype)} {list(x.shape)} as x is, "
            f"got {dtype_name(residual.dtype)} {list(residual.shape)}"
        ),
    )


def rms_norm_quantize_fake(x, weight, eps, residual, scale, *, dtype, reciprocal, lo, hi):
    """The shapes and dtypes of ``rms_norm_quantize``."""
    check_rms_norm(x, weight, residual)
    codes = torch.ops.fx_quant.quantize(x, scale, dtype=dtype, reciprocal=reciprocal, lo=lo, hi=hi)
    return [codes] if residual is None else [codes, x.new_empty(x.shape)]


def rms_norm_quantize_dynamic_fake(x, weight, eps, residual, *, group=0, **quantize_args):
    """The shapes, dtypes and strides of ``rms_norm_quantize_dynamic``."""
    check_rms_norm(x, weight, residual)
    results = quantize_groups_fake(x, group, **quantize_args)
    return [*results] if residual is None else [*results, x.new_empty(x.shape)]


register(f"rms_norm_quantize{STATIC_SCHEMA}", rms_norm_quantize, rms_norm_quantize_fake, QUANTIZE_TAGS)
register(f"rms_norm_quantize{DYNAMIC_SCHEMA}", rms_norm_quantize_dynamic, rms_norm_quantize_dynamic_fake, QUANTIZE_TAGS)
