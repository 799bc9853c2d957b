"""Taking pads out that an author wrote for eager calls, where nothing that is left depends on them.

A pad goes with all that is computed of the padding: the matmul then has the rows, columns and terms of the source, and
its kernel's own plan pads them, or does not. Pads that belong together go together or stay, each with its reason.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Graph, Node

from fx_quant.passes.axes import extent
from fx_quant.passes.emit import Emitter
from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.inputs import Inputs
from fx_quant.passes.nodes import EXPANDS, RESHAPES, args_of, arguments, aten, is_op, qualified_name, shape
from fx_quant.passes.padded import Pad, PaddedNodes, Use
from fx_quant.passes.rules.padded import may_pad, rule_of

# The node of a pad by name, and the dim that it pads.
PadName = tuple[str, int]


@dataclass(frozen=True)
class AuthorsPad:
    """One side of a matmul that its author padded.

    Args:
        gemm: the name of the matmul.
        what: the side and its size with the padding.
        pads: all pads that go or stay with this.
        kept: why it stays; None where it was removed.
    """

    gemm: str
    what: str
    pads: tuple[PadName, ...]
    kept: str | None

    def __str__(self) -> str:
        return f"author's pad of {self.what} {'removed' if self.kept is None else f'kept: {self.kept}'}"


class UnremovableError(Exception):
    """Pads that cannot be taken out after all, while some of it is done; the graph is of no more use.

    Args:
        pads: those at which a step raised.
        going: all that were to be taken out.
        reason: why.
    """

    def __init__(self, pads: Sequence[PadName], going: Sequence[PadName], reason: str) -> None:
        super().__init__(f"the pads {pads} cannot be taken out: {reason}")
        self.pads, self.going, self.reason = pads, going, reason


def remove_pads(graph: Graph, inputs: Inputs, kept: Mapping[PadName, str]) -> list[AuthorsPad]:
    """Take out what pads the operands of matmuls and is dropped again, in place, but for those in ``kept``.

    Nodes keep their names.

    Returns the padded sides of matmuls, those that stay too.

    Raises:
        UnremovableError: pads that are to be in ``kept``.
    """
    nodes = attempt(PaddedNodes, graph, inputs.runtime, rule_of, may_pad)
    if isinstance(nodes, Failure):
        return []
    groups = {root: tuple((pad.name, dim) for pad, dim in members) for root, members in nodes.members().items()}
    for root, names in groups.items():
        for name in names:
            if name in kept:
                nodes.fail(root, kept[name])
    going = {nodes.root(use.padded.pad) for use in nodes.uses if nodes.failed(use.padded.pad) is None}
    found = dict.fromkeys(
        AuthorsPad(use.gemm.name, _what(use), groups[nodes.root(use.padded.pad)], kept=nodes.failed(use.padded.pad))
        for use in nodes.uses
    )
    if going:
        _Removal(graph, nodes, going, groups).run()
    return list(found)


def _what(use: Use) -> str:
    """``m to 17``."""
    to, kept = extent(use.to), extent(use.padded.kept)
    if isinstance(to, int):
        return f"{use.side} to {to}"
    # m + max(0, 17 - m), as a pad to at least 17 is written.
    added = to - kept
    least = [kept + part for part in getattr(added, "args", ()) if part != 0]
    named = len(least) == 1 and type(added).__name__ == "Max" and least[0].is_Integer
    return f"{use.side} to {least[0] if named else to.subs(kept, sympy.Symbol(use.side))}"


class _Removal:
    """Takes ``going`` pads out of ``graph``: operands, sizes and fake values of what was computed of them."""

    def __init__(
        self, graph: Graph, nodes: PaddedNodes, going: set[Pad], groups: Mapping[Pad, tuple[PadName, ...]]
    ) -> None:
        self._graph, self._nodes, self._going, self._groups = graph, nodes, going, groups
        self._emitter = Emitter(graph)

    def run(self) -> None:
        """Take them out.

        Raises:
            UnremovableError: a step raised.
        """
        affected = {node: roots for node in self._graph.nodes if (roots := self._roots(node))}
        sizes = [node for node in affected if is_op(node, aten.sym_size.int)]
        # Sizes first, while their tensors can be told from what is left of them.
        for node in dict.fromkeys((*sizes, *affected)):
            done, roots = attempt(self._take_out, node), affected[node]
            if isinstance(done, Failure):
                why = done.reason(f"taking it out of {qualified_name(node.target)}")
                raise UnremovableError(self._names(roots), self._names(self._going), why)
        for node in reversed(affected):
            if not node.users:
                self._graph.erase_node(node)

    def _roots(self, node: Node) -> set[Pad]:
        """The pads to take out that ``node`` has to do with."""
        every = [padded for one in (node, *node.all_input_nodes) for padded in self._nodes.every(one)]
        return {root for padded in every if (root := self._nodes.root(padded.pad)) in self._going}

    def _names(self, roots: Iterable[Pad]) -> list[PadName]:
        return [name for root in roots for name in self._groups[root]]

    def _goes(self, pad: Pad) -> bool:
        return self._nodes.root(pad) in self._going

    def _take_out(self, node: Node) -> None:
        if is_op(node, aten.sym_size.int):
            self._keep_size(node)
            return
        own = [dim for dim in self._nodes.padded_by(node) if self._goes((node, dim))]
        end = self._nodes.ends.get(node)
        source = self._unpadded(node, own) if own else None
        if source is None and end is not None and self._goes(end):
            source = args_of(node)[0]
        if source is not None:
            self._emitter.replace(node, source)
        else:
            self._recall(node)

    def _keep_size(self, node: Node) -> None:
        """``node``, a size, as the sum of what is left and what was padded, where that is taken out."""
        source, dim = args_of(node)
        padded = self._nodes.of(source).get(dim)
        if padded is not None and self._goes(padded.pad):
            kept, size = extent(padded.kept), extent(node.meta["val"])
            parts = [self._emitter.size_argument(part, node) for part in (kept, size - kept)]
            self._emitter.recall(node, operator.add, tuple(parts), {})

    def _unpadded(self, node: Node, dims: Sequence[int]) -> Node | None:
        """What ``node`` pads, where that is along ``dims`` only; else None, and it pads the others."""
        if not is_op(node, aten.constant_pad_nd.default):
            return self._emitter.current(self._nodes.sources[node])
        given, rank = arguments(node), len(shape(node))
        amounts = list(given["pad"])
        for dim in dims:
            amounts[2 * (rank - 1 - dim) : 2 * (rank - dim)] = 0, 0
        if not any(isinstance(amount, Node) or amount for amount in amounts):
            return given["self"]
        node.args = (given["self"], amounts, given["value"])
        return None

    def _recall(self, node: Node) -> None:
        """``node`` of the operands that it has now, in the sizes that it has now."""
        kept = {dim: p.kept for dim, p in self._nodes.of(node).items() if self._goes(p.pad)}
        for operand, own, dim in self._nodes.cuts.get(node, ()):
            if dim in kept:
                to = self._emitter.size_argument(extent(kept[dim]), node)
                with self._graph.inserting_before(node):
                    part = self._emitter.call(aten.slice.Tensor, operand, own, 0, to, like=node)
                node.replace_input_with(self._emitter.current(operand), part)
        target, args = node.target, node.args
        sizes = tuple(kept.get(dim, size) for dim, size in enumerate(shape(node)))
        if is_op(node, *RESHAPES):
            target, args = aten.reshape.default, (args[0], self._emitter.size_args(sizes, node, like=node))
        elif is_op(node, *EXPANDS):
            args = (args[0], [self._emitter.size_argument(extent(size), node) for size in sizes])
        self._emitter.recall(node, target, args, dict(node.kwargs))
