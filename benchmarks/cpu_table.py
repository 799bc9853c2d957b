"""What the rows of ``cpu.py linears`` say: the table, the means, what was asked for and what was got, the picture.

A row is what ``cpu_measure.measure`` gives: ``ways`` by name, each with ``status``, ``error`` and ``ms``, and the
``ceilings`` of the same moment.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

OURS, PLAIN = "fx_quant", "inductor"
FROZEN = "fx_quant frozen"

Row = Mapping[str, Any]


def milliseconds(row: Row, name: str) -> float | None:
    """Of the way ``name``, if it ran and was right."""
    way = row["ways"].get(name)
    return way["ms"] if way and way["status"] == "ok" else None


def frozen(rows: Sequence[Row]) -> list[Row]:
    """The rows in which ours ran with frozen weights too, which takes the place of ours in them."""
    return [{**row, "ways": {**row["ways"], OURS: row["ways"][FROZEN]}} for row in rows if FROZEN in row["ways"]]


def best_peer(row: Row) -> tuple[str, float] | None:
    """``(name, ms)`` of the fastest other way that was right; None where none was.

    What quantizes an activation that the scheme leaves float is not asked: it computes something else.
    """
    rivals = (name for name, way in row["ways"].items() if name not in (OURS, FROZEN) and not way.get("another"))
    peers = {name: ms for name in rivals if (ms := milliseconds(row, name)) is not None}
    return min(peers.items(), key=lambda peer: peer[1]) if peers else None


def ratio_to_best(row: Row) -> float | None:
    """The best peer's time over ours: above 1 we are faster."""
    ours, best = milliseconds(row, OURS), best_peer(row)
    return best[1] / ours if ours and best else None


def ratio_to_plain(row: Row) -> float | None:
    """The time of plain Inductor, on the source that we were given, over ours."""
    ours, plain = milliseconds(row, OURS), milliseconds(row, PLAIN)
    return plain / ours if ours and plain else None


def share_of_bandwidth(row: Row) -> float | None:
    """Bytes of the weight over our time, as a share of what the memory gave to a plain read."""
    ours, read = milliseconds(row, OURS), row["ceilings"].get("read")
    return row["bytes"] / ours / 1e6 / read if ours and read else None


def share_of_peak(row: Row) -> float | None:
    """``2 m n k`` over our time, as a share of what the scheme's instruction gave without any memory."""
    ours, peak = milliseconds(row, OURS), row["ceilings"].get("peak")
    return 2e-6 * row["m"] * row["n"] * row["k"] / ours / peak if ours and peak else None


def ceiling(row: Row) -> str:
    """The nearer of both ceilings, as ``87 % read`` or ``91 % vpdpbusd``."""
    shares = {"read": share_of_bandwidth(row), row["ceilings"]["instruction"]: share_of_peak(row)}
    known = {name: share for name, share in shares.items() if share is not None}
    if not known:
        return ""
    name = max(known, key=known.__getitem__)
    return f"{known[name]:.0%} {name}"


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are there; None where none is."""
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


# --- the table --------------------------------------------------------------------------------------------------------

HEADERS = (
    "threads",
    "scheme",
    "dtype",
    "n x k",
    "m",
    "fx_quant ms",
    "best peer",
    "ms",
    "to best",
    "to inductor",
    "of ceiling",
)


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    ours, (best, ms) = row["ways"].get(OURS, {"status": "failed"}), best_peer(row) or ("none", None)
    return (
        str(row["threads"]),
        row["scheme"],
        row["dtype"],
        f"{row['n']} x {row['k']}",
        str(row["m"]),
        _number(ours["ms"], 3) if ours["status"] == "ok" else ours["status"],
        best,
        _number(ms, 3),
        _number(ratio_to_best(row)),
        _number(ratio_to_plain(row)),
        ceiling(row),
    )


def table(rows: Sequence[Row]) -> str:
    """One line for each row."""
    return tabulate([cells(row) for row in rows], headers=HEADERS, tablefmt="simple", disable_numparse=True)


def peers_table(rows: Sequence[Row]) -> str:
    """Milliseconds of every way, a table for each case; what is not right says so in place of a time."""
    tables = []
    for key, group in _by(rows, "threads", "scheme", "dtype", "n", "k").items():
        names = list(dict.fromkeys(name for row in group for name in row["ways"]))
        lines = [(name, *(_state(row["ways"].get(name)) for row in group)) for name in names]
        headers = ("{1} {2} {3} x {4}, threads {0}: ms".format(*key), *(f"m = {row['m']}" for row in group))
        tables.append(tabulate(lines, headers=headers, tablefmt="simple", disable_numparse=True))
    return "\n\n".join(tables)


def _state(way: Mapping[str, Any] | None) -> str:
    if way is None:
        return ""
    if way["status"] == "ok":
        return f"{way['ms']:.3f}{' (int8 activation)' * bool(way.get('another'))}"
    return f"wrong ({way['error']:.2g})" if way["status"] == "wrong" else way["status"][:60]


def _by(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


# --- the summary ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A figure that was asked for.

    Args:
        what: the figure, for people.
        takes: the rows that it is about.
        figure: of one row.
        gather: of the rows' figures, such as their geometric mean or the least.
        least: what was asked.
    """

    what: str
    takes: Callable[[Row], bool]
    figure: Callable[[Row], float | None]
    gather: Callable[[Iterable[float | None]], float | None]
    least: float

    def got(self, rows: Sequence[Row]) -> float | None:
        """The figure of the rows that it is about; None where there are none."""
        return self.gather(self.figure(row) for row in rows if self.takes(row))


