"""``fx_quant::prepack`` and ``fx_quant::fold``: extern calls whose results belong to the cache that made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

from fx_quant.kernels.packing import prepack
from fx_quant.ops.fold import fold

_BODIES: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    torch.ops.fx_quant.prepack.default: prepack,
    torch.ops.fx_quant.fold.default: fold,
}


class _Call(ir.FallbackKernel):
    """A call of the op's body: by way of the dispatcher it would take two to three times as long, in each call."""

    def codegen(self, wrapper: Any) -> None:
        if not V.graph.cpp_wrapper:
            body = _BODIES[self.op_overload]  # pyrefly: ignore[bad-index]
            self.python_kernel_name = f"fx_quant_{body.__name__}"
            wrapper.add_import_once(f"from {body.__module__} import {body.__name__} as {self.python_kernel_name}")
        super().codegen(wrapper)


def _lower(op: torch._ops.OpOverload) -> None:
    @register_lowering(op, type_promotion_kind=None)
    def kept(*arguments) -> list[TensorBox]:
        """Call the op, and keep Inductor from reusing the memory of its results: the next call hands it out again."""
        results = [TensorBox.create(result) for result in _Call.create(op, *arguments)]
        for result in results:
            result.realize()
            V.graph.never_reuse_buffers.add(result.get_name())
        return results


for _op in _BODIES:
    _lower(_op)
