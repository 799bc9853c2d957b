"""compressed-tensors: what vLLM and llm-compressor checkpoints are, in the states in which a model can be compiled.

``frozen`` is a calibrated model before compression: the weight is fake-quantized in each forward. ``decompressed`` is
what Hugging Face leaves after the first forward: dense weights, fake-quantized activations. ``compressed`` holds codes,
and a hook inside the traced call would decompress them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.dialects.registry import flow
from tests.dialects.weights import K, N

NEEDS = ("compressed-tensors", "transformers")
WHY = "the hooks around each linear break the graph: the modules must be converted first"


def _arguments(**fields: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(symmetric=True, **fields)


def _scheme(weights: dict[str, Any], activations: dict[str, Any] | None = None) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    fields = {"weights": _arguments(**weights)}
    if activations is not None:
        fields["input_activations"] = _arguments(**activations)
    return QuantizationScheme(targets=["Linear"], **fields)


def _preset(name: str) -> Any:
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    return preset_name_to_scheme(name, ["Linear"])


_INT8_CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
_FLOAT8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
_FLOAT8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor"}

SCHEMES: dict[str, Callable[[], Any]] = {
    "w8a8_int_dyn": partial(
        _scheme, _INT8_CHANNEL, {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    ),
    "w8a8_int_static": partial(
        _scheme, _INT8_CHANNEL, {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    ),
    "fp8_dyn": partial(
        _scheme, _FLOAT8_CHANNEL, {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    ),
    "fp8_static": partial(_scheme, _FLOAT8_TENSOR, _FLOAT8_TENSOR | {"dynamic": False}),
    "fp8_block": partial(
        _scheme,
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        {"num_bits": 8, "type": "float", "strategy": "group", "dynamic": True, "group_size": 128},
    ),
    "w4a8": partial(
        _scheme,
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    ),
    "w8a16": partial(_scheme, _INT8_CHANNEL),
    "w4a16": partial(_scheme, {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
    "nvfp4": partial(_preset, "NVFP4"),
    "mxfp4": partial(_preset, "MXFP4"),
}


def configuration(scheme: Any) -> Any:
    """A quantization config of ``scheme`` for every linear but the head."""
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen")


def _extremes(weight: torch.Tensor, arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight that each scale covers."""
    strategy = str(getattr(arguments.strategy, "value", arguments.strategy))
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy in ("group", "tensor_group"):
        groups = weight.unflatten(-1, (-1, arguments.group_size))
        return groups.amin(-1), groups.amax(-1)
    if strategy == "block":
        rows, columns = arguments.block_structure
        tiles = weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    raise ValueError(f"no scales for the strategy {strategy!r}")


def _set(parameter: nn.Parameter | None, value: torch.Tensor) -> None:
    if parameter is not None:
        parameter.data = value.reshape(parameter.shape).to(parameter.dtype)


def calibrate(model: nn.Module) -> nn.Module:
    """Fill in the scales of weights and static activations by the library's own arithmetic, from min and max."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    low, high = torch.tensor([-4.0]), torch.tensor([4.2])
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or not hasattr(module, "weight"):
            continue
        weight = module.weight.data
        if scheme.weights is not None:
            global_scale = getattr(module, "weight_global_scale", None)
            if global_scale is not None:
                _set(global_scale, generate_gparam(weight.min(), weight.max()))
            extremes = _extremes(weight, scheme.weights)
            scale, zero_point = calculate_qparams(*extremes, scheme.weights, global_scale=global_scale)
            _set(module.weight_scale, scale)
            _set(getattr(module, "weight_zero_point", None), zero_point)
        if getattr(module, "input_scale", None) is not None:
            scale, zero_point = calculate_qparams(low, high, scheme.input_activations)
            _set(module.input_scale, scale)
            _set(getattr(module, "input_zero_point", None), zero_point)
        if getattr(module, "input_global_scale", None) is not None:
            _set(module.input_global_scale, generate_gparam(low[0], high[0]))
    return model


def in_state(scheme: str, state: str, dtype: torch.dtype, bias: bool) -> nn.Module:
    """A linear quantized with ``SCHEMES[scheme]``, in one of the states of this module's docstring."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype).eval().requires_grad_(False)
    apply_quantization_config(model, configuration(SCHEMES[scheme]()), show_progress=False)
    calibrate(model)
    if state == "frozen":
        return model
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    if state == "decompressed":
        compressor.decompress_model(model)
    return model


_STATES = {
    "decompressed": tuple(SCHEMES),
    "frozen": ("w8a8_int_dyn", "w4a8", "fp8_static", "w4a16", "fp8_block", "nvfp4"),
    "compressed": ("w8a8_int_dyn", "w4a8", "fp8_dyn", "w4a16"),
}
for _state, _schemes in _STATES.items():
    for _name in _schemes:
        flow(
            f"ct_{_name}_{_state}",
            needs=NEEDS,
            expected="unsupported" if "fp4" in _name else "prepare",
            why="float4 codes have no kernel here" if "fp4" in _name else WHY,
            what=f"compressed-tensors {_name}, {_state}",
            # Its fp4 compressors decode to bfloat16 whatever the model's dtype.
            dtypes=(torch.bfloat16,) if "fp4" in _name else (torch.bfloat16, torch.float32),
        )(partial(in_state, _name, _state))