def least(values: Iterable[float | None]) -> float | None:
    """The smallest of those that are there."""
    return min((value for value in values if value is not None), default=None)


def _rows(schemes: str, low: int, high: float) -> Callable[[Row], bool]:
    return lambda row: row["scheme"] in schemes.split() and low <= row["m"] <= high


def _beyond_cache(row: Row) -> bool:
    return row["scheme"] == "w8a8" and row["m"] == 1 and row["bytes"] > row.get("cache", math.inf)


GOALS: tuple[Goal, ...] = (
    Goal("w8a8 to best peer, m <= 16, mean", _rows("w8a8", 1, 16), ratio_to_best, geometric_mean, 1.25),
    Goal("w8a8 to best peer, m = 64..1024, mean", _rows("w8a8", 64, 1024), ratio_to_best, geometric_mean, 1.10),
    Goal("w8a8 to plain Inductor, m <= 16, mean", _rows("w8a8", 1, 16), ratio_to_plain, geometric_mean, 2.0),
    Goal("w8a8 to best peer, least of all rows", _rows("w8a8", 1, math.inf), ratio_to_best, least, 0.97),
    Goal(
        "w8a8 share of read bandwidth, m = 1, weight beyond the cache, mean",
        _beyond_cache,
        share_of_bandwidth,
        geometric_mean,
        0.85,
    ),
    Goal("w8a8 share of VNNI peak, m >= 256, mean", _rows("w8a8", 256, math.inf), share_of_peak, geometric_mean, 0.80),
    Goal("w8a16 to best peer, m = 1, mean", _rows("w8a16", 1, 1), ratio_to_best, geometric_mean, 1.2),
    Goal("w4a16 to best peer, m = 1, mean", _rows("w4a16-g128 w4a16-g32", 1, 1), ratio_to_best, geometric_mean, 1.2),
    Goal("fp8 to plain Inductor, m <= 16, mean", _rows("fp8 fp8-tensor", 1, 16), ratio_to_plain, geometric_mean, 5.0),
)


def goals(rows: Sequence[Row]) -> list[str]:
    """A line for each goal that the rows say something about: what was asked, what was got."""
    lines = []
    for goal in GOALS:
        got = goal.got(rows)
        if got is not None:
            reached = "reached" if got >= goal.least else "missed"
            lines.append(f"{goal.what}: asked {goal.least:.2f}, got {got:.2f} ({reached})")
    return lines


def summary(rows: Sequence[Row]) -> str:
    """Geometric means by scheme, dtype and threads for few and for many rows, the least ratio, and the goals.

    Also of ours with frozen weights, where that was run.
    """
    parts, lines = [], []
    for ours, of in ((OURS, rows), (FROZEN, frozen(rows))):
        for (threads, scheme, dtype), group in _by(of, "threads", "scheme", "dtype").items():
            for what, low, high in (("m <= 16", 1, 16), ("m >= 64", 64, math.inf)):
                some = [row for row in group if low <= row["m"] <= high]
                best, plain = (geometric_mean(map(ratio, some)) for ratio in (ratio_to_best, ratio_to_plain))
                if best is not None:
                    lines.append((ours, str(threads), scheme, dtype, what, _number(best), _number(plain), _least(some)))
        asked = goals(of)
        if asked:
            parts.append("\n".join([f"{ours}:", *asked]))
    headers = ("ours", "threads", "scheme", "dtype", "rows", "to best, mean", "to inductor, mean", "least to best")
    if lines:
        parts.insert(0, tabulate(lines, headers=headers, tablefmt="simple", disable_numparse=True))
    return "\n\n".join(parts)


def _least(rows: Sequence[Row]) -> str:
    known = [(ratio, row) for row in rows if (ratio := ratio_to_best(row)) is not None]
    ratio, row = min(known, key=lambda pair: pair[0])
    return f"{ratio:.2f} at {row['n']} x {row['k']}, m = {row['m']}"


# --- the picture ------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path) -> None:
    """Ratios to the best peer over m, and shares of the nearer ceiling, as a PNG or SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib  # pyrefly: ignore[missing-import]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyrefly: ignore[missing-import]

    figure, (ratios, shares) = plt.subplots(1, 2, figsize=(13, 5))
    for (threads, scheme, dtype), group in _by(rows, "threads", "scheme", "dtype").items():
        by_m = sorted(_by(group, "m").items())
        label = f"{scheme} {dtype}, {threads} thread{'s' * (threads > 1)}"
        for axes, value in ((ratios, ratio_to_best), (shares, _nearer)):
            points = [(m, mean) for (m,), some in by_m if (mean := geometric_mean(map(value, some))) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
    ratios.set_ylabel("best peer's time / ours (geometric mean over shapes)")
    shares.set_ylabel("share of the nearer ceiling: read bandwidth, instruction peak")
    shares.set_ylim(0, 1.05)
    for axes in (ratios, shares):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("m, rows of the activation")
        axes.grid(alpha=0.3)
    ratios.set_yscale("log", base=2)
    ratios.yaxis.set_major_formatter("{x:g}")
    ratios.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _nearer(row: Row) -> float | None:
    known = [share for share in (share_of_bandwidth(row), share_of_peak(row)) if share is not None]
    return max(known, default=None)
