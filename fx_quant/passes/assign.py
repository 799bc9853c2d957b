"""Canonical ops to kernel ops: padding, exact casts of the codes, and weights packed once."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fx_quant.kernels.packing import PANEL, TRANSPOSED
from fx_quant.passes.canonical import Operands, operands_of
from fx_quant.passes.emit import Emitter
from fx_quant.passes.matrices import matrix_base
from fx_quant.passes.nodes import args_of, aten, is_single, shape
from fx_quant.selection import Selection


class UnassignedError(Exception):
    """Some canonical ops could not be replaced; the graph is half rewritten.

    Args:
        errors: what was raised, by the canonical op.
    """

    def __init__(self, errors: Mapping[Node, Exception]) -> None:
        super().__init__("; ".join(f"{node}: {error!r}" for node, error in errors.items()))
        self.errors = errors


def assign(
    graph: Graph, selections: Mapping[Node, Selection], runtime: Collection[Node] = frozenset()
) -> dict[Node, Node]:
    """Replace each canonical op by its selected kernel's op; returns the new result of each.

    All weights that want packing are packed by one call at the head of the graph. What is computed of anything but
    constants is in ``runtime``: it is not rearranged, as that would be done in every call.

    Raises:
        UnassignedError: names every op that could not be replaced.
    """
    emitter = Emitter(graph)
    packed = _pack(emitter, selections)
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    results = {}
    errors: dict[Node, Exception] = {}
    for node, selection in selections.items():
        try:
            results[node] = _assign(emitter, node, selection, packed.get(node, Packed()), casts, runtime)
        except Exception as error:
            errors[node] = error
            continue
        node.replace_all_uses_with(results[node])
        graph.erase_node(node)
    if errors:
        raise UnassignedError(errors)
    return results


def _assign(
    emitter: Emitter,
    node: Node,
    selection: Selection,
    packed: Packed,
    casts: dict[tuple[Node, torch.dtype], Node],
    runtime: Collection[Node],
) -> Node:
    of = operands_of(node)
    a, b, a_scale, b_scale, bias = of.a, of.b, of.a_scale, of.b_scale, of.bias
    kernel, problem, padding = selection.kernel, selection.problem, selection.padding
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
        if packed.weight is not None:
            b = packed.weight
        elif pad_n or pad_k:
            # Padded as [n, k]: padding makes its result row-major, and GPU kernels read b column by column.
            b = emitter.call(aten.permute.default, b, [1, 0], like=node)
            b = emitter.call(aten.constant_pad_nd.default, b, [0, pad_k, 0, pad_n], like=node)
            b = emitter.call(aten.permute.default, b, [1, 0], like=node)
        sums = _sums(emitter, of, packed, like=node)
        if pad_n:
            if sums is not None:
                sums = emitter.call(aten.constant_pad_nd.default, sums, [0, pad_n], like=node)
            # A block of scales covers the padding, as kernels align to less than a block.
            if b_scale is not None and of.block is None and not is_single(b_scale):
                b_scale = emitter.call(aten.constant_pad_nd.default, b_scale, [0, pad_n], 1.0, like=node)
            if bias is not None:
                bias = emitter.call(aten.constant_pad_nd.default, bias, [0, pad_n], 0.0, like=node)
        b_zero_point = of.b_zero_point
        if kernel.panel_factors and of.block is not None and of.block[0] == 1:
            b_scale, b_zero_point = (_in_panels(emitter, x, runtime) for x in (b_scale, b_zero_point))
        given = {"a_zero_point": of.a_zero_point, "b_sum": sums, "b_zero_point": b_zero_point, "block": of.block}
        extras = {name: value for name, value in given.items() if value is not None}
        out = emitter.call(
            kernel.overload(), a, b, a_scale, b_scale, bias, padding.n, of.out_dtype, like=node, **extras
        )
        if pad_n:
            out = emitter.call(aten.slice.Tensor, out, 1, 0, problem.n, like=node)
            out = emitter.call(aten.clone.default, out, memory_format=torch.contiguous_format, like=node)
    return out


def _in_panels(emitter: Emitter, factor: Node | None, runtime: Collection[Node]) -> Node | None:
    """``factor [n, groups]`` as ``[ceil(n / 64), groups, 64]``; folding takes the copy out of the graph."""
    if factor is None or factor in runtime:
        return factor
    n, groups = shape(factor)
    missing = -n % PANEL
    if missing:
        factor = emitter.call(aten.constant_pad_nd.default, factor, [0, 0, 0, missing], like=factor)
    panels = emitter.call(aten.reshape.default, factor, [-(-n // PANEL), PANEL, groups], like=factor)
    panels = emitter.call(aten.permute.default, panels, [0, 2, 1], like=factor)
    return emitter.call(aten.clone.default, panels, memory_format=torch.contiguous_format, like=factor)


def _sums(emitter: Emitter, of: Operands, packed: Packed, *, like: Node) -> Node | None:
    """The sum of the weight's codes over k, where a zero point asks for it."""
    if of.a_zero_point is None or packed.sums is not None:
        return packed.sums
    return emitter.call(aten.sum.dim_IntList, of.b, [0], dtype=torch.int32, like=like)


