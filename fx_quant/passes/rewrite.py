"""Around the canonical ops: identities dropped before them, quantizes and duplicates rewritten after them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from fx_quant.passes.emit import Emitter
from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.memory import Memory
from fx_quant.passes.merge import call_key
from fx_quant.passes.nodes import (
    CASTS,
    EXPANDS,
    PERMUTES,
    RESHAPES,
    VIEWS,
    args_of,
    aten,
    is_op,
    same_shape,
    shape,
    through,
    uniform_value,
)
from fx_quant.passes.quantizers import Quantizer, recognise_quantizer
from fx_quant.passes.sites import Site


def remove_identities(graph: Graph) -> None:
    """Drop views, casts and ``+ 0`` / ``* 1`` that change nothing, which libraries leave between the steps.

    One that makes a copy stays where that could be told: outputs keep memory of their own. What ``torch.export``
    asserts of dtypes and devices goes too, which a graph of known dtypes cannot break.
    """
    memory = Memory(graph)
    for node in list(graph.nodes):
        if is_op(node, aten._assert_tensor_metadata.default):
            graph.erase_node(node)
            continue
        source = _identity_source(node)
        if source is not None and memory.can_stand_for(source, node):
            memory.join(source, node)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _identity_source(node: Node) -> Node | None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    if before.dtype != after.dtype or not same_shape(before.shape, after.shape):
        return None
    if node.target in RESHAPES | EXPANDS or is_op(node, aten.slice.Tensor):
        return source
    # Arithmetic makes a dense copy, of which later steps may take views that its source has not.
    if len(node.args) < 2 or not same_shape(before.stride(), after.stride()):
        return None
    if is_op(node, aten.mul.Tensor) and uniform_value(node.args[1]) == 1:
        return source
    if is_op(node, aten.constant_pad_nd.default):
        return source  # to a size that it is known to have
    if is_op(node, aten.add.Tensor) and uniform_value(node.args[1]) == 0 and _loses_sign_of_zero(node):
        return source
    return None


def _loses_sign_of_zero(node: Node) -> bool:
    """Whether it does not matter that ``-0.0 + 0`` is ``0.0``: all that becomes of ``node`` is integers."""
    if not node.meta["val"].dtype.is_floating_point:
        return True
    return all(
        is_op(user, *CASTS, *VIEWS, aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default)
        and _loses_sign_of_zero(user)
        for user in node.users
    )


def collapse_reshapes(emitter: Emitter) -> None:
    """Make each emitted reshape one of the tensor that its chain of reshapes began with."""
    for node in list(emitter.graph.nodes):
        if node not in emitter.emitted or not is_op(node, aten.reshape.default):
            continue
        base = through(node, RESHAPES)
        if same_shape(shape(base), shape(node)):
            emitter.replace(node, base)
            emitter.graph.erase_node(node)
        elif base is not node.args[0]:
            node.args = (base, *node.args[1:])


def merge_duplicates(emitter: Emitter) -> None:
    """Drop emitted views, casts and scale arithmetic that are there already: several sites ask for the same.

    Nodes of the source graph stay, as merging two outputs would alias them.
    """
    first: dict[tuple, Node] = {}
    for node in list(emitter.graph.nodes):
        if is_op(node, *RESHAPES, *PERMUTES, *EXPANDS, *CASTS, *_SCALE_ARITHMETIC):
            kept = first.setdefault(call_key(node, {}), node)
            if kept is not node and node in emitter.emitted:
                emitter.replace(node, kept)
                emitter.graph.erase_node(node)


_SCALE_ARITHMETIC = (aten.mul.Tensor, aten.reciprocal.default, aten.full.default)


def quantizers_of(sites: Iterable[Site], memory: Memory) -> dict[Node, Quantizer | str]:
    """What is recognised of the quantize behind each site's activation, by the node of its codes."""
    nodes = {site.codes for site in sites} - {None}
    return {node: _recognised(node, memory) for node in nodes if node is not None}


def _recognised(codes: Node, memory: Memory) -> Quantizer | str:
    quantizer = attempt(recognise_quantizer, codes)
    if isinstance(quantizer, Failure):
        return quantizer.reason("recognising the quantize")
    if not isinstance(quantizer, Quantizer):
        return quantizer
    for source in (quantizer.x, quantizer.scale):
        if memory.is_written_before(source, quantizer.codes):
            return f"{source} is written to while it is quantized"
    scale = quantizer.scale
    if quantizer.dynamic is not None and memory.base(scale) is not scale and memory.is_returned(scale):
        # The scale is a view of an output, and is to stay one.
        return dataclasses.replace(quantizer, dynamic=None)
    return quantizer


def rewrite_quantizers(emitter: Emitter, quantizers: Iterable[Quantizer | str]) -> dict[Node, str]:
    """Replace each recognised quantize by ``fx_quant::quantize``, codes and scale, for all of their users.

    Returns why not, by the node of the codes, of those that could not be replaced.
    """
    done: set[Node] = set()
    left: dict[Node, str] = {}
    for quantizer in quantizers:
        if not isinstance(quantizer, Quantizer) or quantizer.codes in done:
            continue
        done.add(quantizer.codes)
        outcome = attempt(_rewrite_quantizer, emitter, quantizer)
        if isinstance(outcome, Failure):
            left[quantizer.codes] = outcome.reason("rewriting the quantize")
    return left


def _rewrite_quantizer(emitter: Emitter, quantizer: Quantizer) -> None:
    codes, scale, op = quantizer.codes, quantizer.scale, torch.ops.fx_quant.quantize
    x = None if quantizer.dynamic is None else _before(scale, emitter.current(quantizer.x))
    if x is None:
        with emitter.graph.inserting_before(codes):
            out = emitter.call(op.default, quantizer.x, scale, like=codes, **quantizer.arguments)
        emitter.replace(codes, out)
        return
    with emitter.graph.inserting_before(scale):
        pair = emitter.call(op.dynamic, x, like=codes, **quantizer.arguments, **(quantizer.dynamic or {}))
        new_codes = emitter.call(operator.getitem, pair, 0, like=codes)
        new_scale = _reshaped_like(emitter, emitter.call(operator.getitem, pair, 1, like=codes), scale)
    with emitter.graph.inserting_before(codes):
        new_codes = _reshaped_like(emitter, new_codes, codes)
    emitter.replace(codes, new_codes)
    emitter.replace(scale, new_scale)


def _before(scale: Node, x: Node) -> Node | None:
    """``x``, or a view of it with the same last dim, that is computed before ``scale``; None when there is none."""
    columns = shape(x)[-1:]
    while not x < scale:
        if not is_op(x, *RESHAPES) or not same_shape(shape(args_of(x)[0])[-1:], columns):
            return None
        x = args_of(x)[0]
    return x


def _reshaped_like(emitter: Emitter, node: Node, like: Node) -> Node:
    if same_shape(shape(node), shape(like)):
        return node
    return emitter.reshape(node, emitter.size_args(shape(like), like, like=like), like=like)
