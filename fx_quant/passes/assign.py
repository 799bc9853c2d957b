"""Canonical ops to kernel ops: padding, exact casts of the codes, and weights packed once."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch.fx import Graph, Node

from fx_quant.passes.emit import Emitter
from fx_quant.passes.matrices import matrix_base
from fx_quant.passes.nodes import args_of, aten, is_single
from fx_quant.passes.values import Codes
from fx_quant.selection import Selection


def assign(graph: Graph, selections: Mapping[Node, Selection]) -> dict[Node, Node]:
    """Replace each canonical op by its selected kernel's op; returns the new result of each.

    All weights that want packing are packed by one call at the head of the graph.
    """
    emitter = Emitter(graph)
    packed = _pack(emitter, selections)
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    results = {}
    for node, selection in selections.items():
        results[node] = _assign(emitter, node, selection, packed.get(node), casts)
        node.replace_all_uses_with(results[node])
        graph.erase_node(node)
    return results


def _assign(
    emitter: Emitter,
    node: Node,
    selection: Selection,
    packed: Node | None,
    casts: dict[tuple[Node, torch.dtype], Node],
) -> Node:
    a, b, a_scale, b_scale, bias, out_dtype = node.args
    kernel, problem, padding = selection.kernel, selection.problem, selection.padding
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    pad_n, pad_k = padding.n - problem.n, padding.k - problem.k
    with emitter.graph.inserting_before(node):
        if pad_k:
            a = emitter.call(aten.constant_pad_nd.default, a, [0, pad_k], like=node)
        if kernel.a_dtype is not None:
            key = (a, kernel.a_dtype)
            if key not in casts:
                # Exact at each step. Inductor's C++ converts float8 to float32 in vectors, to bfloat16 one by one.
                wide = emitter.cast(a, torch.float32, like=node)
                casts[key] = emitter.cast(wide, kernel.a_dtype, like=node)
            a = casts[key]
        if packed is not None:
            b = packed
        elif pad_n or pad_k:
            # Padded as [n, k]: padding makes its result row-major, and GPU kernels read b column by column.
            b = emitter.call(aten.permute.default, b, [1, 0], like=node)
            b = emitter.call(aten.constant_pad_nd.default, b, [0, pad_k, 0, pad_n], like=node)
            b = emitter.call(aten.permute.default, b, [1, 0], like=node)
        if pad_n:
            if isinstance(b_scale, Node) and not is_single(b_scale):
                b_scale = emitter.call(aten.constant_pad_nd.default, b_scale, [0, pad_n], 1.0, like=node)
            if isinstance(bias, Node):
                bias = emitter.call(aten.constant_pad_nd.default, bias, [0, pad_n], 0.0, like=node)
        out = emitter.call(kernel.overload(), a, b, a_scale, b_scale, bias, padding.n, out_dtype, like=node)
        if pad_n:
            out = emitter.call(aten.slice.Tensor, out, 1, 0, problem.n, like=node)
            out = emitter.call(aten.clone.default, out, memory_format=torch.contiguous_format, like=node)
    return out


def _pack(emitter: Emitter, selections: Mapping[Node, Selection]) -> dict[Node, Node]:
    wanted = {node: s.kernel.layout for node, s in selections.items() if s.kernel.layout is not None}
    if not wanted:
        return {}
    graph = emitter.graph
    head = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    weights: list[Node] = []
    layouts: list[str] = []
    known: dict[tuple[Node, bool, str], int] = {}
    index: dict[Node, int] = {}
    with graph.inserting_before(head):
        for node, layout in wanted.items():
            found = matrix_base(Codes(args_of(node)[1]))
            assert found is not None  # selection has asked for a constant
            base, transposed = found
            key = (base, transposed, layout)
            if key not in known:
                known[key] = len(weights)
                if base.op == "get_attr":
                    head.prepend(base)
                weights.append(base if transposed else emitter.call(aten.permute.default, base, [1, 0], like=node))
                layouts.append(layout)
            index[node] = known[key]
        like = next(iter(wanted))
        call = emitter.call(torch.ops.fx_quant.prepack.default, weights, layouts, like=like)
        outs = [emitter.call(operator.getitem, call, i, like=like) for i in range(len(weights))]
    return {node: outs[i] for node, i in index.items()}
