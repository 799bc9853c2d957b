"""What the rows of ``gpu.py`` say: the table, the goals, the picture. Plain text; nothing but Python is needed.

A row has the fields of its case, ``floor_us`` and ``limit``, and ``ways`` by name, each with ``status``, ``error``,
``part`` and ``us`` (``p20``, ``p50``, ``p80``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_cases import MODELS

OURS = "fx_quant"
INDUCTOR, TUNED = "inductor", "inductor max-autotune"
BF16, BF16_TUNED = "bf16", "bf16 max-autotune"
VLLM, DEEP_GEMM = "vllm", "deep_gemm"
TORCH = "eager quant + torch"
MARLIN = "kernel marlin"

Row = Mapping[str, Any]


def columns(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Text in columns, each as wide as its widest cell."""
    everything = [list(headers), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    everything.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in everything
    )


def microseconds(row: Row, *names: str) -> float | None:
    """The median of the fastest of these ways that ran and was right; a name may be the beginning of one."""
    found = [
        way["us"]["p50"]
        for name, way in row["ways"].items()
        if way["status"] == "ok" and way["us"] and any(name == each or name.startswith(f"{each}_") for each in names)
    ]
    return min(found, default=None)


def best_peer(row: Row) -> tuple[str, float] | None:
    """``(name, microseconds)`` of the fastest other way that computes the whole."""
    rivals = {
        name: way["us"]["p50"]
        for name, way in row["ways"].items()
        if not name.startswith(OURS) and not way["part"] and way["status"] == "ok" and way["us"]
    }
    return min(rivals.items(), key=lambda peer: peer[1]) if rivals else None


def ratio(row: Row, *names: str) -> float | None:
    """Time of the fastest of these over ours: above 1 we are faster."""
    ours, theirs = microseconds(row, OURS), microseconds(row, *names)
    return theirs / ours if ours and theirs else None


def share(row: Row) -> float | None:
    """The floor over our time."""
    ours = microseconds(row, OURS)
    return row["floor_us"] / ours if ours else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are there; None where none is."""
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


# --- the table ----------------------------------------------------------------------------------------------------

HEADERS = ("case", "recipe", "m", "n x k", "fx_quant us", "p20..p80", "best peer", "us", "ratio", "floor", "share")


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    ours = row["ways"].get(OURS, {"status": "not run", "us": None})
    best, us = best_peer(row) or ("none", None)
    mine = microseconds(row, OURS)
    return (
        row["what"],
        row["recipe"],
        str(row["m"]),
        f"{row['n']} x {row['k']}",
        _number(mine, 1) if mine else ours["status"][:30],
        f"{ours['us']['p20']:.1f}..{ours['us']['p80']:.1f}" if mine and ours["us"] else "",
        best,
        _number(us, 1),
        _number(us / mine) if us and mine else "",
        f"{row['floor_us']:.1f} {row['limit']}",
        "" if (found := share(row)) is None else f"{found:.0%}",
    )


def table(rows: Sequence[Row]) -> str:
    """One line for each row."""
    return columns(HEADERS, map(cells, rows))


def ways_table(rows: Sequence[Row]) -> str:
    """Microseconds of every way, a table for each case without its m."""
    parts = []
    for (section, what, recipe, k), group in by(rows, "section", "what", "recipe", "k").items():
        names = dict.fromkeys(name for row in group for name in row["ways"])
        lines = [(name, *(_state(row["ways"].get(name)) for row in group)) for name in names]
        parts.append(columns((f"{section}: {what} {recipe}, k = {k}: us", *(f"m={row['m']}" for row in group)), lines))
    return "\n\n".join(parts)


def _state(way: Mapping[str, Any] | None) -> str:
    if way is None:
        return ""
    if way["status"] == "ok" and way["us"]:
        return f"{way['us']['p50']:.1f}"
    return f"wrong ({way['error']:.2g})" if way["status"] == "wrong" else way["status"].split(":")[0]


def absent(rows: Sequence[Row]) -> list[str]:
    """A line for each way that did not run, with the first reason."""
    reasons: dict[str, str] = {}
    for row in rows:
        for name, way in row["ways"].items():
            if way["status"] != "ok":
                error = "" if way["error"] is None else f" (relative error {way['error']:.2g})"
                reasons.setdefault(name, f"{name}: {way['status']}{error}; first at {row['what']} m={row['m']}")
    return list(reasons.values())


def by(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows with the same values of ``keys``."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


# --- the goals ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A figure that was asked for.

    Args:
        name: such as ``G1``.
        what: the figure, for people.
        figure: of all rows; None where they say nothing of it.
        least: what is asked at least.
        moonshot: what is wished for.
    """

    name: str
    what: str
    figure: Callable[[Sequence[Row]], float | None]
    least: float
    moonshot: float

    def line(self, rows: Sequence[Row]) -> str:
        """What was asked and what was got."""
        got = self.figure(rows)
        if got is None:
            return f"{self.name:4} {self.what}: not measured"
        verdict = "moonshot" if got >= self.moonshot else "reached" if got >= self.least else "missed"
        return f"{self.name:4} {self.what}: asked {self.least:g} ({self.moonshot:g}), got {got:.2f}: {verdict}"


