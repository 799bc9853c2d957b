"""Intel Neural Compressor's ``INCWeightOnlyLinear``: integer codes in groups along k, packed as GPTQ packs them.

Its forward logs, which breaks the graph, and decodes the whole weight in the first call, a column at a time, to keep it
in float32 from then on.

Source: https://github.com/intel/neural-compressor (3.10), ``torch/algorithms/weight_only/modules.py``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fx_quant.layers.linear import QuantizedLinear
from fx_quant.loading.adapters.base import Adapter, Conversion, is_of, must, register_adapter
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.weights import UINT4, pack_int4

_HOME = "neural_compressor.torch.algorithms.weight_only.modules"
_ELSEWHERE = "quantize the float model with fx_quant.quantize_"
_NOTE = (
    "the library rounds the decoded weight to float16 and returns float32; a QuantizedLinear does not round it, and "
    "returns what it is given"
)


def _recognizes(module: nn.Module) -> bool:
    return is_of(module, _HOME) and hasattr(module, "qweight")


def _describe(module: Any) -> str:
    return f"{module.dtype}{module.bits} in groups of {module.group_size}"


def _check(module: Any) -> None:
    kind = type(module).__name__
    must(kind == "INCWeightOnlyLinear", f"it must be an INCWeightOnlyLinear, got {kind}; {_ELSEWHERE}")
    must("forward" not in vars(module), "its forward must be its class's, got another; remove what replaced it")
    must(module.dtype == "int", f"its codes must be integers, got {module.dtype}; {_ELSEWHERE}")
    bits, k, size = module.bits, module.in_features, module.group_size
    must(bits in (2, 3, 4, 8), f"its codes must have 2, 3, 4 or 8 bits, got {bits}; {_ELSEWHERE}")
    must(k % size == 0 and k % 2 == 0, f"its k must be even and whole groups of {size}, got {k}; {_ELSEWHERE}")
    order = module.g_idx
    must(
        order is None or order.tolist() == [column // size for column in range(k)],
        "its g_idx must be in order (column // group_size), got activation ordering; quantize without act_order",
    )
    must(
        hasattr(module, "qzeros"),
        f"it must have zero points, as use_optimum_format=True stores them, got none; {_ELSEWHERE}",
    )


@torch.no_grad()
def _convert(module: Any) -> Conversion:
    held = module.unpack()
    codes, scale, zero_point = held["int_weight"], held["scales"], held["zp"]
    size = module.group_size
    granularity = Granularity.PER_CHANNEL if size == module.in_features else Granularity.per_group(size)
    # Codes are unsigned, whatever dtype the library's arithmetic leaves them in.
    codes, zero_point = codes.to(torch.uint8), zero_point.to(torch.uint8).int()
    packed = module.bits <= 4
    spec = OperandSpec(UINT4 if packed else torch.uint8, granularity, symmetric=False)
    linear = QuantizedLinear(
        Scheme(OperandSpec(torch.bfloat16), spec),
        pack_int4(codes) if packed else codes,
        scale.float(),
        weight_zero_point=zero_point,
        bias=None if module.bias is None else module.bias.float(),
    )
    return Conversion(linear, _weight(module), Numerics.APPROXIMATE, _NOTE)


def _weight(module: Any) -> Tensor:
    """The decoded weight, which the module keeps from its first call on."""
    if hasattr(module, "weight"):
        return module.weight.to(module.float_type)
    order, weight = module.g_idx, module.recover()
    module.g_idx = order  # which decoding fills in
    return weight


register_adapter(
    Adapter(
        library="neural-compressor",
        effect="break the graph",
        recognizes=_recognizes,
        describe=_describe,
        check=_check,
        convert=_convert,
    )
)
