"""The page of a report on a model: misses first, then kernels, the tree of modules, and each matmul with its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fx_quant.reasons import for_platform, is_candidate
from fx_quant.report.advice import advice
from fx_quant.report.blocks import Block
from fx_quant.report.compare import Matmuls
from fx_quant.report.page import page
from fx_quant.report.rows import (
    BreakReport,
    ExcerptReport,
    FloatReport,
    MissReport,
    RecognisedReport,
    SiteReport,
    UnseenReport,
)
from fx_quant.report.tables import alike_by_name, mebibytes
from fx_quant.scheme import short_scheme

# Where nothing more is known of a miss than its reason.
_LOOK = "look at the step that the graph below marks: what it does to the codes or their scale has no rule"


class Model(Matmuls, Protocol):
    """A report on a model, as the page needs it."""

    @property
    def unseen(self) -> tuple[UnseenReport, ...]:
        """Quantized modules of which nothing was found."""

    @property
    def floats(self) -> tuple[FloatReport, ...]:
        """Linears that are not quantized."""

    @property
    def breaks(self) -> tuple[BreakReport, ...]:
        """Where the graph broke."""

    def remarks(self) -> Sequence[Block]:
        """What is said above the rows."""


@dataclass
class _Branch:
    """A module in the tree: what it is, what became of its own matmul, and what is in it."""

    label: str
    children: dict[str, _Branch] = field(default_factory=dict)
    leaves: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class _Kernel:
    """What one kernel runs of the model."""

    name: str
    matmuls: int = 0
    weight_bytes: int = 0
    seconds: float | None = None
    inductor_seconds: float | None = None

    def add(self, site: SiteReport) -> None:
        self.matmuls += 1
        self.weight_bytes += site.weight_bytes
        if site.time is not None:
            self.seconds = (self.seconds or 0.0) + site.time.seconds
            self.inductor_seconds = (self.inductor_seconds or 0.0) + site.time.inductor_seconds


def report_page(report: Model) -> str:
    """The page of ``report``."""
    tree, anchors = _Branch(""), iter(range(1, 10**9))
    groups = {
        "missed": [_miss(*each) for each in alike_by_name(report.misses, lambda r: (r.source, r.op, r.reason))],
        "recognised": [
            _recognised(*each) for each in alike_by_name(report.recognised, lambda r: (r.scheme, r.n, r.k, r.reason))
        ],
        "rewritten": [_site(*each) for each in alike_by_name(report.sites, _alike_sites)],
    }
    for outcome in ("rewritten", "recognised", "missed"):
        for card in groups[outcome]:
            card["anchor"] = f"matmul-{next(anchors)}"
            for row, path in card.pop("rows"):
                _plant(tree, path, outcome, card["says"], card["anchor"], row)
    for unseen in report.unseen:
        _plant(tree, unseen.module, "unseen", unseen.kind, "unseen", unseen)
    for linear in report.floats:
        _plant(tree, linear.module, "float", f"{linear.kind}, {mebibytes(linear.weight_bytes)}", "", linear)
    kernels: dict[str, _Kernel] = {}
    for site in report.sites:
        kernels.setdefault(site.kernel, _Kernel(site.kernel)).add(site)
    return page(
        "report.html",
        report=report,
        groups=groups,
        tree=_joined(tree),
        kernels=sorted(kernels.values(), key=lambda each: -each.weight_bytes),
        most_bytes=max((each.weight_bytes for each in kernels.values()), default=0) or 1,
        timed=any(site.time is not None for site in report.sites),
        mebibytes=mebibytes,
        outcomes=_OUTCOMES,
        counts={
            "rewritten": len(report.sites),
            "missed": len(report.misses),
            "unseen": len(report.unseen),
            "recognised": len(report.recognised),
            "float": len(report.floats),
        },
    )


# A mark beside each colour, for who does not tell colours apart.
_OUTCOMES = {
    "rewritten": ("✓", "runs a fused kernel"),
    "missed": ("✗", "quantized, and left as it was"),
    "unseen": ("?", "quantized, and in no matmul of a graph"),
    "recognised": ("=", "understood, and left: nothing here is faster"),
    "float": ("·", "a linear that is not quantized"),
}


def _alike_sites(row: SiteReport) -> tuple[Any, ...]:
    return row.scheme, row.m, row.n, row.k, row.kernel, row.padding, row.notes, row.numerics, row.excerpt


def _card(name: str, rows: Sequence[Any], says: str, **more: Any) -> dict[str, Any]:
    first = rows[0]
    excerpt = first.excerpt or ExcerptReport("")
    where = name or first.source or first.op
    paths = [(row, row.module or row.source or row.op) for row in rows]
    return {"where": where, "count": len(rows), "says": says, "rows": paths, "excerpt": excerpt, "row": first, **more}


def _miss(name: str, rows: Sequence[MissReport]) -> dict[str, Any]:
    return _card(name, rows, rows[0].reason, advice=advice(rows[0].reason) or _LOOK)


def _recognised(name: str, rows: Sequence[RecognisedReport]) -> dict[str, Any]:
    return _card(name, rows, rows[0].reason, losers=_losers(rows[0]))


def _site(name: str, rows: Sequence[SiteReport]) -> dict[str, Any]:
    first = rows[0]
    facts = {
        "scheme": first.scheme,
        "rows (m)": first.m,
        "weight (n x k)": f"{first.n} x {first.k}",
        "result": first.out_dtype,
        "numerics": first.numerics,
        "padding": "; ".join((first.padding, *first.notes)),
        "quantize": first.quantize,
        "source": first.source,
        "weight bytes": mebibytes(sum(row.weight_bytes for row in rows)),
    }
    if times := [row.time for row in rows if row.time is not None]:
        ours, inductor = sum(each.seconds for each in times), sum(each.inductor_seconds for each in times)
        share = sum(each.share for each in times)
        facts["measured time"] = f"{1e6 * ours:.0f} us, Inductor alone {1e6 * inductor:.0f} us; {share:.0%} of a call"
    says = f"{first.kernel}, {short_scheme(first.scheme)}, {first.n} x {first.k}"
    return _card(name, rows, says, facts={k: v for k, v in facts.items() if v}, losers=_losers(first))


def _losers(row: SiteReport | RecognisedReport) -> dict[str, dict[str, str]]:
    """Every other kernel with its reasons: those that a reader asks of, those without the codes, those of elsewhere."""
    here, codes, elsewhere = "for this machine and these codes", "for other codes", "for other machines"
    sorted_out: dict[str, dict[str, str]] = {here: {}, codes: {}, elsewhere: {}}
    for kernel, texts in row.losers.items():
        unmet = row.unmet[kernel]
        part = here if is_candidate(unmet) else codes if for_platform(unmet) else elsewhere
        sorted_out[part][kernel] = "; ".join(texts)
    return {part: kernels for part, kernels in sorted_out.items() if kernels}


def _plant(tree: _Branch, path: str, outcome: str, says: str, anchor: str, row: Any) -> None:
    """A leaf at ``path``, counted in each module above it."""
    branch = tree
    # The path of a source file is one word.
    for part in [path] if "/" in path else path.split("."):
        branch.counts[outcome] = branch.counts.get(outcome, 0) + 1
        branch = branch.children.setdefault(part, _Branch(part or "the model itself"))
    branch.counts[outcome] = branch.counts.get(outcome, 0) + 1
    time = getattr(row, "time", None)
    took = f", {1e6 * time.seconds:.0f} us" if time is not None else ""
    branch.leaves.append({"outcome": outcome, "says": f"{says}{took}", "anchor": anchor})


def _joined(branch: _Branch) -> _Branch:
    """``branch`` with modules that hold nothing but one other joined with it."""
    children = {name: _joined(child) for name, child in branch.children.items()}
    if len(children) == 1 and not branch.leaves and branch.label:
        (inner,) = children.values()
        return dataclasses.replace(inner, label=f"{branch.label}.{inner.label}")
    return dataclasses.replace(branch, children=children)
