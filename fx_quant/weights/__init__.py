"""Checkpoint transforms: scales, codes and layouts of weights, as a kernel wants them.

Each function runs once, at load: it checks values as well as shapes, so it wants real tensors, not fake or meta ones.
None modifies its inputs, except those named with a trailing underscore. A weight is ``[n, k]``, one row per output
channel, and int4 codes are unpacked (one per element) everywhere but in ``pack_int4`` and ``unpack_int4``.
"""

from __future__ import annotations

from fx_quant.weights.checks import INT4, UINT4, WeightError, require
from fx_quant.weights.layouts import (
    column_major_scales,
    dequantize_blockwise,
    expand_block_scale,
    pack_int4,
    pad_weight,
    repeat_blocks,
    round_scales_to_power_of_two,
    unpack_int4,
)
from fx_quant.weights.shards import (
    all_close_1d,
    azp_adjoint,
    convert_to_channelwise,
    merge_input_scales,
    merge_shards,
    normalize_e4m3fn_to_e4m3fnuz,
    normalize_e4m3fn_to_e4m3fnuz_,
    per_tensor_dequantize,
    requantize_with_max_scale,
    requantize_with_max_scale_,
)

__all__ = [
    "INT4",
    "UINT4",
    "WeightError",
    "all_close_1d",
    "azp_adjoint",
    "column_major_scales",
    "convert_to_channelwise",
    "dequantize_blockwise",
    "expand_block_scale",
    "merge_input_scales",
    "merge_shards",
    "normalize_e4m3fn_to_e4m3fnuz",
    "normalize_e4m3fn_to_e4m3fnuz_",
    "pack_int4",
    "pad_weight",
    "per_tensor_dequantize",
    "repeat_blocks",
    "requantize_with_max_scale",
    "requantize_with_max_scale_",
    "require",
    "round_scales_to_power_of_two",
    "unpack_int4",
]
