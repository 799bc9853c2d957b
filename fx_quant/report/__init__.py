"""What became of each quantized matmul: rows, the report that holds them, and how it prints."""

from __future__ import annotations

from fx_quant.report.report import Report
from fx_quant.report.rows import (
    BreakReport,
    MissReport,
    PieceReport,
    PlanReport,
    RecognisedReport,
    SiteReport,
    UnseenReport,
)
from fx_quant.report.tables import mebibytes, without_numbers

__all__ = [
    "BreakReport",
    "MissReport",
    "PieceReport",
    "PlanReport",
    "RecognisedReport",
    "Report",
    "SiteReport",
    "UnseenReport",
    "mebibytes",
    "without_numbers",
]
