"""What became of each quantized matmul of a model: data first, then text."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from fx_quant.kernels.registry import kernels
from fx_quant.reasons import as_data, from_data, lacks_only_compiler, without_compiler
from fx_quant.report.rows import (
    BreakReport,
    MissReport,
    PieceReport,
    PlanReport,
    RecognisedReport,
    SiteReport,
    UnseenReport,
)
from fx_quant.report.tables import (
    breaks_list,
    counted,
    losers_list,
    mebibytes,
    miss_list,
    padding_list,
    recognised_list,
    site_table,
    sizes_list,
    unseen_list,
)


@dataclass(frozen=True)
class Report:
    """What became of each quantized matmul of a model on a target; prints as tables.

    Args:
        target: the machine.
        sites: rewritten.
        misses: left as they were, because a rule failed.
        recognised: left as they were, because nothing on the target runs them faster.
        graphs, graph_breaks: how the model was captured.
        note: what to do first, where the model hides its matmuls from every compiler.
        unseen: modules that hold codes and are in none of the above.
        breaks: where the graph broke.
        uncaptured: why there is no graph; empty where there is one.
        pieces: the artefacts of a graph that was compiled in pieces; its matmuls are reported for every piece.
        whole: why a graph that was to be compiled in pieces was not.
        held_twice: bytes of the model's codes that kernels hold a packed copy of once it is compiled for a CPU.
        releasable: how many of them ``prepare_(model, release=True)`` would free.
        attention: calls of attention of one query that a kernel beside the matmuls' has.
    """

    target: str
    sites: tuple[SiteReport, ...]
    misses: tuple[MissReport, ...]
    recognised: tuple[RecognisedReport, ...] = ()
    graphs: int = 1
    graph_breaks: int = 0
    note: str = ""
    unseen: tuple[UnseenReport, ...] = ()
    breaks: tuple[BreakReport, ...] = ()
    uncaptured: str = ""
    pieces: tuple[PieceReport, ...] = ()
    whole: str = ""
    held_twice: int = 0
    releasable: int = 0
    attention: int = 0

    def to_json(self) -> str:
        """The whole report as JSON: ``losers`` of a row are texts, and ``unmet`` the kinds of these."""
        data = dataclasses.asdict(self)
        for name in _JUDGED:
            for fields, row in zip(data[name], getattr(self, name), strict=True):
                fields |= {"losers": row.losers, "unmet": as_data(row.unmet)}
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report of which ``to_json`` made ``text``; the kinds of one that was saved without are unknown."""
        data = json.loads(text)
        for name in _JUDGED:
            for fields in data[name]:
                fields["unmet"] = from_data(fields.pop("losers"), fields.get("unmet"))
        for fields in data.get("pieces", ()):
            fields["sizes"] = tuple(fields.get("sizes", ()))
        for fields in data["sites"]:
            fields["notes"] = tuple(fields.get("notes", ()))
            plans = fields.get("plans", {}).items()
            fields["plans"] = {mode: PlanReport(**plan | {"cut": tuple(plan["cut"])}) for mode, plan in plans}
        for name, row in _ROWS.items():
            data[name] = tuple(row(**fields) for fields in data[name])
        return cls(**data)

    def merged(self, other: Report) -> Report:
        """The sites and misses of this report and of ``other``, in order."""
        return dataclasses.replace(
            self,
            sites=self.sites + other.sites,
            misses=self.misses + other.misses,
            recognised=self.recognised + other.recognised,
            graphs=self.graphs + other.graphs,
            graph_breaks=self.graph_breaks + other.graph_breaks,
            pieces=self.pieces + other.pieces,
            whole=self.whole or other.whole,
            attention=self.attention + other.attention,
        )

    def renamed(self, name_of: Callable[[str], str]) -> Report:
        """The same with the name that ``name_of`` gives for that of each module."""

        def rows(named: tuple) -> tuple:
            return tuple(dataclasses.replace(row, module=name_of(row.module)) for row in named)

        return dataclasses.replace(
            self, sites=rows(self.sites), misses=rows(self.misses), recognised=rows(self.recognised)
        )

    def summary(self) -> str:
        """One line: how many were rewritten, recognised and missed, and what is in none of the graphs."""
        total = len(self.sites) + len(self.misses) + len(self.recognised)
        if not total and not self.graphs:
            return f"nothing was captured: {self.uncaptured or 'the reason is not known'}"
        if not total:
            nothing = f"no quantized matmul found ({self._graphs()})"
            if self.unseen:
                return f"{nothing}, though {counted(len(self.unseen), 'module holds', 'modules hold')} codes"
            return f"{nothing}; the model compiles unchanged"
        kept = f"{len(self.recognised)} recognised and left, " if self.recognised else ""
        counts = f"{len(self.sites)} of {total} quantized matmuls rewritten on {self.target}"
        outside = counted(len(self.unseen), "module that holds codes", "modules that hold codes") if self.unseen else ""
        return f"{counts}, {kept}{len(self.misses)} missed" + (f", {outside} not among them" if outside else "")

    def how_cut(self) -> str:
        """One line: how many pieces there are and how many were compiled, or why a graph was left whole."""
        if self.whole:
            return f"compiled whole, not in pieces: {self.whole}"
        if not self.pieces:
            return ""
        shared = [f"{row.count} are the same as piece {row.first}" for row in self.pieces if row.count > 1]
        total = sum(row.count for row in self.pieces)
        return ", ".join([f"{counted(total, 'piece', 'pieces')}, {len(self.pieces)} compiled", *shared])

    def memory(self) -> str:
        """One line: how much of the weights is held twice, and how much of that could be freed."""
        if not self.held_twice:
            return ""
        twice = (
            f"{mebibytes(self.held_twice)} of weights are held twice once compiled, as codes and packed for a kernel"
        )
        if not self.releasable:
            return twice
        return f"{twice}; fx_quant.prepare_(model, release=True) would free {mebibytes(self.releasable)}"

    def lost_to_compiler(self) -> list[str]:
        """For each matmul the kernel that a C++ compiler would have given it, where the target has none."""
        order = [kernel.name for kernel in kernels()]
        lost: dict[str, None] = {}
        rows = [(site.unmet, site.kernel) for site in self.sites] + [(row.unmet, "") for row in self.recognised]
        for unmet, chosen in rows:
            better = order[: order.index(chosen)] if chosen in order else order
            lost.update(dict.fromkeys([n for n in better if lacks_only_compiler(unmet.get(n, ()))][:1]))
        return list(lost)

    def _graphs(self) -> str:
        breaks = f", {self.graph_breaks} graph breaks" if self.graph_breaks else ""
        return f"{self.graphs} graph{'s' if self.graphs != 1 else ''}{breaks}"

    def __str__(self) -> str:
        parts = [f"fx_quant: {self.summary()}"]
        if self.note:
            parts.append(textwrap.fill(self.note, 118))
        if memory := self.memory():
            parts.append(textwrap.fill(memory, 118))
        if self.attention:
            calls = counted(self.attention, "call of attention", "calls of attention")
            parts.append(f"{calls} with one query by cpu_attention, which reads keys and values once")
        if how := self.how_cut():
            parts.append(textwrap.fill(how, 118))
        if sized := sizes_list(self.pieces):
            parts.append(sized)
        if lost := self.lost_to_compiler():
            parts.append(without_compiler(lost))
        if self.sites:
            parts.append(site_table(self.sites))
            parts.append(padding_list(self.sites))
            parts.append(losers_list(self.sites))
        if self.recognised:
            parts.append(recognised_list(self.recognised))
        if self.misses:
            parts.append(miss_list(self.misses))
        reported = (*self.sites, *self.recognised, *self.misses)
        parts.append(unseen_list(self.unseen, nameless=sum(not row.module for row in reported)))
        # Only where something may be outside the graphs.
        if self.graph_breaks and (reported or self.unseen):
            parts.append(breaks_list(self.breaks, self._graphs()))
        return "\n\n".join(part for part in parts if part)


_JUDGED = ("sites", "recognised")
_ROWS = {
    "sites": SiteReport,
    "misses": MissReport,
    "recognised": RecognisedReport,
    "unseen": UnseenReport,
    "breaks": BreakReport,
    "pieces": PieceReport,
}
