"""Which matmuls of a graph are quantized, found without the algebra: what must end as rewritten, recognised or missed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

aten, prims = torch.ops.aten, torch.ops.prims

CODES = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}

# Positions of the two operands that are multiplied.
CONTRACTIONS: dict[object, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten._int_mm.default: (0, 1),
    aten._scaled_mm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmv.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
}

# What moves codes or their decoded values from place to place, whole.
MOVES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.expand.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.slice.Tensor,
    aten._to_copy.default,
    prims.convert_element_type.default,
}
# By one number or a smaller tensor; by one of the same size it is a gate or a residual.
DECODES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.sub.Tensor, aten.sub.Scalar}


def quantized_contractions(graph: Graph, static: Collection[int]) -> dict[str, str]:
    """Names and ops of the contractions of a weight that is codes, or is decoded from them for certain.

    Integers that change from call to call may be a mask or an image; they are codes once they are scaled or shifted.

    Args:
        static: positions of the inputs that are parameters.
    """
    raw: set[Node] = set()
    decoded: set[Node] = set()
    found = {}
    placeholders = graph.find_nodes(op="placeholder")
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        if node.target in CONTRACTIONS:
            if node.args[CONTRACTIONS[node.target][1]] in decoded:
                found[node.name] = str(node.target)
        elif node.op == "placeholder":
            if value.dtype in CODES and value.dim() >= 2:
                kept = placeholders.index(node) in static or value.dtype.is_floating_point
                # Bytes of a call that constants shift and scale are an image.
                if kept or value.dtype is not torch.uint8:
                    (decoded if kept else raw).add(node)
        elif node.target in MOVES and value.dtype is not torch.bool:
            for known in (raw, decoded):
                if node.args[0] in known:
                    known.add(node)
        elif node.target in DECODES and node.args[0] in raw | decoded:
            other = node.args[1].meta.get("val") if isinstance(node.args[1], Node) else None
            if (isinstance(other, torch.Tensor) and other.numel() < value.numel()) or (
                not isinstance(node.args[1], Node) and node.args[0] in decoded
            ):
                decoded.add(node)
    return found
