"""Which matmuls of a graph are quantized, found without the algebra: what must end as rewritten, recognised or missed."""

from __future__ import annotations

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


def quantized_contractions(graph: Graph) -> dict[str, str]:
    """Names and ops of the contractions whose weight, the second operand, is codes or is decoded from them for certain."""
    decoded: set[Node] = set()
    found = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        if node.target in CONTRACTIONS:
            operand = node.args[CONTRACTIONS[node.target][1]]
            if operand in decoded:
                found[node.name] = str(node.target)
            continue
        if value.dtype in CODES and value.dim() >= 2 and (node.op == "placeholder" or node.target in MOVES):
            if node.op == "placeholder" or node.args[0] in decoded:
                decoded.add(node)
        elif node.target in MOVES and node.args[0] in decoded:
            if value.dtype.is_floating_point or value.dtype in (torch.int32, torch.int16, torch.int64):
                decoded.add(node)
        elif node.target in DECODES and node.args[0] in decoded:
            other = node.args[1].meta.get("val") if isinstance(node.args[1], Node) else None
            if not isinstance(other, torch.Tensor) or other.numel() < value.numel():
                decoded.add(node)
    return found