def _mean(
    figure: Callable[[Row], float | None], section: str, recipes: str, low: float, high: float = math.inf
) -> Callable[[Sequence[Row]], float | None]:
    asked = recipes.split(",")

    def got(rows: Sequence[Row]) -> float | None:
        takes = (r for r in rows if r["section"] == section and r["recipe"] in asked and low <= r["m"] <= high)
        return geometric_mean(map(figure, takes))

    return got


def _to(*names: str) -> Callable[[Row], float | None]:
    return lambda row: ratio(row, *names)


def _matmul_to_torch(row: Row) -> float | None:
    ours, theirs = microseconds(row, "kernel triton"), microseconds(row, "kernel pytorch")
    return theirs / ours if ours and theirs else None


def _share_between(low: float, high: float) -> Callable[[Row], float | None]:
    return lambda row: share(row) if low <= row["n"] * row["k"] < high else None


def _to_best(row: Row) -> float | None:
    best, ours = best_peer(row), microseconds(row, OURS)
    return best[1] / ours if best and ours else None


def _asymmetric(rows: Sequence[Row]) -> float | None:
    """Time with a zero point over that without; as a goal the inverse, so that more is better."""
    linears = [row for row in rows if row["section"] == "linears"]
    plain = {(row["what"], row["m"]): microseconds(row, OURS) for row in linears if row["recipe"] == "int8"}
    found = []
    for row in linears:
        ours, other = microseconds(row, OURS), plain.get((row["what"], row["m"]))
        if row["recipe"] == "int8 asym" and ours and other:
            found.append(other / ours)
    return geometric_mean(found)


def _layer(low: float, high: float) -> Callable[[Sequence[Row]], float | None]:
    """The four linears of a decoder layer in bfloat16 over ours by rows, where all were timed."""

    def got(rows: Sequence[Row]) -> float | None:
        takes = [r for r in rows if r["section"] == "linears" and r["recipe"] == "row" and low <= r["m"] <= high]
        ratios: list[float | None] = []
        for model in MODELS:
            for group in by([r for r in takes if r["what"].startswith(f"{model} ")], "m").values():
                ours = [microseconds(row, OURS) for row in group]
                theirs = [microseconds(row, BF16, BF16_TUNED) for row in group]
                if len(group) == 4 and None not in ours and None not in theirs:
                    ratios.append(sum(filter(None, theirs)) / sum(filter(None, ours)))
        return geometric_mean(ratios)

    return got


def _worst(rows: Sequence[Row]) -> float | None:
    known = [found for row in rows if row["section"] == "linears" and (found := ratio(row, INDUCTOR, TUNED))]
    return min(known, default=None)


