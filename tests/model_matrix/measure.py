"""One model, quantized in one way: what explain says of it, how true the rewritten graph is, how often it compiles."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import Graph

import fx_quant
from benchmarks.decoders import Compiler, inductor, ours, watched
from fx_quant.config import Options
from fx_quant.diagnose import check as checking
from fx_quant.diagnose import explain as explaining
from fx_quant.diagnose.capture import Capture, run_captured, run_eagerly
from fx_quant.loading.prepare import needs_prepare
from fx_quant.report import Report
from fx_quant.scheme import dtype_name
from tests.dialects.capture import fresh, inductor_config_restored
from tests.dialects.outcome import failed, reasons_of
from tests.model_matrix.count import quantized_calls, untold
from tests.model_matrix.outcome import Outcome
from tests.model_matrix.registry import Model, Way, in_dtype, missing

Call = tuple[Callable[..., Any], dict[str, Any]]


def measure(model: Model, way: Way, *, recompiles: bool = False, compiled: bool = False) -> Outcome:
    """The row of ``model`` quantized by ``way``.

    Args:
        recompiles: count the graphs that calls of all sizes compile.
        compiled: compile it too, by fx_quant and by plain Inductor.
    """
    row = Outcome(model.name, way.name, dtype_name(way.dtype))
    lacking = missing((*model.needs, *way.needs))
    if lacking:
        return dataclasses.replace(row, unavailable=f"needs {', '.join(lacking)}")
    if way.only is not None and not way.only(model):
        return dataclasses.replace(row, unavailable=f"{way.name} is not for it")
    started = cpu_seconds()
    with inductor_config_restored():
        try:
            module = quantized(model, way)
            # The library's own, whatever ``prepare_`` makes of the other.
            eager = quantized(model, way) if needs_prepare(module) else module
        except Exception as error:  # noqa: BLE001  (a library may fail in any way)
            return dataclasses.replace(row, unavailable=f"cannot be quantized: {failed(error)}")
        inputs = [in_dtype(model.inputs(*size), way.dtype) for size in model.sizes]
        row = outcome_of(row, module, eager, inputs, recompiles=recompiles, compiled=compiled)
    return dataclasses.replace(row, seconds=cpu_seconds() - started)


def cpu_seconds() -> float:
    """What this process and those that it waited for have computed for."""
    return sum(os.times()[:4])


def quantized(model: Model, way: Way) -> nn.Module:
    """``model`` quantized by ``way``, in eval mode."""
    return way.quantize(model.build().to(way.dtype)).eval().requires_grad_(False)


def outcome_of(
    row: Outcome,
    module: nn.Module,
    eager: nn.Module,
    inputs: list[dict[str, Any]],
    *,
    recompiles: bool = False,
    compiled: bool = False,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Outcome:
    """``row`` with what becomes of ``module``, called under ``context`` with the first of ``inputs``, and with all.

    ``prepare_`` is called where ``explain`` asks for it; what the results are compared with are those of ``eager``.
    """
    with context():
        counts, output = quantized_calls(eager, lambda: eager(**inputs[0]))
        try:
            row = dataclasses.replace(row, prepared=needs_prepare(module) is not None)
            if row.prepared:
                fx_quant.prepare_(module)
            report, errors = explained(module, inputs[0], output)
            outside, silent = untold(counts, report)
            row = dataclasses.replace(
                row, **of_report(report, sum(counts.values())), **errors, outside=outside, silent=silent
            )
            if recompiles:
                row = dataclasses.replace(row, **graph_counts(module, inputs))
            if compiled:
                row = dataclasses.replace(row, **compiled_errors(module, inputs[0], output))
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the outcome)
            reason = without_us(module, inputs[0])
            row = dataclasses.replace(row, **{"unavailable": reason} if reason else {"failed": failed(error)})
    return row


def of_report(report: Report, linears: int) -> dict[str, Any]:
    """The fields of an outcome that ``report`` tells."""
    breaks = [f"in no graph, which breaks: {each.reason}" for each in report.breaks if report.unseen]
    return {
        "linears": linears,
        "rewritten": len(report.sites),
        "recognised": len(report.recognised),
        "missed": len(report.misses),
        "breaks": report.graph_breaks,
        "reasons": tuple(dict.fromkeys([*reasons_of(report), *breaks])),
    }


def merged(reports: Sequence[Report]) -> Report:
    """One report of those of all graphs."""
    return functools.reduce(Report.merged, reports, Report("", (), (), graphs=0))


def explained(module: nn.Module, inputs: dict[str, Any], eager: Any) -> tuple[Report, dict[str, float]]:
    """What ``explain`` reports, and the errors that ``check`` finds in the same run, both op by op."""
    recorder = checking._Recorder(Options())
    outputs: list[Any] = []

    def both(*args: Any, on_graph: Callable[[Graph], None], **hooks: Any) -> Capture:
        def looked_at(graph: Graph) -> None:
            on_graph(graph)
            recorder.on_graph(graph)

        def called(renaming: Mapping[str, str]) -> None:
            recorder.on_call(renaming)

        hooks |= {"inner_compile": recorder.inner_compile, "on_call": called}
        capture = run_captured(*args, on_graph=looked_at, **hooks)
        outputs.append(capture.output)
        return capture

    fresh()
    with (
        mock.patch.object(explaining, "run_captured", both),
        mock.patch.object(checking, "compile_graph", run_eagerly),
    ):
        report = fx_quant.explain(module, **inputs)
    sites = [_largest(site.error) for site in recorder.sites]
    return report, {"site_error": max(sites, default=0.0), "error": error(outputs[0], eager)}


def error(output: Any, eager: Any) -> float:
    """The largest error of a tensor of ``output``; infinite where it is not finite and ``eager`` is."""
    return _largest(checking._output_error(output, eager))


def _largest(found: checking.Error) -> float:
    return float("inf") if found.new_nan or found.new_inf else found.max_rel_err


def graph_counts(module: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, int]:
    """How many graphs calls with ``inputs``, one after the other, compile: with fx_quant, and without."""
    mine = _graphs(module, inputs, ours())
    return {"graphs": mine, "plain_graphs": graphs_without_us(mine, lambda each: _graphs(module, inputs, each))}


def graphs_without_us(mine: int, graphs: Callable[[Compiler], int]) -> int:
    """The ``graphs`` of Dynamo by itself, than which Inductor has no fewer; only where that is less than ``mine``, Inductor's."""
    least = graphs(lambda gm, _: gm.forward)
    return least if mine <= least else graphs(inductor)


def _graphs(module: nn.Module, inputs: list[dict[str, Any]], compiler: Compiler) -> int:
    fresh()
    with watched(eager=True) as seen, uncached(), torch.no_grad():
        compiled = torch.compile(module, backend=seen.counting(compiler))
        for each in inputs:
            compiled(**each)
    fresh()
    return seen.graphs


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """No graph of before, in which no pass would run."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def compiled_errors(module: nn.Module, inputs: dict[str, Any], eager: Any) -> dict[str, float]:
    """The error to ``eager`` of the model compiled by fx_quant and by plain Inductor."""
    found = {}
    for name, backend in (("compiled", "fx_quant"), ("inductor", "inductor")):
        fresh()
        with torch.no_grad():
            found[name] = error(torch.compile(module, backend=backend)(**inputs), eager)
    return found


def without_us(module: nn.Module, inputs: dict[str, Any]) -> str:
    """What torch.compile fails with without fx_quant too; empty where it does not."""
    fresh()
    try:
        with torch.no_grad(), watched(eager=True):
            torch.compile(module, backend=inductor)(**inputs)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the outcome)
        return f"torch.compile fails: {failed(error)}"
    return ""
