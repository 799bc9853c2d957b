"""torchao: ``nn.Linear`` with a weight that is a tensor subclass, of which ``Int8Tensor``, ``Float8Tensor`` (beside a
float activation) and ``IntxUnpackedToInt8Tensor`` are read.

They compile as they are, and are swapped only to be held once. Int8 codes of up to 4 bits are packed two to a byte.

Source: https://github.com/pytorch/ao (0.18), ``int8/int8_tensor.py``, ``float8/float8_tensor.py`` and
``intx/intx_unpacked_to_int8_tensor.py`` in ``quantization/quantize_/workflows``, ``quantization/quant_primitives.py``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_quant.layers.activation import Quantizer
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.loading.adapters.base import Adapter, Conversion, decoded_weight, must, register_adapter
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.weights import INT4, pack_int4

_LIBRARY = "torchao"
_AS_IT_IS = "it compiles as it is"
# How many rows and outputs tell whether a linear is computed as is known here.
_ROWS, _OUTPUTS = 4, 256


def _recognizes(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return is_traceable_wrapper_subclass(weight) and type(weight).__module__.split(".")[0] == _LIBRARY


def _describe(module: Any) -> str:
    return type(module.weight).__name__


def _check(module: Any) -> None:
    kind, weight = type(module), module.weight
    must(
        isinstance(module, nn.Linear)
        and kind.forward is nn.Linear.forward
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and "forward" not in vars(module),
        f"it must compute as nn.Linear does, got {kind.__name__} with a forward of its own; {_AS_IT_IS}"
        if isinstance(module, nn.Linear)
        else f"it must be an nn.Linear, got {kind.__name__}; only linears have quantized kernels",
    )
    must(
        type(weight).__name__ in _READERS,
        f"its weight must be one of {', '.join(_READERS)}, got {type(weight).__name__}; {_AS_IT_IS}",
    )
    must(
        weight.dim() == 2 and weight.numel() > 0, f"its weight must be a matrix, got {list(weight.shape)}; {_AS_IT_IS}"
    )
    must(
        weight.device.type == "cpu",
        f"its weight must be on a CPU, where a kernel has a layout of its own, got {weight.device.type}; elsewhere "
        "codes are held once as they are",
    )
    must(
        getattr(weight, "act_pre_scale", None) is None,
        f"its activation must be scaled by what quantizes it only, got an act_pre_scale; {_AS_IT_IS}",
    )


@torch.no_grad()
def _convert(module: Any) -> Conversion:
    weight = module.weight
    conversion = _READERS[type(weight).__name__](weight.detach(), module.bias)
    _check_arithmetic(weight, module.bias, conversion.linear)
    return conversion


def _read_int8(weight: Any, bias: Tensor | None) -> Conversion:
    k = weight.shape[1]
    rows, columns = weight.block_size
    scale, zero_point, given = weight.scale, weight.zero_point, weight.act_quant_kwargs
    grouped = columns < k
    if not grouped:
        must(
            zero_point is None or not zero_point.any(),
            f"its weight must be symmetric, as the library reads it, got zero points other than 0; {_AS_IT_IS}",
        )
        zero_point = None
    must(
        given is None or not grouped,
        f"beside a quantized activation a row must have one scale, got one for {columns} of {k}; {_AS_IT_IS}",
    )
    decoded = weight.dequantize()
    if given is None and not grouped:
        # What the library multiplies the sums with, where ``dequantize`` has the wider scale.
        scale = scale.to(weight.dtype)
        decoded = weight.qdata.to(weight.dtype) * scale
    codes, scale, zero_point, spec = _operand(weight.qdata, scale, zero_point, (rows, columns))
    if given is None:
        return _conversion(codes, scale, zero_point, spec, OperandSpec(torch.bfloat16), bias, decoded)
    low, high = (-64, 63) if given.reduce_range else (-128, 127)
    symmetric = given.mapping_type.name == "SYMMETRIC"
    must(
        symmetric or given.mapping_type.name == "ASYMMETRIC",
        f"its activation must be symmetric or asymmetric, got {given.mapping_type.name}; {_AS_IT_IS}",
    )
    must(
        symmetric or weight.dtype is torch.float32,
        "an asymmetric activation must be float32, as in other dtypes the library rounds the product and its "
        f"correction before it takes their difference, got {weight.dtype}; {_AS_IT_IS}",
    )
    kind = type(given.granularity).__name__
    must(
        kind in ("PerRow", "PerTensor") and getattr(given.granularity, "dim", -1) == -1,
        f"its activation must be quantized per row or per tensor, got {given.granularity}; {_AS_IT_IS}",
    )
    static = weight.act_quant_scale
    granularity = Granularity.PER_TOKEN if kind == "PerRow" else Granularity.PER_TENSOR
    offset = None
    if static is not None:
        must(
            static.numel() == 1 and static.dtype is torch.float32,
            f"its given scale must be one float32 number, got {static.dtype} {list(static.shape)}; {_AS_IT_IS}",
        )
        granularity, offset = Granularity.PER_TENSOR, weight.act_quant_zero_point
        must(
            not symmetric or offset is None or not offset.any(),
            f"a symmetric activation must have no zero point, got one; {_AS_IT_IS}",
        )
        offset = None if symmetric else torch.zeros((), dtype=torch.int8) if offset is None else offset
    activation = OperandSpec(torch.int8, granularity, dynamic=static is None, symmetric=symmetric)
    formula = partial(
        quantize_activation,
        rows=granularity == Granularity.PER_TOKEN,
        symmetric=symmetric,
        low=low,
        high=high,
        wide=True,
    )
    conversion = _conversion(
        codes, scale, zero_point, spec, activation, bias, decoded, formula, input_scale=static, input_zero_point=offset
    )

    from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor as quantize

    def of_library(x: Tensor) -> Tensor:
        x = _of_rank(x, weight)
        return quantize(x, given, scale=static, zero_point=weight.act_quant_zero_point).dequantize()

    _check_formula(conversion.linear, weight, of_library)
    return conversion


def _read_intx(weight: Any, bias: Tensor | None) -> Conversion:
    zero_point = weight.zero_point
    must(
        not zero_point.is_floating_point() or torch.equal(zero_point, zero_point.round()),
        f"its zero points must be whole numbers, got floats; {_AS_IT_IS}",
    )
    codes, scale, zero_point, spec = _operand(weight.qdata, weight.scale, zero_point, weight.block_size)
    how = weight.activation_quantization
    decoded = weight.dequantize()
    if how is None:
        return _conversion(codes, scale, zero_point, spec, OperandSpec(torch.bfloat16), bias, decoded)
    must(
        getattr(how, "value", how) == "int8_asym_per_token",
        f"its activation must be quantized as int8_asym_per_token, got {how}; {_AS_IT_IS}",
    )
    activation = OperandSpec(torch.int8, Granularity.PER_TOKEN, dynamic=True, symmetric=False)
    formula = partial(quantize_activation, rows=True, symmetric=False, low=-128, high=127, wide=False)
    conversion = _conversion(codes, scale, zero_point, spec, activation, bias, decoded, formula)
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        _apply_int8_act_asym_per_token_quant_dequant,
    )

    _check_formula(conversion.linear, weight, _apply_int8_act_asym_per_token_quant_dequant)
    return conversion


def _read_float8(weight: Any, bias: Tensor | None) -> Conversion:
    must(
        weight.act_quant_kwargs is None,
        f"beside float8 codes its activation must be float, got one that is quantized; {_AS_IT_IS}",
    )
    block = tuple(weight.block_size or weight.shape)
    codes, scale, _, spec = _operand(weight.qdata, weight.scale, None, block)
    return _conversion(codes, scale, None, spec, OperandSpec(torch.bfloat16), bias, weight.dequantize())


_READERS: Mapping[str, Callable[[Any, Tensor | None], Conversion]] = MappingProxyType(
    {"Int8Tensor": _read_int8, "Float8Tensor": _read_float8, "IntxUnpackedToInt8Tensor": _read_intx}
)


def _operand(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, block: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None, OperandSpec]:
    """Codes, scale, zero point and spec of a weight with one scale for each ``block`` of rows and columns."""
    (n, k), (rows, columns) = codes.shape, block
    must(
        columns == k or rows == 1,
        f"its scales must be for rows, groups of a row or all of the weight, got blocks of {rows} x {columns}; "
        f"{_AS_IT_IS}",
    )
    granularity = (
        Granularity.per_group(columns)
        if columns < k
        else Granularity.PER_CHANNEL
        if rows == 1
        else Granularity.PER_TENSOR
    )
    must(columns < k or rows in (1, n), f"its scales must be for one row or for all, got {rows} of {n}; {_AS_IT_IS}")
    if zero_point is not None and not zero_point.any():
        zero_point = None
    few = codes.dtype is torch.int8 and k % 2 == 0 and granularity != Granularity.PER_TENSOR
    few = few and int(codes.min()) >= -8 and int(codes.max()) <= 7
    spec = OperandSpec(INT4 if few else codes.dtype, granularity, symmetric=zero_point is None)
    return (pack_int4(codes) if few else codes), scale, None if zero_point is None else zero_point.int(), spec


def _conversion(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: OperandSpec,
    activation: OperandSpec,
    bias: Tensor | None,
    decoded: Tensor,
    quantizer: Quantizer | None = None,
    **given: Any,
) -> Conversion:
    linear = QuantizedLinear(
        Scheme(activation, spec), codes, scale, weight_zero_point=zero_point, bias=bias, quantizer=quantizer, **given
    )
    return Conversion(linear, decoded, Numerics.REASSOCIATED)


def quantize_activation(
    x: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    *,
    rows: bool,
    symmetric: bool,
    low: int,
    high: int,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(codes, scale, zero_point)`` of ``x [..., k]`` as torchao computes them.

    ::

        codes       clamp(round(x * (1 / scale)) + zero_point, low, high)
        scale       amax / ((high - low) / 2), or (hi - lo) / (high - low); at least eps
        zero_point  clamp(low - round(lo / scale), low, high)

    ``lo = min(0, min x)`` and ``hi = max(0, max x)``. Scales and zero points are computed in ``x``'s dtype.

    Args:
        rows: one scale for each row, or one for all of ``x``.
        low, high: the range of the codes.
        wide: codes are computed in float32 and eps is float32's (``Int8Tensor``); or codes too in ``x``'s dtype and
            eps is its least normal number (``IntxUnpackedToInt8Tensor``).

    Source: ``_choose_qparams_affine`` and ``_quantize_affine_no_dtype_cast`` in ``quantization/quant_primitives.py``
    """
    scale, zero_point = input_scale, input_zero_point
    if scale is None:
        least, most = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if rows else (x.amin(), x.amax())
        least, most = least.clamp(max=0), most.clamp(min=0)
        eps = torch.finfo(torch.float32).eps if wide else torch.finfo(x.dtype).smallest_normal
        if symmetric:
            scale = (torch.max(-least, most) / (float(high - low) / 2)).clamp(min=eps)
        else:
            scale = ((most - least) / float(high - low)).clamp(min=eps)
            zero_point = (low - (least / scale).round()).clamp(low, high)
            zero_point = zero_point.masked_fill(zero_point.isnan(), 0).to(torch.int32)
        scale = scale.float() if wide else scale
    # With dims, a scale widens what it multiplies.
    scale = scale if rows and input_scale is None else scale.reshape([1] * x.dim())
    scaled = (x * (1.0 / scale)).round()
    # Only a scale that is not finite makes NaN of a number, and spoils the products itself.
    scaled = scaled.masked_fill(scaled.isnan(), 0)
    if zero_point is not None:
        scaled = scaled + zero_point
    return scaled.clamp(low, high).to(torch.int8), scale, zero_point


