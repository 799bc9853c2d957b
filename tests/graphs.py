"""The joint graph of a module, captured as the backend sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph

from fx_quant.capture import run_captured, run_eagerly
from fx_quant.compat import copy_graph, static_input_indices
from fx_quant.config import Options
from fx_quant.passes.pipeline import Rewriting, to_canonical, to_kernels
from fx_quant.passes.printer import print_graph
from fx_quant.target import named_target


@dataclass
class Captured:
    """One graph of a module on its way through the passes, as text and as data.

    Args:
        source: the graph as Inductor hands it to the pass.
        state: sites, misses and the graph after the passes.
        canonical, kernels: text of the graph with canonical ops, and with kernel ops.
    """

    source: Graph
    state: Rewriting
    before: str
    canonical: str
    kernels: str


def capture(
    model: Callable[..., Any],
    *inputs: torch.Tensor,
    dynamic_rows: bool = False,
    target: str = "x86_vnni",
    options: dict[str, Any] | None = None,
) -> list[Captured]:
    """Each joint graph of ``model`` on ``inputs``, rewritten for ``target``."""
    captured: list[Captured] = []

    def on_graph(graph: Graph) -> None:
        source, _ = copy_graph(graph)
        state = to_canonical(graph, named_target(target), Options.parse(options or {}), static_input_indices())
        before, canonical = print_graph(state.before), print_graph(state.graph)
        if state.selections:
            to_kernels(state)
        captured.append(Captured(source, state, before, canonical, print_graph(state.graph)))

    torch._dynamo.reset()
    if dynamic_rows:
        inputs = tuple(x.clone() for x in inputs)
        for x in inputs:
            for dim in range(x.dim() - 1):
                torch._dynamo.mark_dynamic(x, dim)
    run_captured(model, inputs, {}, on_graph=on_graph, inner_compile=run_eagerly)
    return captured
