"""The rows of a report as tables and lists, in which repeated layers share a line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

from fx_quant.reasons import is_candidate
from fx_quant.report.advice import advice
from fx_quant.report.blocks import Block, Entries, Paragraph, Table
from fx_quant.report.rows import (
    BreakReport,
    FloatReport,
    MissReport,
    PieceReport,
    RecognisedReport,
    SiteReport,
    UnseenReport,
)
from fx_quant.scheme import short_scheme

_BREAKS_SHOWN, _FLOATS_SHOWN = 5, 4


def site_table(sites: Sequence[SiteReport], *, wide: bool) -> list[Block]:
    """One row a site; those of repeated layers share one, with ``*`` for the number of the layer.

    Unless it is ``wide`` there is a table for each scheme and kernel, whose headline says what its rows agree in.
    """
    if wide:
        return [_table(sites, wide=True)[1]]
    blocks: list[Block] = []
    for rows in _alike(sites, lambda site: (site.scheme, site.kernel, site.numerics)).values():
        blocks += _table(rows, wide=False)
    return blocks


def _table(sites: Sequence[SiteReport], *, wide: bool) -> tuple[Paragraph, Table]:
    alike = _alike(sites, lambda site: (_name(site), *_facts(site, wide).values()))
    names = [rows[0].module or rows[0].source or "?" if len(rows) == 1 else str(key[0]) for key, rows in alike.items()]
    columns: dict[str, list[str]] = {"module": names, "sites": [str(len(rows)) for rows in alike.values()]}
    for name in _facts(sites[0], wide):
        columns[name] = [_facts(rows[0], wide)[name] for rows in alike.values()]
    columns |= _times(alike.values())
    said = [] if wide else _folded(columns)
    return Paragraph(", ".join(said)), Table(tuple(columns), tuple(zip(*columns.values(), strict=True)))


def _name(row: SiteReport) -> str:
    return without_numbers(row.module) if row.module else row.source or "?"


def _facts(site: SiteReport, wide: bool) -> dict[str, str]:
    return {
        "scheme": site.scheme if wide else short_scheme(site.scheme),
        "m": site.m,
        "n": str(site.n),
        "k": str(site.k),
        "kernel": site.kernel,
        "padding": "; ".join((site.padding, *site.notes)),
        "numerics": site.numerics,
    }


def folded(columns: dict[str, list[str]], names: Iterable[str]) -> list[str]:
    """What the rows agree in of the columns ``names``, which are taken out of ``columns``."""
    return [columns.pop(name)[0] for name in names if len(set(columns[name])) == 1]


def _folded(columns: dict[str, list[str]]) -> list[str]:
    """What the rows agree in, taken out of ``columns``, in words."""
    said = folded(columns, ("scheme", "kernel", "numerics"))
    said += [f"m {value}" for value in folded(columns, ("m",))]
    said += ["no padding" if value == "none" else f"padding {value}" for value in folded(columns, ("padding",))]
    if path := _shared_path(columns["module"]):
        columns["module"] = [name.removeprefix(path) for name in columns["module"]]
        said.append(f"in {path.removesuffix('.')}")
    return said


def _shared_path(names: Sequence[str]) -> str:
    """The path that all of several ``names`` begin with, to its last dot."""
    if len(names) < 2 or any("/" in name for name in names):
        return ""
    parts = [name.split(".")[:-1] for name in names]
    # Of a few, the least and the greatest share what all share.
    agree = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(parts), max(parts), strict=False))
    return "".join(f"{part}." for part, _ in agree)


def _times(alike: Iterable[Sequence[SiteReport]]) -> dict[str, list[str]]:
    """Columns of the measured times, of all sites of a row together; none where nothing was measured."""
    timed = [[site.time for site in rows if site.time is not None] for rows in alike]
    if not any(timed):
        return {}
    return {
        "us": [f"{1e6 * sum(each.seconds for each in row):.0f}" if row else "-" for row in timed],
        "Inductor us": [f"{1e6 * sum(each.inductor_seconds for each in row):.0f}" if row else "-" for row in timed],
        "of call": [f"{sum(each.share for each in row):.0%}" if row else "-" for row in timed],
    }


def padding_list(sites: Sequence[SiteReport]) -> list[Block]:
    """What each mode pads where any does, with what, and what is cut; repeated layers share a line."""
    lines: dict[str, None] = {}
    for site in sites:
        modes: dict[str, list[str]] = {}
        for mode, plan in site.plans.items():
            modes.setdefault(plan.padding, []).append(mode)
        if set(modes) - {"none"}:
            widest = max(site.plans.values(), key=lambda plan: (len(plan.fills), len(plan.cut)))
            planned = "; ".join(f"{', '.join(names)}: {padding}" for padding, names in modes.items())
            fills = ", ".join(f"{operand} {fill}" for operand, fill in widest.fills.items())
            cut = f"; the result is cut to {' and '.join(widest.cut)} right behind the kernel" if widest.cut else ""
            lines[f"{_name(site)}: {planned} (filled with: {fills}{cut})"] = None
    return [Entries("padding by mode", tuple(lines))] if lines else []


def losers_list(sites: Sequence[SiteReport]) -> list[Block]:
    """Why each kernel of the target's platform that has the codes was not chosen, once per distinct reason."""
    seen: dict[str, list[str]] = {}
    for site in sites:
        for kernel, reasons in site.losers.items():
            if is_candidate(site.unmet[kernel]) and (text := "; ".join(reasons)) not in seen.setdefault(kernel, []):
                seen[kernel].append(text)
    alike = _alike(seen.items(), lambda item: tuple(item[1]))
    items = [f"{', '.join(kernel for kernel, _ in rows)}: {' | '.join(texts)}" for texts, rows in alike.items()]
    return [Entries("not chosen", tuple(items), folded=True)] if items else []


