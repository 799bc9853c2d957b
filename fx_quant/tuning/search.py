"""How a tuner decides: another value than the default must be faster by enough, in two rounds, within a budget of time.

What is tried, how it is verified and how it is timed is the provider's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from fx_quant.report import Block, Paragraph, Reported, Table
from fx_quant.report.progress import progress

_NOTHING = "nothing was decided; what was compiled is kept, so that a second run has more time to measure"
# What the default takes over what the chosen takes, at least.
GAIN = 1.03

Case = TypeVar("Case")
DecisionT = TypeVar("DecisionT", bound="Decision")
Value = TypeVar("Value")
# Medians in seconds of values that take turns.
Measure = Callable[[Sequence[Value]], Sequence[float]]


class BudgetSpentError(Exception):
    """No time is left."""


class Budget:
    """So many seconds from now on.

    Args:
        seconds: how many.
        clock: seconds since any moment.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds, self._clock, self._start = seconds, clock, clock()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def check(self, needed: float = 0.0) -> None:
        """Nothing, where time is left, as much as is ``needed``.

        Raises:
            BudgetSpentError: there is none.
        """
        if self.spent >= self._seconds or self.spent + needed > self._seconds:
            raise BudgetSpentError

    def leaves(self, needed: float, share: float) -> bool:
        """Whether within ``share`` of the budget there is time for what is ``needed``."""
        return self.spent + needed <= share * self._seconds


@dataclass(frozen=True)
class Choice:
    """What was found among some values, of which the first is the default.

    Args:
        index: of the value that is chosen; 0 unless another is faster in both rounds.
        gain: time under the default over time under it, less 1, over what was measured, noise taken off; 0 for the
            default.
        seconds: of the default and of what is chosen, in the first round of the first measure.
    """

    index: int
    gain: float
    seconds: tuple[float, float]


def choose(values: Sequence[Value], measures: Sequence[Measure[Value]]) -> Choice:
    """The fastest of ``values``, where it is faster than the first by ``GAIN`` over the measures and slower on none."""
    best, gain, wins, seconds = _fastest(values, (0,), measures)
    if wins:
        _, gain, wins, _ = _fastest((values[0], values[best]), (0, 1), measures)
    return Choice(best, gain, (seconds[0], seconds[best])) if wins else Choice(0, 0.0, (seconds[0], seconds[0]))


def _fastest(
    values: Sequence[Value], twice: Sequence[int], measures: Sequence[Measure[Value]]
) -> tuple[int, float, bool, list[float]]:
    """``(index, gain, whether that is enough)`` of the fastest but the first, against it, and what the first measured.

    Those of ``twice`` take part twice, and what differs between the two is noise: the first value counts as the better
    of its two, another as the worse.
    """
    measured: list[list[float]] = []
    for measure in measures:
        times = list(measure((*values, *(values[index] for index in twice))))
        for index, again in zip(twice, times[len(values) :], strict=True):
            times[index] = (max if index else min)(times[index], again)
        measured.append(times[: len(values)])
    ratios = [[times[0] / times[index] for times in measured] for index in range(len(values))]
    means = list(map(statistics.geometric_mean, ratios))
    best = max(range(1, len(values)), key=means.__getitem__, default=0)
    return best, means[best] - 1, means[best] >= GAIN and min(ratios[best]) > 1 / GAIN, measured[0]


def decide_all(cases: Iterable[Case], decide: Callable[[Case], DecisionT], budget: Budget) -> Iterator[DecisionT]:
    """Decide case by case until the budget is spent; a case whose decision it ends is not decided."""
    for case in progress(cases, "tuning", "decision"):
        try:
            budget.check()
            decision = decide(case)
        except BudgetSpentError:
            return
        yield decision


class Decision(Protocol):
    """What was found for one case."""

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON holds it."""

    def row(self) -> tuple[object, ...]:
        """The decision as cells of the report's table."""


@dataclass(frozen=True, repr=False)
class Report(Reported, Generic[DecisionT]):
    """What a tuning run decided.

    Args:
        decisions: in the order in which they were made.
        unreached: cases for which no time was left.
        seconds: that the run took.
        path: the file that holds them, or None where nothing was saved.
    """

    decisions: tuple[DecisionT, ...]
    unreached: tuple[Any, ...]
    seconds: float
    path: Path | None

    headers: ClassVar[tuple[str, ...]]
    # What is in force where nothing is saved.
    otherwise: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "summary": self.summary(),
            "decisions": [decision.to_dict() for decision in self.decisions],
            "unreached": list(map(str, self.unreached)),
            "seconds": round(self.seconds, 3),
            **self.measured_on(),
            "path": None if self.path is None else str(self.path),
        }

    def measured_on(self) -> Mapping[str, Any]:
        """What of the machine the report says as JSON."""
        return {}

    def summary(self) -> str:
        """What was decided, in a line."""
        return f"{self.decided()} in {self.seconds:.1f} s"

    def decided(self) -> str:
        """How much was decided, in words."""
        raise NotImplementedError  # each provider counts what it decides

    def summary_of_unreached(self) -> str:
        """What was not, in a line."""
        raise NotImplementedError  # each provider names what it asks

    def remarks(self) -> list[str]:
        """Lines below the table."""
        return []

    def blocks(self, *, wide: bool) -> list[Block]:
        """A row a decision, what was not reached, and where the decisions are."""
        rows = tuple(tuple(map(str, decision.row())) for decision in self.decisions)
        blocks: list[Block] = [Table(self.headers, rows) if rows else Paragraph(_NOTHING)]
        said = self.remarks()
        if self.unreached:
            said.append(f"not reached within the budget, so as before: {self.summary_of_unreached()}")
        said.append(f"saved in {self.path}" if self.path else f"nothing is saved: {self.otherwise} in force")
        return [*blocks, *map(Paragraph, said)]
