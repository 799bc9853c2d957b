"""``fx_quant::prepack`` and ``fx_quant::fold``: extern calls whose results belong to the cache that made them."""

from __future__ import annotations

import torch
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V

import fx_quant.kernels.packing  # noqa: F401  (registers the op)


def _lower(op: torch._ops.OpOverload) -> None:
    @register_lowering(op, type_promotion_kind=None)
    def kept(*arguments) -> list[TensorBox]:
        """Call the op, and keep Inductor from reusing the memory of its results: the next call hands it out again."""
        results = fallback_handler(op, add_to_fallback_set=False)(*arguments)
        for result in results:
            result.realize()
            V.graph.never_reuse_buffers.add(result.get_name())
        return results


_lower(torch.ops.fx_quant.prepack.default)
_lower(torch.ops.fx_quant.fold.default)
