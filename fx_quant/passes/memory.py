"""Which nodes share memory: what a view is a view of, what is written to, and what the graph returns."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator

import torch
from torch.fx import Graph, Node

from fx_quant.compat import mutates
from fx_quant.passes.nodes import RESHAPES, is_op, returned, tensor

# Results that an op keeps and hands out again, so that nobody may write to them. By name, as passes import no kernel.
_KEEPING = ("fx_quant.fold.default", "fx_quant.prepack.default")


class Memory:
    """The memory behind each node of a graph, named by the node that it began with.

    A reshape counts as a view, though it may copy: it is then merely kept apart from too much.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._bases: dict[Node, Node] = {}
        self._joined: dict[Node, Node] = {}
        self._order: dict[Node, int] = {}
        self._written: dict[Node, int] = {}
        attributes: dict[object, Node] = {}
        for i, node in enumerate(graph.nodes):
            self._order[node] = i
            source = attributes.setdefault(node.target, node) if node.op == "get_attr" else _viewed(node)
            self._bases[node] = node if source is None or source is node else self._bases[source]
            for written in written_by(node):
                self._written.setdefault(self._bases[written], i)
        self._returned = {self._bases[node] for node in graph.output_node().all_input_nodes}

    def base(self, node: Node) -> Node:
        """The node that ``node``'s memory began with; ``node`` itself where it has memory of its own."""
        base = self._bases[node]
        while base in self._joined:
            base = self._joined[base]
        return base

    def is_returned(self, node: Node) -> bool:
        """Whether an output shares memory with ``node``."""
        return self.base(node) in self._returned

    def is_written(self, node: Node) -> bool:
        """Whether the graph writes to the memory of ``node``."""
        return self.base(node) in self._written

    def is_written_before(self, node: Node, reader: Node) -> bool:
        """Whether a write may stand between ``node`` and ``reader``, which would see what it wrote."""
        first = self._written.get(self.base(node))
        return first is not None and first < self._order[reader]

    def can_stand_for(self, source: Node, copy: Node) -> bool:
        """Whether nobody can tell if ``copy``, which holds the same values as ``source``, is ``source``.

        Not where either is written to, nor where an output would come to share memory with an input or another output.
        """
        one, other = self.base(source), self.base(copy)
        if one is other:
            return True
        if one in self._written or other in self._written:
            return False
        return other not in self._returned or not (one in self._returned or _is_foreign(one))

    def join(self, source: Node, copy: Node) -> None:
        """Take note that ``source`` stands for ``copy`` from now on."""
        one, other = self.base(source), self.base(copy)
        if one is not other:
            self._joined[other] = one
            if other in self._returned:
                self._returned.add(one)

    def outputs(self) -> list[object]:
        """For each output whose memory it is: an input's, a kept result's, or the first output's with that memory."""
        inputs = {node: i for i, node in enumerate(self._graph.find_nodes(op="placeholder"))}
        first: dict[Node, int] = {}
        owners: list[object] = []
        for i, node in enumerate(returned(self._graph)):
            if not isinstance(node, Node) or tensor(node) is None:
                owners.append(None)
                continue
            base = self.base(node)
            if base in inputs:
                owners.append(f"input {inputs[base]}")
            elif _is_foreign(base):
                owners.append(f"constant {base.target if base.op == 'get_attr' else base}")
            else:
                owners.append(f"output {first.setdefault(base, i)}")
        return owners


def _is_foreign(base: Node) -> bool:
    """Whether somebody else holds the memory: an input's, a constant's, or a result that an op keeps."""
    if base.op != "call_function":
        return True
    producer = base.args[0] if base.target is operator.getitem else base
    return isinstance(producer, Node) and str(producer.target) in _KEEPING


def _viewed(node: Node) -> Node | None:
    """The node whose memory ``node`` has; None where it has memory of its own."""
    if node.op != "call_function":
        return None
    if is_op(node, *RESHAPES):
        return next((source for source in node.all_input_nodes if tensor(source) is not None), None)
    call = node.args[0] if node.target is operator.getitem else node
    if not isinstance(call, Node):
        return None
    if isinstance(call.target, torch._ops.OpOverload):
        for position, name in _aliased(call.target):
            for source in _nodes(call, position, name):
                return source
    # Ops whose schema does not say.
    memory = _storage(node)
    return next((s for s in call.all_input_nodes if memory is not None and _storage(s) == memory), None)


def written_by(node: Node) -> Iterator[Node]:
    """The nodes to whose memory ``node`` writes."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        # Those of functional graphs write to nothing, unless they wrap an op that does.
        wrapped = [arg for arg in node.args if isinstance(arg, torch._ops.OpOverload) and arg._schema.is_mutable]
        functional = str(target).startswith("auto_functionalized")
        if "mutation" in str(target) or (wrapped and not functional):
            yield from node.all_input_nodes
    elif isinstance(target, torch._ops.OpOverload):
        for position, name in _overwritten(target):
            yield from _nodes(node, position, name)
    elif node.op in ("call_function", "call_method") and mutates(node):
        yield from node.all_input_nodes


def is_barrier(node: Node) -> bool:
    """Whether what is computed before ``node`` may differ from the same computed after it."""
    return mutates(node) or next(written_by(node), None) is not None


def written_inputs(graph: Graph) -> set[Node]:
    """The inputs and constants of ``graph`` that it writes to."""
    if not any(next(written_by(node), None) is not None for node in graph.nodes):
        return set()
    memory = Memory(graph)
    return {node for node in graph.nodes if node.op in ("placeholder", "get_attr") and memory.is_written(node)}


Argument = tuple[int, str]


@functools.cache
def _aliased(target: torch._ops.OpOverload) -> tuple[Argument, ...]:
    """Which arguments the results of ``target`` may be views of, by position and name."""
    returned: set[str] = set()
    for result in target._schema.returns:
        returned |= set() if result.alias_info is None else result.alias_info.before_set
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(target._schema.arguments)
        if (alias := argument.alias_info) is not None and (returned & alias.before_set or "*" in alias.after_set)
    )


@functools.cache
def _overwritten(target: torch._ops.OpOverload) -> tuple[Argument, ...]:
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(target._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _nodes(call: Node, position: int, name: str) -> Iterable[Node]:
    """The nodes in one argument of ``call``."""
    given = call.args[position] if position < len(call.args) else call.kwargs.get(name)
    values = given if isinstance(given, (list, tuple)) else [given]
    return [value for value in values if isinstance(value, Node)]


def _storage(node: Node) -> object:
    """Identity of the memory behind ``node``'s tensor; None where it has none."""
    value = tensor(node)
    if value is None:
        return None
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:  # a tensor without a storage of its own, such as a sparse one
        return None
