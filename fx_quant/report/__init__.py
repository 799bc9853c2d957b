"""What became of each quantized matmul: rows, the report that holds them, and how reports print and show themselves."""

from __future__ import annotations

from fx_quant.report.blocks import Block, Entries, Paragraph, Table
from fx_quant.report.compare import Comparison
from fx_quant.report.report import Report
from fx_quant.report.reported import Reported
from fx_quant.report.rows import (
    BreakReport,
    CallReport,
    ExcerptReport,
    FloatReport,
    MissReport,
    PieceReport,
    PlanReport,
    RecognisedReport,
    SiteReport,
    TimeReport,
    UnseenReport,
)
from fx_quant.report.tables import alike_by_name, counted, folded, mebibytes

__all__ = [
    "Block",
    "BreakReport",
    "CallReport",
    "Comparison",
    "Entries",
    "ExcerptReport",
    "FloatReport",
    "MissReport",
    "Paragraph",
    "PieceReport",
    "PlanReport",
    "RecognisedReport",
    "Report",
    "Reported",
    "SiteReport",
    "Table",
    "TimeReport",
    "UnseenReport",
    "alike_by_name",
    "counted",
    "folded",
    "mebibytes",
]
