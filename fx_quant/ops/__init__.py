"""The canonical ops: schema, plain-PyTorch body (reference and test oracle) and fake function in one place.

A canonical op states mathematics and names no provider. Bodies are registered as CompositeExplicitAutograd: the op
stays opaque to AOTAutograd, runs eagerly on every device, and Inductor may still lower it.
"""

from __future__ import annotations

from fx_quant.ops import fold
from fx_quant.ops.attention import single_query_attention
from fx_quant.ops.decode import decode, repeat_blocks, unpack_codes, unpack_nibbles
from fx_quant.ops.library import KEEPING_TAGS, LIBRARY, MATMUL_TAGS, QUANTIZE_TAGS, register
from fx_quant.ops.quantize import (
    check_quantize,
    check_quantize_dynamic,
    choose_scale,
    quantize,
    quantize_dynamic,
)
from fx_quant.ops.scaled_mm import (
    accumulate,
    accumulate_blocks,
    check_scaled_mm,
    column_sums,
    correct,
    dequantize,
    scaled_mm,
)
from fx_quant.ops.weight_only_mm import check_weight_only_mm, dequantize_weight, weight_only_mm
from fx_quant.ops.zero_points import split_zero_point

__all__ = [
    "KEEPING_TAGS",
    "LIBRARY",
    "MATMUL_TAGS",
    "QUANTIZE_TAGS",
    "accumulate",
    "accumulate_blocks",
    "check_quantize",
    "check_quantize_dynamic",
    "check_scaled_mm",
    "check_weight_only_mm",
    "choose_scale",
    "column_sums",
    "correct",
    "decode",
    "dequantize",
    "dequantize_weight",
    "fold",
    "quantize",
    "quantize_dynamic",
    "register",
    "repeat_blocks",
    "scaled_mm",
    "single_query_attention",
    "split_zero_point",
    "unpack_codes",
    "unpack_nibbles",
    "weight_only_mm",
]
