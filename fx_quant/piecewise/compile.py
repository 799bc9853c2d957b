"""One graph of Dynamo's compiled in pieces: cut, each distinct piece compiled once, one report for all."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fx_quant.piecewise.padded_run import SizedPiece
from fx_quant.piecewise.run import as_it_is, runner
from fx_quant.piecewise.same import key_of, renaming
from fx_quant.piecewise.sizes import Asked, SizePlan, copied, plan_sizes, specialised
from fx_quant.piecewise.split import NotSplitError, Part, Split, split
from fx_quant.piecewise.traced import compiling_later
from fx_quant.piecewise.writes import check_writes, written_inputs
from fx_quant.report import PieceReport, Report
from fx_quant.report.progress import progress

log = logging.getLogger("fx_quant")

# Compiles a graph for inputs like those given; says what became of its matmuls.
Compiler = Callable[[GraphModule, Sequence[Any]], tuple[Callable[..., Any], Report]]


def compile_in_pieces(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    ops: Collection[str],
    compiler: Compiler,
    whole: str = "",
    asked: Asked | None = None,
    modules: Collection[str] = (),
) -> tuple[Callable[..., Any], Report]:
    """``gm`` compiled in pieces, cut at the calls of ``ops`` and ``modules``, those that are the same graph once.

    Args:
        whole: why the graph must be left whole, where the caller knows a reason.
        asked: numbers of rows to compile each piece for beside all of them; None for none.

    Returns:
        What is called like ``gm``, and the report of all pieces in order, each as often as it is called; or that of the
        whole graph, with the reason.
    """
    try:
        if whole:
            raise NotSplitError(whole)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
            raise NotSplitError("it is to be differentiated; call it under torch.no_grad()")
        pieces = _pieces(gm, ops, modules, asked)
    except NotSplitError as error:
        compiled, report = compiler(gm, example_inputs)
        return compiled, dataclasses.replace(report, whole=str(error))
    return _compile(gm, example_inputs, pieces, compiler, asked)


@dataclass(frozen=True)
class _Pieces:
    """A graph that may be cut, by what one artefact serves.

    Args:
        first_of: for each part, in order, the first that is like it.
        written: for each first, the positions of the inputs that it writes to.
    """

    cut: Split
    first_of: Mapping[Part, Part]
    written: Mapping[Part, frozenset[int]]

    def compiled(self) -> list[Part]:
        """The parts that are compiled, each the first of its like."""
        return [part for part in dict.fromkeys(self.first_of.values()) if not part.is_cut or _is_higher_order(part)]

    def plans(self, asked: Asked | None) -> dict[Part, SizePlan]:
        """For each part that is compiled, the numbers of rows that it is compiled for by itself."""
        if asked is None:
            return {}
        alike: dict[Part, list[Part]] = {}
        for part, first in self.first_of.items():
            alike.setdefault(first, []).append(part)
        return {part: plan_sizes(alike[part], self.cut, self.written[part], asked) for part in self.compiled()}


def _pieces(gm: GraphModule, ops: Collection[str], modules: Collection[str], asked: Asked | None) -> _Pieces:
    """The pieces of ``gm``; where they are to be padded, attention, which mixes rows, is in none of them.

    Raises:
        NotSplitError: it must be left whole.
    """
    cut = split(gm, ops, modules, apart=asked is not None)
    alike = {part: key_of(part) for part in cut.parts}
    firsts: dict[Hashable, Part] = {}
    for part, key in alike.items():
        firsts.setdefault(key, part)
    # A part that is like another writes to the same of its inputs.
    written = {first: written_inputs(first) for first in firsts.values()}
    first_of = {part: firsts[key] for part, key in alike.items()}
    check_writes(cut, {part: written[first] for part, first in first_of.items()})
    pieces = _Pieces(cut, first_of, written)
    if not pieces.compiled():
        raise NotSplitError("there is nothing to compile before, between or after its cuts")
    return pieces


def pieces_of(
    gm: GraphModule, ops: Collection[str], asked: Asked | None, modules: Collection[str] = ()
) -> tuple[tuple[PieceReport, ...], str]:
    """What ``compile_in_pieces`` would compile of ``gm``, or why it would leave it whole."""
    try:
        pieces = _pieces(gm, ops, modules, asked)
    except NotSplitError as error:
        return (), str(error)
    return _rows(pieces.first_of, pieces.compiled(), pieces.plans(asked), {}), ""


def _compile(
    gm: GraphModule, example_inputs: Sequence[Any], pieces: _Pieces, compiler: Compiler, asked: Asked | None
) -> tuple[Callable[..., Any], Report]:
    """The parts of ``gm``, each by the artefact of the first that is like it."""
    cut, first_of = pieces.cut, pieces.first_of
    given = dict(zip(cut.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    reports: dict[Part, Report] = {}
    compiled, plans = pieces.compiled(), pieces.plans(asked)
    functions: dict[Part, Callable[..., Any]] = {
        part: as_it_is(part) for part in dict.fromkeys(first_of.values()) if part not in compiled
    }
    for part in progress(compiled, "compiling", "piece"):
        inputs = [_input(node, given, cut) for node in part.call.args]
        plan = plans.get(part, SizePlan())
        # Inductor changes what it compiles.
        own = copied(part.module) if plan.sizes else part.module
        functions[part], reports[part] = compiler(part.module, inputs)
        if plan.sizes:
            functions[part] = SizedPiece(
                functions[part], plan, functools.partial(_compile_for, own, plan, compiler), str(part.call.target)
            )
    run = runner(cut, {part: functions[first] for part, first in first_of.items()}, gm)
    return run, _report(first_of, compiled, plans, reports)


def _compile_for(
    module: GraphModule, plan: SizePlan, compiler: Compiler, rows: int, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """``module`` compiled for ``rows`` rows alone; ``inputs`` has so many, and what is returned takes all of them."""
    piece, kept = specialised(module, plan, rows)
    with compiling_later([inputs[position] for position in kept]) as fakes:
        compiled, report = compiler(piece, fakes)
    kernels = ", ".join(sorted({site.kernel for site in report.sites})) or "no kernel of fx_quant's"
    log.info("compiled a piece for m = %d: %s", rows, kernels)
    return compiled if len(kept) == len(inputs) else lambda *values: compiled(*[values[position] for position in kept])


def _input(node: Any, given: Mapping[Node, Any], cut: Split) -> Any:
    """What stands for an input of a part while it is compiled: the whole graph's own, or what Dynamo saw of it."""
    return given[node] if node in given else cut.made[node]


