"""``triton_quantized_linear``: dynamic quantization and the matmul, in one Triton kernel for few rows.

A tensor that is not on a GPU is left to the canonical op, unless Triton's interpreter is on (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.gpu.architectures import architecture_of
from fx_quant.gpu.launch import runs
from fx_quant.gpu.quantized_linear import DynamicQuantization, run_quantized_linear
from fx_quant.ops import MATMUL_TAGS, quantized_linear, register
from fx_quant.ops.quantize import DYNAMIC_ARGS


def _quantized_linear(x, b, b_scale, bias, out_dtype, **quantize_args) -> Tensor:
    if not runs(x):
        return quantized_linear(x, b, b_scale, bias, out_dtype, **quantize_args)
    quantization = DynamicQuantization(**quantize_args)
    return run_quantized_linear(x, b, b_scale, bias, out_dtype, quantization, architecture_of(x.device))


def _fake(x, b, b_scale, bias, out_dtype, **quantize_args):
    return torch.ops.fx_quant.quantized_linear(x, b, b_scale, bias, out_dtype, **quantize_args)


register(
    "triton_quantized_linear(Tensor x, Tensor b, Tensor b_scale, Tensor? bias, ScalarType out_dtype, "
    f"{DYNAMIC_ARGS}) -> Tensor",
    _quantized_linear,
    _fake,
    MATMUL_TAGS,
)
