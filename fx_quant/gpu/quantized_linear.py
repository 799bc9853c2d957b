"""A linear layer with dynamic quantization on a GPU: inside the decode kernel where that pays, before it elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_quant.gpu import quantize, swapped
from fx_quant.gpu.architectures import Architecture
from fx_quant.gpu.launch import Configuration, Launch
from fx_quant.gpu.operands import scaled_operands, vector_stride
from fx_quant.gpu.scaled_mm import plan_scaled_mm
from fx_quant.ops import check_scaled_mm, quantized_linear
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, dtype_name

# Every program reads all rows again to choose their scales. They come from the L2 cache, which is a few times as fast
# as memory: up to this part of the weight's bytes, that is quicker than another kernel.
_READ_AGAIN = 0.3

# Elements of a step of choosing scales: two loads of 16 bytes for each of 128 threads.
_AMAX_ELEMENTS = 2048


@dataclass(frozen=True)
class DynamicQuantization:
    """How ``fx_quant::quantize.dynamic`` chooses scales and codes; the fields are its keyword arguments."""

    dtype: torch.dtype
    granularity: str
    divisor: float
    divide_dtype: torch.dtype
    floor: float
    floor_on: str
    scale_dtype: torch.dtype
    reciprocal: bool
    lo: float
    hi: float


def unfit(x: Tensor, b: Tensor, quantization: DynamicQuantization, on: Architecture) -> str | None:
    """Why the decode kernel cannot quantize ``x`` itself, bit for bit as the canonical op; None if it can."""
    name, dtype = "quantized_linear", quantization.dtype
    if x.dtype not in FLOAT_DTYPES:
        return f"{name}: needs x in float32, bfloat16 or float16, got {dtype_name(x.dtype)}"
    if not x.numel():
        return f"{name}: needs an x that is not empty, got {list(x.shape)}"
    if (dtype, b.dtype) != (torch.int8, torch.int8) and not {dtype, b.dtype} <= FLOAT8_DTYPES:
        return f"{name}: needs codes both int8 or both float8, got {dtype_name(dtype)} and {dtype_name(b.dtype)}"
    if not {quantization.divide_dtype, quantization.scale_dtype} <= FLOAT_DTYPES:
        return f"{name}: needs scales rounded to float32, bfloat16 or float16"
    integer = dtype is torch.int8
    info = torch.iinfo(dtype) if integer else torch.finfo(dtype)
    lo, hi = quantization.lo, quantization.hi
    if not info.min <= lo <= hi <= info.max or (integer and (lo % 1 or hi % 1)):
        return f"{name}: needs bounds that are codes of {dtype_name(dtype)}, got {lo} and {hi}"
    return swapped.unfit_codes(dtype, on) or swapped.unfit_codes(b.dtype, on)


def pays(m: int, n: int, k: int, itemsize: int, found: Configuration) -> bool:
    """Whether quantizing ``m`` rows in each program of ``found`` is quicker than once before: see ``_READ_AGAIN``."""
    programs = -(-n // found.block_n) * found.split_k
    return m <= found.block_m and m * k * itemsize * programs <= _READ_AGAIN * n * k


def plan_quantized_linear(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    quantization: DynamicQuantization,
    configuration: Configuration,
    on: Architecture,
) -> Launch:
    """The launch of the kernel that quantizes ``x [m, k]`` itself, of no more than ``block_m`` rows.

    Raises:
        RuntimeError: the operands do not fit together.
        ValueError: this kernel cannot compute them there.
    """
    import triton.language as tl  # pyrefly: ignore[missing-import]

    from fx_quant.kernels.native import triton_swapped

    reason = unfit(x, b, quantization, on) or swapped.unfit_split(configuration.split_k, on)
    (m, k), n = x.shape, b.shape[1]
    if reason is None and m > configuration.block_m:
        reason = f"quantized_linear: needs at most {configuration.block_m} rows, got {m}"
    if reason is not None:
        raise ValueError(reason)
    check_scaled_mm(m, quantization.dtype, k, n, None, b_scale, bias, out_dtype, "quantized_linear")
    rows = 1 << (m - 1).bit_length()
    integer = quantization.dtype is torch.int8
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "b_scale_ptr": b_scale,
        "bias_ptr": bias,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_b_scale": vector_stride(b_scale, -1),
        "stride_bias": vector_stride(bias, 0),
        "divisor": quantization.divisor,
        "floor": quantization.floor,
        "lo": quantization.lo,
        "hi": quantization.hi,
        "CODES": _language_type(tl, quantization.dtype),
        "FLOOR_ON": quantization.floor_on,
        "DIVIDE": _language_type(tl, quantization.divide_dtype),
        "SCALE": _language_type(tl, quantization.scale_dtype),
        "PER_TENSOR": quantization.granularity == "per_tensor",
        "RECIPROCAL": quantization.reciprocal,
        "WHOLE_STEPS": k % configuration.block_k == 0,
        "ROWS": rows,
        "AMAX_BLOCK": _AMAX_ELEMENTS // rows,
    }
    out = x.new_empty((m, n), dtype=out_dtype)
    sums = torch.int32 if integer else torch.float32
    return swapped.launch(triton_swapped.quantized_linear_kernel, x, b, configuration, sums, arguments, out, on)


def _language_type(language: Any, dtype: torch.dtype) -> Any:
    names = {
        torch.float8_e4m3fn: "float8e4nv",
        torch.float8_e5m2: "float8e5",
        torch.float8_e4m3fnuz: "float8e4b8",
        torch.float8_e5m2fnuz: "float8e5b16",
    }
    return getattr(language, names.get(dtype, dtype_name(dtype)))


def run_quantized_linear(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    quantization: DynamicQuantization,
    on: Architecture,
) -> Tensor:
    """``fx_quant::quantized_linear`` over the last dim of ``x``, by one kernel where that pays, else by two.

    Codes that no kernel multiplies are left to the canonical op.

    Raises:
        RuntimeError: the operands do not fit together.
    """
    torch._check(
        x.shape[-1] == b.shape[0],
        lambda: f"quantized_linear: x must end in k = {b.shape[0]}, got {list(x.shape)}",
    )
    rows = x.reshape(-1, x.shape[-1])
    (m, k), n = rows.shape, b.shape[1]
    arguments = vars(quantization)
    if not ({quantization.dtype, b.dtype} == {torch.int8} or {quantization.dtype, b.dtype} <= FLOAT8_DTYPES):
        return quantized_linear(x, b, b_scale, bias, out_dtype, **arguments)
    recipe = "int8" if quantization.dtype is torch.int8 else "float8"
    found = swapped.configuration(recipe, m, n, k, on, dynamic=True)
    if found is not None and unfit(rows, b, quantization, on) is None and pays(m, n, k, x.dtype.itemsize, found):
        out = plan_quantized_linear(rows, b, b_scale, bias, out_dtype, quantization, found, on).run()
    else:
        if quantize.unfit(rows, on, **arguments) is None:
            codes, scale = quantize.plan_dynamic(rows, **arguments, on=on).run()
        else:
            codes, scale = torch.ops.fx_quant.quantize.dynamic(rows, **arguments)
        out = plan_scaled_mm(scaled_operands(codes, b, scale, b_scale, bias, n, out_dtype), on).run()
    return out.reshape(*x.shape[:-1], n)
