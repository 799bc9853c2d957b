"""Ops that are a library's own fused kernel over a weight in a layout of its own: which, in words."""

from __future__ import annotations

OWN_KERNELS: dict[str, str] = {
    "aten._weight_int4pack_mm_for_cpu.default": "ATen's int4 kernel for CPU",
    "aten._weight_int4pack_mm.default": "ATen's int4 (tinygemm) kernel",
    "aten._weight_int4pack_mm_with_scales_and_zeros.default": "ATen's int4 kernel",
    "aten._dyn_quant_matmul_4bit.default": "ATen's KleidiAI int4 kernel",
    "torchao.da8w4_linear_cpu.default": "torchao's int8 x int4 kernel",
    "torchao.float8_linear_cpu.default": "torchao's float8 kernel for CPU",
    "bitsandbytes.gemv_4bit.default": "bitsandbytes' 4-bit kernel",
    "onednn.qlinear_pointwise.default": "oneDNN's quantized linear",
    "onednn.qlinear_pointwise.tensor": "oneDNN's quantized linear",
    "quantized.linear_dynamic.default": "torch.ao's quantized linear",
    "quantized.linear.default": "torch.ao's quantized linear",
}
