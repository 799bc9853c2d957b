"""Which matmuls of a graph are quantized, found without the algebra: what must end as rewritten, recognised or missed.

The rule is that of ``fx_quant/passes/origins.py``, written down a second time for what the grammar draws. Bytes are codes
where they are stored. Where they change from call to call they may be a mask or an image, until a tensor smaller than
they are scales or shifts them: any that is not computed from them for int8, one that comes with the call too for uint8,
as constants and their own statistics normalise an image. int8 that the graph writes to is the state of a model, so codes.
Stored uint8 that nothing scales may be a mask where it is multiplied and summed without a matmul.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

aten, prims = torch.ops.aten, torch.ops.prims

BYTES = {torch.int8, torch.uint8}
CODES = {*BYTES, torch.float8_e4m3fn, torch.float8_e5m2}

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

CASTS = {aten._to_copy.default, prims.convert_element_type.default}
# What moves codes or their decoded values from place to place, whole.
MOVES = CASTS | {
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
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.flip.default,
    aten.neg.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.round.default,
    operator.getitem,
}
# What takes codes out of bytes, or makes others of them.
UNPACKS = {
    overload
    for name in ("__and__", "__rshift__", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_right_shift")
    for overload in (getattr(getattr(aten, name), of) for of in getattr(aten, name).overloads())
}
SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
SHIFTS = {aten.sub.Tensor, aten.sub.Scalar, aten.add.Tensor, aten.add.Scalar}


@dataclass(frozen=True)
class _Made:
    """What a node was made of.

    Args:
        of: the bytes.
        coded: they are codes for certain, not a mask or an image.
        scaled: something scaled or shifted them.
    """

    of: Node
    coded: bool
    scaled: bool = False


def quantized_contractions(graph: Graph, static: Collection[int]) -> dict[str, str]:
    """Names and ops of the contractions of an operand that is codes, or is decoded from them, for certain.

    Args:
        static: positions of the inputs that are parameters.
    """
    walk = _Walk(graph, static)
    found = {}
    for node in graph.nodes:
        walk.visit(node)
        operands = [node.args[i] for i in CONTRACTIONS.get(node.target, ())]
        if any(map(walk.is_coded, operands)) or walk.multiplies_and_sums(node):
            found[node.name] = str(node.target)
    return found


class _Walk:
    """What each node of a graph was made of, visited in order."""

    def __init__(self, graph: Graph, static: Collection[int]) -> None:
        placeholders = graph.find_nodes(op="placeholder")
        written = {node.args[0] for node in graph.find_nodes(op="call_function", target=aten.copy_.default)}
        self.state = {placeholders[i] for i in static} & written
        self.constant = {placeholders[i] for i in static} - written
        self.changes: set[Node] = set()
        # The bytes of a call that a node is computed from without a contraction.
        self.statistics: dict[Node, set[Node]] = {}
        self.made: dict[Node, _Made] = {}

    def visit(self, node: Node) -> None:
        """Note what ``node`` was made of."""
        value = node.meta.get("val")
        brought = node.op == "placeholder" and node not in self.constant
        # A tensor that is filled to a size of the call holds the same values in each.
        if not isinstance(value, (int, torch.SymInt)) and (
            brought or not self.changes.isdisjoint(node.all_input_nodes)
        ):
            self.changes.add(node)
        sources = [] if node.target in CONTRACTIONS else node.all_input_nodes
        self.statistics[node] = {source for n in sources for source in self.statistics[n]}
        of = self.of(node, value[0] if isinstance(value, (list, tuple)) and value else value)
        if of is not None:
            self.made[node] = of
            if of.of is node and not of.coded:
                self.statistics[node] = {node}

    def is_coded(self, node: object) -> bool:
        """Whether ``node`` is of codes for certain."""
        known = self.made.get(node) if isinstance(node, Node) else None
        return known is not None and known.coded

    def multiplies_and_sums(self, node: Node) -> bool:
        """Whether ``node`` sums what a call brings times a weight that broadcasts to it."""
        product = node.args[0] if node.target is aten.sum.dim_IntList else None
        if not isinstance(product, Node) or product.target is not aten.mul.Tensor or product in self.made:
            return False
        weights = [n for n in product.all_input_nodes if self.is_coded(n) and self.is_weight(self.made[n])]
        return len(weights) == 1 and any(n in self.changes for n in product.all_input_nodes if n not in weights)

    def is_weight(self, made: _Made) -> bool:
        """Whether stored bytes are codes of a weight, not a mask: what sums under one looks the same."""
        return made.of in self.constant and (made.scaled or made.of.meta["val"].dtype is not torch.uint8)

    def of(self, node: Node, value: object) -> _Made | None:
        """What ``node`` was made of; None where that is no bytes, or nothing is certain."""
        if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
            return None
        if node.op == "placeholder":
            if value.dtype not in CODES or value.dim() < 2 or value.numel() == 1:
                return None
            coded = node in self.constant or value.dtype.is_floating_point
            return _Made(node, coded or (node in self.state and value.dtype is torch.int8))
        if node.target in MOVES | UNPACKS:
            known = self.made.get(node.args[0])
            return _Made(node, True) if known is None and self.quantizes(node, value) else known
        if node.target is aten.cat.default:
            parts = [self.made.get(n) for n in node.args[0]]
            return parts[0] if all(part is not None and part.coded for part in parts) else None
        return self.combined(node, value) if node.target in SCALES | SHIFTS else None

    def quantizes(self, node: Node, value: torch.Tensor) -> bool:
        """Whether ``node`` rounds floats, or casts them to codes."""
        if node.target is aten.round.default:
            return value.dim() >= 2 and value.is_floating_point()
        source = node.args[0].meta["val"] if node.target in CASTS else None
        floats = isinstance(source, torch.Tensor) and source.dtype.is_floating_point and source.dtype not in CODES
        return floats and value.dtype in CODES and value.dim() >= 2

    def combined(self, node: Node, value: torch.Tensor) -> _Made | None:
        """Codes with what scales or shifts them; by what is as large as they are it is a gate or a residual."""
        for codes, by in (node.args[:2], node.args[1::-1]):
            known = self.made.get(codes) if isinstance(codes, Node) else None
            if known is None:
                continue
            if not isinstance(by, Node):
                return replace(known, scaled=True)
            other = by.meta.get("val")
            if not isinstance(other, torch.Tensor) or other.numel() >= value.numel() or other.dtype is torch.bool:
                continue
            if codes.meta["val"].shape != value.shape:
                continue  # broadcast itself
            if node.target in (aten.add.Tensor, aten.add.Scalar) and other.dtype.is_floating_point:
                continue  # a bias
            return replace(known, coded=known.coded or self.decodes(known.of, by), scaled=True)
        return None

    def decodes(self, source: Node, by: Node) -> bool:
        """Whether ``by`` tells that bytes of a call are codes."""
        if source in self.statistics[by]:
            return False
        return source.meta["val"].dtype is torch.int8 or by in self.changes
