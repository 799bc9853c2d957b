"""Measures which plans (``fx_quant.tuning.plans``) suit this machine, within a budget of time.

One parameter of one range of rows at a time, few rows first: its candidates take turns on weights that are not in
cache, each verified against the default before it is timed. A candidate must be at least 3 % faster over the shapes,
and slower by as much on none, in two rounds; else the default stays.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fx_quant.errors import FxQuantError
from fx_quant.kernels.cpu.candidates import Shape, Timer, TunedKernel, tuned_kernels
from fx_quant.tuning.plans import (
    ANY_ROWS,
    Machine,
    PlanTable,
    check_writable,
    default_table,
    reset,
    save,
    table,
    this_machine,
)

SHAPES = ((2048, 2048), (4096, 4096))
ROWS = (1, 4, 16, 64, 256)
GAIN = 1.03
_AHEAD = (0, 2048, 4096, 8192, 16384)
_CHUNK_K = (128, 256, 512, 1024, 2048, 4096)
_ALONE = (0, 2**15, 2**17, 2**19)
# Work of the problems that tell the candidates of `alone` apart: each lies between two of them.
_SMALL = (2**14, 2**16, 2**18, 2**20)

# Medians in seconds of a kernel under each of some tables: (kernel, rows, shape, tables).
Measure = Callable[[TunedKernel, int, Shape, Sequence[PlanTable]], Sequence[float]]


@dataclass(frozen=True)
class Step:
    """One parameter of one kernel in one range of rows, and what to try for it."""

    kernel: TunedKernel
    rows: int
    parameter: str
    candidates: tuple[Any, ...]
    shapes: tuple[Shape, ...]

    def __str__(self) -> str:
        return f"{self.kernel.kind} {self.rows} {self.parameter}"


@dataclass(frozen=True)
class Decision:
    """What was found for one step.

    Args:
        kernel: kind of kernel.
        rows: the range, in words.
        parameter: of ``Plan``.
        default, chosen: values of it.
        gain: time under the default over time under what was chosen, less 1, over the shapes, noise taken off; 0 where
            they agree.
    """

    kernel: str
    rows: str
    parameter: str
    default: Any
    chosen: Any
    gain: float


@dataclass(frozen=True)
class TuneReport:
    """What a tuning run decided.

    Args:
        decisions: in the order in which they were made.
        unreached: steps for which no time was left: kernel, rows and parameter.
        seconds: that the run took.
        machine: what the decisions hold for.
        path: the file that holds them, or None where no plan differs from the defaults.
    """

    decisions: tuple[Decision, ...]
    unreached: tuple[str, ...]
    seconds: float
    machine: Machine
    path: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "decisions": [dataclasses.asdict(each) for each in self.decisions],
            "unreached": list(self.unreached),
            "seconds": round(self.seconds, 3),
            "machine": dataclasses.asdict(self.machine),
            "path": None if self.path is None else str(self.path),
        }

    def __str__(self) -> str:
        rows = [
            (d.kernel, d.rows, d.parameter, d.default, d.chosen, f"{d.gain:+.1%}" if d.chosen != d.default else "")
            for d in self.decisions
        ]
        headers = ("kernel", "rows", "parameter", "default", "chosen", "gain")
        lines = [tabulate(rows, headers=headers, disable_numparse=True)] if rows else ["nothing was decided"]
        changed = sum(d.chosen != d.default for d in self.decisions)
        lines.append(
            f"\n{changed} of {len(rows)} parameters changed for {self.machine.cpu}, {self.machine.threads} threads, "
            f"in {self.seconds:.1f} s"
        )
        if self.unreached:
            lines.append(f"not reached within the budget, so as before: {_summary(self.unreached)}")
        lines.append(f"saved in {self.path}" if self.path else "nothing is saved: the defaults are in force")
        return "\n".join(lines)


def _summary(unreached: Sequence[str]) -> str:
    """How many, and which kernels by rows."""
    kernels: dict[str, list[str]] = {}
    for step in unreached:
        kind, rows, _ = step.split()
        of = kernels.setdefault(rows, [])
        if kind not in of:
            of.append(kind)
    return f"{len(unreached)} parameters, " + "; ".join(
        f"{rows} rows of {', '.join(of)}" for rows, of in kernels.items()
    )


def tune(
    shapes: Sequence[Shape] | None = None, *, budget_seconds: float = 20.0, threads: int | None = None
) -> TuneReport:
    """Measure the native kernels on this machine and keep the plans that are faster than the defaults.

    What was decided is saved for the processor, ``threads``, PyTorch and the native sources, and in force from then on,
    in graphs that are compiled later too. What was not reached stays as it was.

    Args:
        shapes: ``(n, k)`` of weights to measure with; None is 2048 x 2048 and 4096 x 4096.
        budget_seconds: after which no measurement begins.
        threads: to measure for, which must be PyTorch's number when the plans are to be used; None is the present one.

    Raises:
        FxQuantError: a shape, the budget or the threads are not positive; no native kernel can run here; a plan
            changes a result; the plans cannot be written.
    """
    start = time.perf_counter()
    shapes = _checked(shapes, budget_seconds, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        kernels = tuned_kernels()
        if not kernels:
            raise FxQuantError(
                "tuning needs a native kernel that can run here, and there is none; see `python -m fx_quant doctor`"
            )
        machine = this_machine()
        check_writable(machine)
        plan = steps(kernels, shapes, machine.threads)
        decided, tables = decide_all(plan, Timer(kernels, shapes), budget_seconds, time.perf_counter, start)
        return _saved(decided, plan, tables, machine, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)


def _checked(shapes: Sequence[Shape] | None, budget: float, threads: int | None) -> tuple[Shape, ...]:
    for shape in shapes or ():
        if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
            raise FxQuantError(f"a shape must be (n, k), both 1 or more, got {shape}")
    if not (math.isfinite(budget) and budget > 0):
        raise FxQuantError(f"the budget must be a positive number of seconds, got {budget}")
    if threads is not None and threads < 1:
        raise FxQuantError(f"threads must be 1 or more, got {threads}")
    return SHAPES if not shapes else tuple(dict.fromkeys((n, k) for n, k in shapes))


def _saved(
    decided: Sequence[Decision],
    plan: Sequence[Step],
    tables: Mapping[str, PlanTable],
    machine: Machine,
    seconds: float,
) -> TuneReport:
    unreached = tuple(map(str, plan[len(decided) :]))
    tuned = {kind: each for kind, each in tables.items() if each != default_table(kind)}
    if not decided:
        path = machine.path() if tuned else None
    elif tuned:
        path = save(tuned, machine)
    else:
        reset(machine)
        path = None
    return TuneReport(tuple(decided), unreached, seconds, machine, path)


# --- what is tried ------------------------------------------------------------------------------------------------


def steps(kernels: Sequence[TunedKernel], shapes: Sequence[Shape], threads: int) -> list[Step]:
    """Everything there is to decide, in order: few rows first, which take the least time and are run the most."""
    found = []
    for rows in ROWS:
        for kernel in kernels:
            for parameter, candidates in _parameters(kernel, rows, threads):
                of = tuple(shapes) if parameter != "alone" else _small(rows)
                found.append(Step(kernel, rows, parameter, candidates, of))
    return found


def _parameters(kernel: TunedKernel, rows: int, threads: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    # A tile of one row or two asks for nothing: the hardware does in time.
    if rows <= 6 and (kernel.decodes or rows > 2):
        yield "ahead", _AHEAD
    if rows > 6:
        yield "next_panel", (False, True)
        yield "chunk_k", _CHUNK_K
    if threads > 1:
        yield "alone", _ALONE


def _small(rows: int) -> tuple[Shape, ...]:
    sides = (max(64, round(math.sqrt(work / rows) / 64) * 64) for work in _SMALL)
    return tuple(dict.fromkeys((side, side) for side in sides))


# --- how it is decided --------------------------------------------------------------------------------------------


def decide_all(
    plan: Sequence[Step], measure: Measure, budget: float, clock: Callable[[], float], start: float
) -> tuple[list[Decision], dict[str, PlanTable]]:
    """Decide step by step until ``budget`` seconds after ``start``; the decisions, and the tables with them.

    A step that the budget ends is not decided.
    """
    tables = {step.kernel.kind: table(step.kernel.kind) for step in plan}
    decided: list[Decision] = []

    def timed(*arguments: Any) -> Sequence[float]:
        if clock() - start >= budget:
            raise _BudgetSpentError
        return measure(*arguments)

    for step in plan:
        kind = step.kernel.kind
        default = getattr(default_table(kind).plan_for(step.rows), step.parameter)
        try:
            chosen, gain = decide(step, tables[kind], default, timed)
        except _BudgetSpentError:
            break
        tables[kind] = tables[kind].replaced(step.rows, **{step.parameter: chosen})
        decided.append(Decision(kind, _range(tables[kind], step.rows), step.parameter, default, chosen, gain))
    return decided, tables


class _BudgetSpentError(Exception):
    """No time is left."""


def decide(step: Step, given: PlanTable, default: Any, measure: Measure) -> tuple[Any, float]:
    """``(value, gain)`` of the step's parameter: the default, unless another is faster in both rounds."""
    values = [default, *(value for value in step.candidates if value != default)]
    tables = [given.replaced(step.rows, **{step.parameter: value}) for value in values]
    best, gain, wins = _fastest(step, tables, (0,), measure)
    if wins:
        _, gain, wins = _fastest(step, (tables[0], tables[best]), (0, 1), measure)
    return (values[best], gain) if wins else (default, 0.0)


