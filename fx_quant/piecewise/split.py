"""Cutting a graph of Dynamo's at named ops, and how the pieces hang together."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.split_module import split_module

from fx_quant.compat import as_dynamo_graph, copy_graph, specialize_floats
from fx_quant.kernels.subclasses import inner_tensors
from fx_quant.passes.nodes import module_calls


class NotSplitError(Exception):
    """Why a graph is left whole."""


@dataclass(frozen=True)
class Part:
    """What stands between two cuts, or a cut itself.

    Args:
        module: its graph, which returns a tuple; parameters are inputs.
        call: where the graph of parts calls it.
        is_cut: whether it is one of the named ops alone.
    """

    module: GraphModule
    call: Node
    is_cut: bool

    @property
    def inputs(self) -> list[Node]:
        """Its placeholders, in order."""
        return self.module.graph.find_nodes(op="placeholder")

    @property
    def outputs(self) -> tuple[Node, ...]:
        """What it returns."""
        return self.module.graph.output_node().args[0]  # type: ignore[return-value]


@dataclass(frozen=True)
class Split:
    """A graph in parts.

    Args:
        graph: placeholders, the calls of the parts, ``getitem`` of their results, and the output.
        parts: in the order of their calls.
        made: the value of each node of ``graph`` that is an input or a result of a part, as Dynamo saw it.
    """

    graph: Graph
    parts: tuple[Part, ...]
    made: Mapping[Node, Any] = field(repr=False)


def names_of(node: Node) -> set[str]:
    """What an option may call the op of ``node``: ``flash``, ``mylib::flash``, ``mylib.flash`` and so on."""
    target = node.target
    if isinstance(target, str):
        return {target} if node.op == "call_method" else set()
    names = {getattr(target, "__name__", "").removesuffix("._op")}
    if isinstance(target, torch._ops.OpOverload):
        packet = target.overloadpacket
        names |= {str(target), str(packet), packet.__name__, target._schema.name}
    elif isinstance(target, torch._ops.OpOverloadPacket):
        names |= {str(target), target._qualified_op_name}
    elif isinstance(target, torch._ops.HigherOrderOperator):
        names |= {target.name()}
    return names - {""}


def split(gm: GraphModule, ops: Collection[str], modules: Collection[str] = (), *, apart: bool = False) -> Split:
    """``gm`` cut before every call of ``ops``, and around every call of ``modules``.

    An op of PyTorch's own is in the piece that it begins, as Inductor calls the same kernel for it and each boundary
    costs time; a library's op is a part of its own. ``gm`` itself is not touched.

    Args:
        modules: patterns of ``fnmatch`` for the paths of modules, such as ``model.layers.*``, and names of classes.
        apart: whether PyTorch's ops are parts of their own too.

    Raises:
        NotSplitError: none of ``ops`` and ``modules`` is there, or what crosses a cut cannot.
    """
    wanted = set(ops)
    whole = GraphModule(gm, copy_graph(gm.graph)[0])
    begins = {node for node in whole.graph.nodes if node.op in _CALLS and names_of(node) & wanted}
    calls = _calls_of(modules, whole.graph)
    if not begins and not any(calls.values()):
        named = ", ".join(sorted([*wanted, *modules])) or "no ops, as splitting_ops is empty"
        raise NotSplitError(f"it calls none of {named}")
    cuts = {node for node in begins if apart or _is_library_op(node)}
    specialize_floats(whole.graph)
    _unpack_at_once(whole.graph)
    part_of = _parts(whole.graph, begins, cuts, calls)
    try:
        outer = split_module(whole, whole, part_of.__getitem__, keep_original_order=True)
    except (AssertionError, KeyError, RuntimeError) as error:
        # A region of autocast that no part closes, or a size that no input has.
        raise NotSplitError(f"torch.fx could not split it: {error!r}") from error
    return _joined(gm, outer, {part_of[cut] for cut in cuts})


_CALLS = ("call_function", "call_method", "call_module")


def _unpack_at_once(graph: Graph) -> None:
    """Move the items of a tuple to where it is made, as no tuple crosses a cut."""
    for node in list(graph.nodes):
        if isinstance(node.meta.get("example_value"), (tuple, list)):
            for user in sorted(node.users, reverse=True):
                if user.target is operator.getitem and isinstance(user.args[1], int):
                    node.append(user)


def _is_library_op(node: Node) -> bool:
    """Whether ``node`` calls what a library brought along, which may be there to be called as it is."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in ("aten", "prims")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.partition("::")[0] not in ("aten", "prims")
    package = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    return node.op == "call_function" and package not in ("torch", "_operator", "math")


def _calls_of(modules: Collection[str], graph: Graph) -> dict[Node, str]:
    """Which call of a module that ``modules`` name each node is of, the outermost; ``""`` for none."""
    calls = dict.fromkeys(graph.nodes, "")
    if not modules:
        return calls
    for node in graph.nodes:
        for call, path, kind in module_calls(node):
            if any(pattern == kind or fnmatchcase(path, pattern) for pattern in modules):
                calls[node] = call
                break
    return calls


def _parts(graph: Graph, begins: set[Node], cuts: set[Node], calls: Mapping[Node, str]) -> dict[Node, int]:
    """The number of each node's part, growing; a cut has one of its own, its items are in it."""
    parts, current, after_cut, within = {}, 0, False, ""
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        belongs = node.target is operator.getitem and node.args[0] in cuts
        if node in begins or calls.get(node, within) != within or (after_cut and not belongs):
            current += 1
        after_cut, within = node in cuts or belongs, calls.get(node, within)
        parts[node] = current
    return parts


def _joined(gm: GraphModule, outer: GraphModule, cuts: set[int]) -> Split:
    """The parts of ``outer``, with what crosses from one to the next."""
    sources = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    graph, parts = outer.graph, []
    made = {node: node.meta.get("example_value") for node in graph.find_nodes(op="placeholder")}
    made |= {node: node.meta.get("example_value") for node in graph.find_nodes(op="get_attr")}
    for call in list(graph.nodes):
        if call.op != "call_module":
            continue
        module = outer.get_submodule(call.target)
        assert isinstance(module, GraphModule)
        _return_tuple(module.graph, call)
        module.recompile()
        as_dynamo_graph(module, gm, sources)
        part = Part(module, call, int(call.target.rpartition("_")[2]) in cuts)
        for item in call.users:
            made[item] = part.outputs[item.args[1]].meta.get("example_value")
            if not isinstance(made[item], (Tensor, torch.SymInt, int)) or isinstance(made[item], bool):
                raise NotSplitError(f"a {type(made[item]).__name__} ({item.name}) would cross a cut")
        parts.append(part)
    return Split(graph, tuple(parts), made)


def _return_tuple(graph: Graph, call: Node) -> None:
    """Make ``graph`` return a tuple, and the users of ``call`` take its items."""
    output = graph.output_node()
    if isinstance(output.args[0], tuple):
        return
    output.args = ((output.args[0],),)
    users = list(call.users)
    with call.graph.inserting_after(call):
        item = call.graph.call_function(operator.getitem, (call, 0))
    for user in users:
        user.replace_input_with(call, item)


def storages(value: Any) -> Iterator[int]:
    """What tells the memory of ``value`` from other memory: nothing for a number, several for a tensor subclass."""
    for inner in inner_tensors(value):
        if inner.layout is torch.strided:
            yield inner.untyped_storage()._cdata


def attribute(module: Any, name: str) -> Any:
    """What ``module`` holds under the dotted ``name``."""
    return operator.attrgetter(name)(module)