def recognised_list(recognised: Sequence[RecognisedReport]) -> list[Block]:
    """One line a matmul that is left; those of repeated layers share one."""
    items = []
    for name, rows in alike_by_name(recognised, lambda row: (row.scheme, row.m, row.n, row.k, row.op, row.reason)):
        row = rows[0]
        shape = "" if row.n is None else f"m={row.m} n={row.n} k={row.k}"
        times = f" x {len(rows)}" if len(rows) > 1 else ""
        matmul = f"{row.op}, {row.scheme} {shape}" if row.scheme else row.op
        items.append(f"{name or row.source or row.op}{times}: {matmul}: {row.reason}")
    return [Entries("recognised, and left as they are", tuple(items))] if items else []


def miss_list(misses: Sequence[MissReport]) -> list[Block]:
    """One line a miss; those of repeated layers share one."""
    items = []
    for name, rows in alike_by_name(misses, lambda miss: (miss.source, miss.op, miss.reason)):
        first = rows[0]
        where = name or first.source or first.op
        where += f" ({first.source})" if first.source and name else ""
        times = f" x {len(rows)}" if len(rows) > 1 else ""
        do = advice(first.reason)
        items.append(
            f"{where}{times}: {first.op} left as it is, at {first.node}: {first.reason}"
            + (f"; to do: {do}" if do else "")
        )
    return [Entries("missed", tuple(items))] if items else []


def unseen_list(unseen: Sequence[UnseenReport], nameless: int) -> list[Block]:
    """One line for modules of the same class and, but for numbers, name; those outside the graphs first.

    Args:
        nameless: how many reported matmuls have no module, and may be theirs.
    """
    blocks: list[Block] = []
    outside = "in no graph, not run on these inputs or run outside the graphs, so nothing is done there"
    if nameless:
        outside = f"in no graph by name: not run, run outside the graphs, or among the {nameless} above without a name"
    for in_graph, says in (
        (False, outside),
        (True, "in a graph, but in no quantized matmul that fx_quant knows"),
    ):
        those = [row for row in unseen if row.in_graph is in_graph]
        if not those:
            continue
        items = []
        for name, rows in alike_by_name(those, lambda row: (row.kind, row.reason)):
            where = name or "the model itself" if len(rows) == 1 else f"{name} x {len(rows)}"
            items.append(f"{where} ({rows[0].kind})" + (f": {rows[0].reason}" if rows[0].reason else ""))
        head = counted(len(those), "quantized module is", "quantized modules are")
        blocks.append(Entries(f"{head} {says}", tuple(items)))
    return blocks