def _is_higher_order(part: Part) -> bool:
    """Whether ``part`` calls an op that is there to be compiled, as flex attention is."""
    return any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in part.module.graph.nodes)


def _report(
    first_of: Mapping[Part, Part],
    compiled: Sequence[Part],
    plans: Mapping[Part, SizePlan],
    reports: Mapping[Part, Report],
) -> Report:
    """The reports of all compiled parts in order, and which of them share an artefact."""
    in_order = []
    for part, first in first_of.items():
        if first in reports:
            names = renaming(first, part)
            in_order.append(reports[first].renamed(lambda name, names=names: names.get(name, name)))
    rows = _rows(first_of, compiled, plans, reports)
    return dataclasses.replace(functools.reduce(Report.merged, in_order), graphs=1, pieces=rows)


def _rows(
    first_of: Mapping[Part, Part],
    compiled: Sequence[Part],
    plans: Mapping[Part, SizePlan],
    reports: Mapping[Part, Report],
) -> tuple[PieceReport, ...]:
    """A row for each artefact; its matmuls are unknown where there is no report of it."""
    pieces = [part for part, first in first_of.items() if first in compiled]
    rows = []
    for number, part in enumerate(pieces):
        if first_of[part] is part:
            plan = plans.get(part, SizePlan())
            rows.append(
                PieceReport(
                    first=number,
                    count=sum(first_of[other] is part for other in pieces),
                    sites=len(reports[part].sites) if part in reports else None,
                    sizes=plan.sizes,
                    unsized=plan.unsized,
                    unpadded=plan.unpadded,
                )
            )
    return tuple(rows)
