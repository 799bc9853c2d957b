"""The rows as Markdown, why what was not rewritten was not, and the page of both."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from fx_quant.report import without_numbers
from tests.model_matrix.outcome import Outcome, faults

_HEADS = (
    "model",
    "quantized by",
    "linears",
    "rewritten",
    "recognised",
    "missed",
    "outside",
    "silent",
    "breaks",
    "error of a site",
    "of the output",
    "graphs (plain)",
    "compiled error (Inductor's)",
    "",
)


def result_table(rows: Sequence[Outcome]) -> str:
    """One line a row; those that could not be measured have none."""
    lines = [_line(row) for row in rows if not row.unavailable]
    return tabulate(lines, _HEADS, tablefmt="github", disable_numparse=True)


def _line(row: Outcome) -> tuple[str, ...]:
    counts = (row.linears, row.rewritten, row.recognised, row.missed, row.outside, row.silent, row.breaks)
    graphs = "" if row.graphs is None else f"{row.graphs} ({row.plain_graphs})"
    compiled = "" if row.compiled is None else f"{row.compiled:.1e} ({row.inductor:.1e})"
    errors = (f"{row.site_error:.1e}", f"{row.error:.1e}")
    way = f"{row.way}, prepared" if row.prepared else row.way
    return (row.model, way, *(str(count or "") for count in counts), *errors, graphs, compiled, "; ".join(faults(row)))


def reason_list(rows: Sequence[Outcome]) -> str:
    """Each reason once, but for its numbers, with the rows that it stopped; and of each row that is not there, why."""
    stopped: dict[str, tuple[str, list[str]]] = {}
    for row in rows:
        for reason in (row.unavailable,) if row.unavailable else row.reasons:
            stopped.setdefault(without_numbers(reason), (reason, []))[1].append(row.name)
    return "\n".join(f"- {reason}: {_shortened(list(dict.fromkeys(names)))}" for reason, names in stopped.values())


def _shortened(names: list[str]) -> str:
    """``model, way``; ways of one model together."""
    by_way: dict[str, list[str]] = {}
    for name in names:
        model, _, way = name.partition(", ")
        by_way.setdefault(way, []).append(model)
    return "; ".join(f"{way} ({' '.join(models)})" for way, models in by_way.items())


def totals(rows: Sequence[Outcome]) -> str:
    """What all rows sum to, in a line."""
    there = [row for row in rows if not row.unavailable]
    sums = {name: sum(getattr(row, name) for row in there) for name in ("linears", "rewritten", "recognised", "missed")}
    counted = [row for row in there if row.graphs is not None]
    more = sum(row.graphs > row.plain_graphs for row in counted if row.graphs and row.plain_graphs)
    wrong = sum(any(fault.startswith("wrong") for fault in faults(row)) for row in there)
    return (
        f"{len(there)} rows, {len(rows) - len(there)} not here: {sums['linears']} quantized linears, "
        f"{sums['rewritten']} rewritten, {sums['recognised']} recognised, {sums['missed']} missed, "
        f"{sum(row.outside for row in there)} outside of graphs, {sum(row.silent for row in there)} silent; "
        f"{wrong} rows wrong, {sum(bool(row.failed) for row in there)} failed, "
        f"{more} of {len(counted)} with more graphs than without fx_quant"
    )


PAGE = """\
# Real architectures, as people quantize and run them

Printed by `make models` (`python -m tests.model_matrix --write --compile`): small models with random weights, two layers
of width 64 and an odd vocabulary, of the classes that `transformers`, `diffusers`, `timm` and `sentence-transformers` have.

- *linears*: quantized linears that one eager call runs, counted without fx_quant, by classes and tensor subclasses. Each is
  *rewritten*, *recognised* (understood, and nothing here is faster) or *missed* with a reason; *outside* are those that the
  report names as in no graph; *silent* would be those of which it says nothing.
- *prepared*: `explain` asked for `fx_quant.prepare_` first.
- *error of a site*: the largest of any rewritten matmul on the values that the source graph gives it; *of the output*: of
  the whole model to the eager quantized one. Both run op by op, as fractions of the largest value; what plain Inductor
  traces is then the eager model itself. In *compiled error* C++ is compiled by fx_quant and by plain Inductor.
- *graphs*: how many calls of three batches and lengths compile, and what `torch.compile` makes of them without fx_quant.

{totals}.

{table}

Why what is not rewritten is not, and which rows are not here:

{reasons}

{made}; {minutes:.0f} minutes of one core.
"""


def page(rows: Sequence[Outcome], made: str) -> str:
    """The whole of ``docs/models.md``."""
    fields = {"totals": totals(rows), "table": result_table(rows), "reasons": reason_list(rows)}
    return PAGE.format(**fields, made=made, minutes=sum(row.seconds for row in rows) / 60)
