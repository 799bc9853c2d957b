"""torch.ao.quantization: the dynamic ``Linear`` of ``quantize_dynamic`` and of dynamic FX graph mode.

It keeps its weight in an object of the backend engine, which a compiler cannot read. Static modules take and return
quantized tensors; they are recognized and left.

Source: torch/ao/nn/quantized/dynamic/modules/linear.py and aten/src/ATen/native/quantized/cpu/qlinear_dynamic.cpp
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fx_quant.adapters.base import Adapter, Conversion, is_of, register_adapter, require
from fx_quant.linear import QuantizedLinear
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme

_HOMES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
_DYNAMIC = "torch.ao.nn.quantized.dynamic.modules.linear.Linear"
_STATIC = "torch.ao.nn.quantized.modules.linear.Linear"
# What holds weights in an engine's own format: linears and convolutions, embeddings, recurrent layers, their cells.
_PACKED = ("_weight_bias", "_packed_params", "_all_weight_values", "_packed_weight_ih")
_ELSEWHERE = "quantize the float model with fx_quant.quantize_ or torchao"


def _recognizes(module: nn.Module) -> bool:
    # The objects that hold the packed weights are modules themselves.
    packed = "PackedParam" in type(module).__name__
    return is_of(module, *_HOMES) and not packed and any(hasattr(module, name) for name in _PACKED)


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _describe(module: Any) -> str:
    dtype = getattr(getattr(module, "_packed_params", None), "dtype", None)
    when = "dynamic" if "dynamic" in type(module).__module__ else "static"
    return when if dtype is None else f"{when}, weight {str(dtype).removeprefix('torch.')}"


def _check(module: Any) -> None:
    path = _path(module)
    require(
        path != _STATIC,
        "it must take and return floats, but a static linear takes and returns quantized tensors, whose scales are "
        f"those of its neighbours; {_ELSEWHERE}",
    )
    require(path == _DYNAMIC, f"it must be a dynamic Linear of torch.ao, got {path}; {_ELSEWHERE}")
    require("forward" not in vars(module), "its forward must be its class's, got another; remove what replaced it")
    dtype = module._packed_params.dtype
    require(dtype is torch.qint8, f"its weight must be qint8 codes, got {dtype}; {_ELSEWHERE}")


def _convert(module: Any) -> Conversion:
    """Codes, scales and bias as the engine holds them.

    The activation is quantized per tensor over ``min(0, min x) .. max(0, max x)``, as ``int8 per_tensor asymmetric``
    does, but to the 7 bits of ``reduce_range`` (8 on qnnpack): results agree as well as both agree with float.
    """
    weight, bias = module._weight_bias()
    if weight.qscheme() is torch.per_tensor_affine:
        scale, zero_point = torch.tensor(weight.q_scale()), torch.tensor(weight.q_zero_point())
        granularity = Granularity.PER_TENSOR
    else:
        require(
            weight.qscheme() is torch.per_channel_affine and weight.q_per_channel_axis() == 0,
            f"its weight must be per tensor or per output channel, got {weight.qscheme()}; {_ELSEWHERE}",
        )
        scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        granularity = Granularity.PER_CHANNEL
    require(
        not bool(zero_point.any()),
        f"its weight must be symmetric beside a quantized activation, got zero points other than 0; {_ELSEWHERE}",
    )
    activation = OperandSpec(torch.int8, Granularity.PER_TENSOR, dynamic=True, symmetric=False)
    linear = QuantizedLinear(
        Scheme(activation, OperandSpec(torch.int8, granularity)),
        weight.int_repr(),
        scale.float(),
        bias=None if bias is None else bias.detach(),
    )
    note = "activations are quantized to 8 bits, not the 7 of reduce_range"
    return Conversion(linear, weight.dequantize(), Numerics.APPROXIMATE, note)


register_adapter(
    Adapter(
        library="torch.ao",
        effect="break the graph",
        recognizes=_recognizes,
        describe=_describe,
        check=_check,
        convert=_convert,
    )
)
