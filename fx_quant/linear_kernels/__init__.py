"""vLLM's linear-kernel interface over our kernels: classes that are supported, can implement, prepare and apply.

A class of ours stands for the kernels of the registry that name it (``CutlassFP8ScaledMMLinearKernel``, ...; ``dir``
lists them), and everything it answers is read off their requirements; a class of somebody else implements
``MMLinearKernel`` itself. Both kinds are chosen by the same functions.

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
from fx_quant.linear_kernels.classes import derived_classes, possible_kernels
from fx_quant.linear_kernels.configs import (
    FP8ScaledMMLinearLayerConfig,
    Int8ScaledMMLinearLayerConfig,
    MMLinearLayerConfig,
    MPLinearLayerConfig,
    ScaledMMLinearLayerConfig,
)
from fx_quant.linear_kernels.interface import MMLinearKernel
from fx_quant.linear_kernels.params import FP8Params, Int8Params, LayerError, MPParams, Params, replace_parameter
from fx_quant.linear_kernels.registry import (
    FP8ScaledMMLinearKernel,
    Int8ScaledMMLinearKernel,
    MPLinearKernel,
    RegistryLinearKernel,
    ScaledMMLinearKernel,
)

__all__ = [
    "FP8Params",
    "FP8ScaledMMLinearKernel",
    "FP8ScaledMMLinearLayerConfig",
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
    "RegistryLinearKernel",
    "ScaledMMLinearKernel",
    "ScaledMMLinearLayerConfig",
    "choose_mp_linear_kernel",
    "choose_scaled_mm_linear_kernel",
    "init_fp8_linear_kernel",
    "init_int8_linear_kernel",
    "is_supported_and_can_implement_kernel",
    "possible_kernels",
    "replace_parameter",
]


def __getattr__(name: str) -> Any:
    """The class of that name which stands for kernels, such as ``CutlassFP8ScaledMMLinearKernel``."""
    found = None if name.startswith("_") else derived_classes().get(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__dir__())}")
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *derived_classes()})
