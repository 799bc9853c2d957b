"""Checkpoint transforms: scales, codes and layouts of weights, as a kernel wants them.

Each function runs once, at load: it checks values as well as shapes, so it wants real tensors, not fake or meta ones.
None modifies its inputs. A weight is ``[n, k]``, one row per output
channel, and int4 codes are unpacked (one per element) everywhere but in ``pack_int4`` and ``unpack_int4``.
"""

from __future__ import annotations

from fx_quant.ops import repeat_blocks
from fx_quant.weights.checks import INT4, UINT4, WeightError
from fx_quant.weights.layouts import pack_int4, unpack_int4
from fx_quant.weights.shards import (
    all_close_1d,
    azp_adjoint,
    convert_to_channelwise,
    merge_input_scales,
    normalize_e4m3fn_to_e4m3fnuz,
    per_tensor_dequantize,
    requantize_with_max_scale,
)

__all__ = [
    "INT4",
    "UINT4",
    "WeightError",
    "all_close_1d",
    "azp_adjoint",
    "convert_to_channelwise",
    "merge_input_scales",
    "normalize_e4m3fn_to_e4m3fnuz",
    "pack_int4",
    "per_tensor_dequantize",
    "repeat_blocks",
    "requantize_with_max_scale",
    "unpack_int4",
]
