"""What became of one model, quantized in one way, and when that is a fault."""

from __future__ import annotations

from dataclasses import dataclass

# Of the largest value of a site's result, each site on the inputs that eager gives it: a few roundings of the dtype.
SITE_LIMIT = {"float32": 1e-4, "bfloat16": 3e-2}
# Of the largest value of the model's output, where a code that is rounded to its neighbour tips others behind it.
OUTPUT_FLOOR = 0.1
# How much further than plain Inductor a compiled model may be from eager, where both were compiled. One that is no
# result at all excuses nothing: on some CPUs Inductor's torchao W8A8 is none.
FACTOR, NO_RESULT = 4.0, 0.5


@dataclass(frozen=True)
class Outcome:
    """One row.

    Args:
        model, way: their names.
        dtype: of the model, as in ``SITE_LIMIT``.
        linears: quantized linears that an eager call runs, by an independent count.
        rewritten, recognised, missed: rows of the report.
        outside: linears that the report names as in no graph.
        silent: linears of which the report says nothing.
        breaks: graph breaks.
        site_error: the largest of a site, on the values of the source graph, run op by op.
        error: of the rewritten model's output to the eager quantized model, run op by op.
        compiled, inductor: the same errors compiled, of fx_quant and of plain Inductor; None where not compiled.
        graphs, plain_graphs: how many were compiled for calls of other sizes, and without fx_quant; None unless counted.
        prepared: whether ``prepare_`` was called first, as ``explain`` says.
        reasons: why matmuls are missed, are in no graph, or were left.
        unavailable: why there is no row.
        failed: what fx_quant raised where torch.compile without it does not.
        seconds: how long it computed.
    """

    model: str
    way: str
    dtype: str = "float32"
    linears: int = 0
    rewritten: int = 0
    recognised: int = 0
    missed: int = 0
    outside: int = 0
    silent: int = 0
    breaks: int = 0
    site_error: float = 0.0
    error: float = 0.0
    compiled: float | None = None
    inductor: float | None = None
    graphs: int | None = None
    plain_graphs: int | None = None
    prepared: bool = False
    reasons: tuple[str, ...] = ()
    unavailable: str = ""
    failed: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """``model, way``."""
        return f"{self.model}, {self.way}"


def faults(row: Outcome) -> list[str]:
    """What is wrong with ``row``, each in words; empty where nothing is."""
    found = []
    if row.failed:
        found.append(f"fails: {row.failed}")
    if row.silent:
        found.append(f"{row.silent} silent")
    if not row.site_error <= SITE_LIMIT[row.dtype]:
        found.append(f"wrong: a site by {row.site_error:.1e}")
    if not row.error <= OUTPUT_FLOOR:
        found.append(f"wrong: the output by {row.error:.1e}")
    if row.compiled is not None and not row.compiled <= allowed(row.inductor):
        found.append(f"wrong: compiled by {row.compiled:.1e}, Inductor by {row.inductor:.1e}")
    if row.graphs is not None and row.plain_graphs is not None and row.graphs > row.plain_graphs:
        found.append(f"compiles {row.graphs} graphs, Inductor {row.plain_graphs}")
    return found


def allowed(inductor: float | None) -> float:
    """How far a compiled model may be from the eager one, given plain Inductor's distance."""
    if inductor is None or not inductor <= NO_RESULT:
        return OUTPUT_FLOOR
    return max(OUTPUT_FLOOR, FACTOR * inductor)
