"""Taking out of the graph what the kernels' weights, block scales and zero points are computed of constants by."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from fx_quant.ops.fold import can_fold, program_of
from fx_quant.passes.emit import Emitter
from fx_quant.passes.inputs import Inputs, literal
from fx_quant.passes.nodes import VIEWS, args_of, aten, is_op, shape, tensor

# By name: the op is registered with the kernels, which this package does not import.
_PREPACK = "fx_quant.prepack.default"


def fold_constants(emitter: Emitter, kernels: Sequence[Node], inputs: Inputs) -> None:
    """Replace what ``kernels`` (calls of kernel ops) are given of constants alone by one ``fx_quant::fold``.

    Vectors are left, unless they are padded: Inductor reads them in the epilogue, where their casts and products cost
    nothing.
    """
    graph = emitter.graph
    wanted: dict[Node, list[Node]] = {}
    for kernel in kernels:
        for argument in _matrices(kernel):
            steps = _steps(argument, inputs) if argument not in wanted else wanted[argument]
            if steps:
                wanted[argument] = steps
    if not wanted:
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    steps = sorted({step for needed in wanted.values() for step in needed}, key=order.__getitem__)
    literals = {step: value for step in steps if (value := literal(step)) is not None}
    sources = sorted(
        {source for step in steps for source in step.all_input_nodes if _is_source(source, step)},
        key=order.__getitem__,
    )
    head = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    like = next(iter(wanted))
    for source in sources:
        if source.op == "get_attr":
            head.prepend(source)
    with graph.inserting_before(head):
        program = program_of(sources, steps, list(wanted), literals)
        call = emitter.call(torch.ops.fx_quant.fold.default, sources, program, like=like)
        folded = {old: emitter.call(operator.getitem, call, i, like=old) for i, old in enumerate(wanted)}
    for kernel in kernels:
        for argument in set(_matrices(kernel)) & set(folded):
            kernel.replace_input_with(argument, folded[argument])
    graph.eliminate_dead_code()


def _matrices(kernel: Node) -> Iterator[Node]:
    """The weight, its sums, every scale and zero point of it of more than one dim, and vectors that are padded.

    What is on the activation's side is computed in every call, even of a buffer: it may be a frame that is filled anew.
    """
    weight, sums = args_of(kernel)[1], kernel.kwargs.get("b_sum")
    of_activation = {args_of(kernel)[0], args_of(kernel)[2], kernel.kwargs.get("a_zero_point")}
    for argument in kernel.all_input_nodes:
        is_large = argument in (weight, sums) or len(shape(argument)) > 1
        if argument not in of_activation and (is_large or is_op(argument, aten.constant_pad_nd.default)):
            yield argument


def _steps(result: Node, inputs: Inputs) -> list[Node]:
    """What computes ``result`` of constants, inputs left out; nothing where that is a view, or cannot be folded."""
    steps: list[Node] = []
    seen: set[Node] = set()
    waiting = [result]
    while waiting:
        node = waiting.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node in inputs.runtime or str(node.target) == _PREPACK or not can_fold(node):
            return []
        if any(_is_source(source, node) and tensor(source) is None for source in node.all_input_nodes):
            return []  # a number that the call brings
        steps.append(node)
        waiting += node.all_input_nodes
    computes = any(not is_op(step, *VIEWS) for step in steps)
    of_inputs = any(_is_source(source, step) for step in steps for source in step.all_input_nodes)
    return steps if computes and of_inputs else []


def _is_source(node: Node, step: Node) -> bool:
    """Whether ``node`` is what ``step`` reads of the inputs of the graph; a literal is in the program."""
    return node.op != "call_function" and literal(step) is None
