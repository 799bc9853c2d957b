"""vLLM's names of how an operand is quantized: ``ScaleDesc`` and ``QuantKey`` constants.

Their codes are float8_e4m3fn, as vLLM has them on all but AMD's MI300, whose codes are float8_e4m3fnuz: there
``dataclasses.replace(key, dtype=torch.float8_e4m3fnuz)``.

Source: vLLM, ``model_executor/layers/quantization/utils/quant_utils.py`` (names and what they stand for).
"""

from __future__ import annotations

import torch

from fx_quant.linear_kernels.configs import GroupShape, QuantKey, ScaleDesc

_F32, _FP8, _INT8 = torch.float32, torch.float8_e4m3fn, torch.int8

kStaticTensorScale = ScaleDesc(_F32, True, GroupShape.PER_TENSOR)
kDynamicTensorScale = ScaleDesc(_F32, False, GroupShape.PER_TENSOR)
kStaticTokenScale = ScaleDesc(_F32, True, GroupShape.PER_TOKEN)
kDynamicTokenScale = ScaleDesc(_F32, False, GroupShape.PER_TOKEN)
kStaticChannelScale = ScaleDesc(_F32, True, GroupShape.PER_CHANNEL)
kStatic128BlockScale = ScaleDesc(_F32, True, GroupShape(128, 128))
kDynamic64Scale = ScaleDesc(_F32, False, GroupShape(1, 64))
kDynamic128Scale = ScaleDesc(_F32, False, GroupShape(1, 128))

kFp8StaticTensorSym = QuantKey(_FP8, kStaticTensorScale)
kFp8DynamicTensorSym = QuantKey(_FP8, kDynamicTensorScale)
kFp8StaticTokenSym = QuantKey(_FP8, kStaticTokenScale)
kFp8DynamicTokenSym = QuantKey(_FP8, kDynamicTokenScale)
kFp8StaticChannelSym = QuantKey(_FP8, kStaticChannelScale)
kFp8Static128BlockSym = QuantKey(_FP8, kStatic128BlockScale)
kFp8Dynamic64Sym = QuantKey(_FP8, kDynamic64Scale)
kFp8Dynamic128Sym = QuantKey(_FP8, kDynamic128Scale)
kInt8StaticTensorSym = QuantKey(_INT8, kStaticTensorScale)
kInt8StaticChannelSym = QuantKey(_INT8, kStaticChannelScale)
kInt8DynamicTokenSym = QuantKey(_INT8, kDynamicTokenScale)

QUANT_KEYS = {name: value for name, value in globals().items() if name.startswith("k")}
