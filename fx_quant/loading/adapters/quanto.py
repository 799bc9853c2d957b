"""optimum-quanto: ``QLinear`` with a frozen weight, and activations that are floats or have a calibrated scale.

Source: https://github.com/huggingface/optimum-quanto (0.2.7), ``nn/qmodule.py`` and ``tensor/weights``
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fx_quant.layers.linear import QuantizedLinear
from fx_quant.loading.adapters.base import Adapter, Conversion, float_codes, is_of, must, register_adapter
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.weights import UINT4, pack_int4

_ELSEWHERE = "quantize the float model with fx_quant.quantize_"


def _recognizes(module: nn.Module) -> bool:
    return is_of(module, "optimum.quanto")


def _describe(module: Any) -> str:
    names = [getattr(getattr(module, f"{what}_qtype", None), "name", "float") for what in ("weight", "activation")]
    return f"weight {names[0]}, activation {names[1]}"


def _check(module: Any) -> None:
    kind = type(module)
    must(
        kind.__name__ == "QLinear" and kind.__module__.startswith("optimum.quanto."),
        f"it must be a QLinear, got {kind.__name__}; only linears have quantized kernels",
    )
    must("forward" not in vars(module), "its forward must be its class's, got another; remove what replaced it")
    weights, activations = module.weight_qtype, module.activation_qtype
    must(weights is not None, f"its weight must be quantized, got a float one; {_ELSEWHERE}")
    must(module.frozen, "its weight must be frozen, got a float one; call optimum.quanto.freeze(model) first")
    must(
        weights.bits == 8 or (weights.bits == 4 and activations is None),
        f"its weight must have 8 bits, or 4 beside a float activation, got {_describe(module)}; {_ELSEWHERE}",
    )
    must(
        activations is None or activations.dtype == weights.dtype,
        f"a quantized activation must have the codes of the weight, got {_describe(module)}; {_ELSEWHERE}",
    )
    if weights.bits == 4:
        _zero_point(*_scale_and_shift(module.weight))
    output = module._quantize_hooks.get("output")
    must(
        output is None or output.id not in module._forward_hooks,
        "its result must be floats, but it hands codes on to the modules behind it; quantize the model without "
        "activations, or calibrate with streamline=True",
    )


@torch.no_grad()
def _convert(module: Any) -> Conversion:
    weight = module.weight
    quantized = module.activation_qtype is not None
    codes, scale, zero_point, spec = _bits(weight) if module.weight_qtype.bits == 4 else _bytes(weight)
    activation = OperandSpec(spec.dtype, Granularity.PER_TENSOR) if quantized else OperandSpec(torch.bfloat16)
    scheme = Scheme(activation, spec)
    linear = QuantizedLinear(
        scheme,
        codes,
        scale,
        weight_zero_point=zero_point,
        bias=module.bias,
        input_scale=module.input_scale if quantized else None,
        quantizer=partial(quantize_activation, dtype=spec.dtype) if quantized else None,
    )
    return Conversion(linear, weight.dequantize(), Numerics.REASSOCIATED)


def quantize_activation(
    x: Tensor, input_scale: Tensor, input_zero_point: None, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor, None]:
    """``(codes, scale, None)`` of ``x [..., k]`` under the calibrated scale, as quanto computes them in ``x``'s dtype.

    ``codes = cast(clamp(round(x / scale)))``; float8 codes are not rounded before the cast.

    Source: ``quantize_symmetric`` in ``library/quantize.py``
    """
    return float_codes(x, input_scale, dtype), input_scale, None


_Weight = tuple[Tensor, Tensor, Tensor | None, OperandSpec]


def _bytes(weight: Any) -> _Weight:
    """Codes and scales of 8 bits: ``codes * scale`` with a scale a row, or one where there is one row."""
    if type(weight).__name__ != "WeightQBytesTensor":
        weight = weight.weight_qbytes_tensor()
    scale = weight._scale
    per_row = scale.numel() == weight.shape[0] > 1
    granularity = Granularity.PER_CHANNEL if per_row else Granularity.PER_TENSOR
    must(
        per_row or scale.numel() == 1,
        f"its scale must be one a row or one for all, got {list(scale.shape)} for {list(weight.shape)}; {_ELSEWHERE}",
    )
    codes, empty = weight._data, scale == 0
    if codes.dtype is torch.int8 and empty.any():
        # A row of zeros: its codes are 0 / 0, whatever that was cast to, and their scale is 0.
        codes, scale = codes.masked_fill(empty, 0), scale.masked_fill(empty, 1)
    return codes, scale, None, OperandSpec(codes.dtype, granularity)


def _bits(weight: Any) -> _Weight:
    """Packed codes, scales and zero points of 4 bits: ``(codes - zero_point) * scale``."""
    scale, shift = _scale_and_shift(weight)
    zero_point = _zero_point(scale, shift)
    if type(weight).__name__ != "WeightQBitsTensor":
        weight = weight.weight_qbits_tensor()
    (n, k), size = weight.shape, weight._group_size
    shape = (n, 1) if size is None else (n, k // size)
    granularity = Granularity.PER_CHANNEL if size is None else Granularity.per_group(size)
    codes = weight._data.unpack().reshape(n, k)
    spec = OperandSpec(UINT4, granularity, symmetric=False)
    return pack_int4(codes), scale.reshape(shape), zero_point.reshape(shape), spec


def _scale_and_shift(weight: Any) -> tuple[Tensor, Tensor]:
    """Of ``codes * scale - shift``, or, with an integer shift, ``(codes - shift) * scale``: one each a group."""
    if not hasattr(weight, "_scale_shift"):
        return weight._scale, weight._shift
    # tinygemm has them side by side, [k / g, n, 2], and shifts from the middle of the range.
    scale, middle = (x.t().flatten() for x in weight._scale_shift.unbind(-1))
    return scale, 8 * scale - middle


def _zero_point(scale: Tensor, shift: Tensor) -> Tensor:
    if not shift.is_floating_point():
        return shift.int()
    found = (shift.float() / scale.float()).round()
    must(
        torch.equal((found * scale.float()).to(shift.dtype), shift),
        "the shifts of its 4-bit weight must be whole multiples of their scales, as zero points are integers, got "
        f"floats; {_ELSEWHERE}",
    )
    return found.int()


def _own_hooks(module: Any) -> frozenset[int]:
    return frozenset(handle.id for handle in getattr(module, "_quantize_hooks", {}).values())


register_adapter(
    Adapter(
        library="optimum-quanto",
        effect="multiply in ops that a compiler cannot see into",
        recognizes=_recognizes,
        describe=_describe,
        check=_check,
        convert=_convert,
        own_hooks=_own_hooks,
    )
)
