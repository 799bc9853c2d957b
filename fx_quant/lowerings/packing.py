"""``fx_quant::prepack`` and ``fx_quant::fold``: extern calls whose results belong to the cache that made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

from fx_quant.kernels.packed_weights import prepack
from fx_quant.ops.fold import fold, packing_program, with_several_results

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
    def kept(tensors: list, recipe: Any) -> list[TensorBox]:
        """Call the op, and keep Inductor from reusing the memory of its results: the next call hands it out again."""
        called, count = op, None
        if V.graph.cpp_wrapper:
            called, recipe, count = _for_cpp_wrapper(op, recipe)
        outputs: Any = _Call.create(called, tensors, recipe)
        results = [TensorBox.create(output) for output in outputs[:count]]
        for result in results:
            result.realize()
            V.graph.never_reuse_buffers.add(result.get_name())
        return results


def _for_cpp_wrapper(op: torch._ops.OpOverload, recipe: Any) -> tuple[torch._ops.OpOverload, Any, int | None]:
    """An op, its last argument and how many of its results are those of ``op`` by ``recipe``; None is all.

    Layouts or a program, the recipe is what is made of the tensors. Inductor's C++ wrapper takes a list of one tensor
    for a tensor, and crashes.
    """
    fold_op = torch.ops.fx_quant.fold.default
    if op is not fold_op and len(recipe) > 1:
        return op, recipe, None
    program = recipe if op is fold_op else packing_program(*recipe)
    called = with_several_results(program)
    return fold_op, called, None if called == program else 1


for _op in _BODIES:
    _lower(_op)
