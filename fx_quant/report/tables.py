"""The rows of a report as text: tables and lists, in which repeated layers share a line."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from tabulate import tabulate

from fx_quant.reasons import is_candidate
from fx_quant.report.rows import BreakReport, MissReport, PieceReport, RecognisedReport, SiteReport, UnseenReport

_BREAKS_SHOWN = 5


def site_table(sites: Sequence[SiteReport]) -> str:
    """One row a site; those of repeated layers share one, with ``*`` for the number of the layer."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for site in sites:
        name, padding = site.module or site.source or "?", "; ".join((site.padding, *site.notes))
        facts = (site.scheme, site.m, site.n, site.k, site.kernel, padding, site.numerics)
        alike.setdefault((without_numbers(name) if site.module else name, *facts), []).append(name)
    rows = [(names[0] if len(names) == 1 else name, len(names), *facts) for (name, *facts), names in alike.items()]
    headers = ("module", "sites", "scheme", "m", "n", "k", "kernel", "padding", "numerics")
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def padding_list(sites: Sequence[SiteReport]) -> str:
    """What each mode pads where any does, with what, and what is cut; repeated layers share a line."""
    lines: dict[str, None] = {}
    for site in sites:
        modes: dict[str, list[str]] = {}
        for mode, plan in site.plans.items():
            modes.setdefault(plan.padding, []).append(mode)
        if set(modes) - {"none"}:
            widest = max(site.plans.values(), key=lambda plan: (len(plan.fills), len(plan.cut)))
            name = without_numbers(site.module) if site.module else site.source or "?"
            planned = "; ".join(f"{', '.join(names)}: {padding}" for padding, names in modes.items())
            fills = ", ".join(f"{operand} {fill}" for operand, fill in widest.fills.items())
            cut = f"; the result is cut to {' and '.join(widest.cut)} right behind the kernel" if widest.cut else ""
            lines[_entry(f"{name}: {planned} (filled with: {fills}{cut})")] = None
    return "\n".join(["padding by mode:", *lines]) if lines else ""


def losers_list(sites: Sequence[SiteReport]) -> str:
    """Why each kernel of the target's platform that has the codes was not chosen, once per distinct reason."""
    seen: dict[str, list[str]] = {}
    for site in sites:
        for kernel, reasons in site.losers.items():
            if not is_candidate(site.unmet[kernel]):
                continue
            text = "; ".join(reasons)
            seen.setdefault(kernel, [])
            if text not in seen[kernel]:
                seen[kernel].append(text)
    if not seen:
        return ""
    lines = ["not chosen:"]
    for kernel, texts in seen.items():
        body = " | ".join(texts)
        lines.append(_entry(f"{kernel}: {body}"))
    return "\n".join(lines)


def recognised_list(recognised: Sequence[RecognisedReport]) -> str:
    """One line a matmul that is left; those of repeated layers share one."""

    def facts(row: RecognisedReport) -> tuple[str, ...]:
        shape = "" if row.n is None else f"m={row.m} n={row.n} k={row.k}"
        return without_numbers(row.module), row.scheme, shape, row.op, row.reason

    lines = ["recognised, and left as they are:"]
    for (module, scheme, shape, op, reason), rows in _alike(recognised, facts).items():
        where = (rows[0].module if len(rows) == 1 else module) or rows[0].source or op
        times = f" x {len(rows)}" if len(rows) > 1 else ""
        matmul = f"{op}, {scheme} {shape}" if scheme else op
        text = f"{where}{times}: {matmul}: {reason}"
        lines.append(_entry(text))
    return "\n".join(lines)


def miss_list(misses: Sequence[MissReport]) -> str:
    """One line a miss; those of repeated layers share one."""
    alike = _alike(misses, lambda miss: (without_numbers(miss.module), miss.source, miss.op, miss.reason))
    lines = ["missed:"]
    for (module, source, op, reason), rows in alike.items():
        first = rows[0]
        where = (first.module if len(rows) == 1 else module) or source or op
        where += f" ({source})" if source and module else ""
        times = f" x {len(rows)}" if len(rows) > 1 else ""
        text = f"{where}{times}: {op} left as it is, at {first.node}: {reason}"
        lines.append(_entry(text))
    return "\n".join(lines)


def unseen_list(unseen: Sequence[UnseenReport], nameless: int) -> str:
    """One line for modules of the same class and, but for numbers, name; those outside the graphs first.

    Args:
        nameless: how many reported matmuls have no module, and may be theirs.
    """
    parts = []
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
        head = f"{counted(len(those), 'module that holds codes is', 'modules that hold codes are')} {says}:"
        lines = [textwrap.fill(head, 118)]
        for (module, kind), rows in _alike(those, lambda row: (without_numbers(row.module), row.kind)).items():
            where = rows[0].module or "the model itself" if len(rows) == 1 else f"{module} x {len(rows)}"
            lines.append(_entry(f"{where} ({kind})"))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def sizes_list(pieces: Sequence[PieceReport]) -> str:
    """For each piece the numbers of rows that it is compiled for by itself, and why others are not padded to those."""
    lines = []
    for piece in pieces:
        where = f"piece {piece.first}" + (f" x {piece.count}" if piece.count > 1 else "")
        if piece.unsized:
            lines.append(_entry(f"{where}: for all m only: {piece.unsized}"))
        elif piece.sizes:
            others = f"not padded, as {piece.unpadded}" if piece.unpadded else "padded to the next"
            lines.append(_entry(f"{where}: for m = {', '.join(map(str, piece.sizes))}; other m: {others}"))
    return "\n".join(["compiled by size, each on its first use:", *lines]) if lines else ""


def breaks_list(breaks: Sequence[BreakReport], captured: str) -> str:
    """Where the graph broke, the most frequent place first.

    Args:
        captured: in words how many graphs there are.
    """
    lines = [f"The model was captured in {captured}; matmuls outside the graphs are not seen."]
    for row in sorted(breaks, key=lambda row: -row.count)[:_BREAKS_SHOWN]:
        times = f" x {row.count}" if row.count > 1 else ""
        text = f"{'/'.join(row.source.split('/')[-2:]) or '?'}{times}: {row.reason}"
        lines.append(_entry(text))
    if len(breaks) > _BREAKS_SHOWN:
        lines.append(f"  and {len(breaks) - _BREAKS_SHOWN} more places; to_json() has them all")
    return "\n".join(lines)


Row = TypeVar("Row")
Facts = TypeVar("Facts", bound=Hashable)


def _alike(rows: Iterable[Row], facts: Callable[[Row], Facts]) -> dict[Facts, list[Row]]:
    """The rows of equal ``facts`` together, in the order of their first."""
    groups: dict[Facts, list[Row]] = {}
    for row in rows:
        groups.setdefault(facts(row), []).append(row)
    return groups


def _entry(text: str) -> str:
    """``text`` as an indented entry of a list, wrapped."""
    return textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="      ")


def counted(count: int, one: str, more: str) -> str:
    """``1 piece``, ``3 pieces``."""
    return f"{count} {one if count == 1 else more}"


def mebibytes(count: int) -> str:
    """``1.5 MiB`` of ``count`` bytes."""
    return f"{count / 2**20:.1f} MiB"


def without_numbers(module: str) -> str:
    """``encoder.layer.3.query`` -> ``encoder.layer.*.query``."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
