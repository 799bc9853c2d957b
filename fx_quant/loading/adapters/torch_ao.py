"""torch.ao.quantization: the dynamic ``Linear`` of ``quantize_dynamic`` and of dynamic FX graph mode.

It keeps its weight in an object of the backend engine, which a compiler cannot read. Static modules take and return
quantized tensors; they are recognized and left.

Source: torch/ao/nn/quantized/dynamic/modules/linear.py, and qlinear_dynamic.cpp and QuantUtils.h in
aten/src/ATen/native/quantized/cpu
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fx_quant.layers.linear import QuantizedLinear
from fx_quant.loading.adapters.base import Adapter, Conversion, is_of, must, register_adapter
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme

_HOMES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
_DYNAMIC = "torch.ao.nn.quantized.dynamic.modules.linear.Linear"
_STATIC = "torch.ao.nn.quantized.modules.linear.Linear"
# What holds weights in an engine's own format: linears and convolutions, embeddings, recurrent layers, their cells.
_PACKED = ("_weight_bias", "_packed_params", "_all_weight_values", "_packed_weight_ih")
_SMALL_SCALE = torch.tensor(6.1e-5).item()
# How many outputs of a linear tell its engine.
_PROBED = 256
# How the zero point is added: with the product before it is rounded, to the rounded code (fbgemm, x86 and qnnpack of
# torch 2.14), or apart, as oneDNN has it.
_ADDITIONS = ("fused", "last", "apart")
_ENGINES = tuple({"steps": steps, "adds": adds} for steps in (127, 255) for adds in _ADDITIONS)
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
    must(
        path != _STATIC,
        "it must take and return floats, but a static linear takes and returns quantized tensors, whose scales are "
        f"those of its neighbours; {_ELSEWHERE}",
    )
    must(path == _DYNAMIC, f"it must be a dynamic Linear of torch.ao, got {path}; {_ELSEWHERE}")
    must("forward" not in vars(module), "its forward must be its class's, got another; remove what replaced it")
    dtype = module._packed_params.dtype
    must(dtype is torch.qint8, f"its weight must be qint8 codes, got {dtype}; {_ELSEWHERE}")


def _convert(module: Any) -> Conversion:
    """Codes, scales and bias as the engine holds them, and the formula by which it quantizes activations."""
    weight, bias = module._weight_bias()
    if weight.qscheme() is torch.per_tensor_affine:
        scale, zero_point = torch.tensor(weight.q_scale()), torch.tensor(weight.q_zero_point())
        granularity = Granularity.PER_TENSOR
    else:
        must(
            weight.qscheme() is torch.per_channel_affine and weight.q_per_channel_axis() == 0,
            f"its weight must be per tensor or per output channel, got {weight.qscheme()}; {_ELSEWHERE}",
        )
        scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        granularity = Granularity.PER_CHANNEL
    must(
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
    formula = next((engine for engine in _ENGINES if _is_formula_of(module, linear, **engine)), None)
    if formula is None:
        note = "activations are quantized by a formula that fx_quant does not know"
        return Conversion(linear, weight.dequantize(), Numerics.APPROXIMATE, note)
    linear.quantizer = partial(quantize_activation, **formula)
    return Conversion(linear, weight.dequantize(), Numerics.REASSOCIATED)


def quantize_activation(
    x: Tensor, input_scale: None, input_zero_point: None, *, steps: int, adds: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(codes, scale, zero_point)`` of ``x [..., k]``, one scale for all, as the engines compute them.

    ::

        codes       clamp(round(x * (1 / scale) + zero_point), 0, 255), or round(x * (1 / scale)) + zero_point,
                    128 less to be int8
        scale       (high - low) / steps in float64; 0.1 where it is 0, at least 6.1e-5 elsewhere
        zero_point  round(clamp(-low / scale, 0, steps)) or from the upper end, 128 less

    ``low = min(0, min x)`` and ``high = max(0, max x)``. ``x`` with NaN has no scale there, which is an error; here its
    scale is NaN.

    Args:
        steps: 127 under ``reduce_range``; 255 without it, and on qnnpack, which ignores it.
        adds: ``x * (1 / scale) + zero_point`` is one operation (``fused``: fbgemm, x86, qnnpack until torch 2.13), two
            in float32 (``apart``: onednn), or the product is rounded before (``last``: the former since torch 2.14).

    Source: ``ChooseQuantizationParams`` in QuantUtils.h, ``apply_dynamic_impl`` in qlinear_dynamic.cpp
    """
    x = x.float()
    wide, zero_point = _parameters(x.amin().clamp(max=0), x.amax().clamp(min=0), steps)
    # oneDNN is handed the inverse, and inverts it.
    scale = 1 / (1 / wide).float() if adds == "apart" else wide.float()
    if adds == "fused":
        scaled = (x.double() * (1 / scale).double() + zero_point).float()
    elif adds == "apart":
        scaled = x * (1 / scale) + zero_point
    else:
        scaled = (x * (1 / scale)).round() + zero_point
    scaled = torch.where(scaled.isnan(), zero_point.float(), scaled)
    codes = scaled.round().clamp(0, 255) - 128
    return codes.to(torch.int8), scale, zero_point.to(torch.int32) - 128


