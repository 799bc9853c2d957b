"""One graph of Dynamo's compiled in pieces: cut, each distinct piece compiled once, one report for all."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fx_quant.piecewise.run import as_it_is, runner
from fx_quant.piecewise.same import key_of, renaming
from fx_quant.piecewise.split import NotSplitError, Part, Split, split
from fx_quant.piecewise.writes import check_writes, written_inputs
from fx_quant.report import PieceReport, Report

# Compiles a graph for inputs like those given; says what became of its matmuls.
Compiler = Callable[[GraphModule, Sequence[Any]], tuple[Callable[..., Any], Report]]


def compile_in_pieces(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    ops: Collection[str],
    compiler: Compiler,
    whole: str = "",
    modules: Collection[str] = (),
) -> tuple[Callable[..., Any], Report]:
    """``gm`` compiled in pieces, cut at the calls of ``ops`` and ``modules``, those that are the same graph once.

    Args:
        whole: why the graph must be left whole, where the caller knows a reason.

    Returns:
        What is called like ``gm``, and the report of all pieces in order, each as often as it is called; or that of the
        whole graph, with the reason.
    """
    try:
        if whole:
            raise NotSplitError(whole)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
            raise NotSplitError("it is to be differentiated; call it under torch.no_grad()")
        cut = split(gm, ops, modules)
        alike = {part: key_of(part) for part in cut.parts}
        firsts: dict[Hashable, Part] = {}
        for part, key in alike.items():
            firsts.setdefault(key, part)
        # A part that is like another writes to the same of its inputs.
        written = {key: written_inputs(first) for key, first in firsts.items()}
        check_writes(cut, {part: written[key] for part, key in alike.items()})
    except NotSplitError as error:
        compiled, report = compiler(gm, example_inputs)
        return compiled, dataclasses.replace(report, whole=str(error))
    return _compile(gm, example_inputs, cut, {part: firsts[key] for part, key in alike.items()}, compiler)


def _compile(
    gm: GraphModule, example_inputs: Sequence[Any], cut: Split, first_of: Mapping[Part, Part], compiler: Compiler
) -> tuple[Callable[..., Any], Report]:
    """The parts of ``cut``, each by the artefact of the first that is like it."""
    given = dict(zip(cut.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    functions: dict[Part, Callable[..., Any]] = {}
    reports: dict[Part, Report] = {}
    for part in dict.fromkeys(first_of.values()):
        if part.is_cut and not _is_higher_order(part):
            functions[part] = as_it_is(part)
        else:
            inputs = [_input(node, given, cut) for node in part.call.args]
            functions[part], reports[part] = compiler(part.module, inputs)
    run = runner(cut, {part: functions[first] for part, first in first_of.items()}, gm)
    return run, _report(first_of, reports)


def _input(node: Any, given: Mapping[Node, Any], cut: Split) -> Any:
    """What stands for an input of a part while it is compiled: the whole graph's own, or what Dynamo saw of it."""
    return given[node] if node in given else cut.made[node]


def _is_higher_order(part: Part) -> bool:
    """Whether ``part`` calls an op that is there to be compiled, as flex attention is."""
    return any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in part.module.graph.nodes)


def _report(first_of: Mapping[Part, Part], reports: Mapping[Part, Report]) -> Report:
    """The reports of all compiled parts in order, and which of them share an artefact."""
    pieces = [part for part in first_of if first_of[part] in reports]
    in_order = []
    for part in pieces:
        names = renaming(first_of[part], part)
        in_order.append(reports[first_of[part]].renamed(lambda name, names=names: names.get(name, name)))
    rows = tuple(
        PieceReport(
            first=number,
            count=sum(first_of[other] is part for other in pieces),
            sites=len(reports[part].sites),
        )
        for number, part in enumerate(pieces)
        if first_of[part] is part
    )
    return dataclasses.replace(functools.reduce(Report.merged, in_order), graphs=1, pieces=rows)
