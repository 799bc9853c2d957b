"""compressed-tensors: the ``nn.Linear`` modules that it gives a ``quantization_scheme`` and a forward of its own.

Such a module is in one of three states: frozen (a float weight, quantized in each forward), compressed (codes) and
decompressed (the dense weight ``codes * weight_scale``, as transformers leaves it after the first forward). Its forward
and the offloading wrappers around it break the graph at each linear.

Source: https://github.com/vllm-project/compressed-tensors (0.20), ``quantization/lifecycle/forward.py``,
``quantization/utils/helpers.py``, ``compressors`` and ``offload``
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fx_quant.loading.adapters.base import Adapter, Conversion, float_codes, must, register_adapter
from fx_quant.loading.checkpoint_formats import scheme_of_group
from fx_quant.loading.checkpoint_linear import decode_linear, tensors_of
from fx_quant.scheme import FLOAT8_DTYPES, Granularity, Numerics, OperandSpec, Scheme

_LIBRARY = "compressed_tensors"
_FROZEN, _COMPRESSED, _DECOMPRESSED = "frozen", "compressed", "decompressed"


def _recognizes(module: nn.Module) -> bool:
    # Of the module itself: a wrapper may pass on the attributes of what it wraps.
    scheme = vars(module).get("quantization_scheme")
    return scheme is not None and type(scheme).__module__.split(".")[0] == _LIBRARY


def _scheme(module: Any) -> Scheme:
    return scheme_of_group(module.quantization_scheme.model_dump(mode="json"))


def _describe(module: Any) -> str:
    try:
        return str(_scheme(module))
    except ValueError:
        weights = module.quantization_scheme.weights
        return "no weights" if weights is None else f"{weights.num_bits}-bit {weights.type} per {weights.strategy}"


def _check(module: Any) -> None:
    kind = type(module)
    must(
        isinstance(module, nn.Linear)
        and kind.forward is nn.Linear.forward
        and not isinstance(module, NonDynamicallyQuantizableLinear),
        f"it must compute as nn.Linear does, got {kind.__name__}; only linears have quantized kernels",
    )
    _scheme(module)
    must(
        not module._modules,
        f"it must hold no submodules, got {', '.join(module._modules)}; remove them, for example by ending calibration",
    )
    # Its value is a string, which is all that is needed of the library's enumeration.
    status = str(getattr(getattr(module, "quantization_status", None), "value", None))
    must(
        status in (_FROZEN, _COMPRESSED, _DECOMPRESSED),
        f"its quantization_status must be frozen, compressed or decompressed, got {status}; end calibration first",
    )
    must(
        getattr(module, "quantization_enabled", True),
        "its quantization must be on, got quantization_enabled=False; set it to True",
    )
    _check_forward(module)
    _check_devices(module)


def _check_forward(module: Any) -> None:
    """Raise unless calling ``module`` runs what compressed-tensors has put around ``nn.Linear.forward``, no more."""
    forward = getattr(module.forward, "__func__", module.forward)
    if _home(forward).startswith(f"{_LIBRARY}.offload"):
        forward = getattr(module, "_original_forward_func", forward)
    must(
        _home(forward).startswith(f"{_LIBRARY}.quantization")
        and getattr(forward, "__wrapped__", None) is nn.Linear.forward,
        "its forward must be that of compressed-tensors around nn.Linear's, got "
        f"{_home(forward) or type(forward).__name__}; remove what replaced it, for example accelerate's hooks",
    )


def _home(function: Any) -> str:
    """Where a function is defined, whatever ``functools.wraps`` makes it look like."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def _check_devices(module: Any) -> None:
    cache = module._parameters
    onload, offload = getattr(cache, "onload_device", None), getattr(cache, "offload_device", None)
    must(
        _device_name(onload) == _device_name(offload),
        f"its parameters must live where they are used, got them offloaded from {onload} to {offload}; load the model "
        "without offloading",
    )
    held = getattr(cache, "offloaded_values", cache)
    must(
        all(x is None or x.device.type != "meta" for x in held.values()),
        "its parameters must be loaded, got some on the meta device; load the checkpoint first",
    )


