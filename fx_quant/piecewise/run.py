"""A graph in pieces, run: each piece's artefact with its own inputs, and the ops between them as they are."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fx_quant.piecewise.split import Part, Split, attribute, storages


@dataclass(frozen=True, slots=True)
class _Step:
    """One call: which values it takes, where its results go, and what is not needed after it."""

    function: Callable[..., Sequence[Any]]
    takes: Callable[[list[Any]], Sequence[Any]]
    gives: tuple[tuple[int, int], ...]
    frees: tuple[int, ...]


def runner(cut: Split, functions: Mapping[Part, Callable[..., Sequence[Any]]], constants: Any) -> Callable[..., Any]:
    """What runs the parts of ``cut`` in order, each by its function, and returns what the whole graph returns.

    Args:
        constants: the module that holds the tensors that ``cut.graph`` refers to.
    """
    graph = cut.graph
    slots = {node: i for i, node in enumerate(n for n in graph.nodes if n.op not in ("call_module", "output"))}
    count = len(graph.find_nodes(op="placeholder"))
    held = [(slots[n], attribute(constants, str(n.target))) for n in graph.find_nodes(op="get_attr")]
    returned = [(slots.get(each, -1), each) for each in graph.output_node().args[0]]  # type: ignore[union-attr]
    last: dict[Node, Part] = {node: part for part in cut.parts for node in part.call.all_input_nodes}
    kept = {each for _, each in returned if isinstance(each, Node)}
    steps = tuple(
        _Step(
            functions[part],
            _getter([slots[node] for node in part.call.args]),  # type: ignore[index]
            tuple((item.args[1], slots[item]) for item in part.call.users),  # type: ignore[misc]
            tuple(slots[node] for node, at in last.items() if at is part and node not in kept),
        )
        for part in cut.parts
    )
    empty = [None] * (len(slots) - count)

    def run(*inputs: Any) -> tuple[Any, ...]:
        values = [*inputs, *empty]
        for slot, constant in held:
            values[slot] = constant
        for step in steps:
            results = step.function(*step.takes(values))
            for item, slot in step.gives:
                values[slot] = results[item]
            for slot in step.frees:
                values[slot] = None
        return tuple([each if slot < 0 else values[slot] for slot, each in returned])

    return run


def _getter(slots: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    if len(slots) < 2:
        return lambda values: [values[slot] for slot in slots]
    return operator.itemgetter(*slots)


def as_it_is(part: Part) -> Callable[..., Sequence[Any]]:
    """The ops of ``part`` run eagerly, results laid out as they were when the pieces after it were compiled.

    An op may lay out its result otherwise on a machine than under Dynamo, as attention does that has several kernels.
    """
    forward = _forward(part.module)
    inputs = {each for node in part.inputs for each in storages(node.meta.get("example_value"))}
    orders = []
    for i, node in enumerate(part.outputs):
        value = node.meta.get("example_value")
        order = None if inputs.intersection(storages(value)) else _dense_order(value)
        if order is not None:
            orders.append((i, order, tuple(sorted(range(len(order)), key=order.__getitem__))))
    if not orders:
        return forward

    def run(*values: Any) -> Sequence[Any]:
        results = forward(*values)
        for i, order, back in orders:
            if not results[i].permute(order).is_contiguous():
                results = list(results)
                results[i] = results[i].permute(order).contiguous().permute(back)
        return results

    return run


def _forward(module: GraphModule) -> Callable[..., Sequence[Any]]:
    """Its ``forward``, of which the code is there: one that is made when first called looks for it in every call."""
    getattr(module, "real_recompile", module.recompile)()
    return module.forward


def _dense_order(value: Any) -> tuple[int, ...] | None:
    """The dims of a fake tensor from outermost to innermost in memory; None where it has gaps, or that is not known."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    sizes, strides = [_hint(size) for size in value.shape], [_hint(stride) for stride in value.stride()]
    if None in sizes or None in strides:
        return None
    order = tuple(sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim)))  # type: ignore[operator]
    for place, dim in enumerate(order):
        if sizes[dim] != 1 and strides[dim] != math.prod(sizes[inner] for inner in order[place + 1 :]):  # type: ignore[misc]
            return None
    return order


def _hint(size: int | torch.SymInt) -> int | None:
    return size if isinstance(size, int) else size.node.hint
