"""Measures which plans (``plans.py``) suit this machine, within a budget of time.

One parameter of one range of rows at a time, few rows first: its candidates take turns on weights that are not in
cache, each verified against the default before it is timed. A candidate must be at least 3 % faster over the shapes,
and slower by as much on none, in two rounds; else the default stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fx_quant.errors import FxQuantError
from fx_quant.kernels.cpu.candidates import Shape, Timer, TunedKernel, supported_kernels, tuned_kernels
from fx_quant.kernels.cpu.plans import ANY_ROWS, PLANS, Machine, PlanTable, default_table, table, this_machine
from fx_quant.tuning import search
from fx_quant.tuning.search import Budget, Report, choose

SHAPES = ((2048, 2048), (4096, 4096))
ROWS = (1, 4, 16, 64, 256)
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

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON holds it."""
        return dataclasses.asdict(self)

    def row(self) -> tuple[object, ...]:
        """The decision as cells of the report's table."""
        gain = f"{self.gain:+.1%}" if self.chosen != self.default else ""
        return self.kernel, self.rows, self.parameter, self.default, self.chosen, gain


@dataclass(frozen=True, repr=False)
class TuneReport(Report[Decision]):
    """What a tuning run decided.

    Args:
        decisions: in the order in which they were made.
        unreached: steps for which no time was left: kernel, rows and parameter.
        seconds: that the run took.
        path: the file that holds them, or None where no plan differs from the defaults.
        machine: what the decisions hold for.
    """

    machine: Machine

    headers = ("kernel", "rows", "parameter", "default", "chosen", "gain")
    otherwise = "the defaults are"

    def measured_on(self) -> dict[str, Any]:
        """The machine as JSON holds it."""
        return {"machine": dataclasses.asdict(self.machine)}

    def decided(self) -> str:
        """How many parameters changed, and for what."""
        changed = sum(decision.chosen != decision.default for decision in self.decisions)
        return (
            f"{changed} of {len(self.decisions)} parameters changed for {self.machine.cpu}, "
            f"{self.machine.threads} threads"
        )

    def summary_of_unreached(self) -> str:
        """How many parameters, and which kernels by rows."""
        kernels: dict[str, list[str]] = {}
        for step in self.unreached:
            kind, rows, _ = step.split()
            kinds = kernels.setdefault(rows, [])
            if kind not in kinds:
                kinds.append(kind)
        words = (f"{rows} rows of {', '.join(kinds)}" for rows, kinds in kernels.items())
        return f"{len(self.unreached)} parameters, " + "; ".join(words)


def tune(
    shapes: Sequence[Shape] | None = None, *, budget_seconds: float = 20.0, threads: int | None = None
) -> TuneReport:
    """Measure the native kernels on this machine and keep the plans that are faster than the defaults.

    What was decided is saved for the processor, ``threads``, PyTorch and the native sources, and in force from then on,
    in graphs that are compiled later too. What was not reached stays as it was.

    Args:
        shapes: ``(n, k)`` of weights to measure with; None is 2048 x 2048 and 4096 x 4096.
        budget_seconds: for everything, compiling included; nothing begins for which less time is left than its like
            took. Kernels that are not compiled within a half of it are not reached.
        threads: to measure for, which must be PyTorch's number when the plans are to be used; None is the present one.

    Raises:
        FxQuantError: a shape, the budget or the threads are not positive; no native kernel can run here; a plan
            changes a result; the plans cannot be written.
    """
    budget = Budget(budget_seconds)
    shapes = _checked(shapes, budget_seconds, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        kernels = tuned_kernels(budget)
        if not kernels:
            raise FxQuantError(
                "tuning needs a native kernel that can run here, and there is none; see `python -m fx_quant doctor`"
            )
        machine = this_machine()
        PLANS.check_writable(machine)
        all_steps = steps(kernels, shapes, machine.threads)
        decided, tables = decide_all(all_steps, Timer(kernels, shapes), budget)
        uncompiled = [kernel for kernel in supported_kernels() if kernel not in kernels]
        planned = [*all_steps, *steps(uncompiled, shapes, machine.threads)]
        return _saved(decided, planned, tables, machine, budget.spent)
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
    all_steps: Sequence[Step],
    tables: Mapping[str, PlanTable],
    machine: Machine,
    seconds: float,
) -> TuneReport:
    unreached = tuple(map(str, all_steps[len(decided) :]))
    tuned = {kind: plans for kind, plans in tables.items() if plans != default_table(kind)}
    if not decided:
        path = PLANS.path(machine) if tuned else None
    elif tuned:
        path = PLANS.save(tuned, machine)
    else:
        PLANS.reset(machine)
        path = None
    return TuneReport(tuple(decided), unreached, seconds, path, machine)


# --- what is tried ------------------------------------------------------------------------------------------------


def steps(kernels: Sequence[TunedKernel], shapes: Sequence[Shape], threads: int) -> list[Step]:
    """Everything there is to decide, in order: few rows first, which take the least time and are run the most."""
    return [
        Step(kernel, rows, parameter, candidates, tuple(shapes) if parameter != "alone" else _small(rows))
        for rows in ROWS
        for kernel in kernels
        for parameter, candidates in _parameters(kernel, rows, threads)
    ]


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
    all_steps: Sequence[Step], measure: Measure, budget: Budget
) -> tuple[list[Decision], dict[str, PlanTable]]:
    """Decide step by step until the budget is spent; the decisions, and the tables with them.

    No measurement begins after it, and a step that it ends is not decided.
    """
    tables = {step.kernel.kind: table(step.kernel.kind) for step in all_steps}
    # What a measurement has taken, by its rows.
    took: dict[int, float] = {}

    def timed(step: Step, shape: Shape, tried: Sequence[PlanTable]) -> Sequence[float]:
        budget.check(took.get(step.rows, 0.0))
        begin = budget.spent
        found = measure(step.kernel, step.rows, shape, tried)
        took[step.rows] = max(took.get(step.rows, 0.0), budget.spent - begin)
        return found

    def decide(step: Step) -> Decision:
        kind = step.kernel.kind
        default = getattr(default_table(kind).plan_for(step.rows), step.parameter)
        values = [default, *(value for value in step.candidates if value != default)]
        tried = [tables[kind].replaced(step.rows, **{step.parameter: value}) for value in values]
        choice = choose(tried, [partial(timed, step, shape) for shape in step.shapes])
        tables[kind] = tried[choice.index]
        rows = _range(tables[kind], step.rows)
        return Decision(kind, rows, step.parameter, default, values[choice.index], choice.gain)

    return list(search.decide_all(all_steps, decide, budget)), tables


def _range(plans: PlanTable, rows: int) -> str:
    """The range that holds ``rows``, in words."""
    limits = [0, *(limit for limit, _ in plans.ranges)]
    at = next(i for i, limit in enumerate(limits) if rows <= limit)
    first, last = limits[at - 1] + 1, limits[at]
    return f"{first}.." if last == ANY_ROWS else str(first) if first == last else f"{first}..{last}"
