"""bitsandbytes: Linear4bit on a CPU, after the first forward, which packs the weight."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.dialects.registry import flow
from tests.dialects.variants import Activation, Variant
from tests.dialects.weights import K, N


def linear4bit(quant_type: str, dtype: torch.dtype, bias: bool) -> nn.Module:
    """A Linear4bit of ``quant_type`` that has run once."""
    import bitsandbytes

    torch.manual_seed(0)
    dense = nn.Linear(K, N, bias=bias).to(dtype)
    layer = bitsandbytes.nn.Linear4bit(
        K, N, bias=bias, compute_dtype=dtype, quant_type=quant_type, compress_statistics=False
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        dense.weight.data.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=False
    )
    if bias:
        layer.bias = nn.Parameter(dense.bias.data.clone(), requires_grad=False)
    model = nn.Sequential(layer.to("cpu")).eval()
    ((x,), _) = Activation()(Variant(dtype, 3, dynamic=False, bias=bias))
    with torch.no_grad():
        model(x)
    return model


for _type in ("nf4", "fp4"):
    flow(
        f"bnb_{_type}_cpu",
        needs=("bitsandbytes",),
        what=f"bitsandbytes Linear4bit {_type} on a CPU",
        expected="unsupported",
        why="the product is an opaque op of bitsandbytes whose codes index a table of sixteen values",
    )(partial(linear4bit, _type))
