"""A report's rows as plain data and back. What many rows have alike (verdicts, plans, excerpts) is there once.

A row has the number of its entry where the entry stands in the row's place: ``"verdicts": 0``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fx_quant.reasons import as_data, from_data
from fx_quant.report.rows import (
    BreakReport,
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

ROWS: dict[str, type] = {
    "sites": SiteReport,
    "misses": MissReport,
    "recognised": RecognisedReport,
    "unseen": UnseenReport,
    "breaks": BreakReport,
    "pieces": PieceReport,
    "floats": FloatReport,
}
# What is shared, and by which field of a row.
_SHARED = {"verdicts": "unmet", "plans": "plans", "excerpts": "excerpt"}


def rows_as_data(rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """``rows`` by what they are, and below ``verdicts``, ``plans`` and ``excerpts`` what they share."""
    shared: dict[str, list[Any]] = {name: [] for name in _SHARED}
    numbers: dict[str, dict[str, int]] = {name: {} for name in _SHARED}

    def plain(row: Any) -> dict[str, Any]:
        fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
        for name, field in _SHARED.items():
            if field not in fields:
                continue
            value = fields.pop(field)
            data = as_data(value) if field == "unmet" else _plain(value)
            text = json.dumps(data)
            if text not in numbers[name]:
                numbers[name][text] = len(shared[name])
                shared[name].append(data)
            fields[name if field == "unmet" else field] = numbers[name][text] if value is not None else None
        return _plain(fields)

    return {name: [plain(row) for row in each] for name, each in rows.items()} | shared


def rows_from_data(data: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The rows of which ``rows_as_data`` made ``data``."""
    verdicts = [from_data(each) for each in data["verdicts"]]
    plans = [
        {mode: PlanReport(**plan | {"cut": tuple(plan["cut"])}) for mode, plan in each.items()}
        for each in data["plans"]
    ]
    excerpts = [each and ExcerptReport(**each) for each in data["excerpts"]]

    def row(kind: type, fields: dict[str, Any]) -> Any:
        if "verdicts" in fields:
            fields["unmet"] = verdicts[fields.pop("verdicts")]
        if "plans" in fields:
            fields["plans"] = plans[fields["plans"]]
        if fields.get("excerpt") is not None:
            fields["excerpt"] = excerpts[fields["excerpt"]]
        if fields.get("time") is not None:
            fields["time"] = TimeReport(**fields["time"])
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    return {name: tuple(row(kind, dict(fields)) for fields in data.get(name, ())) for name, kind in ROWS.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value
