"""vLLM's linear-kernel interface over our kernels: classes that are supported, can implement, prepare and apply.

A class of ours stands for the kernels of the registry that name it (``CutlassFP8ScaledMMLinearKernel``, ...; ``dir``
lists them), and everything it answers is read off their requirements; a class of somebody else implements
``MMLinearKernel`` itself. Both kinds are chosen by the same functions.

Beside them stand vLLM's functions of codes that are given: ``dispatch_w8a8_scaled_mm`` and the five that it returns
(``cutlass_``, ``rocm_per_tensor_``, ``torch_per_tensor_``, ``torch_per_token_``, ``torch_channelwise_w8a8_scaled_mm``),
the constants of how an operand is quantized (``kFp8DynamicTokenSym``, ...; ``keys`` has them all), vLLM's names of the
classes for blocks (``CutlassFp8BlockScaledMMKernel``, ...), ``register_linear_kernel``,
the probes ``cutlass_fp8_supported``, ``cutlass_block_fp8_supported``, ``cutlass_group_gemm_supported`` and
``sparse_cutlass_supported``, and ``maybe_create_device_identity``. Transforms of weights are in ``fx_quant.weights``.

Source: vLLM, ``model_executor/kernels/linear/base.py`` (names, signatures and lifecycle).
"""

from __future__ import annotations

from typing import Any

from fx_quant.linear_kernels.choose import (
    choose_mp_linear_kernel,
    choose_scaled_mm_linear_kernel,
    init_fp8_linear_kernel,
    init_int8_linear_kernel,
    is_supported_and_can_implement_kernel,
)
from fx_quant.linear_kernels.classes import BLOCK_NAMES, derived_classes, possible_kernels, register_linear_kernel
from fx_quant.linear_kernels.configs import (
    FP8ScaledMMLinearLayerConfig,
    GroupShape,
    Int8ScaledMMLinearLayerConfig,
    MMLinearLayerConfig,
    MPLinearLayerConfig,
    QuantKey,
    ScaleDesc,
    ScaledMMLinearLayerConfig,
)
from fx_quant.linear_kernels.interface import MMLinearKernel
from fx_quant.linear_kernels.keys import QUANT_KEYS
from fx_quant.linear_kernels.params import FP8Params, Int8Params, LayerError, MPParams, Params, replace_parameter
from fx_quant.linear_kernels.registry import (
    FP8ScaledMMLinearKernel,
    Int8ScaledMMLinearKernel,
    MPLinearKernel,
    RegistryLinearKernel,
    ScaledMMLinearKernel,
)
from fx_quant.linear_kernels.w8a8 import (
    cutlass_block_fp8_supported,
    cutlass_fp8_supported,
    cutlass_group_gemm_supported,
    cutlass_w8a8_scaled_mm,
    dispatch_w8a8_scaled_mm,
    maybe_create_device_identity,
    rocm_per_tensor_w8a8_scaled_mm,
    sparse_cutlass_supported,
    torch_channelwise_w8a8_scaled_mm,
    torch_per_tensor_w8a8_scaled_mm,
    torch_per_token_w8a8_scaled_mm,
)

__all__ = [
    "FP8Params",
    "FP8ScaledMMLinearKernel",
    "FP8ScaledMMLinearLayerConfig",
    "GroupShape",
    "Int8Params",
    "Int8ScaledMMLinearKernel",
    "Int8ScaledMMLinearLayerConfig",
    "LayerError",
    "MMLinearKernel",
    "MMLinearLayerConfig",
    "MPLinearKernel",
    "MPLinearLayerConfig",
    "MPParams",
    "Params",
    "QuantKey",
    "RegistryLinearKernel",
    "ScaleDesc",
    "ScaledMMLinearKernel",
    "ScaledMMLinearLayerConfig",
    "choose_mp_linear_kernel",
    "choose_scaled_mm_linear_kernel",
    "cutlass_block_fp8_supported",
    "cutlass_fp8_supported",
    "cutlass_group_gemm_supported",
    "cutlass_w8a8_scaled_mm",
    "dispatch_w8a8_scaled_mm",
    "init_fp8_linear_kernel",
    "init_int8_linear_kernel",
    "is_supported_and_can_implement_kernel",
    "maybe_create_device_identity",
    "possible_kernels",
    "register_linear_kernel",
    "replace_parameter",
    "rocm_per_tensor_w8a8_scaled_mm",
    "sparse_cutlass_supported",
    "torch_channelwise_w8a8_scaled_mm",
    "torch_per_tensor_w8a8_scaled_mm",
    "torch_per_token_w8a8_scaled_mm",
]


def __getattr__(name: str) -> Any:
    """A constant (``kFp8DynamicTokenSym``), or the class of that name that stands for kernels."""
    if name in QUANT_KEYS:
        return QUANT_KEYS[name]
    derived = None if name.startswith("_") else derived_classes().get(BLOCK_NAMES.get(name, name))
    if derived is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__dir__())}")
    return derived


def __dir__() -> list[str]:
    return sorted({*__all__, *derived_classes(), *BLOCK_NAMES, *QUANT_KEYS})
