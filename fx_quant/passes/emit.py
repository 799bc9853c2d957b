"""Adding nodes to a graph with their fake values and provenance."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from fx_quant.passes.axes import Extent, extent
from fx_quant.passes.fakes import FakeCalls
from fx_quant.passes.nodes import aten, prims, same_size, shape

_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "from_node", "seq_nr")


class Emitter:
    """Makes call nodes whose ``meta`` is as complete as that of traced ones."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._fake_call = FakeCalls(_fake_mode(graph))
        self.emitted: set[Node] = set()
        self._sizes: dict[Any, Node] | None = None
        self._replaced: dict[Node, Node] = {}

    def replace(self, old: Node, new: Node) -> None:
        """Give ``old``'s users to ``new``, and so with every later call that names ``old``."""
        old.replace_all_uses_with(new)
        self._replaced[old] = new

    def current(self, node: Node) -> Node:
        """The node that stands for ``node`` now."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def call(self, target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        """A call of ``target`` at the graph's insertion point, with the provenance of ``like``."""
        args, kwargs = map_arg((args, kwargs), self.current)
        node = self.graph.call_function(target, args, kwargs)
        self.emitted.add(node)
        values = map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = self._fake_call(target, *values)
        for key in _PROVENANCE:
            if key in like.meta:
                node.meta[key] = like.meta[key]
        return node

    def recall(self, node: Node, target: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Make ``node`` a call of ``target``, in place."""
        node.target, node.args, node.kwargs = target, args, kwargs
        values, named = map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = self._fake_call(target, values, named)

    def cast(self, node: Node, to: torch.dtype, *, like: Node) -> Node:
        """``node`` in dtype ``to``."""
        if node.meta["val"].dtype == to:
            return node
        return self.call(prims.convert_element_type.default, node, to, like=like)

    def reshape(self, node: Node, sizes: list, *, like: Node) -> Node:
        """``node`` with shape ``sizes`` (ints, one ``-1``, or size nodes)."""
        current = shape(node)
        # One free size is given by the number of elements, so agreement of the others is identity.
        if len(sizes) == len(current) and all(
            size == -1 or (isinstance(size, int) and same_size(size, now))
            for size, now in zip(sizes, current, strict=True)
        ):
            return node
        return self.call(aten.reshape.default, node, sizes, like=like)

    def size_args(self, sizes: tuple, before: Node, *, like: Node) -> list:
        """``sizes`` as arguments of a view: ints, one ``-1``, and existing nodes for further symbolic sizes.

        Raises:
            LookupError: a symbolic size has no node before ``before``.
        """
        extents = [extent(size) for size in sizes]
        symbolic = [i for i, size in enumerate(extents) if not isinstance(size, int)]
        # -1 is ambiguous beside a size of zero, which a size that is read off values may turn out to be.
        others = [size for i, size in enumerate(sizes) if i not in symbolic[:1]]
        free = symbolic[:1] if all(statically_known_true(size != 0) for size in others) else []
        return [-1 if i in free else self.size_argument(size, before) for i, size in enumerate(extents)]

    def size_argument(self, size: Extent, before: Node) -> int | Node:
        """``size`` as an argument of a view: an int, or an existing node before ``before`` that holds the expression.

        Raises:
            LookupError: no node does.
        """
        if isinstance(size, int):
            return size
        if self._sizes is None:
            self._sizes = _size_nodes(self.graph)
        node = self._sizes.get(size)
        if node is None or not node < before:
            raise LookupError(f"no node holds the symbolic size {size}")
        return node


def _size_nodes(graph: Graph) -> dict[Any, Node]:
    """The first node that holds each symbolic size, by the size's expression."""
    nodes: dict[Any, Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            nodes.setdefault(value.node.expr, node)
    return nodes


def _fake_mode(graph: Graph) -> FakeTensorMode:
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    raise ValueError("the graph must carry fake tensors in node.meta['val'], found none; trace it with fake inputs")
