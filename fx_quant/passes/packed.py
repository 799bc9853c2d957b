"""Weights that a layer holds in the layout of a kernel: the graph unpacks them, a kernel reads them as they are."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import fx_quant.kernels.packed_weights  # noqa: F401  (registers the ops)
from fx_quant.errors import FxQuantError
from fx_quant.kernels.layouts import CODES, Held, repacked
from fx_quant.passes.emit import Emitter
from fx_quant.passes.inputs import Inputs
from fx_quant.passes.nodes import args_of, is_op

_UNPACK = torch.ops.fx_quant.unpack.default


def refuse_writes(gm: GraphModule) -> None:
    """That a graph of Dynamo's writes to no weight that it unpacks, as the layer would not see it.

    Raises:
        FxQuantError: it does.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.fx_quant.unpack):
        codes = node.meta.get("example_value")
        # Traced on tensors without data, of which PyTorch counts the writes, those through views too.
        if isinstance(codes, Tensor) and not codes.is_inference() and codes._version:
            raise FxQuantError(
                "compiled code must not write to the weight of a QuantizedLinear that is held packed, got a graph that "
                "does; write to layer.weight outside of what is compiled"
            )


def unpacked_from(node: Node) -> tuple[Node, Held] | None:
    """The parameter, buffer or input that ``node`` unpacks, and what that holds; None for any other node."""
    if not is_op(node, _UNPACK):
        return None
    packed, layout, n, k = args_of(node)
    if not isinstance(packed, Node) or packed.op == "call_function":
        return None
    assert isinstance(layout, str) and isinstance(n, int) and isinstance(k, int)
    return packed, Held(layout, n, k)


def unpack_once(emitter: Emitter, inputs: Inputs) -> None:
    """Let what is left to be unpacked of constants be unpacked once, instead of in every call."""
    left = {node: unpacked_from(node) for node in emitter.graph.find_nodes(op="call_function", target=_UNPACK)}
    known = {node: found for node, found in left.items() if found is not None and found[0] in inputs.constant}
    if not known:
        return
    head = next(node for node in emitter.graph.nodes if node.op not in ("placeholder", "get_attr"))
    like = next(iter(known))
    with emitter.graph.inserting_before(head):
        sources = [packed for packed, _ in known.values()]
        for source in sources:
            if source.op == "get_attr":
                head.prepend(source)
        layouts = [repacked(CODES, held) for _, held in known.values()]
        call = emitter.call(torch.ops.fx_quant.prepack.default, sources, layouts, like=like)
        codes = [emitter.call(operator.getitem, call, i, like=node) for i, node in enumerate(known)]
    for node, once in zip(known, codes, strict=True):
        node.replace_all_uses_with(once)
        emitter.graph.erase_node(node)
