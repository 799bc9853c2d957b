"""Equal computations made one. AOTAutograd leaves inference graphs as traced, where q, k and v each quantize x anew."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, Node

from fx_quant.compat import mutates
from fx_quant.passes.nodes import aten, tensor


def common_subexpressions_merged(graph: Graph) -> Graph:
    """A copy of ``graph`` in which equal pure computations are one node.

    Kept apart are what an op that mutates stands between, random numbers, uninitialised memory, higher-order ops, and
    whatever shares memory with an output: two outputs never become one tensor. Takes time linear in the graph.
    """
    copy = Graph(graph.owning_module)
    copied: dict[Node, Node] = {}
    first: dict[tuple, Node] = {}
    # For each node, the one that stands for it.
    kept: dict[Node, Node] = {}
    returned = {_storage(node) for node in graph.output_node().all_input_nodes} - {None}
    region = 0
    for node in graph.nodes:
        region += mutates(node)
        if node.op == "call_function" and _is_pure(node.target) and _storage(node) not in returned:
            known = first.setdefault((region, call_key(node, kept)), node)
            if known is not node:
                kept[node], copied[node] = known, copied[known]
                continue
        copied[node] = copy.node_copy(node, copied.__getitem__)
    return copy


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
        return tuple([_key(each, kept) for each in argument])
    if isinstance(argument, dict):
        return tuple([(name, _key(value, kept)) for name, value in sorted(argument.items())])
    return constant_key(argument)


def constant_key(constant: object) -> tuple[type, object]:
    """``constant`` as something hashable that tells 1, 1.0, True and -0.0, 0.0 apart."""
    kind = type(constant)
    return kind, constant if kind in _EQUAL_AS_THEY_ARE else repr(constant)


_EQUAL_AS_THEY_ARE = (int, bool, str, type(None), torch.dtype)


def _is_pure(target: object) -> bool:
    """Whether two calls of ``target`` with the same arguments give the same."""
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket is not aten.empty and torch.Tag.nondeterministic_seeded not in target.tags
    return not isinstance(target, torch._ops.HigherOrderOperator)


def _storage(node: Node) -> object:
    """Identity of the memory behind ``node``'s tensor; None where it has none."""
    value = tensor(node)
    if value is None:
        return None
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:  # a tensor without a storage of its own, such as a sparse one
        return None