def sizes_list(pieces: Sequence[PieceReport]) -> list[Block]:
    """For each piece the numbers of rows that it is compiled for by itself, and why others are not padded to those."""
    items = []
    for piece in pieces:
        where = f"piece {piece.first}" + (f" x {piece.count}" if piece.count > 1 else "")
        if piece.unsized:
            items.append(f"{where}: for all m only: {piece.unsized}")
        elif piece.sizes:
            others = f"not padded, as {piece.unpadded}" if piece.unpadded else "padded to the next"
            items.append(f"{where}: for m = {', '.join(map(str, piece.sizes))}; other m: {others}")
    return [Entries("compiled by size, each on its first use", tuple(items))] if items else []


def float_list(floats: Sequence[FloatReport]) -> list[Block]:
    """The linears that are not quantized, in a line; those of repeated layers share a name."""
    if not floats:
        return []
    groups = alike_by_name(floats, lambda row: ())
    names = [name if len(rows) == 1 else f"{name} x {len(rows)}" for name, rows in groups]
    more = f" and {len(names) - _FLOATS_SHOWN} more" if len(names) > _FLOATS_SHOWN else ""
    size = mebibytes(sum(row.weight_bytes for row in floats))
    head = counted(len(floats), "linear is", "linears are")
    return [Paragraph(f"{head} not quantized ({size} of weights): {', '.join(names[:_FLOATS_SHOWN])}{more}")]


def breaks_list(breaks: Sequence[BreakReport], captured: str) -> list[Block]:
    """Where the graph broke, the most frequent place first.

    Args:
        captured: in words how many graphs there are.
    """
    items = []
    for row in sorted(breaks, key=lambda row: -row.count)[:_BREAKS_SHOWN]:
        times = f" x {row.count}" if row.count > 1 else ""
        items.append(f"{'/'.join(row.source.split('/')[-2:]) or '?'}{times}: {row.reason}")
    if len(breaks) > _BREAKS_SHOWN:
        items.append(f"and {len(breaks) - _BREAKS_SHOWN} more places; to_json() has them all")
    says = f"the model was captured in {captured}; matmuls outside the graphs are not seen"
    return [Entries(says, tuple(items))] if items else [Paragraph(f"{says}.")]


Row = TypeVar("Row")
Facts = TypeVar("Facts", bound=Hashable)


class Named(Protocol):
    """A row on a module."""

    @property
    def module(self) -> str:
        """Its path."""


NamedRow = TypeVar("NamedRow", bound=Named)


def alike_by_name(
    rows: Iterable[NamedRow], facts: Callable[[NamedRow], tuple[Hashable, ...]]
) -> list[tuple[str, list[NamedRow]]]:
    """The rows of equal ``facts`` and, but for numbers, equal paths: the path that they share, and the rows.

    A path of several has ``*`` for numbers.
    """
    groups = _alike(rows, lambda row: (without_numbers(row.module), facts(row)))
    return [(each[0].module if len(each) == 1 else name, each) for (name, _), each in groups.items()]


def _alike(rows: Iterable[Row], facts: Callable[[Row], Facts]) -> dict[Facts, list[Row]]:
    """The rows of equal ``facts`` together, in the order of their first."""
    groups: dict[Facts, list[Row]] = {}
    for row in rows:
        groups.setdefault(facts(row), []).append(row)
    return groups


def counted(count: int, one: str, more: str) -> str:
    """``1 piece``, ``3 pieces``."""
    return f"{count} {one if count == 1 else more}"


def mebibytes(count: int) -> str:
    """``1.5 MiB`` of ``count`` bytes, ``20.0 KiB`` of few."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 // 10 or not count else f"{count / 2**10:.1f} KiB"


def without_numbers(module: str) -> str:
    """``encoder.layer.3.query`` -> ``encoder.layer.*.query``."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
