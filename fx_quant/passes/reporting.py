"""What became of each matmul of a rewritten graph, in words."""

from __future__ import annotations

from collections.abc import Iterable

from fx_quant.kernels.context import Mode
from fx_quant.kernels.padding import Padding
from fx_quant.kernels.select import Verdict
from fx_quant.passes.nodes import module_path, qualified_name, source_line
from fx_quant.passes.rewriting import Rewriting, Row
from fx_quant.passes.sites import Recognised
from fx_quant.problem import Problem
from fx_quant.reasons import Unmet, lacks_only_compiler
from fx_quant.report import MissReport, PlanReport, RecognisedReport, Report, SiteReport
from fx_quant.scheme import dtype_name


def report_on(state: Rewriting) -> Report:
    """Sites, recognised matmuls and misses of ``state``, in words."""
    notes: dict[str, list[str]] = {}
    for pad in state.pads:
        notes.setdefault(pad.gemm, []).append(str(pad))
    for matmul, spelled in state.turned.matmuls.items():
        notes.setdefault(matmul, []).append(f"{spelled} as a matmul with the weight on the right")
    sites = tuple(_site_report(row, tuple(notes.get(row.site.gemm.name, ()))) for row in state.rows.values())
    misses = tuple(
        MissReport(
            module=module_path(miss.gemm),
            source=source_line(miss.gemm),
            op=qualified_name(miss.gemm.target),
            node=miss.node.name,
            reason=miss.rule,
        )
        for miss in state.misses
    )
    recognised = tuple(map(_recognised_report, state.recognised))
    return Report(str(state.target), sites, misses, recognised, attention=state.attended)


def _recognised_report(recognised: Recognised) -> RecognisedReport:
    site = recognised.site
    return RecognisedReport(
        module=module_path(recognised.gemm),
        source=source_line(recognised.gemm),
        op=qualified_name(recognised.gemm.target),
        scheme="" if site is None else site.words,
        m="" if site is None else str(site.problem.m),
        n=None if site is None else site.problem.n,
        k=None if site is None else site.problem.k,
        reason=recognised.reason,
        unmet=_unmet(recognised.verdicts),
        weight_bytes=0 if site is None else _weight_bytes(site.problem),
        lost=next((each.kernel for each in recognised.verdicts if lacks_only_compiler(each.unmet)), ""),
    )


def _unmet(verdicts: Iterable[Verdict], chosen: str = "") -> dict[str, tuple[Unmet, ...]]:
    """Why each other kernel was not chosen."""
    return {verdict.kernel: verdict.unmet for verdict in verdicts if verdict.kernel != chosen}


def _site_report(row: Row, notes: tuple[str, ...]) -> SiteReport:
    site, selection = row.site, row.selection
    problem = site.problem
    return SiteReport(
        module=module_path(site.gemm),
        source=source_line(site.gemm),
        op=qualified_name(site.gemm.target),
        scheme=site.words,
        m=str(problem.m),
        n=problem.n,
        k=problem.k,
        out_dtype=dtype_name(problem.out_dtype),
        kernel=selection.kernel.name,
        padding=selection.padding.describe(problem),
        numerics=str(max(site.numerics, selection.kernel.numerics)),
        quantize=str(row.quantizer or ""),
        unmet=_unmet(selection.verdicts, selection.kernel.name),
        notes=notes,
        plans={str(mode): _plan_report(problem, selection.padding_in(mode)) for mode in Mode},
        weight_bytes=_weight_bytes(problem),
        lost=next(iter(selection.without_compiler), ""),
    )


def _weight_bytes(problem: Problem) -> int:
    """Bytes of the weight's codes."""
    weight = problem.scheme.weight
    return problem.n * problem.k * weight.storage.itemsize // weight.codes_per_element


def _plan_report(problem: Problem, padding: Padding) -> PlanReport:
    rows, n, _ = padding.padded_dims(problem)
    return PlanReport(padding.describe(problem), padding.fills(problem), ("m",) * rows + ("n",) * n)
