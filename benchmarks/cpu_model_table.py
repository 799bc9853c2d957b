"""What the rows of ``cpu.py models`` say: rates, seconds, memory and errors, and how ours stand to llama.cpp.

A row is what ``cpu_models.turns`` gives, with the rates of ``cpu_turns.measured``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cpu_llama_cpp
from cpu_variants import OURS, VARIANTS, family

WIDTH = 120  # of a table at most

Headers = Sequence[tuple[str, str]]  # two lines of each column's title
Lines = Sequence[tuple[str, ...]]


def compile_ratio(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Compile seconds over those of plain Inductor on the same source; None where it was not run."""
    plain = VARIANTS[row["variant"]].plain
    for other in rows:
        same = all(other.get(key) == row.get(key) for key in ("model", "threads", "layers", "prompt", "huge_pages"))
        if same and other["variant"] == plain and "compile_s" in other and "compile_s" in row:
            return row["compile_s"] / other["compile_s"]
    return None


# What a table says of a variant beside its rates and its error.
_COLUMNS = {
    "prepare s": "prepare_s",
    "compile s": "compile_s",
    "/ plain": "",
    "peak MiB": "peak_mib",
    "resident MiB": "steady_mib",
    "weights MiB": "weights_mib",
}
_GROUP = ("model", "threads", "prompt", "huge_pages")  # what a table is of


def _cell(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], key: str) -> str:
    if not key:
        ratio = compile_ratio(row, rows)
        return "" if ratio is None else f"{ratio:.2f}"
    value = row.get(key)
    return "" if value is None else f"{value:.1f}" if key.endswith("_s") else f"{value:.0f}"


def table(rows: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """A table for each model, prompt and number of threads, and how ours stand to llama.cpp; 120 columns at most."""
    tables, form = [], _markdown if markdown else _text
    for group in dict.fromkeys(tuple(row.get(key) for key in _GROUP) for row in rows):
        some = [row for row in rows if tuple(row.get(key) for key in _GROUP) == group]
        phases = next((list(row["tokens_per_s"]) for row in some if "tokens_per_s" in row), [])
        lines: list[tuple[str, ...]] = []
        for row in some:
            if "tokens_per_s" not in row:
                lines.append((row["variant"], row["status"]))
                continue
            rates = [f"{row['tokens_per_s'][phase]:.1f}" for phase in phases]
            error = f"{row['error']:.3f}" + " wrong" * (row["status"] == "wrong")
            lines.append((row["variant"], *rates, *(_cell(row, rows, key) for key in _COLUMNS.values()), error))
        model, threads, prompt, huge = group
        below = [f"prompt {prompt}"] * (model == "decoder" and prompt is not None) + ["huge pages"] * bool(huge)
        titles = [*(f"{phase} tokens/s" for phase in phases), *_COLUMNS]
        headers = [(f"{model}, threads {threads}", ", ".join(below))]
        headers += [(title, unit) for title, _, unit in (each.rpartition(" ") for each in titles)]
        headers.append(("error", ""))
        told = [i for i in range(len(headers)) if any(line[i] for line in lines if len(line) == len(headers))]
        if told:  # older results say less
            lines = [tuple(line[i] for i in told) if len(line) == len(headers) else line for line in lines]
            headers = [headers[i] for i in told]
        tables.append(form(headers, lines))
        if to := to_llama_cpp(some):
            tables.append(form(*to))
    tables += dict.fromkeys(row["runtime"] for row in rows if "runtime" in row)
    if any(row["status"] == "needs llama.cpp" for row in rows):
        tables.append(cpu_llama_cpp.ABSENT)
    return "\n\n".join(tables)


def _text(headers: Headers, lines: Lines) -> str:
    """Columns as wide as they must be; what stands where the rest of a line is missing widens none."""
    whole = [*zip(*headers, strict=True), *(line for line in lines if len(line) == len(headers))]
    names = max(len(line[0]) for line in [*whole, *lines])
    widths = [names, *(max(map(len, column)) for column in list(zip(*whole, strict=True))[1:])]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)).rstrip()[:WIDTH]
        for line in (*whole[:2], rule, *lines)
    )


def _markdown(headers: Headers, lines: Lines) -> str:
    """As the README has tables."""
    titles = [", ".join(filter(None, headers[0])), *(" ".join(filter(None, header)) for header in headers[1:])]
    padded = [(*line, *[""] * (len(headers) - len(line))) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *padded))


def _own_mib(row: Mapping[str, Any]) -> float | None:
    """What the process holds beyond an empty one and its weights."""
    keys = ("steady_mib", "empty_mib", "weights_mib")
    return row[keys[0]] - row[keys[1]] - row[keys[2]] if all(key in row for key in keys) else None


def to_llama_cpp(rows: Sequence[Mapping[str, Any]]) -> tuple[Headers, Lines] | None:
    """Of each variant of ours, the tokens a second over those of llama.cpp with as many bits; None without it.

    The last columns are what each process holds beyond its weights and an empty process.
    """
    ran = [row for row in rows if "tokens_per_s" in row and row["status"] == "ok"]
    peers = [row for row in ran if VARIANTS[row["variant"]].gguf]
    lines = []
    for row in (row for row in ran if family(row["variant"]) == OURS):
        for peer in peers:
            if set(VARIANTS[row["variant"]].schemes) & set(VARIANTS[peer["variant"]].schemes):
                rates = [f"{rate / peer['tokens_per_s'][phase]:.2f}" for phase, rate in row["tokens_per_s"].items()]
                own = ["" if mib is None else f"{mib:.0f}" for mib in (_own_mib(row), _own_mib(peer))]
                lines.append((row["variant"], peer["variant"], *rates, *own))
    if not lines:
        return None
    phases = [(phase, "ratio") for phase in peers[0]["tokens_per_s"]]
    return [("ours", ""), ("to", ""), *phases, ("own", "MiB"), ("its own", "MiB")], lines
