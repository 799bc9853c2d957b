"""Canonical ops to kernel ops: each selection's plan realised in the graph, and what is constant packed once."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_quant.kernels.layouts import TRANSPOSED, repacked
from fx_quant.kernels.realise import WEIGHT_FACTORS, kept_parts, realise
from fx_quant.kernels.select import Selection
from fx_quant.passes.axes import extent
from fx_quant.passes.canonical import operands_of
from fx_quant.passes.emit import Emitter
from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.matrices import matrix_base
from fx_quant.passes.memory import Memory
from fx_quant.passes.nodes import args_of, aten, dtype, is_op, prims, same_size, shape, through
from fx_quant.passes.packed import unpacked_from
from fx_quant.passes.size_bounds import least
from fx_quant.problem import Size
from fx_quant.scheme import HALF_DTYPES

_TO_SIZES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


class UnassignedError(Exception):
    """Some canonical ops could not be replaced; the graph is half rewritten.

    Args:
        reasons: why not, by the canonical op.
    """

    def __init__(self, reasons: Mapping[Node, str]) -> None:
        super().__init__("; ".join(f"{node}: {reason}" for node, reason in reasons.items()))
        self.reasons = reasons


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
    pad_in_quantizes(emitter, selections)
    kept = _keep(emitter, selections, runtime)
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    results = {}
    reasons: dict[Node, str] = {}
    sums: dict[Node, Node | None] = {}
    for node, selection in selections.items():
        b = operands_of(node).b
        sums[b] = sums.get(b) or kept.get(node, {}).get("b_sum")
        result = attempt(_assign, emitter, node, selection, kept.get(node, {}), casts)
        if isinstance(result, Failure):
            reasons[node] = result.reason("calling the kernel")
            continue
        results[node] = result
        node.replace_all_uses_with(results[node])
        graph.erase_node(node)
    if reasons:
        raise UnassignedError(reasons)
    _share_sums(emitter, sums)
    return results


@dataclass(frozen=True)
class _IntoGraph:
    """Writes each step of a plan into the graph, in front of the canonical op that it replaces."""

    emitter: Emitter
    node: Node
    casts: dict[tuple[Node, torch.dtype], Node]

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        return self.emitter.call(op, *args, like=self.node, **kwargs)

    def cast(self, x: Node, to: torch.dtype) -> Node:
        # What several matmuls read is cast once. Inductor's C++ converts float8 to float32 in vectors, to bfloat16 one
        # by one, so it goes by way of float32.
        if (x, to) not in self.casts:
            wide = self.emitter.cast(x, torch.float32, like=self.node)
            self.casts[x, to] = self.emitter.cast(wide, to, like=self.node)
        return self.casts[x, to]

    def shape(self, x: Node) -> Sequence[Size]:
        return shape(x)

    def rows(self, x: Node) -> int | Node:
        size = shape(x)[0]
        try:
            return self.emitter.size_argument(extent(size), self.node)
        except LookupError:
            return self.emitter.call(aten.sym_size.int, x, 0, like=self.node)

    def missing_rows(self, x: Node, wanted: int) -> int | Node:
        # Never a comparison, which would be a guard and a graph for each answer.
        rows = self.rows(x)
        if isinstance(rows, int):
            return max(wanted - rows, 0)
        if least(shape(x)[0]) >= wanted:
            return 0
        less = self.emitter.call(operator.sub, wanted, rows, like=self.node)
        return self.emitter.call(torch.sym_max, less, 0, like=self.node)

    def per_row(self, x: Node, of: Node) -> bool:
        return same_size(shape(x)[0], shape(of)[0]) or not same_size(shape(x)[0], 1)


def _assign(
    emitter: Emitter,
    node: Node,
    selection: Selection,
    kept: dict[str, Node],
    casts: dict[tuple[Node, torch.dtype], Node],
) -> Node:
    operands = operands_of(node)
    with emitter.graph.inserting_before(node):
        return realise(_IntoGraph(emitter, node, casts), selection, operands, kept)


def pad_in_quantizes(emitter: Emitter, selections: Mapping[Node, Selection]) -> None:
    """Let each quantize pad its codes along k itself, where all that read them want them padded alike."""
    for node, selection in selections.items():
        codes = through(operands_of(node).a, _TO_SIZES)
        quantize = args_of(codes)[0] if is_op(codes, operator.getitem) else codes
        op, k = torch.ops.fx_quant.quantize, selection.padding.k
        if not is_op(quantize, op.default, op.dynamic) or same_size(shape(codes)[-1], k):
            continue
        views: list[Node] = []
        if _all_want(k, codes, selections, views):
            emitter.recall(quantize, quantize.target, quantize.args, quantize.kwargs | {"pad": k - shape(codes)[-1]})
            for view in dict.fromkeys((codes, *views)):
                if view is not quantize:
                    args = view.args if view is codes else (view.args[0], [*args_of(view)[1][:-1], k])
                    emitter.recall(view, view.target, args, view.kwargs)


def _all_want(k: int, codes: Node, selections: Mapping[Node, Selection], views: list[Node]) -> bool:
    """Whether all that read ``codes``, by way of ``views`` of its rows too, are matmuls that pad it to ``k``."""
    for user in codes.users:
        if is_op(user, *_TO_SIZES) and same_size(shape(user)[-1], shape(codes)[-1]):
            views.append(user)
            if not _all_want(k, user, selections, views):
                return False
        elif user not in selections or selections[user].padding.k != k or _reads(user, codes) != [0]:
            return False
    return bool(codes.users)


def _reads(user: Node, operand: Node) -> list[int]:
    """Which arguments of ``user`` are ``operand``."""
    return [i for i, given in enumerate((*user.args, *user.kwargs.values())) if given is operand]


def _share_sums(emitter: Emitter, sums: Mapping[Node, Node | None]) -> None:
    """One sum of each weight over k, the kept one if there is one; a zero point that lies far out has its own.

    What is returned stays, as it is to have memory of its own.
    """
    memory: Memory | None = None
    for b, kept in sums.items():
        users = [
            user
            for user in b.users
            if is_op(user, aten.sum.dim_IntList) and user.args == (b, [0]) and user.kwargs == {"dtype": torch.int32}
        ]
        first = kept if kept is not None else next((user for user in users if user in emitter.emitted), None)
        for user in users:
            if first is not None and first < user:
                memory = memory or Memory(emitter.graph)
                if not memory.is_returned(user):
                    user.replace_all_uses_with(first)


def _keep(
    emitter: Emitter, selections: Mapping[Node, Selection], runtime: Collection[Node]
) -> dict[Node, dict[str, Node]]:
    """Everything that kernels want to be computed once of constants, by canonical op and part."""
    kept: dict[Node, dict[str, Node]] = {}
    stored: list[tuple[Node, str, Node, str]] = []
    for node, selection in selections.items():
        operands = operands_of(node)
        constant = {name for name in WEIGHT_FACTORS if getattr(operands, name) not in runtime}
        if selection.problem.constant_weight:
            constant.add("b")
        for part, (name, layout) in kept_parts(selection, operands, constant).items():
            operand = getattr(operands, name)
            if name == "b_scale":
                operand = _as_stored(emitter, operand, node)
            matrix = matrix_base(operand)
            unpacked = None if matrix is None or name != "b" or not matrix[1] else unpacked_from(matrix[0])
            if unpacked is not None:
                # The weight of a layer that holds it in the layout of a kernel.
                packed, held = unpacked
                if part == "b" and layout == held.layout:
                    kept.setdefault(node, {})[part] = packed
                else:
                    stored.append((node, part, packed, repacked(layout, held)))
            elif matrix is not None and matrix[0].op != "call_function":
                base, transposed = matrix
                # Layouts are of weights [n, k], and of factors as they stand.
                stored.append((node, part, base, layout if transposed == (name == "b") else f"{layout}{TRANSPOSED}"))
            else:
                kept.setdefault(node, {})[part] = _pack_computed(emitter, node, operand, layout, is_weight=name == "b")
    for node, parts in _pack_stored(emitter, stored).items():
        kept.setdefault(node, {}).update(parts)
    return kept


def _as_stored(emitter: Emitter, scale: Node, like: Node) -> Node:
    """A widened ``scale`` in the 16 bits that it was widened from; any other as it is.

    The kernels whose scales are packed widen them as they read them, and half as much is read.
    """
    views, source = [], scale
    while is_op(source, *_TO_SIZES, aten.permute.default, aten.expand.default):
        views.append(source)
        source = args_of(source)[0]
    if not is_op(source, prims.convert_element_type.default, aten._to_copy.default):
        return scale
    stored = args_of(source)[0]
    if dtype(source) is not torch.float32 or dtype(stored) not in HALF_DTYPES:
        return scale
    with emitter.graph.inserting_before(like):
        for view in reversed(views):
            stored = emitter.call(view.target, stored, *args_of(view)[1:], like=like)
    return stored


def _pack_computed(emitter: Emitter, node: Node, operand: Node, layout: str, *, is_weight: bool) -> Node:
    """What the graph computes of constants, packed where it stands; folding takes it out of the graph."""
    with emitter.graph.inserting_before(node):
        if is_weight:
            operand = emitter.call(aten.permute.default, operand, [1, 0], like=node)
        return emitter.call(torch.ops.fx_quant.pack.default, operand, layout, like=node)


def _pack_stored(emitter: Emitter, stored: Sequence[tuple[Node, str, Node, str]]) -> dict[Node, dict[str, Node]]:
    """Parameters and buffers, packed by one call at the head of the graph."""
    if not stored:
        return {}
    graph = emitter.graph
    head = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    known: dict[tuple[Node, str], int] = {}
    index: dict[Node, dict[str, int]] = {}
    with graph.inserting_before(head):
        for node, part, base, layout in stored:
            key = base, layout
            if key not in known:
                known[key] = len(known)
                if base.op == "get_attr":
                    head.prepend(base)
            index.setdefault(node, {})[part] = known[key]
        like = stored[0][0]
        weights, layouts = map(list, zip(*known, strict=True))
        call = emitter.call(torch.ops.fx_quant.prepack.default, weights, layouts, like=like)
        outs = [emitter.call(operator.getitem, call, i, like=like) for i in range(len(known))]
    return {node: {part: outs[i] for part, i in parts.items()} for node, parts in index.items()}