def _parameters(low: Tensor, high: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point in 0 .. ``steps`` of the range ``low <= 0 .. high >= 0``, both float64."""
    wide = (high.double() - low.double()) / steps
    single = wide.float()
    wide = wide.masked_fill((single == 0) | (1 / single).isinf(), 0.1)
    small = wide < _SMALL_SCALE
    # Where the scale is raised the range grows with it, about 0 or away from it.
    amplifier = _SMALL_SCALE / wide.float()
    least = torch.full_like(low, _SMALL_SCALE) * steps
    grown_low = torch.where(high == 0, -least, low * amplifier)
    grown_high = torch.where(low == 0, least, high * amplifier)
    low, high = torch.where(small, grown_low, low).double(), torch.where(small, grown_high, high).double()
    wide = wide.masked_fill(small, _SMALL_SCALE)
    below, above = low / wide, high / wide
    # From the end whose terms are the smaller, for the sake of rounding.
    zero_point = torch.where(-below.abs() < steps - above.abs(), -below, steps - above)
    zero_point = zero_point.clamp(0, steps).round()
    return wide, zero_point.masked_fill(zero_point.isnan(), 0)


def _is_formula_of(module: Any, linear: QuantizedLinear, *, steps: int, adds: str) -> bool:
    """Whether ``module`` gives on one small input what its weight and this formula give, for some of its outputs.

    Its engine cannot be asked for, and is not that of the process if the module was made under another.
    """
    x = _ties(linear.in_features, steps)
    codes, scale, zero_point = quantize_activation(x, None, None, steps=steps, adds=adds)
    n = min(_PROBED, linear.out_features)
    products = (codes.double() - zero_point) @ linear.weight[:n].double().t()
    bias = 0 if linear.bias is None else linear.bias[:n].double()
    expected = products * scale.double() * linear.weight_scale.double().flatten()[:n] + bias
    error = (module(x)[:, :n].double() - expected).abs().max()
    return bool(error <= 1e-6 * expected.abs().max())


def _ties(k: int, steps: int) -> Tensor:
    """``[m, k]`` whose values lie halfway between codes of ``steps`` but for rounding, which engines do their ways."""
    scale, zero_point = 0.0712345, steps // 3
    rows = -(-1024 // k)
    x = ((torch.arange(rows * k) * 37 % steps) - zero_point + 0.5) * scale
    # The ends of the range, so that the scale is as said.
    x[0], x[-1] = -zero_point * scale, (steps - zero_point) * scale
    return x.reshape(rows, k)


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
