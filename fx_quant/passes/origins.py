"""What each node was made of, whether or not a rule proves its value: stored codes, or a quantize in the graph.

One walk forward gives each node at most one origin. It decides which contractions are quantized matmuls at all, so it
errs towards yes where a weight is decoded by steps that nobody knows, and towards no where floats, masks, indices and
images meet floats.

Bytes are codes where they are stored. Where they change from call to call they may be a mask or an image, until a
tensor smaller than they are scales or shifts them: any that is not computed from them for int8, one that comes with the
call too for uint8, as constants and their own statistics normalise an image. int8 that the graph writes to is the state
of a model, so codes. (``tests/fuzz/contractions.py`` states the same rule by itself.)
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch.fx import Graph, Node

from fx_quant.passes.axes import REPEAT, seen_through
from fx_quant.passes.carriers import (
    CACHES,
    CARRIERS,
    CHOICES,
    ENDS,
    LOOKUPS,
    NARROW_INTEGERS,
    ROUNDS,
    UNPACKS,
    WIDE_INTEGERS,
    is_float_in_bytes,
    keeps_values,
)
from fx_quant.passes.contractions import (
    LOW_BIT_DTYPES,
    added_operand,
    called,
    is_contraction,
    is_opaque,
    is_quantization,
    op_name,
)
from fx_quant.passes.inputs import Inputs
from fx_quant.passes.nodes import (
    ADDITIONS,
    CASTS,
    DIVISIONS,
    MULTIPLICATIONS,
    SUBTRACTIONS,
    aten,
    dtype,
    is_one,
    is_op,
    same_shape,
    shape,
)
from fx_quant.passes.values import Environment, Unknown
from fx_quant.scheme import INT8_DTYPES


class Kind(IntEnum):
    """What a node was made of; of several inputs the largest counts."""

    INPUT = 0
    """Integers of a byte that a call brings: an image, a mask, or codes that only a scale would tell."""
    PACKED = 1
    """A stored matrix of wide integers: positions, or packed codes that only unpacking would tell."""
    WEIGHTED = 2
    """Stored codes times what a call brings, before they are summed."""
    ROUNDED = 3
    """Rounded in floating point, as fake quantization does."""
    CODES = 4
    """Codes, in whatever dtype."""
    DECODED = 5
    """Codes after a scale, a zero point, a table, or a step that is not known."""


@dataclass(frozen=True)
class Origin:
    """What a node was made of.

    Args:
        source: the node that stores or computes the codes.
        stored: the codes are the same in each call, as those of a weight.
        lost: the first step behind ``source`` of which no rule proves anything, or None.
        weighted: what a call brings was multiplied into stored codes.
    """

    kind: Kind
    source: Node
    stored: bool
    lost: Node | None = None
    weighted: bool = False

    @property
    def coded(self) -> bool:
        """Whether a contraction of the node is a quantized matmul."""
        return self.kind >= Kind.ROUNDED


class Origins:
    """The origins of the nodes of one graph.

    Args:
        env: what is proven of the nodes.
        given: origins of placeholders that are known from outside.
    """

    def __init__(self, graph: Graph, env: Environment, inputs: Inputs, given: Mapping[Node, Origin] | None = None):
        self._env, self._inputs = env, inputs
        self._origins: dict[Node, Origin] = dict(given or {})
        # Which bytes of a call each node is computed from without a contraction, a bit for each.
        self._bytes, self._next_bit = dict[Node, int](), 1
        for node in graph.nodes:
            if node not in self._origins:
                origin = self._origin(node)
                if origin is not None:
                    self._origins[node] = self._remembering_loss(node, origin)
            self._note_bytes(node)

    def of(self, node: object) -> Origin | None:
        """The origin of ``node``; None where it has nothing to do with codes."""
        return self._origins.get(node) if isinstance(node, Node) else None

    def coded(self, node: object) -> Origin | None:
        """The origin of ``node`` where a contraction of it is a quantized matmul."""
        origin = self.of(node)
        return origin if origin is not None and origin.coded else None

    def _note_bytes(self, node: Node) -> None:
        origin = self.of(node)
        if origin is not None and origin.kind is Kind.INPUT and origin.source is node:
            self._bytes[node] = self._next_bit
            self._next_bit <<= 1
        elif self._bytes and not is_contraction(node):
            made_from = functools.reduce(operator.or_, (self._bytes.get(n, 0) for n in node.all_input_nodes), 0)
            if made_from:
                self._bytes[node] = made_from

    def _remembering_loss(self, node: Node, origin: Origin) -> Origin:
        value = self._env.value(node)
        starts = origin.source is node and not (is_opaque(node) or is_quantization(node))
        if origin.lost is not None or starts:
            return origin
        return replace(origin, lost=node) if value is None or isinstance(value, Unknown) else origin

    def _origin(self, node: Node) -> Origin | None:
        if node.op in ("placeholder", "get_attr"):
            return self._leaf(node, stored=node in self._inputs.constant)
        if is_op(node, aten.lift_fresh_copy.default):
            return self._leaf(node, stored=True)  # a literal of the code
        if node.op != "call_function" or node.target in ENDS:
            return self._own(node)
        if is_contraction(node):
            return self._added(node) or self._own(node)
        own = self._own(node)
        if own is not None and own.kind is Kind.CODES and own.source is node:
            return own
        if is_op(node, operator.getitem):
            return self._part(node)
        made = [(source, origin) for source in node.all_input_nodes if (origin := self.of(source)) is not None]
        if is_opaque(node) or is_quantization(node):
            return self._of_library(node, made)
        if is_op(node, *ROUNDS):
            return self._rounded(node, made)
        if not made:
            return self._cast_to_codes(node)
        if dtype(node) is torch.bool or is_float_in_bytes(node):
            return None
        carried = self._stored_step(node, made) if node not in self._inputs.brought else self._step(node, made)
        if carried is not None and dtype(node) in NARROW_INTEGERS and carried.kind in (Kind.ROUNDED, Kind.PACKED):
            return replace(carried, kind=Kind.CODES)
        return carried if carried is not None else self._cast_to_codes(node)

    def _leaf(self, node: Node, *, stored: bool) -> Origin | None:
        kind = dtype(node)
        if kind in LOW_BIT_DTYPES:
            many = not all(map(is_one, shape(node)))
            if not many:
                return None
            state = kind is torch.int8 and node in self._inputs.written
            return Origin(Kind.CODES if stored or state or kind not in INT8_DTYPES else Kind.INPUT, node, stored)
        wide = stored and kind in WIDE_INTEGERS and sum(not is_one(size) for size in shape(node)) > 1
        return Origin(Kind.PACKED, node, stored) if wide else None

    def _own(self, node: Node) -> Origin | None:
        """Codes by their dtype alone."""
        if node.op != "call_function" or dtype(node) not in LOW_BIT_DTYPES or dtype(node) in INT8_DTYPES:
            return None
        sources = [origin for n in node.all_input_nodes if (origin := self.coded(n)) is not None]
        return sources[0] if sources else Origin(Kind.CODES, node, node not in self._inputs.brought)

    def _added(self, node: Node) -> Origin | None:
        """What stored codes are after a product of floats was added to them, as a low-rank adapter's is."""
        added = self.coded(added_operand(node))
        return replace(added, kind=Kind.DECODED) if added is not None and node not in self._inputs.brought else None

    def _cast_to_codes(self, node: Node) -> Origin | None:
        """A cast of floats to a byte."""
        if dtype(node) not in NARROW_INTEGERS or not is_op(node, *CASTS):
            return None
        source = dtype(node.args[0])
        if source is None or not source.is_floating_point:
            return None
        return Origin(Kind.CODES, node, node not in self._inputs.brought)

    def _rounded(self, node: Node, made: list[tuple[Node, Origin]]) -> Origin | None:
        kind = dtype(node)
        if kind is None or not kind.is_floating_point:
            return made[0][1] if made else None
        return Origin(Kind.ROUNDED, node, node not in self._inputs.brought)

    def _of_library(self, node: Node, made: list[tuple[Node, Origin]]) -> Origin | None:
        """The result of an op that nothing is known of but its name and its operands."""
        stored = node not in self._inputs.brought
        if is_library_matmul(node, self):
            return None
        kind = dtype(node)
        if kind is None:  # several results, which _part tells apart
            return Origin(Kind.CODES, node, stored) if is_quantization(node) or made else None
        if kind is torch.bool:
            return None
        coded = [origin for _, origin in made if origin.kind is not Kind.WEIGHTED]
        if not kind.is_floating_point:
            return Origin(Kind.CODES, node, stored) if kind in LOW_BIT_DTYPES or is_quantization(node) else None
        if coded:
            return replace(max(coded, key=lambda origin: origin.kind), kind=Kind.DECODED)
        if kind in LOW_BIT_DTYPES:
            return Origin(Kind.CODES, node, stored)
        return Origin(Kind.DECODED, node, stored) if is_quantization(node) else None

    def _part(self, node: Node) -> Origin | None:
        """One of several results."""
        source = node.args[0]
        origin, kind = self.of(source), dtype(node)
        if origin is None or kind is None or not isinstance(source, Node) or kind is torch.bool:
            return None
        if not (is_opaque(source) or is_quantization(source)):
            return origin
        if kind in LOW_BIT_DTYPES:
            return Origin(Kind.CODES, node, origin.stored)
        fake = "fake" in op_name(called(source)) and node.args[1] == 0
        return replace(origin, kind=Kind.DECODED) if fake else None

    # --- steps ------------------------------------------------------------------------------------------------------

    def _stored_step(self, node: Node, made: list[tuple[Node, Origin]]) -> Origin | None:
        """A step of what is the same in each call. Whatever is not known to end it may be part of decoding a weight."""
        if is_op(node, *LOOKUPS):
            return self._looked_up(node, made)
        if is_op(node, *MULTIPLICATIONS, *DIVISIONS) and any(_is_float_leaf(n, node) for n in node.all_input_nodes):
            return None  # a float weight under a mask, or of scaled columns
        origin = max((origin for _, origin in made), key=lambda origin: origin.kind)
        if is_op(node, *UNPACKS):
            return replace(origin, kind=Kind.CODES)
        scaled = is_op(node, *MULTIPLICATIONS, *DIVISIONS, *SUBTRACTIONS)
        if origin.kind is Kind.PACKED:
            by_tensor = scaled and len(node.all_input_nodes) == 2
            return replace(origin, kind=Kind.DECODED) if by_tensor else origin
        if origin.kind is Kind.CODES and (scaled or not keeps_values(node)):
            return replace(origin, kind=Kind.DECODED)
        return origin

    def _looked_up(self, node: Node, made: list[tuple[Node, Origin]]) -> Origin | None:
        """Rows or elements of a table; the indices count where they are codes, not where they are positions."""
        origins = dict(made)
        table = node.args[0]
        candidates = [origins[table]] if isinstance(table, Node) and table in origins else []
        for index, origin in made:
            if index is not table and origin.kind in (Kind.CODES, Kind.PACKED, Kind.DECODED):  # shifted ones too
                candidates.append(replace(origin, kind=Kind.DECODED))
        return max(candidates, key=lambda origin: origin.kind, default=None)

    def _step(self, node: Node, made: list[tuple[Node, Origin]]) -> Origin | None:
        """A step of what a call brings: only what may be part of quantizing goes on."""
        if is_op(node, *LOOKUPS):
            return self._chosen(node, dict(made))
        if is_op(node, *MULTIPLICATIONS, *DIVISIONS, *ADDITIONS, *SUBTRACTIONS, *CHOICES):
            return self._combined(node, made)
        if is_op(node, aten.cat.default, aten.stack.default):
            return made[0][1] if len(made) == len(node.all_input_nodes) else None
        if is_op(node, *CACHES):
            values = [self.coded(n) for n in node.all_input_nodes[:1] + node.all_input_nodes[-1:]]
            return next((origin for origin in values if origin is not None), self.of(node.all_input_nodes[0]))
        if is_op(node, *UNPACKS):
            origin = max((origin for _, origin in made), key=lambda origin: origin.kind)
            return replace(origin, kind=Kind.CODES) if origin.coded else origin
        return self.of(node.all_input_nodes[0]) if is_op(node, *CARRIERS) else None

    def _chosen(self, node: Node, origins: dict[Node, Origin]) -> Origin | None:
        table = node.args[0]
        origin = origins.get(table) if isinstance(table, Node) else None
        if origin is not None and (is_op(node, aten.embedding.default) or (origin.stored and len(shape(table)) == 2)):
            return None  # rows of an embedding are activations
        if origin is None and len(shape(table)) == 1:
            codes = [other for other in origins.values() if other.kind is Kind.CODES]
            return replace(codes[0], kind=Kind.DECODED) if codes else None
        return origin

    def _combined(self, node: Node, made: list[tuple[Node, Origin]]) -> Origin | None:
        """Arithmetic of codes with scales, zero points and floats."""
        full = [(source, origin) for source, origin in made if same_shape(shape(source), shape(node))]
        multiplies = is_op(node, *MULTIPLICATIONS)
        weights = [(source, origin) for source, origin in made if _is_weight(origin)]
        if not full:
            return replace(weights[0][1], kind=Kind.WEIGHTED, weighted=True) if multiplies and weights else None
        scales = multiplies or is_op(node, *DIVISIONS)
        source, origin = max(full, key=lambda pair: (scales and pair in weights, pair[1].kind))
        others = [n for n in node.all_input_nodes if n is not source and dtype(n) is not torch.bool]
        brought = set(node.all_input_nodes).difference(weight for weight, _ in weights) & self._inputs.brought
        # A dot product in parts, whichever of its two factors is as large as the product.
        if scales and weights and brought:
            origin = replace(origin, weighted=True)
        floats = [
            n for n in others if self.coded(n) is None and n in self._inputs.brought and not self._undone(origin, n)
        ]
        met = [n for n in floats if _fills(n, node)]
        if origin.stored and floats:
            # A scale or a zero point that is written to is one that a call brings.
            decodes = scales or all(_shifts(node, n) for n in floats)
            if not origin.coded or not (scales and _is_weight(origin) if met else decodes):
                return None
            return replace(origin, kind=Kind.WEIGHTED if met else Kind.DECODED)
        if met:
            return None
        if origin.kind is Kind.INPUT:
            by = [n for n in others if not _fills(n, node) and (scales or _shifts(node, n))]
            decodes = any(self._decodes(origin, n) for n in by)
            return replace(origin, kind=Kind.DECODED) if decodes else origin
        return replace(origin, kind=Kind.DECODED) if scales and origin.kind is Kind.CODES else origin

    def _decodes(self, origin: Origin, by: Node) -> bool:
        """Whether bytes of a call are codes because ``by``, which is smaller, scales or shifts them."""
        if self._bytes.get(origin.source, 0) & self._bytes.get(by, 0):
            return False  # normalised by their own statistics
        return dtype(origin.source) is torch.int8 or by in self._inputs.brought

    def _undone(self, origin: Origin, other: Node) -> bool:
        """Whether ``other`` is what was rounded, which straight-through rounding subtracts and adds again."""
        return is_op(origin.source, *ROUNDS) and _base(origin.source.args[0]) is _base(other)


