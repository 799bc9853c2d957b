"""Many programs judged, and what came of them as a table."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tabulate import tabulate

from tests.fuzz.grammar import draw
from tests.fuzz.oracle import Fault, Outcome, judge
from tests.fuzz.program import Program
from tests.fuzz.shrink import shrink

COLUMNS = ("graphs", "sites", "rewritten", "recognised", "missed", "declined", "wrong", "crashed", "silent")
# In which column a fault counts.
_COLUMN_OF = {"crash": "crashed", "silent": "silent"}


@dataclass
class Tally:
    """What came of many programs.

    Args:
        counts: by column; ``declined`` are programs that PyTorch itself does not run.
        faults: the seeds of each kind of fault.
        kernels: how many matmuls each kernel ran.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)
    kernels: Counter[str] = field(default_factory=Counter)

    def note(self, seed: int, outcome: Outcome) -> None:
        """Add one program's outcome."""
        self.counts["graphs"] += 1
        for name in ("sites", "rewritten", "recognised", "missed", "declined"):
            self.counts[name] += int(getattr(outcome, name))
        for column in {_COLUMN_OF.get(fault.kind, "wrong") for fault in outcome.faults}:
            self.counts[column] += 1
        for key in {describe(fault) for fault in outcome.faults}:
            self.faults.setdefault(key, []).append(seed)
        self.kernels.update(outcome.kernels)

    def add(self, other: Tally) -> None:
        """Add what came of other programs."""
        self.counts.update(other.counts)
        self.kernels.update(other.kernels)
        for key, seeds in other.faults.items():
            self.faults.setdefault(key, []).extend(seeds)

    def table(self, seconds: float) -> str:
        """Counts, kernels and faults as text."""
        head = tabulate([[self.counts[name] for name in COLUMNS]], COLUMNS)
        lines = [head, "", f"{seconds:.0f} s, {self.counts['graphs'] / max(seconds, 1e-9):.0f} graphs a second"]
        lines += [f"{count:8d} by {kernel}" for kernel, count in self.kernels.most_common()]
        for key, seeds in sorted(self.faults.items(), key=lambda item: -len(item[1])):
            lines.append(f"{len(seeds):8d} {key}: --only {' '.join(map(str, sorted(seeds)[:3]))}")
        return "\n".join(lines)


def describe(fault: Fault) -> str:
    """What tells one kind of fault from another."""
    return f"{fault.kind} {fault.where}{': ' + fault.what[:100] if fault.kind == 'crash' else ''}"


def run(first: int, count: int) -> Tally:
    """Judge the programs of ``count`` seeds."""
    quiet()
    tally = Tally()
    for seed in range(first, first + count):
        tally.note(seed, judge(draw(seed)))
    return tally


def run_many(first: int, count: int, jobs: int, progress: Callable[[Tally], None] = lambda _: None) -> Tally:
    """``run`` in ``jobs`` processes; ``progress`` is called with what came of the programs so far."""
    tally = Tally()
    work = [(start, min(_CHUNK, first + count - start)) for start in range(first, first + count, _CHUNK)]
    with contextlib.ExitStack() as stack:
        if jobs == 1:
            found = itertools.starmap(run, work)
        else:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(jobs))
            found = pool.imap_unordered(_run, work)
        for one in found:
            tally.add(one)
            progress(tally)
    return tally


_CHUNK = 100


def _run(work: tuple[int, int]) -> Tally:
    return run(*work)


def quiet() -> None:
    """One thread, as the tensors are tiny; and no tracebacks of what PyTorch refuses."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def run_one(seed: int, *, shrinks: bool) -> int:
    """Print and judge one program; returns the exit code."""
    quiet()
    program = draw(seed)
    outcome = judge(program)
    if outcome.faults and shrinks:
        program = smallest(program, outcome.faults[0])
        outcome = judge(program)
    print(f"# seed {seed}\n{program}")
    for fault in outcome.faults:
        print(f"{fault.kind} ({fault.where}): {fault.what}")
    if outcome.declined:
        print(f"PyTorch does not run it: {outcome.reasons[0]}")
    ends = f"{outcome.rewritten} rewritten, {outcome.recognised} recognised, {outcome.missed} missed"
    print(f"{outcome.sites} quantized matmuls: {ends}")
    return 1 if outcome.faults else 0


def smallest(program: Program, fault: Fault) -> Program:
    """``program`` without what ``fault`` does not need."""
    return shrink(program, lambda candidate: fault.key in [found.key for found in judge(candidate).faults])
