"""Equal computations made one. AOTAutograd leaves inference graphs as traced, where q, k and v each quantize x anew."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, Node

from fx_quant.ops.purity import is_pure
from fx_quant.passes.memory import Memory, is_barrier
from fx_quant.passes.nodes import shape, spell_by_schema, tensor


def common_subexpressions_merged(graph: Graph) -> Graph:
    """A copy of ``graph`` in which equal pure computations are one node.

    Kept apart are what an op that mutates stands between, what is not known to be pure, and whatever shares memory with
    an output or is written to: two outputs never become one tensor. Arguments of ops are spelled in one way, so that
    each rule need know one only. Takes time linear in the graph.
    """
    copy = Graph(graph.owning_module)
    copied: dict[Node, Node] = {}
    first: dict[tuple, Node] = {}
    # For each node, the one that stands for it.
    kept: dict[Node, Node] = {}
    memory = Memory(graph)
    region = 0
    for node in graph.nodes:
        region += is_barrier(node)
        if _is_mergeable(node, memory):
            known = first.setdefault((region, call_key(node, kept)), node)
            if known is not node:
                kept[node], copied[node] = known, copied[known]
                continue
        copied[node] = copy.node_copy(node, copied.__getitem__)
        spell_by_schema(copied[node])
    return copy


def _is_mergeable(node: Node, memory: Memory) -> bool:
    return (
        node.op == "call_function"
        and is_pure(node.target)
        and not _brings_size(node)
        and not memory.is_returned(node)
        and not memory.is_written(node)
    )


def _brings_size(node: Node) -> bool:
    """Whether ``node`` has a number or size that is read off values, by whose name others refer to it."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.data_dependent_output not in tags and torch.Tag.dynamic_output_shape not in tags:
        return False
    return tensor(node) is None or not all(isinstance(size, int) for size in shape(node))


def call_key(node: Node, kept: Mapping[Node, Node]) -> tuple:
    """What ``node`` calls and with what, hashable: equal keys are equal calls, if the op is pure.

    Args:
        kept: the nodes that stand for others among the arguments.
    """
    return node.target, _key(node.args, kept), _key(node.kwargs, kept) if node.kwargs else None


def _key(argument: object, kept: Mapping[Node, Node]) -> object:
    """``argument`` as something hashable, its nodes as those that stand for them."""
    if isinstance(argument, Node):
        return kept.get(argument, argument)
    if isinstance(argument, (list, tuple)):
        return tuple([_key(part, kept) for part in argument])
    if isinstance(argument, dict):
        return tuple([(name, _key(value, kept)) for name, value in sorted(argument.items())])
    return constant_key(argument)


def constant_key(constant: object) -> tuple[type, object]:
    """``constant`` as something hashable that tells 1, 1.0, True and -0.0, 0.0 apart."""
    kind = type(constant)
    return kind, constant if kind in _EQUAL_AS_THEY_ARE else repr(constant)


_EQUAL_AS_THEY_ARE = (int, bool, str, type(None), torch.dtype)