@dataclass(frozen=True)
class Packed:
    """What is computed of a constant weight for one matmul."""

    weight: Node | None = None
    sums: Node | None = None


def _pack(emitter: Emitter, selections: Mapping[Node, Selection]) -> dict[Node, Packed]:
    """Everything that kernels want to be computed of constant weights."""
    packed: dict[Node, dict[str, Node]] = {}
    stored: list[tuple[Node, str, Node, bool, str]] = []
    for node, selection in selections.items():
        for field, layout in _layouts(node, selection):
            found = matrix_base(args_of(node)[1])
            if found is not None and found[0].op != "call_function":
                stored.append((node, field, *found, layout))
            else:
                packed.setdefault(node, {})[field] = _pack_computed(emitter, node, layout)
    for node, fields in _pack_stored(emitter, stored).items():
        packed.setdefault(node, {}).update(fields)
    return {node: Packed(**fields) for node, fields in packed.items()}


def _pack_computed(emitter: Emitter, node: Node, layout: str) -> Node:
    """A weight that the graph computes of constants, packed where it stands; folding takes it out of the graph."""
    with emitter.graph.inserting_before(node):
        weight = emitter.call(aten.permute.default, args_of(node)[1], [1, 0], like=node)
        return emitter.call(torch.ops.fx_quant.pack.default, weight, layout, like=node)


def _pack_stored(emitter: Emitter, stored: Sequence[tuple[Node, str, Node, bool, str]]) -> dict[Node, dict[str, Node]]:
    """Parameters and buffers, packed by one call at the head of the graph."""
    if not stored:
        return {}
    graph = emitter.graph
    head = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    known: dict[tuple[Node, str], int] = {}
    index: dict[Node, dict[str, int]] = {}
    with graph.inserting_before(head):
        for node, field, base, transposed, layout in stored:
            key = base, layout if transposed else f"{layout}{TRANSPOSED}"
            if key not in known:
                known[key] = len(known)
                if base.op == "get_attr":
                    head.prepend(base)
            index.setdefault(node, {})[field] = known[key]
        like = stored[0][0]
        weights, layouts = map(list, zip(*known, strict=True))
        call = emitter.call(torch.ops.fx_quant.prepack.default, weights, layouts, like=like)
        outs = [emitter.call(operator.getitem, call, i, like=like) for i in range(len(known))]
    return {node: {field: outs[i] for field, i in fields.items()} for node, fields in index.items()}


def _layouts(node: Node, selection: Selection) -> Iterator[tuple[str, str]]:
    """``(field of Packed, layout)`` of everything that ``node``'s kernel wants of its constant weight."""
    if selection.kernel.layout is not None:
        yield "weight", selection.kernel.layout
    if operands_of(node).a_zero_point is not None and selection.problem.constant_weight:
        yield "sums", "sums"
