"""What became different between two reports."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from fx_quant.report.blocks import Block, Entries
from fx_quant.report.reported import Reported
from fx_quant.report.rows import MissReport, RecognisedReport, SiteReport
from fx_quant.report.tables import alike_by_name


class Matmuls(Protocol):
    """A report on the matmuls of a model."""

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """Rewritten."""

    @property
    def recognised(self) -> tuple[RecognisedReport, ...]:
        """Understood, and left."""

    @property
    def misses(self) -> tuple[MissReport, ...]:
        """Not understood."""

    def summary(self) -> str:
        """How many of each."""


@dataclass(frozen=True)
class Change:
    """A matmul of which two reports tell different things.

    Args:
        module: where it is.
        before, after: what became of it, in words; empty where a report does not have it.
    """

    module: str
    before: str
    after: str


@dataclass(frozen=True, repr=False)
class Comparison(Reported):
    """What became different from one report to another.

    Args:
        before, after: their summaries.
        changes: in the order of the first report, then what only the second has.
        same: matmuls of which both tell the same.
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    same: int

    @classmethod
    def of(cls, first: Matmuls, second: Matmuls) -> Comparison:
        """The comparison of ``first`` with ``second``; matmuls of one module are compared in their order."""
        before, after = dict(_outcomes(first)), dict(_outcomes(second))
        changes = tuple(
            Change(key[0], before.get(key, ""), after.get(key, ""))
            for key in dict.fromkeys((*before, *after))
            if before.get(key) != after.get(key)
        )
        same = sum(before[key] == after.get(key) for key in before)
        return cls(first.summary(), second.summary(), changes, same)

    def summary(self) -> str:
        """One line: how many changed."""
        return f"{len(self.changes)} of {len(self.changes) + self.same} quantized matmuls differ"

    def blocks(self, *, wide: bool) -> list[Block]:
        """Both summaries, and each change."""
        summaries = Entries("compared", (f"before: {self.before}", f"after: {self.after}"))
        items = [
            f"{name}: {rows[0].before or 'not there'} -> {rows[0].after or 'not there'}"
            for name, rows in alike_by_name(self.changes, lambda row: (row.before, row.after))
        ]
        return [summaries, Entries("different", tuple(items))] if items else [summaries]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {"summary": self.summary(), **dataclasses.asdict(self)}


def _outcomes(report: Matmuls) -> Iterator[tuple[tuple[str, int], str]]:
    """What became of each matmul, by its module and which of that module's it is."""
    seen: Counter[str] = Counter()
    for row in (*report.sites, *report.recognised, *report.misses):
        name = row.module or row.source or row.op
        yield (name, seen[name]), _outcome(row)
        seen[name] += 1


def _outcome(row: SiteReport | RecognisedReport | MissReport) -> str:
    if isinstance(row, SiteReport):
        padding = "" if row.padding == "none" else f", padding {row.padding}"
        return f"{row.kernel} ({row.numerics}{padding})"
    return f"recognised, {row.reason}" if isinstance(row, RecognisedReport) else f"missed, {row.reason}"