_MB = 1e6
_INDUCTORS = _to(INDUCTOR, TUNED)
GOALS: tuple[Goal, ...] = (
    Goal(
        "G1", "row-wise linear to the best of Inductor, m <= 16", _mean(_INDUCTORS, "linears", "row", 1, 16), 1.25, 1.6
    ),
    Goal("G1b", "row-wise linear to vLLM, m <= 16", _mean(_to(VLLM), "linears", "row", 1, 16), 1.05, 1.25),
    Goal(
        "G1c",
        "share of the floor, n k >= 60 MB",
        _mean(_share_between(60 * _MB, math.inf), "linears", "row", 1, 16),
        0.75,
        0.90,
    ),
    Goal(
        "G1c",
        "share of the floor, n k of 16 to 60 MB",
        _mean(_share_between(16 * _MB, 60 * _MB), "linears", "row", 1, 16),
        0.55,
        0.75,
    ),
    Goal(
        "G2",
        "row-wise linear to quantize + torch._scaled_mm, m >= 1024",
        _mean(_to(TORCH, INDUCTOR, TUNED), "linears", "row", 1024),
        1.0,
        1.1,
    ),
    Goal("G2b", "own matmul to torch's, m >= 1024", _mean(_matmul_to_torch, "linears", "row", 1024), 0.90, 0.97),
    Goal(
        "G3",
        "blocks to torch._scaled_mm, m <= 64",
        _mean(_to(TORCH, INDUCTOR, TUNED), "linears", "block", 1, 64),
        1.5,
        2.2,
    ),
    Goal("G3", "blocks to DeepGEMM, m <= 64", _mean(_to(DEEP_GEMM), "linears", "block", 1, 64), 1.0, 1.25),
    Goal("G4", "MLP to the best peer, m <= 64", _mean(_to_best, "chains", "row,block", 1, 64), 1.15, 1.35),
    Goal("G4", "MLP to the best peer, m >= 4096", _mean(_to_best, "chains", "row,block", 4096), 1.05, 1.15),
    Goal("G5", "int8 to Inductor, m >= 64", _mean(_INDUCTORS, "linears", "int8,int8 asym", 64), 1.5, 2.5),
    Goal("G5", "int8 to Inductor, m <= 16", _mean(_INDUCTORS, "linears", "int8,int8 asym", 1, 16), 2.0, 4.0),
    Goal("G5", "int8 without a zero point to with one", _asymmetric, 0.97, 0.97),
    Goal("G6", "w4a16 and w8a16 to Inductor, m <= 16", _mean(_INDUCTORS, "linears", "w4a16,w8a16", 1, 16), 1.5, 3.0),
    Goal("G6", "w4a16 and w8a16 to Marlin, m <= 16", _mean(_to(MARLIN), "linears", "w4a16,w8a16", 1, 16), 0.9, 1.05),
    Goal("G7", "linears of a layer to bf16, m <= 64", _layer(1, 64), 1.5, 1.85),
    Goal("G7", "linears of a layer to bf16, m = 4096", _layer(4096, 4096), 1.45, 1.75),
    Goal("G9", "least ratio to Inductor of all linears", _worst, 0.97, 1.0),
)


def goals(rows: Sequence[Row]) -> str:
    """A line for each goal."""
    return "\n".join(goal.line(rows) for goal in GOALS)


# --- the picture --------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path) -> None:
    """Ratios to the best peer and shares of the floor over m, as a PNG or SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib  # pyrefly: ignore[missing-import]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyrefly: ignore[missing-import]

    figure, (ratios, shares) = plt.subplots(1, 2, figsize=(13, 5))
    for (section, recipe), group in by(rows, "section", "recipe").items():
        by_m = sorted(by(group, "m").items())
        for axes, value in ((ratios, _to_best), (shares, share)):
            points = [(m, mean) for (m,), some in by_m if (mean := geometric_mean(map(value, some))) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{section} {recipe}")
    ratios.set_ylabel("best peer's time / ours (geometric mean over shapes)")
    shares.set_ylabel("floor / our time")
    for axes in (ratios, shares):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("m, rows of the activation")
        axes.grid(alpha=0.3)
    ratios.set_yscale("log", base=2)
    ratios.yaxis.set_major_formatter("{x:g}")
    shares.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
