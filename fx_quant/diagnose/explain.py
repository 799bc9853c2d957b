"""``explain``: what fx_quant would do with a model, on this machine or another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from fx_quant.backend import safely, split_options, warn_of_failures
from fx_quant.compat import static_input_indices
from fx_quant.diagnose.capture import run_captured, run_eagerly
from fx_quant.diagnose.excerpts import with_excerpts
from fx_quant.diagnose.inputs import check_inputs
from fx_quant.diagnose.isolation import innermost
from fx_quant.diagnose.timing import SiteTimes, call_times, model_bytes, timed
from fx_quant.errors import FxQuantError, must
from fx_quant.kernels.machine import resolve_target
from fx_quant.loading.coded_modules import float_linears, unseen_modules
from fx_quant.loading.module_names import renamed, roots_of
from fx_quant.loading.prepare import first_steps, hidden, swappable
from fx_quant.loading.release import held_twice
from fx_quant.passes.pipeline import run_passes
from fx_quant.passes.reporting import report_on
from fx_quant.piecewise.compile import pieces_of
from fx_quant.piecewise.sizes import Asked
from fx_quant.report import PieceReport, Report
from fx_quant.report.progress import counting
from fx_quant.target import Target


def explain(
    model: Callable[..., Any],
    *args: Any,
    target: Target | str | None = None,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    time: bool = False,
    **kwargs: Any,
) -> Report:
    """Every quantized matmul of ``model``: its scheme, kernel and losers, or why it would be missed.

    The model runs once, op by op and without gradients, on ``args`` and ``kwargs``; nothing is compiled to machine
    code, and the target need not be present. Compiled code of before, Dynamo's state and random numbers are afterwards
    as they were; not for use while another thread runs compiled code.

    Args:
        target: a machine by name (``"sm90"``), a ``Target``, or None for the one the inputs are on.
        dynamic: as for ``torch.compile``.
        options: as for the backend, Inductor's too; ``strict`` is ignored, as a report is the purpose. With
            ``piecewise`` the report says what the pieces are and for which numbers of rows; its matmuls are those of
            the whole graphs.
        time: measure here what each rewritten matmul and a call take, beside Inductor alone. For this the model is
            compiled both ways, and each kind of matmul alone.

    Raises:
        UnknownNameError: an unknown target, option or kernel.
        NoKernelError: a forced kernel cannot run a site.
        ModelError: the model cannot be run on these inputs.
    """
    parsed, inductors = split_options({**(options or {}), "strict": False})
    check_inputs(model, args, kwargs)
    must(not time or target is None, "time=True measures this machine, so no target may be given", FxQuantError)
    times = SiteTimes() if time else None
    resolved = resolve_target(target, _device(args, kwargs))
    reports: list[Report] = []
    cuts: list[tuple[tuple[PieceReport, ...], str]] = []

    def on_graph(graph: Graph) -> None:
        def passes() -> Report:
            state = run_passes(graph, resolved, parsed, static_input_indices(graph))
            report = with_excerpts(report_on(state), state)
            if times is not None:
                times.on_state(state, report.sites)
            return report

        reports.append(safely(passes, resolved, parsed))
        done()

    def on_dynamo_graph(gm: GraphModule) -> None:
        if parsed.piecewise:
            asked = Asked.of(parsed, resolved.platform)
            cuts.append(pieces_of(gm, parsed.splitting_ops, asked, parsed.splitting_modules))

    roots = roots_of(innermost(model)).values()
    hiding = {module: why for root in roots for module, why in hidden(root).items()}
    with counting("explaining", "graph") as done:
        capture = run_captured(
            model,
            args,
            kwargs,
            on_graph=on_graph,
            inner_compile=run_eagerly if times is None else times.inner_compile,
            on_dynamo_graph=on_dynamo_graph,
            dynamic=dynamic,
            inductor_options=inductors,
        )
    call = None
    if times is not None:
        call = call_times(model, args, kwargs, dynamic, options or {}, inductors)
        pairs = zip(reports, times.times, strict=True)
        reports = [replace(each, sites=timed(each.sites, seconds, call)) for each, seconds in pairs]
    report = Report(
        str(resolved),
        (),
        (),
        graphs=0,
        graph_breaks=sum(place.count for place in capture.breaks),
        note=" ".join(filter(None, map(first_steps, roots))),
        breaks=capture.breaks,
        uncaptured=capture.uncaptured,
        call=call,
        model_bytes=model_bytes(capture.modules),
        pieces=tuple(piece for pieces, _ in cuts for piece in pieces),
        whole=next((why for _, why in cuts if why), ""),
    )
    for of_graph, called_for in zip(reports, capture.renamings, strict=True):
        warn_of_failures(of_graph)
        report = replace(report, graphs=report.graphs + of_graph.graphs)
        for renaming in called_for:
            report = report.merged(replace(of_graph.renamed(lambda name, to=renaming: renamed(name, to)), graphs=0))
    report = replace(report, unseen=unseen_modules(capture.modules, capture.seen, report, hiding))
    report = replace(report, floats=float_linears(capture.modules, report))
    return _with_memory(report, capture.modules, roots) if resolved.platform == "cpu" else report


def _with_memory(report: Report, modules: Mapping[str, nn.Module], roots: Collection[nn.Module]) -> Report:
    """``report`` with what the ``modules`` within ``roots`` hold twice once compiled for a CPU, and would give back."""
    twice = held_twice(modules, report)
    freeable = {module for root in roots for module in swappable(root, release=True)} if twice else set()
    return replace(
        report,
        held_twice=sum(twice.values()),
        releasable=sum(size for module, size in twice.items() if module in freeable),
    )


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return tensors[0].device if tensors else "cpu"