def is_library_matmul(node: Node, origins: Origins) -> bool:
    """Whether an op of which nothing is known takes a stored quantized matrix and what a call brings."""
    if not is_opaque(node) or node not in origins._inputs.brought:
        return False
    matrices = [n for n in node.all_input_nodes if len(shape(n)) > 1 and dtype(n) is not torch.bool]
    weights = [n for n in matrices if (origin := origins.coded(n)) is not None and origin.stored]
    brought = [
        n
        for n in matrices
        if n in origins._inputs.brought and (origins.of(n) is not None or dtype(n).is_floating_point)  # type: ignore[union-attr]
    ]
    return bool(weights) and bool(brought)


def _is_weight(origin: Origin) -> bool:
    """Whether stored codes are those of a weight, not a mask of bytes."""
    plain_bytes = origin.kind is Kind.CODES and dtype(origin.source) is torch.uint8
    return origin.stored and origin.coded and not plain_bytes


def _shifts(node: Node, by: Node) -> bool:
    """Whether ``node`` subtracts ``by`` from codes or these from it, or adds what may be a zero point."""
    kind = dtype(by)
    whole = all(map(is_one, shape(by))) or (kind is not None and not kind.is_floating_point)
    return is_op(node, *SUBTRACTIONS) or (is_op(node, *ADDITIONS) and whole)


def _fills(source: Node, node: Node) -> bool:
    """Whether ``source`` has an element for each of ``node``."""
    return same_shape(shape(source), shape(node)) and not _only_repeats(source)


def _base(node: object) -> object:
    return seen_through(node, lambda n: is_op(n, *CASTS))[0] if isinstance(node, Node) else node


def _is_float_leaf(source: Node, node: Node) -> bool:
    """Whether ``source`` is a stored float matrix with as many elements as ``node``."""
    kind, base = dtype(source), _base(source)
    if kind is None or not kind.is_floating_point or not isinstance(base, Node):
        return False
    if sum(not is_one(size) for size in shape(source)) < 2:
        return False  # of a single row or column it may be a scale
    kind = dtype(base)
    leaf = base.op in ("placeholder", "get_attr") and kind is not None and kind.is_floating_point
    return leaf and kind not in LOW_BIT_DTYPES and _fills(source, node)


def _only_repeats(node: Node) -> bool:
    return any(piece.axis == REPEAT for dim in seen_through(node, lambda n: is_op(n, *CASTS))[1] for piece in dim)
