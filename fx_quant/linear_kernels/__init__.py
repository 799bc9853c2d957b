"""vLLM's linear-kernel interface over our kernels: classes that are supported, can implement, prepare and apply.

A class of ours names kernels of the registry, and everything it answers is read off their requirements; a class of
somebody else implements ``MMLinearKernel`` itself. Both kinds are chosen by the same functions.

Source: vLLM, ``model_executor/kernels/linear/base.py`` (names, signatures and lifecycle).
"""

from __future__ import annotations

from fx_quant.linear_kernels.choose import (
    choose_mp_linear_kernel,
    choose_scaled_mm_linear_kernel,
    init_fp8_linear_kernel,
    init_int8_linear_kernel,
    is_supported_and_can_implement_kernel,
    possible_kernels,
)
from fx_quant.linear_kernels.classes import (
    AiterFP8BlockScaledMMLinearKernel,
    AiterFP8ScaledMMLinearKernel,
    AiterInt8ScaledMMLinearKernel,
    AiterPreshuffledFP8ScaledMMLinearKernel,
    BlockWiseTorchFP8ScaledMMLinearKernel,
    ChannelWiseTorchFP8ScaledMMLinearKernel,
    CPUFP8ScaledMMLinearKernel,
    CPUInt8ScaledMMLinearKernel,
    CPUWeightOnlyLinearKernel,
    CutlassFP8BlockScaledMMLinearKernel,
    CutlassFP8ScaledMMLinearKernel,
    CutlassInt8ScaledMMLinearKernel,
    FlashInferFP8BlockScaledMMLinearKernel,
    FlashInferFP8ScaledMMLinearKernel,
    MacheteLinearKernel,
    MarlinLinearKernel,
    PerTensorTorchFP8ScaledMMLinearKernel,
    ROCmFP8ScaledMMLinearKernel,
    RowWiseTorchFP8ScaledMMLinearKernel,
    TorchInt8ScaledMMLinearKernel,
    TorchMPLinearKernel,
    TritonFP8BlockScaledMMLinearKernel,
    TritonFP8ScaledMMLinearKernel,
    TritonInt8ScaledMMLinearKernel,
    TritonMPLinearKernel,
)
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
    "AiterFP8BlockScaledMMLinearKernel",
    "AiterFP8ScaledMMLinearKernel",
    "AiterInt8ScaledMMLinearKernel",
    "AiterPreshuffledFP8ScaledMMLinearKernel",
    "BlockWiseTorchFP8ScaledMMLinearKernel",
    "CPUFP8ScaledMMLinearKernel",
    "CPUInt8ScaledMMLinearKernel",
    "CPUWeightOnlyLinearKernel",
    "ChannelWiseTorchFP8ScaledMMLinearKernel",
    "CutlassFP8BlockScaledMMLinearKernel",
    "CutlassFP8ScaledMMLinearKernel",
    "CutlassInt8ScaledMMLinearKernel",
    "FP8Params",
    "FP8ScaledMMLinearKernel",
    "FP8ScaledMMLinearLayerConfig",
    "FlashInferFP8BlockScaledMMLinearKernel",
    "FlashInferFP8ScaledMMLinearKernel",
    "Int8Params",
    "Int8ScaledMMLinearKernel",
    "Int8ScaledMMLinearLayerConfig",
    "LayerError",
    "MMLinearKernel",
    "MMLinearLayerConfig",
    "MPLinearKernel",
    "MPLinearLayerConfig",
    "MPParams",
    "MacheteLinearKernel",
    "MarlinLinearKernel",
    "Params",
    "PerTensorTorchFP8ScaledMMLinearKernel",
    "ROCmFP8ScaledMMLinearKernel",
    "RegistryLinearKernel",
    "RowWiseTorchFP8ScaledMMLinearKernel",
    "ScaledMMLinearKernel",
    "ScaledMMLinearLayerConfig",
    "TorchInt8ScaledMMLinearKernel",
    "TorchMPLinearKernel",
    "TritonFP8BlockScaledMMLinearKernel",
    "TritonFP8ScaledMMLinearKernel",
    "TritonInt8ScaledMMLinearKernel",
    "TritonMPLinearKernel",
    "choose_mp_linear_kernel",
    "choose_scaled_mm_linear_kernel",
    "init_fp8_linear_kernel",
    "init_int8_linear_kernel",
    "is_supported_and_can_implement_kernel",
    "possible_kernels",
    "replace_parameter",
]
