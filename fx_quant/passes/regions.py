"""Quantized matmuls inside the subgraphs of higher-order ops: branches, loops, regions that are compiled once.

Such a graph goes through the passes by itself, where all its operands may be another tensor in each call. What that
cannot rewrite is missed once for each call of the region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch.fx import Graph, Node

from fx_quant.passes.contractions import is_contraction, op_name, subgraphs_of
from fx_quant.passes.inputs import Inputs
from fx_quant.passes.origins import Origin, Origins

Reason = tuple[Node, Node, str]


class Finder(Protocol):
    """Finds the quantized matmuls of a subgraph whose inputs at some positions are weights."""

    def __call__(self, graph: Graph, static: frozenset[int], given: Mapping[Node, Origin]) -> Findings:
        """The matmuls that could be rewritten, those that are recognised, and why the others are missed."""
        ...


Findings = tuple[list[Node], list[Node], list[Reason]]


def reasons_in_regions(graph: Graph, origins: Origins, inputs: Inputs, find: Finder) -> list[Reason]:
    """For each call of a subgraph each quantized matmul in it that its own passes leave: the node, where and why."""
    reasons: list[Reason] = []
    known: dict[object, list[Reason]] = {}
    for node in graph.nodes:
        if is_contraction(node):
            continue  # attention, whose subgraphs only change its scores
        for subgraph in subgraphs_of(node):
            operands = _operands(node, len(subgraph.find_nodes(op="placeholder")))
            static = frozenset(i for i, n in enumerate(operands) if n not in inputs.runtime)
            kinds = tuple(None if (o := origins.of(n)) is None else (o.kind, o.stored) for n in operands)
            key = (id(subgraph), static, kinds)
            if key not in known:
                known[key] = _inside(op_name(node.target), subgraph, operands, static, origins, find)
            reasons += known[key]
    return reasons


def _operands(node: Node, count: int) -> Sequence[Node]:
    """What the subgraph is called with, in order; nothing where that is not known."""
    tensors: list[Node] = []
    _collect(node.args, tensors)
    return tensors if len(tensors) == count else ()


def _collect(value: object, into: list[Node]) -> None:
    if isinstance(value, Node):
        if value.meta.get("val") is not None:
            into.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, into)


def _inside(
    op: str, graph: Graph, operands: Sequence[Node], static: frozenset[int], origins: Origins, find: Finder
) -> list[Reason]:
    placeholders = graph.find_nodes(op="placeholder")
    brought = {
        placeholder: origin
        for placeholder, operand in zip(placeholders, operands, strict=False)
        if (origin := origins.of(operand)) is not None
    }
    sites, _, missed = find(graph, static, brought)
    alone = find(graph, frozenset(), {})
    handled = {*alone[0], *alone[1]}
    reason = f"it is inside {op}, where the passes do not know which operands are weights"
    left = [(gemm, gemm, reason) for gemm in sites if gemm not in handled]
    return left + [(gemm, node, f"inside {op}: {rule}") for gemm, node, rule in missed if gemm not in handled]
