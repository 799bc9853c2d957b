"""Triton ops of the gated half of an MLP: ``fx_quant::triton_gated_mm`` and its quantized overloads.

``fx_quant/gpu/gated.py`` plans their launches. Triton is imported when an op runs, never before. A tensor that is not
on a GPU is left to the canonical op, unless Triton's interpreter is on (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_quant.gpu.architectures import architecture_of
from fx_quant.gpu.gated import GROUP, ResultCodes, configuration, gated_operands, plan_gated_mm
from fx_quant.gpu.launch import runs
from fx_quant.gpu.swapped import unfit_codes
from fx_quant.ops import gated_mm, gated_mm_dynamic, gated_mm_static, quantize, quantize_groups
from fx_quant.ops.gated_mm import register_gated_mm


def _runs(a: Tensor, b: Tensor) -> bool:
    """Whether Triton runs on this device, and its GPU multiplies such codes."""
    on = architecture_of(a.device)
    return runs(a) and unfit_codes(a.dtype, on) is None and unfit_codes(b.dtype, on) is None


def _launched(a, b, a_scale, b_scale, out_dtype, codes: ResultCodes | None = None) -> tuple[Tensor, Tensor | None]:
    operands, on = gated_operands(a, b, a_scale, b_scale, out_dtype, codes), architecture_of(a.device)
    launch, scale = plan_gated_mm(operands, configuration(operands, on), on)
    return launch.run(), scale


def _plain(a, b, a_scale, b_scale, out_dtype) -> Tensor:
    if not _runs(a, b):
        return gated_mm(a, b, a_scale, b_scale, out_dtype)
    return _launched(a, b, a_scale, b_scale, out_dtype)[0]


def _static(a, b, a_scale, b_scale, out_dtype, scale: Tensor, *, dtype, reciprocal, lo, hi) -> Tensor:
    if not _runs(a, b):
        return gated_mm_static(
            a, b, a_scale, b_scale, out_dtype, scale, dtype=dtype, reciprocal=reciprocal, lo=lo, hi=hi
        )
    if scale.numel() != 1:
        y = _launched(a, b, a_scale, b_scale, out_dtype)[0]
        return quantize(y, scale, dtype, reciprocal, lo, hi)
    return _launched(a, b, a_scale, b_scale, out_dtype, ResultCodes(dtype, reciprocal, lo, hi, scale))[0]


def _dynamic(a, b, a_scale, b_scale, out_dtype, group: int, **quantize_args: Any) -> tuple[Tensor, Tensor]:
    if not _runs(a, b):
        return gated_mm_dynamic(a, b, a_scale, b_scale, out_dtype, group, **quantize_args)
    formula = dict(quantize_args)
    rounded = {formula.pop("divide_dtype"), formula.pop("scale_dtype")}
    if group != GROUP or formula.pop("granularity") != "per_token" or rounded != {torch.float32}:
        return quantize_groups(_launched(a, b, a_scale, b_scale, out_dtype)[0], group, **quantize_args)
    codes, scale = _launched(a, b, a_scale, b_scale, out_dtype, ResultCodes(**formula))
    assert scale is not None
    return codes, scale


register_gated_mm("triton_", _plain, _static, _dynamic)
