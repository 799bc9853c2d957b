"""What is known of dims that an author padded at the end, node by node, and which pads belong together.

A padded dim is the source's own up to some index, and what an author filled in behind. A rule for each op says which
dims of its result are padded, and what stands in the padding, on the condition that nothing else depends on that. An op
of which this is not proven ends every pad that reaches it: that pad stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_quant.passes.contractions import is_contraction
from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.memory import Memory
from fx_quant.passes.nodes import is_one, qualified_name, same_size, shape, tensor
from fx_quant.passes.size_bounds import least
from fx_quant.problem import Size


class Tail(IntEnum):
    """What stands in the padded part."""

    ANY = 0
    FINITE = 1
    ZERO = 2


# A pad and the dim that it pads.
Pad = tuple[Node, int]


@dataclass(frozen=True)
class Padded:
    """A dim that is padded at its end.

    Args:
        kept: how many of its indices are the source's own.
        tail: what stands in the others.
        pad: one of the pads that it is from.
    """

    kept: Size
    tail: Tail
    pad: Pad


# The padded dims of a tensor.
PaddedDims = dict[int, Padded]


@dataclass(frozen=True)
class Use:
    """A matmul that multiplies a padded dim.

    Args:
        gemm: the matmul.
        side: ``m``, ``n`` or ``k``.
        padded: the dim.
        to: its size with the padding.
    """

    gemm: Node
    side: str
    padded: Padded
    to: Size


class PaddedNodes:
    """The padded dims of the nodes of one graph.

    Args:
        runtime: nodes that are not the same in every call.
        rule_of: the rule for a node, if there is one.
        may_pad: whether a node may pad what is not padded.
    """

    def __init__(
        self,
        graph: Graph,
        runtime: frozenset[Node],
        rule_of: Callable[[Node], Rule | None],
        may_pad: Callable[[Node], bool],
    ) -> None:
        self.runtime = runtime
        self.memory = Memory(graph)
        self.uses: list[Use] = []
        # Operands that are cut with the result, as ``(operand, its dim, the result's dim)`` by node.
        self.cuts: dict[Node, list[tuple[Node, int, int]]] = {}
        # What a pad pads, and which pad a slice drops.
        self.sources: dict[Node, Node] = {}
        self.ends: dict[Node, Pad] = {}
        self._dims: dict[Node, tuple[PaddedDims, ...]] = {}
        self._parents: dict[Pad, Pad] = {}
        self._failed: dict[Pad, str] = {}
        for node in graph.nodes:
            reached = [padded for source in node.all_input_nodes for padded in self.every(source)]
            if reached or may_pad(node):
                self._visit(node, rule_of(node), reached)

    def _visit(self, node: Node, rule: Rule | None, reached: Sequence[Padded]) -> None:
        result = attempt(self._result, node, rule)
        if isinstance(result, Failure):
            for padded in reached:
                self.fail(padded.pad, result.reason(f"seeing through {qualified_name(node.target)}"))
        else:
            parts = result if isinstance(result, tuple) else (result,)
            if any(parts):
                self._dims[node] = parts

    def _result(self, node: Node, rule: Rule | None) -> PaddedDims | tuple[PaddedDims, ...]:
        if rule is None:
            raise LookupError(_unknown(node))
        if any(self.memory.is_written(n) for n in (node, *node.all_input_nodes) if tensor(n) is not None):
            raise LookupError("the padded tensor is written to")
        return rule(self, node)

    def every(self, node: Node) -> Iterator[Padded]:
        """The padded dims of all results of a call."""
        return (padded for dims in self._dims.get(node, ()) for padded in dims.values())

    def of(self, node: object) -> PaddedDims:
        """The padded dims of a tensor."""
        parts = self.parts(node)
        return parts[0] if parts else {}

    def parts(self, node: object) -> tuple[PaddedDims, ...]:
        """The padded dims of each result of a call that has several."""
        return self._dims.get(node, ()) if isinstance(node, Node) else ()

    # --- which pads belong together -----------------------------------------------------------------------------

    def root(self, pad: Pad) -> Pad:
        """The one that stands for all pads that ``pad`` belongs with: they stay or go together."""
        self._parents.setdefault(pad, pad)
        while self._parents[pad] != pad:
            self._parents[pad] = self._parents[self._parents[pad]]
            pad = self._parents[pad]
        return pad

    def join(self, padded: Sequence[Padded]) -> Padded:
        """One for dims that are to be padded alike, of the weakest tail.

        Raises:
            LookupError: they are not.
        """
        first = padded[0]
        for other in padded[1:]:
            if not same_size(first.kept, other.kept):
                raise LookupError(f"a dim padded from {first.kept} meets one padded from {other.kept}")
            one, two = self.root(first.pad), self.root(other.pad)
            if one != two:
                self._parents[two] = one
                if two in self._failed:
                    self._failed.setdefault(one, self._failed.pop(two))
        return Padded(first.kept, min(part.tail for part in padded), first.pad)

    def fail(self, pad: Pad, reason: str) -> None:
        """Take note that ``pad`` and those that it belongs with stay."""
        self._failed.setdefault(self.root(pad), reason)

    def failed(self, pad: Pad) -> str | None:
        """Why ``pad`` stays; None where nothing says so."""
        return self._failed.get(self.root(pad))

    def pads(self, node: Node, source: Node, padded: Padded) -> Padded:
        """Take note that ``node`` pads ``source`` to ``padded``."""
        self.root(padded.pad)
        self.sources[node] = source
        return padded

    def padded_by(self, node: Node) -> list[int]:
        """The dims that ``node`` itself pads."""
        return [dim for dim in range(len(shape(node))) if (node, dim) in self._parents]

    def members(self) -> dict[Pad, list[Pad]]:
        """All pads, by the one that stands for them."""
        groups: dict[Pad, list[Pad]] = {}
        for pad in list(self._parents):
            groups.setdefault(self.root(pad), []).append(pad)
        return groups

    # --- for rules ----------------------------------------------------------------------------------------------

    def aligned(self, node: Node, operands: Iterable[object], rank: int, sizes: Sequence[Size]) -> dict[int, Padded]:
        """The padded dims of what ``operands`` broadcast to: each is padded alike, cut, or broadcast.

        Raises:
            LookupError: one is neither.
        """
        tensors = [operand for operand in operands if isinstance(operand, Node) and tensor(operand) is not None]
        result: PaddedDims = {}
        for dim in range(rank):
            parts, whole = [], []
            for operand in tensors:
                own = dim - rank + len(shape(operand))
                if own < 0:
                    continue
                padded = self.of(operand).get(own)
                if padded is not None:
                    parts.append(padded)
                elif not is_one(shape(operand)[own]):
                    whole.append((operand, own))
            if not parts:
                continue
            result[dim] = self.join(parts)
            for operand, own in whole:
                self.cut(node, operand, own, dim, sizes)
        return result

    def cut(self, node: Node, operand: Node, own: int, dim: int, sizes: Sequence[Size]) -> None:
        """Take note that dim ``own`` of ``operand`` is cut where ``dim`` of ``node``'s result is.

        Raises:
            LookupError: they are not of one size.
        """
        if not same_size(shape(operand)[own], sizes[dim]):
            raise LookupError(f"{operand} has another size than what is padded")
        self.cuts.setdefault(node, []).append((operand, own, dim))

    def use(self, gemm: Node, side: str, padded: Padded, to: Size) -> None:
        """Take note that ``gemm`` multiplies a padded dim."""
        self.uses.append(Use(gemm, side, padded, to))


# The padded dims of a node's result, or of each result; raises LookupError where nothing is proven.
Rule = Callable[[PaddedNodes, Node], "PaddedDims | tuple[PaddedDims, ...]"]


def grows(before: Size, after: Size) -> bool:
    """Whether a dim of ``after`` is known to be no shorter than ``before``, and never the one that broadcasts."""
    return bool(statically_known_true(after >= before)) and least(after) > 1


def _unknown(node: Node) -> str:
    if node.op == "output":
        return "the padded tensor is returned"
    what = "the matmul" if is_contraction(node) else "what"
    return f"nothing proves that {what} {qualified_name(node.target)} computes keeps what is padded apart"
