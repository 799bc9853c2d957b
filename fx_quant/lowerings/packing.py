"""``fx_quant::prepack``: an extern call whose results belong to the cache that made them."""

from __future__ import annotations

import torch
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V

import fx_quant.kernels.packing  # noqa: F401  (registers the op)

_PREPACK = torch.ops.fx_quant.prepack.default


@register_lowering(_PREPACK, type_promotion_kind=None)
def prepack(weights: list[TensorBox], layouts: list[str]) -> list[TensorBox]:
    """Call the op, and keep Inductor from reusing the memory of its results: the next call hands it out again."""
    results = fallback_handler(_PREPACK, add_to_fallback_set=False)(weights, layouts)
    for result in results:
        result.realize()
        V.graph.never_reuse_buffers.add(result.get_name())
    return results
