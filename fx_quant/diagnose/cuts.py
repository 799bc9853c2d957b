"""Parts of a graph alone, and the values that it has where they begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from fx_quant.passes.rewriting import Rewriting


def cut_out(state: Rewriting, results: Sequence[Node]) -> tuple[Graph, list[str]]:
    """What leads to ``results`` of the rewritten graph, as a graph of its own, and its inputs: names of source nodes.

    A node of the rewritten graph that is none of ours stands for the source node of the same name.
    """
    source = {node.name for node in state.before.nodes}
    needed: set[Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += () if node.name in source else node.all_input_nodes
    # Inductor reads the sizes of a dynamic graph off its symbolic inputs.
    needed.update(n for n in state.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.SymInt))

    graph, copied, inputs = Graph(state.graph.owning_module), {}, []
    for node in state.graph.nodes:
        if node in needed and node.name in source:
            copied[node] = graph.placeholder(node.name)
            copied[node].meta = dict(node.meta)
            inputs.append(node.name)
    for node in state.graph.nodes:
        if node in needed and node.name not in source:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in results))
    return graph, inputs


class Keeper(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.kept: dict[str, Tensor] = {}
        self._names = names

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run ``n`` and keep its value when asked for."""
        value = super().run_node(n)
        if n.name in self._names:
            self.kept[n.name] = value
        return value
