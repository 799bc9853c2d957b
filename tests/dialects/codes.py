"""The codes that a graph makes from floats, before and after the passes: how many of them a rewrite changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fx_quant.compat import row_scales_on_cpu
from fx_quant.scheme import CODE_DTYPES


def collecting(codes: list[Tensor]) -> Callable[..., Callable[..., Any]]:
    """An ``inner_compile`` that runs the graph op by op and adds to ``codes`` those that an op makes from floats."""

    def inner_compile(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        def run(inputs: list[Any]) -> Any:
            # A torch-function mode left active by a library must not see the graph's ops a second time.
            with torch._C.DisableTorchFunction(), row_scales_on_cpu():
                return _Collector(gm, codes).run(*inputs)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return inner_compile


class _Collector(Interpreter):
    def __init__(self, gm: GraphModule, codes: list[Tensor]) -> None:
        super().__init__(gm)
        self.codes = codes

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and any(_is_float(self.env.get(source)) for source in n.all_input_nodes):
            leaves = torch.utils._pytree.tree_leaves(result)
            self.codes += [each.clone() for each in leaves if isinstance(each, Tensor) and each.dtype in CODE_DTYPES]
        return result


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in CODE_DTYPES


def fraction_changed(source: Sequence[Tensor], rewritten: Sequence[Tensor]) -> float | None:
    """The largest fraction of codes that differ between a tensor of ``rewritten`` and the nearest of ``source``.

    Only tensors of one dtype and size are compared; None where there are none. A float8 zero is the other zero.
    """
    nearest = []
    for codes in rewritten:
        alike = [each for each in source if each.dtype is codes.dtype and each.numel() == codes.numel()]
        if alike:
            nearest.append(min(_differing(each, codes) for each in alike))
    return max(nearest, default=None)


def _differing(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten().float(), b.flatten().float()
    same = (a == b) | (a.isnan() & b.isnan())
    return float((~same).double().mean()) if a.numel() else 0.0
