"""Parts of a weight that was decoded whole, as parts of its codes: ``w.chunk(3)``, ``w.split``, ``w[1]``, ``unbind``.

What keeps elements apart gives the same of a part of its operands, bit for bit. So a slice of a decoded weight moves in
front of the steps that decode it, to codes, scales and zero points, where each rule reads them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fx_quant.passes.axes import order_of
from fx_quant.passes.contractions import may_store_codes
from fx_quant.passes.emit import Emitter
from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.inputs import classify_inputs
from fx_quant.passes.memory import Memory
from fx_quant.passes.nodes import (
    CASTS,
    EXPANDS,
    PERMUTES,
    RESHAPES,
    VIEWS,
    args_of,
    arguments,
    aten,
    dtype,
    is_one,
    is_op,
    shape,
    tensor,
)
from fx_quant.problem import Size
from fx_quant.scheme import FLOAT_DTYPES

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


@dataclass(frozen=True)
class Cut:
    """A slice of a tensor.

    Args:
        dim: the dim that is cut.
        start, step: the first index, and how far the next is.
        size: how many indices are taken.
        drops: the dim goes, as of ``w[1]``.
    """

    dim: int
    start: int
    size: int
    step: int = 1
    drops: bool = False


def cut_of(node: Node) -> tuple[Node, Cut] | None:
    """What ``node`` is a slice of, and which; None where it is none, or of sizes that are not known."""
    if is_op(node, aten.slice.Tensor):
        given = arguments(node)
        return _cut(given["self"], given["dim"], given["start"] or 0, given["end"], given["step"])
    if is_op(node, aten.select.int):
        source, dim, index = args_of(node)
        return _selected(source, dim, index)
    if not is_op(node, operator.getitem) or not is_op(args_of(node)[0], *_SPLITS):
        return None
    split, index = args_of(node)
    given = arguments(split)
    if is_op(split, aten.unbind.int):
        return _selected(given["self"], given["dim"], index)
    sizes = given["split_size"] if is_op(split, aten.split.Tensor) else given["split_sizes"]
    sizes = [sizes] * (index + 1) if isinstance(sizes, int) else sizes
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    return _cut(given["self"], given["dim"], start, start + sizes[index], 1)


def _cut(source: Node, dim: int, start: object, end: object, step: object) -> tuple[Node, Cut] | None:
    dim %= len(shape(source))
    size = shape(source)[dim]
    if not isinstance(size, int) or not isinstance(start, int) or not isinstance(step, int):
        return None
    if end is not None and not isinstance(end, int):
        return None
    chosen = range(size)[start:end:step]
    return source, Cut(dim, chosen.start, len(chosen), chosen.step)


def _selected(source: Node, dim: int, index: object) -> tuple[Node, Cut] | None:
    dim %= len(shape(source))
    size = shape(source)[dim]
    if not isinstance(size, int) or not isinstance(index, int):
        return None
    return source, Cut(dim, index % size, 1, drops=True)


def decode_parts(graph: Graph, static_indices: frozenset[int] | None) -> None:
    """Decode parts of a weight instead of taking parts of the decoded one, where nobody wants more than its parts.

    Left are slices that do not follow the groups, and those of what is returned, or written to.
    """
    coded = coded_nodes(graph)
    sliced: dict[Node, list[tuple[Node, Cut]]] = {}
    for node in graph.nodes:
        found = cut_of(node)
        if found is not None and found[0] in coded and dtype(node) in FLOAT_DTYPES:
            sliced.setdefault(found[0], []).append((node, found[1]))
    if not sliced:
        return
    memory, runtime = Memory(graph), classify_inputs(graph, static_indices).runtime
    parts = _Parts(Emitter(graph), coded)
    for source, slices in sliced.items():
        if source in runtime or memory.is_returned(source) or memory.is_written(source):
            continue
        # A slice of what was a slice itself.
        whole = parts.emitter.current(source)
        if _are_all(whole, {node for node, _ in slices}):
            for node, cut in slices:
                parts.replace(node, whole, cut)
    if parts.emitter.emitted:
        graph.eliminate_dead_code()


def coded_nodes(graph: Graph) -> set[Node]:
    """What is made of codes by steps that integers take, or that keep elements apart."""
    coded: set[Node] = set()
    for node in graph.nodes:
        if tensor(node) is None:
            continue
        found = cut_of(node)
        made = any(source in coded for source in (node.all_input_nodes if found is None else found[:1]))
        if made and node.op == "call_function":
            keeps = found is not None or dtype(node) not in FLOAT_DTYPES or _keeps_apart(node)
        else:
            keeps = may_store_codes(node)
        if keeps:
            coded.add(node)
    return coded


def _keeps_apart(node: Node) -> bool:
    return is_op(node, *VIEWS, *CASTS) or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _are_all(source: Node, slices: Set[Node]) -> bool:
    """Whether ``slices`` are all that is read of ``source``, and have no more elements than it."""
    readers = {user for call in source.users for user in (call.users if is_op(call, *_SPLITS) else (call,))}
    count = sum(math.prod(shape(node)) for node in slices)
    return readers <= slices and count <= math.prod(shape(source))


def _refresh(emitter: Emitter, node: Node) -> None:
    """Let views of ``node`` have the strides that theirs are now."""
    for user in list(node.users):
        if is_op(user, *VIEWS):
            emitter.recall(user, user.target, user.args, user.kwargs)
            _refresh(emitter, user)


class _Parts:
    """Emits parts of nodes as what is computed of parts of their operands."""

    def __init__(self, emitter: Emitter, coded: set[Node]) -> None:
        self.emitter, self._coded = emitter, coded
        self._known: dict[tuple[Node, Cut], Node] = {}

    def replace(self, node: Node, source: Node, cut: Cut) -> None:
        """Let ``node``, which is the part ``cut`` of ``source``, be computed of parts, where it can."""
        if not self._is_step(source) or not self._can(source, cut):
            return
        with self.emitter.graph.inserting_before(node):
            part = attempt(self._part, source, replace(cut, drops=False))
            if isinstance(part, Failure):
                return
            if cut.drops:
                part = self._emit(node, aten.squeeze.dim, part, cut.dim)
        self.emitter.replace(node, part)
        _refresh(self.emitter, part)

    def _can(self, node: Node, cut: Cut) -> bool:
        """Whether a part of ``node`` is computed of parts of codes and of what is no codes."""
        if not self._is_step(node):
            return True
        operands = operands_of_part(node, cut)
        return operands is not None and all(self._can(source, part) for source, part in operands.items())

    def _is_step(self, node: Node) -> bool:
        return node in self._coded and node.op == "call_function" and dtype(node) in FLOAT_DTYPES

    def _part(self, node: Node, cut: Cut) -> Node:
        if (node, cut) not in self._known:
            self._known[node, cut] = self._emitted(node, cut)
        return self._known[node, cut]

    def _emitted(self, node: Node, cut: Cut) -> Node:
        operands = operands_of_part(node, cut) if self._is_step(node) else None
        if operands is None:
            end = cut.start + (cut.size - 1) * cut.step + 1
            return self._emit(node, aten.slice.Tensor, node, cut.dim, cut.start, end, cut.step)
        parts = {source: self._part(source, part) for source, part in operands.items()}
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: parts.get(n, n))
        if not is_op(node, *RESHAPES, *EXPANDS):
            return self._emit(node, node.target, *args, **kwargs)
        sizes = [cut.size if dim == cut.dim else size for dim, size in enumerate(shape(node))]
        op = aten.expand.default if is_op(node, *EXPANDS) else aten.reshape.default
        return self._emit(node, op, args[0], sizes)

    def _emit(self, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.emitter.call(target, *args, like=like, **kwargs)
        if like in self._coded:
            self._coded.add(node)
        return node


def operands_of_part(node: Node, cut: Cut) -> dict[Node, Cut] | None:
    """Which parts of its operands the part ``cut`` of ``node`` is computed of, beside operands that stay whole.

    None where it is computed of no such parts.
    """
    sizes = shape(node)
    if not cut.size or not all(isinstance(size, int) for size in sizes):
        return None
    if is_op(node, *RESHAPES):
        source = args_of(node)[0]
        before = _before_reshape(shape(source), sizes, cut)
        return None if before is None else {source: before}
    if is_op(node, *PERMUTES):
        order = order_of(node)
        return None if order is None else {args_of(node)[0]: replace(cut, dim=order[cut.dim])}
    if not _keeps_apart(node):
        return None
    parts: dict[Node, Cut] = {}
    for operand in node.all_input_nodes:
        own = cut.dim - len(sizes) + len(shape(operand))
        if tensor(operand) is not None and own >= 0 and not is_one(shape(operand)[own]):
            parts[operand] = replace(cut, dim=own)
    return parts


def _before_reshape(before: Sequence[Size], after: Sequence[Size], cut: Cut) -> Cut | None:
    """The slice of a tensor of sizes ``before`` that holds the part ``cut`` of it in sizes ``after``."""
    old = [size for size in before if isinstance(size, int) and size]
    new = [size for size in after if isinstance(size, int) and size]
    if len(old) < len(before) or len(new) < len(after):
        return None
    size, inner = new[cut.dim], math.prod(new[cut.dim + 1 :])
    for dim, whole in enumerate(old):
        rest = math.prod(old[dim + 1 :])
        if whole * rest == size * inner:
            # The dim is cut where its neighbours of less significance begin.
            if cut.step == 1 and cut.start * inner % rest == 0 and cut.size * inner % rest == 0:
                return Cut(dim, cut.start * inner // rest, cut.size * inner // rest)
            if inner == rest:
                return replace(cut, dim=dim)
        if cut.size == 1 and inner == rest and whole % size == 0:
            return Cut(dim, cut.start, whole // size, size)  # each index of what is more significant has one
    return None