def _check_formula(linear: QuantizedLinear, weight: Tensor, of_library: Callable[[Tensor], Tensor]) -> None:
    """Raise unless the library's own function gives for some values what ``linear``'s quantizer gives, decoded."""
    assert linear.quantizer is not None
    x = _values(linear.in_features, weight.dtype)
    codes, scale, zero_point = linear.quantizer(x, linear.input_scale, linear.input_zero_point)
    shifted = codes.to(x.dtype) if zero_point is None else codes.to(x.dtype) - zero_point.to(x.dtype)
    must(
        torch.equal((shifted * scale).to(x.dtype), of_library(x).reshape(x.shape)),
        f"its activation must be quantized as in torchao 0.18, got other values; {_AS_IT_IS}",
    )


def _check_arithmetic(weight: Tensor, bias: Tensor | None, linear: QuantizedLinear) -> None:
    """Raise unless the library's linear is what ``linear`` stands for, on one small input and for some outputs."""
    x = _values(linear.in_features, weight.dtype)
    a = x.double()
    if linear.quantizer is not None:
        codes, scale, zero_point = linear.quantizer(x, linear.input_scale, linear.input_zero_point)
        a = (codes.double() - (0 if zero_point is None else zero_point)) * scale.double()
    out = F.linear(_of_rank(x, weight), weight, bias).reshape(_ROWS, -1)[:, :_OUTPUTS]
    expected = a @ decoded_weight(linear)[:_OUTPUTS].double().t()
    if bias is not None:
        expected = expected + bias[:_OUTPUTS].double()
    error = (out.double() - expected).abs().max()
    # Of a sum in another order, with operands and result rounded to the dtype.
    bound = 1e-5 if x.dtype is torch.float32 else 4 * torch.finfo(x.dtype).eps
    must(
        bool(error <= bound * expected.abs().max()),
        f"its result must be codes times codes times scales, got {float(error):.1e} beside that of "
        f"{float(expected.abs().max()):.1e}; {_AS_IT_IS}",
    )


def _of_rank(x: Tensor, weight: Tensor) -> Tensor:
    """``x [m, k]`` with as many dims as the given scale of its quantization has, which torchao wants."""
    static = getattr(weight, "act_quant_scale", None)
    return x if static is None else x.reshape([1] * (static.dim() - x.dim()) + list(x.shape))


def _values(k: int, dtype: torch.dtype) -> Tensor:
    """``[4, k]`` of both signs and many magnitudes, the last row zeros."""
    numbers = torch.arange(_ROWS * k, dtype=torch.float64).reshape(_ROWS, k)
    x = torch.sin(numbers * 12.9898) * torch.exp(torch.cos(numbers * 0.77))
    x[-1] = 0
    return x.to(dtype)


def _let_go(module: nn.Module) -> None:
    """Drop what torchao puts on a module to describe it, which refers to the module itself."""
    vars(module).pop("extra_repr", None)


register_adapter(
    Adapter(
        library=_LIBRARY,
        effect="hold their codes beside the kernel's",
        recognizes=_recognizes,
        describe=_describe,
        check=_check,
        convert=_convert,
        compiles=True,
        let_go=_let_go,
    )
)
