"""What became of each quantized matmul of a model: data first, then text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fx_quant.errors import MissError
from fx_quant.reasons import without_compiler
from fx_quant.report.blocks import Block, Paragraph
from fx_quant.report.compare import Comparison
from fx_quant.report.record import ROWS, rows_as_data, rows_from_data
from fx_quant.report.reported import Reported
from fx_quant.report.rows import (
    BreakReport,
    CallReport,
    FloatReport,
    MissReport,
    PieceReport,
    RecognisedReport,
    SiteReport,
    UnseenReport,
)
from fx_quant.report.tables import (
    breaks_list,
    counted,
    float_list,
    losers_list,
    mebibytes,
    miss_list,
    padding_list,
    recognised_list,
    site_table,
    sizes_list,
    unseen_list,
)
from fx_quant.report.tree_page import report_page


@dataclass(frozen=True, repr=False)
class Report(Reported):
    """What became of each quantized matmul of a model on a target; prints as tables, and shows itself as a page.

    Args:
        target: the machine.
        sites: rewritten.
        misses: left as they were, because a rule failed.
        recognised: left as they were, because nothing on the target runs them faster.
        graphs, graph_breaks: how the model was captured.
        note: what to do first, where the model hides its matmuls from every compiler.
        unseen: quantized modules that are in none of the above.
        breaks: where the graph broke.
        uncaptured: why there is no graph; empty where there is one.
        pieces: the artefacts of a graph that was compiled in pieces; its matmuls are reported for every piece.
        whole: why a graph that was to be compiled in pieces was not.
        held_twice: bytes of the model's codes that kernels hold a packed copy of once it is compiled for a CPU.
        releasable: how many of them ``prepare_(model, release=True)`` would free.
        floats: linears that are not quantized.
        call: what a call of the model takes, where it was measured.
        model_bytes: that the model's tensors take.
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
    floats: tuple[FloatReport, ...] = ()
    call: CallReport | None = None
    model_bytes: int = 0
    attention: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data, in which rows name what they share by its number."""
        rows = {name: getattr(self, name) for name in ROWS}
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in ROWS}
        call = None if self.call is None else dataclasses.asdict(self.call)
        return {"summary": self.summary(), **facts, "call": call, **rows_as_data(rows)}

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report of which ``to_json`` made ``text``."""
        data = json.loads(text)
        rows = rows_from_data(data)
        facts = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data and f.name not in ROWS}
        if facts.get("call") is not None:
            facts["call"] = CallReport(**facts["call"])
        fields: dict[str, Any] = {**facts, **rows}
        return cls(**fields)

    def compare(self, other: Report) -> Comparison:
        """What became different from this report to ``other``: of another version, machine, option or model."""
        return Comparison.of(self, other)

    def raise_if(self, *, missed: bool = True, fewer_than: int | None = None) -> Report:
        """Raise when a matmul was missed, or fewer were rewritten than expected; returns self otherwise.

        Args:
            missed: raise for a miss, for a quantized module that is in no row, and where nothing was analysed.
            fewer_than: raise when fewer are rewritten.

        Raises:
            MissError: says which.
        """
        told = len(self.sites) + len(self.recognised) + len(self.misses)
        if missed and (self.misses or self.unseen or not told):
            raise MissError(f"every quantized matmul must be found and none missed, got: {self.summary()}")
        if fewer_than is not None and len(self.sites) < fewer_than:
            raise MissError(f"{fewer_than} or more quantized matmuls must be rewritten, got: {self.summary()}")
        return self

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
                return f"{nothing}, though {counted(len(self.unseen), 'module is', 'modules are')} quantized"
            return f"{nothing}; the model compiles unchanged"
        kept = f"{len(self.recognised)} recognised and left, " if self.recognised else ""
        counts = f"{len(self.sites)} of {total} quantized matmuls rewritten on {self.target}"
        outside = counted(len(self.unseen), "quantized module", "quantized modules") if self.unseen else ""
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
        if self.releasable:
            twice = f"{twice}; fx_quant.prepare_(model, release=True) would free {mebibytes(self.releasable)}"
        if not self.model_bytes:
            return twice
        then = mebibytes(self.model_bytes + self.held_twice)
        return f"{twice}; the model's tensors take {mebibytes(self.model_bytes)} now, and with those {then}"

    def timing(self) -> str:
        """One line: what a call takes, beside Inductor alone."""
        if self.call is None:
            return ""
        ours, inductor = 1e3 * self.call.seconds, 1e3 * self.call.inductor_seconds
        return f"a call takes {ours:.3g} ms, as Inductor alone compiles it {inductor:.3g} ms"

    def attended(self) -> str:
        """One line: how many calls of attention a kernel of ours has."""
        if not self.attention:
            return ""
        calls = counted(self.attention, "call of attention", "calls of attention")
        return f"{calls} with one query by cpu_attention, which reads keys and values once"

    def lost_to_compiler(self) -> list[str]:
        """For each matmul the kernel that a C++ compiler would have given it, where the target has none."""
        return list(dict.fromkeys(row.lost for row in (*self.sites, *self.recognised) if row.lost))

    def _graphs(self) -> str:
        breaks = f", {self.graph_breaks} graph breaks" if self.graph_breaks else ""
        return f"{self.graphs} graph{'s' if self.graphs != 1 else ''}{breaks}"

    def remarks(self) -> list[Block]:
        """What is said above the rows: what to do first, memory, pieces, time, and a compiler that is missing."""
        blocks: list[Block] = [
            Paragraph(text)
            for text in (self.note, self.memory(), self.attended(), self.how_cut(), self.timing())
            if text
        ]
        lost = self.lost_to_compiler()
        return [*blocks, *sizes_list(self.pieces), *([Paragraph(without_compiler(lost))] if lost else [])]

    def blocks(self, *, wide: bool) -> list[Block]:
        """Notes, then sites, recognised matmuls and misses, then what is outside the graphs."""
        blocks = self.remarks()
        if self.sites:
            blocks += [*site_table(self.sites, wide=wide), *padding_list(self.sites), *losers_list(self.sites)]
        blocks += recognised_list(self.recognised) + miss_list(self.misses)
        reported = (*self.sites, *self.recognised, *self.misses)
        blocks += unseen_list(self.unseen, nameless=sum(not row.module for row in reported))
        blocks += float_list(self.floats) if reported else []
        # Only where something may be outside the graphs.
        if self.graph_breaks and (reported or self.unseen):
            blocks += breaks_list(self.breaks, self._graphs())
        return blocks

    def _page(self) -> str:
        return report_page(self)