def _device_name(device: torch.device | str | None) -> str:
    """``cuda`` and ``cuda:0`` are one; ``disk`` is not a device, and None is that of no cache."""
    name = str(device)
    return name if ":" in name or name in ("cpu", "disk", "meta", "None") else f"{name}:0"


@torch.no_grad()
def _convert(module: Any) -> Conversion:
    scheme = _scheme(module)
    tensors = {name: x.data for name, x in module._parameters.items() if x is not None}
    stored, weight = _codes_and_weight(module, tensors)
    bias = stored.get("bias")
    # What decode_linear takes sizes and the bias's dtype from.
    like = nn.Linear(
        module.in_features,
        module.out_features,
        device="meta",
        dtype=weight.dtype if bias is None else bias.dtype,
    )
    keys = tensors_of(scheme, "", stored, bias is not None)
    linear = decode_linear(like, scheme, {what: stored[key] for what, key in keys.items()})
    if not scheme.weight_only:
        linear.quantizer = partial(quantize_activation, spec=scheme.activation)
    return Conversion(linear, weight, Numerics.REASSOCIATED)


def _codes_and_weight(module: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of the module with codes for its weight, as a checkpoint has them, and its weight as it is used."""
    compressed = module.quantization_status.value == _COMPRESSED
    weights = ("weight", "weight_packed") if compressed else ("weight",)
    must(
        "weight_scale" in tensors and any(name in tensors for name in weights),
        f"it must have {' or '.join(weights)} and weight_scale, got {', '.join(sorted(tensors))}; load the whole "
        "checkpoint",
    )
    if compressed:
        return tensors, _decompressed(module, tensors)
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize

    weight, scale = tensors["weight"], tensors["weight_scale"]
    zero_point: Any = tensors.get("weight_zero_point")  # None will do, whatever the annotations say
    args = module.quantization_scheme.weights
    dtype = torch.float8_e4m3fn if args.type == "float" else torch.int8
    if module.quantization_status.value == _FROZEN:
        codes = quantize(weight, scale, zero_point, args, dtype)
        weight = fake_quantize(weight, scale, zero_point, args)
    else:
        codes = _recovered(weight, scale, zero_point, args, dtype)
    stored = {**tensors, "weight": codes}
    if zero_point is not None:
        # int32 would be read as packed; 8 bits hold every zero point.
        stored["weight_zero_point"] = zero_point.float().to(torch.int8)
    return stored, weight


def _recovered(weight: Tensor, scale: Tensor, zero_point: Any, args: Any, dtype: torch.dtype) -> Tensor:
    """Codes that decode to the dense ``weight``, where there are such."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    # In float32: a code of up to 128 times a scale, rounded to bfloat16, is less than half a code away.
    codes = quantize(weight.float(), scale.float(), zero_point, args, dtype)
    if zero_point is None or args.type == "float":
        return codes
    # Less its zero point a code goes up to 255, which bfloat16 may round to a neighbour.
    low = -(1 << (args.num_bits - 1))
    for step in (1, -1):
        wrong = dequantize(codes, scale, zero_point, args).to(weight.dtype) != weight
        if not wrong.any():
            break
        near = (codes.int() + step).clamp(low, -low - 1).to(codes.dtype)
        fits = wrong & (dequantize(near, scale, zero_point, args).to(weight.dtype) == weight)
        codes = torch.where(fits, near, codes)
    return codes


def _decompressed(module: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    scheme = module.quantization_scheme
    stored_as = scheme.format or infer_module_format(type(module), scheme)
    compressor: Any = BaseCompressor.get_value_from_registry(getattr(stored_as, "value", stored_as))
    return compressor.decompress(dict(tensors), scheme)["weight"]


def quantize_activation(
    x: Tensor, input_scale: Tensor | None, input_zero_point: Tensor | None, *, spec: OperandSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(codes, scale, zero_point)`` of ``x [..., k]`` as compressed-tensors computes them, in ``x``'s dtype.

    ::

        codes       clamp(round(x / scale + zero_point), -128, 127), or cast(clamp(x / scale, -448, 448))
        scale       amax / 127.5, amax / 448, or (high - low) / 255; the dtype's eps where that is 0
        zero_point  clamp(round(-128 - low / scale), -128, 127); 0 where that is NaN

    ``low = min(0, min x)`` and ``high = max(0, max x)``, over what has one scale: all of ``x`` per_tensor, a group
    per_group, and per_token what an index of the first two dims selects. So a 2-D ``x`` has one scale per_token, a 3-D
    one a scale for each token. A given scale and zero point are taken as they are.

    Source: ``compute_dynamic_scales_and_zp`` and ``calculate_qparams`` in ``quantization/utils/helpers.py``,
    ``_quantize_dequantize`` in ``quantization/lifecycle/forward_helpers.py``
    """
    if input_scale is not None:
        return float_codes(x, input_scale, spec.dtype, input_zero_point), input_scale, input_zero_point
    if spec.group is not None:
        size, k = spec.group, x.shape[-1]
        groups = spec.scales_along(k)
        # The library wants whole groups; zeros beyond k change no scale.
        rows = F.pad(x, (0, groups * size - k)).unflatten(-1, (groups, size))
        scale = _symmetric_scale(rows.abs().amax(-1, keepdim=True), spec)
        return float_codes(rows, scale, spec.dtype).flatten(-2)[..., :k], scale.squeeze(-1), None
    # No dims are all dims, and keep none.
    dims = list(range(2, x.dim())) if spec.granularity == Granularity.PER_TOKEN else []
    if spec.symmetric:
        scale = _symmetric_scale(x.abs().amax(dims, keepdim=bool(dims)), spec)
        return float_codes(x, scale, spec.dtype), scale, None
    low, high = x.amin(dims, keepdim=bool(dims)).clamp(max=0), x.amax(dims, keepdim=bool(dims)).clamp(min=0)
    unfloored = _divided(high - low, 255)
    zero_point = low / unfloored
    if not dims:
        # What is subtracted there is two scalars, of which the float32 one decides the dtype.
        zero_point = zero_point.float()
    zero_point = (-128 - zero_point).clamp(-128, 127).round()
    zero_point = zero_point.masked_fill(zero_point.isnan(), 0).to(torch.int32)
    scale = _floored(unfloored)
    return float_codes(x, scale, spec.dtype, zero_point), scale, zero_point


def _symmetric_scale(amax: Tensor, spec: OperandSpec) -> Tensor:
    return _floored(_divided(amax, 448.0 if spec.dtype in FLOAT8_DTYPES else 127.5))


def _divided(x: Tensor, divisor: float) -> Tensor:
    # CUDA multiplies by the reciprocal of a Python number, and divides by a tensor.
    return x / x.new_full((), divisor)


def _floored(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)


def _own_hooks(module: nn.Module) -> frozenset[int]:
    handle = getattr(module, "ct_decompress_hook", None)
    return frozenset() if handle is None else frozenset({handle.id})


def _finish(model: nn.Module) -> tuple[str, ...]:
    """Remove what would decompress the model at its next call, and the offloading wrappers of all its modules."""
    for module in model.modules():
        hook = getattr(module, "ct_decompress_hook", None)
        if hook is not None and not any(map(_is_compressed, module.modules())):
            hook.remove()
            del module.ct_decompress_hook
    caches: list[Any] = [x._parameters for x in model.modules() if hasattr(x._parameters, "offload_device")]
    devices = sorted({_device_name(x) for cache in caches for x in (cache.onload_device, cache.offload_device)})
    if len(devices) > 1:
        where = ", ".join(devices)
        return (f"offloading wrappers break the graph and stay, as the model is spread over {where}; load it on one",)
    if caches:
        from compressed_tensors.offload import remove_dispatch

        wrapped = [module for module in model.modules() if hasattr(module, "_original_forward_func")]
        remove_dispatch(model)
        for module in wrapped:
            if getattr(module.forward, "__func__", None) is type(module).forward:
                del module.forward
    return ()


def _is_compressed(module: Any) -> bool:
    return _recognizes(module) and getattr(module.quantization_status, "value", None) == _COMPRESSED


register_adapter(
    Adapter(
        library="compressed-tensors",
        effect="break the graph",
        recognizes=_recognizes,
        describe=_describe,
        check=_check,
        convert=_convert,
        own_hooks=_own_hooks,
        finish=_finish,
    )
)