def _fastest(
    step: Step, tables: Sequence[PlanTable], twice: Sequence[int], measure: Measure
) -> tuple[int, float, bool]:
    """``(index, gain, whether that is enough)`` of the fastest table but the first, against the first.

    Those of ``twice`` take part twice, and what differs between the two is noise: the first table counts as the better
    of its two, another as the worse.
    """
    ratios: list[list[float]] = [[] for _ in tables]
    for shape in step.shapes:
        times = list(measure(step.kernel, step.rows, shape, (*tables, *(tables[of] for of in twice))))
        for of, again in zip(twice, times[len(tables) :], strict=True):
            times[of] = (max if of else min)(times[of], again)
        for of, seconds in zip(ratios, times[: len(tables)], strict=True):
            of.append(times[0] / seconds)
    means = [statistics.geometric_mean(of) for of in ratios]
    best = max(range(1, len(tables)), key=means.__getitem__)
    return best, means[best] - 1, means[best] >= GAIN and min(ratios[best]) > 1 / GAIN


def _range(plans: PlanTable, rows: int) -> str:
    """The range that holds ``rows``, in words."""
    limits = [0, *(limit for limit, _ in plans.ranges)]
    at = next(i for i, limit in enumerate(limits) if rows <= limit)
    first, last = limits[at - 1] + 1, limits[at]
    return f"{first}.." if last == ANY_ROWS else str(first) if first == last else f"{first}..{last}"
