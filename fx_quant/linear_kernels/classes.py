"""The classes of our kernels, by the names that vLLM gave them where it has them."""

from __future__ import annotations

from fx_quant.linear_kernels.registry import FP8ScaledMMLinearKernel, Int8ScaledMMLinearKernel, MPLinearKernel


class CPUInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """Our tiles of each instruction set; for scales that vary along k those that decode the weight in cache."""

    KERNELS = (
        "cpu_int8_amx",
        "cpu_int8_vnni",
        "cpu_int8_avx_vnni",
        "cpu_int8_avx512",
        "cpu_int8_avx2",
        "cpu_int8_portable",
        "cpu_int8_blocks_bf16",
        "cpu_int8_blocks_float32",
    )


class TorchInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """``torch._int_mm``."""

    KERNELS = ("pytorch_int_mm", "pytorch_int_mm_cuda")


class CPUFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """Codes widened exactly to bfloat16 or float32."""

    KERNELS = (
        "cpu_float8_decoded_bf16",
        "cpu_float8_bf16",
        "cpu_float8_float32",
        "cpu_float8_blocks_bf16",
        "cpu_float8_blocks_float32",
    )


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
    """Weights decoded in registers by our own tiles, or ATen's weight-only matmuls."""

    KERNELS = (
        "cpu_weight_only_bf16",
        "cpu_weight_only_int4_bf16",
        "cpu_weight_only_float32",
        "cpu_weight_only_int4_float32",
        "cpu_weight_only_int8",
        "cpu_weight_only_int4",
    )


class TorchMPLinearKernel(MPLinearKernel):
    """The weight dequantized, then a float matmul."""

    KERNELS = ("pytorch_weight_only",)


class MacheteLinearKernel(MPLinearKernel):
    """vLLM's Machete kernels, for Hopper."""

    KERNELS = ("machete_int4", "machete_int8")


class MarlinLinearKernel(MPLinearKernel):
    """vLLM's Marlin kernels."""

    KERNELS = ("marlin_int4", "marlin_int8")


class CutlassFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """vLLM's CUTLASS kernels."""

    KERNELS = ("cutlass_float8",)


class CutlassFP8BlockScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """vLLM's CUTLASS kernels with scales of 1 x 128 and 128 x 128."""

    KERNELS = ("cutlass_float8_block",)


class CutlassInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """vLLM's CUTLASS kernels, with zero points of the activation."""

    KERNELS = ("cutlass_int8",)


class FlashInferFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """FlashInfer's ``bmm_fp8``."""

    KERNELS = ("flashinfer_float8",)


class FlashInferFP8BlockScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """FlashInfer's ``fp8_blockscale_gemm_sm90``."""

    KERNELS = ("flashinfer_float8_block_sm90",)


class ROCmFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """vLLM's skinny kernel for up to four rows, ``torch._scaled_mm`` for more."""

    KERNELS = ("rocm_float8", "rocm_float8_fnuz")


class AiterFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """AITER's row-wise kernels."""

    KERNELS = ("aiter_float8_rowwise", "aiter_float8_rowwise_fnuz")


class AiterPreshuffledFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """AITER's kernels over a shuffled weight."""

    KERNELS = ("aiter_float8_preshuffled", "aiter_float8_preshuffled_fnuz")


class AiterFP8BlockScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """AITER's kernels with scales of 1 x 128 and 128 x 128."""

    KERNELS = ("aiter_float8_block", "aiter_float8_block_fnuz")


class AiterInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """AITER's int8 kernels."""

    KERNELS = ("aiter_int8",)


class TritonFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """Our Triton kernels."""

    KERNELS = ("triton_float8", "triton_float8_fnuz")


class TritonFP8BlockScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """Our Triton kernels with scales of groups and blocks."""

    KERNELS = ("triton_float8_block", "triton_float8_block_fnuz")


class TritonInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """Our Triton kernels, with zero points of the activation."""

    KERNELS = ("triton_int8",)


class TritonMPLinearKernel(MPLinearKernel):
    """Our Triton kernels, which decode the weight as they read it."""

    KERNELS = (
        "triton_weight_only",
        "triton_weight_only_float8",
        "triton_weight_only_float8_fnuz",
        "triton_weight_only_int4",
        "triton_weight_only_int4_packed",
        "triton_weight_only_int8_packed",
        "triton_weight_only_uint8_packed",
        "triton_weight_only_float8_packed",
        "triton_weight_only_float8_fnuz_packed",
    )
