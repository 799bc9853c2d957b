"""Slices that fill a new tensor one after the other, as codes are unpacked into an empty one: they are a ``cat``."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from fx_quant.passes.emit import Emitter
from fx_quant.passes.memory import is_barrier
from fx_quant.passes.nodes import args_of, arguments, aten, dtype, dtype_of, is_op, same_shape, shape

_WRITES = (aten.slice_scatter.default, aten.copy.default, aten.slice.Tensor)
_NEW = frozenset(
    {
        *(aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default),
        *(aten.full.default, aten.full_like.default, aten.zeros.default, aten.zeros_like.default),
        *(aten.new_full.default, aten.new_zeros.default),
    }
)


def join_slices(graph: Graph) -> None:
    """Make each tensor that is new and then wholly overwritten, slice by slice along one dim, the ``cat`` of these.

    What was in it cannot be told any more. One that is filled in part only is left, and so are slices that overlap in
    part, or have a step, and those that an op that writes to memory stands between.
    """
    writes, emitter = list(graph.find_nodes(op="call_function", target=aten.slice_scatter.default)), None
    regions = _regions(graph) if writes else {}
    for node in writes:
        if any(is_op(user, aten.slice_scatter.default) and user.args[0] is node for user in node.users):
            continue  # written to again
        found = _slices(node)
        if found is None or any(regions[part] != regions[node] for part in found[1]):
            continue
        dim, parts = found
        emitter = emitter or Emitter(graph)
        copied = [_copied(part) for part in parts]
        kinds = {dtype_of(part) for part in copied}
        with graph.inserting_before(node):
            # Codes that are cast as they are copied are put together first.
            written = [_like(emitter, *pair, kinds, node) for pair in zip(copied, parts, strict=True)]
            joined = emitter.cast(emitter.call(aten.cat.default, written, dim, like=node), dtype_of(node), like=node)
        if not same_shape(joined.meta["val"].stride(), node.meta["val"].stride()):
            graph.erase_node(joined)
            continue
        emitter.replace(node, joined)
        _erase_unused(graph, node)


def _regions(graph: Graph) -> dict[Node, int]:
    """How many ops that write to memory stand before each node."""
    regions, region = {}, 0
    for node in graph.nodes:
        region += is_barrier(node)
        regions[node] = region
    return regions


def _slices(last: Node) -> tuple[int, list[Node]] | None:
    """The dim along which ``last`` and the writes before it fill a new tensor, and what they write, in its order."""
    rank, filled, dim = len(shape(last)), dict[int, tuple[int, Node]](), None
    node: object = last
    while is_op(node, aten.slice_scatter.default):
        given = arguments(node)
        along = int(given["dim"]) % rank
        size, start, stop = shape(node)[along], given["start"] or 0, given["end"]
        stop = size if stop is None else stop
        if not (isinstance(size, int) and isinstance(start, int) and isinstance(stop, int)):
            return None
        if given["step"] != 1 or dim not in (None, along):
            return None
        start, stop = (min(max(each + size if each < 0 else each, 0), size) for each in (start, stop))
        inside = [begin <= start and stop <= end for begin, (end, _) in filled.items()]
        if not any(inside):
            if any(start < end and begin < stop for begin, (end, _) in filled.items()) or start >= stop:
                return None
            if dtype(given["src"]) != dtype(last):
                return None
            filled[start] = stop, given["src"]
        dim, node = along, given["self"]
    if dim is None or not is_op(node, *_NEW):
        return None
    at, parts = 0, []
    while at in filled:
        at, part = filled[at]
        parts.append(part)
    return (dim, parts) if at == shape(last)[dim] and len(parts) == len(filled) else None


def _copied(part: Node) -> Node:
    """What was copied to a slice to make ``part``."""
    return args_of(part)[1] if is_op(part, aten.copy.default) and isinstance(args_of(part)[1], Node) else part


def _like(emitter: Emitter, source: Node, part: Node, kinds: Collection[torch.dtype], like: Node) -> Node:
    """``source`` of the shape of ``part``, and of its dtype unless all have one of ``kinds``."""
    source = source if len(kinds) == 1 else emitter.cast(source, dtype_of(part), like=like)
    if same_shape(shape(source), shape(part)):
        return source
    return emitter.call(aten.expand.default, source, list(shape(part)), like=like)


def _erase_unused(graph: Graph, node: Node) -> None:
    """Erase ``node`` and what only it used, as far as that made or sliced the tensor."""
    waiting, erased = [node], set[Node]()
    while waiting:
        node = waiting.pop()
        if node in erased or node.users or not is_op(node, *_WRITES, *_NEW):
            continue
        waiting += node.all_input_nodes
        erased.add(node)
        graph.erase_node(node)
