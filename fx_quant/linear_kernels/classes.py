"""The classes of our kernels, by the names that vLLM gave them where it has them."""

from __future__ import annotations

from fx_quant.linear_kernels.interface import FP8ScaledMMLinearKernel, Int8ScaledMMLinearKernel, MPLinearKernel


class CPUInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """Our VNNI tiles."""

    KERNELS = ("cpu_int8_vnni",)


class TorchInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """``torch._int_mm``."""

    KERNELS = ("pytorch_int_mm", "pytorch_int_mm_cuda")


class CPUFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """Codes widened exactly to bfloat16 or float32."""

    KERNELS = ("cpu_float8_bf16", "cpu_float8_float32")


class PerTensorTorchFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """``torch._scaled_mm`` with one scale for each operand."""

    KERNELS = ("pytorch_scaled_mm", "pytorch_scaled_mm_rocm", "pytorch_scaled_mm_rocm_fnuz")


class RowWiseTorchFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """``torch._scaled_mm`` with one scale for each token and output."""

    KERNELS = ("pytorch_scaled_mm_rowwise", "pytorch_scaled_mm_rowwise_rocm", "pytorch_scaled_mm_rowwise_rocm_fnuz")


class ChannelWiseTorchFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """``torch._scaled_mm`` with unit scales, dequantized after it: every granularity, the activation's too."""

    KERNELS = ("pytorch_channelwise", "pytorch_channelwise_rocm", "pytorch_channelwise_rocm_fnuz")


class BlockWiseTorchFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """``torch._scaled_mm`` with scales of 1 x 128 and 128 x 128, or both operands dequantized."""

    KERNELS = ("pytorch_scaled_mm_block", "pytorch_dequantized_block")


class CPUWeightOnlyLinearKernel(MPLinearKernel):
    """ATen's int8 weight-only matmul."""

    KERNELS = ("cpu_weight_only_int8",)


class TorchMPLinearKernel(MPLinearKernel):
    """The weight dequantized, then a float matmul."""

    KERNELS = ("pytorch_weight_only",)
