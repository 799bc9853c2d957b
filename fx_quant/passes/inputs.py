"""Which nodes of a graph hold the same value in every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fx_quant.ops.purity import is_pure
from fx_quant.passes.memory import written_inputs
from fx_quant.passes.nodes import aten, dtype, is_op, shape, tensor
from fx_quant.scheme import CODE_DTYPES, FLOAT_DTYPES, INT8_DTYPES

# Bits to shift by, or a table: the program of what is folded has them as text.
_FEW, _INTEGERS = 64, INT8_DTYPES | {torch.int16, torch.int32, torch.int64}
_EMPTY = (aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default)


@dataclass(frozen=True)
class Inputs:
    """Which nodes hold the same value in every call of the compiled graph.

    Args:
        constant: parameters, buffers and constants of the graph that it does not write to.
        runtime: nodes that depend on anything else.
        brought: those of ``runtime`` that hold more than what was written to an empty tensor, which brings nothing.
        written: parameters, buffers and constants of the graph that it writes to; they are ``runtime`` too.
    """

    constant: frozenset[Node]
    runtime: frozenset[Node]
    brought: frozenset[Node]
    written: frozenset[Node]


def classify_inputs(graph: Graph, static_indices: frozenset[int] | None) -> Inputs:
    """Split nodes by whether they can change from call to call.

    Args:
        static_indices: positions of the placeholders that are parameters or buffers; None (a bare graph) takes those
            that hold codes or float vectors for such.
    """
    constant, runtime, kept = set(), set(), set()
    written = written_inputs(graph)
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        static = _looks_static(node) if static_indices is None else index in static_indices
        if static:
            kept.add(node)
        elif tensor(node) is not None:
            runtime.add(node)
    attributes = graph.find_nodes(op="get_attr")
    kept.update(attributes)
    constant.update(kept - written)
    runtime.update(kept & written)
    brought = set(runtime)
    for node in graph.nodes:
        # A size depends on the input's shape alone, and what is expanded to it holds the same values in every call.
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            continue
        # A literal of the code is copied in every call; a short one is as good as numbers.
        copied = is_op(node, aten.lift_fresh_copy.default) and (literal(node) is None or node.args[0] in written)
        changes = node.op == "call_function" and (not is_pure(node.target) or copied)
        sources = node.all_input_nodes
        if changes or not runtime.isdisjoint(sources):
            runtime.add(node)
            if not is_op(node, *_EMPTY) and (changes or not brought.isdisjoint(sources)):
                brought.add(node)
    return Inputs(frozenset(constant), frozenset(runtime), frozenset(brought), frozenset(kept & written))


def literal(node: Node) -> torch.Tensor | None:
    """The few numbers that stand in the code as ``node``, such as the bits by which bytes are shifted; else None."""
    source, owner = node.args[:1], node.graph.owning_module
    if not is_op(node, aten.lift_fresh_copy.default) or owner is None:
        return None
    value = getattr(owner, str(source[0].target), None) if isinstance(source[0], Node) else None
    if type(value) is not torch.Tensor or not (value.dtype in FLOAT_DTYPES or value.dtype in _INTEGERS):
        return None
    return value if value.dim() < 2 and value.numel() <= _FEW else None


def _looks_static(node: Node) -> bool:
    return dtype(node) in CODE_DTYPES or (tensor(node) is not None and len(shape(node)) < 2)
