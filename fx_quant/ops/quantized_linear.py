"""``quantized_linear``: dynamic quantization and the scaled matrix product in one."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.ops.library import MATMUL_TAGS, register
from fx_quant.ops.quantize import DYNAMIC_ARGS, quantize_dynamic, quantize_dynamic_fake
from fx_quant.ops.scaled_mm import scaled_mm


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
    quantize_dynamic_fake(x, **quantize_args)
    return x.new_empty((*x.shape[:-1], b.shape[1]), dtype=out_dtype)


register(
    "quantized_linear(Tensor x, Tensor b, Tensor b_scale, Tensor? bias, ScalarType out_dtype, "
    f"{DYNAMIC_ARGS}) -> Tensor",
    quantized_linear,
    _quantized_linear_fake,
    MATMUL_TAGS,
)
