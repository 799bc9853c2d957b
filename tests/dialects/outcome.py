"""What became of one flow in one variant, and whether that is what the flow expects."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fx_quant.report import Report
from tests.dialects.registry import Flow


class Verdict(str, Enum):
    """What became of the quantized matmuls of a module."""

    REWRITTEN = "rewritten"
    """Every one runs on a kernel of fx_quant."""
    PREPARED = "rewritten after prepare_"
    """The graph breaks around them; once ``fx_quant.prepare_`` has swapped their modules, none is missed."""
    RECOGNISED = "recognised"
    """Every one was understood; some were left because no kernel of the target is faster."""
    MISSED = "missed"
    """Some were left as they were, each with a reason."""
    BROKEN = "broken graph"
    """Some are in no graph, because the graph breaks around them."""
    SILENT = "silent"
    """Some are not in the report at all."""
    FAILED = "failed"
    """fx_quant raises where torch.compile without it does not."""
    UNCOMPILABLE = "not compilable"
    """torch.compile fails without fx_quant too: nothing to count."""
    UNBUILDABLE = "not buildable"
    """The library cannot make the module on this machine: nothing to count."""

    def __str__(self) -> str:
        return self.value


# Verdicts that say nothing about fx_quant.
NOT_COUNTED = (Verdict.UNCOMPILABLE, Verdict.UNBUILDABLE)

# What satisfies each expectation.
_SATISFIED_BY = {
    "rewritten": {Verdict.REWRITTEN},
    "recognised": {Verdict.REWRITTEN, Verdict.RECOGNISED},
    "prepare": {Verdict.REWRITTEN, Verdict.RECOGNISED, Verdict.PREPARED},
    "unsupported": set(Verdict) - {Verdict.SILENT, Verdict.FAILED},
}


@dataclass(frozen=True)
class Outcome:
    """One flow in one variant.

    Args:
        flow, variant: their names.
        verdict: what became of it.
        expected: whether that satisfies the flow's expectation.
        kernels: kernels of the rewritten sites, in order.
        schemes: schemes of the rewritten sites, in order.
        reasons: of every recognised row, miss or exception.
        graph_breaks: why Dynamo broke the graph, each reason once.
        errors: largest error against eager, as a fraction of the largest eager result: of ``source`` and ``rewritten``,
            the graph before and after the passes run op by op; of ``fx_quant`` and ``inductor``, compiled. And
            ``codes``, the fraction of the codes that the passes changed. Empty unless numbers were asked for.
        notes: what else a reader should know, such as that ``inductor`` cannot compile it.
        seconds: how long it took.
    """

    flow: str
    variant: str
    verdict: Verdict
    expected: bool
    kernels: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    graph_breaks: tuple[str, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def judged(flow: Flow, report: Report) -> Verdict:
    """The verdict that ``report`` is on ``flow``; worse things hide better ones."""
    recognised = report.recognised
    if len(report.sites) + len(recognised) + len(report.misses) < flow.matmuls + flow.others:
        return Verdict.BROKEN if report.graph_breaks else Verdict.SILENT
    if len(report.misses) > flow.others:
        return Verdict.MISSED
    return Verdict.RECOGNISED if recognised else Verdict.REWRITTEN


def as_expected(flow: Flow, verdict: Verdict) -> bool:
    """Whether ``verdict`` satisfies what ``flow`` expects; a module that should exist must be buildable."""
    if verdict is Verdict.UNBUILDABLE:
        return flow.expected == "unsupported"
    return verdict is Verdict.UNCOMPILABLE or verdict in _SATISFIED_BY[flow.expected]


def reasons_of(report: Report) -> tuple[str, ...]:
    """Why each matmul of ``report`` that was not rewritten was not."""
    rows = [*report.recognised, *report.misses]
    return tuple(row.reason for row in rows)


def failed(error: BaseException) -> str:
    """``error`` in one line."""
    inner = getattr(error, "inner_exception", None) or error
    text = " ".join(str(inner).split())
    return f"{type(inner).__name__}: {text[:240]}"
