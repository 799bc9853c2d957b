"""``python -m tests.promises [--write] [--quick]``: each promise, how it is attacked, and what the attacks found.

Everything in the table ran for it: tests by pytest, in this process, and random programs beside them. A row whose tests
are not there says so. Ends with 1 where anything failed or is missing.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tabulate import tabulate

from tests.provenance import made_with

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "promises.md"


@dataclass(frozen=True)
class Counts:
    """What came of one attack: cases that were tried, those that failed, and tests that this machine cannot run."""

    cases: int = 0
    failures: int = 0
    skipped: int = 0
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One attack on one promise.

    Args:
        tests: files in ``tests``, or a file and the start of its tests' names (``test_x.py::test_a``).
        checks: functions of those files of which each call is a case; else each test is one.
        run: what counts the cases instead of tests, given the options of the command.
        slow: left out by ``--quick``.
    """

    promise: str
    attack: str
    tests: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    run: Callable[[argparse.Namespace], Counts] | None = None
    slow: bool = False


def _programs(options: argparse.Namespace) -> Counts:
    from tests.fuzz.run import run_many

    tally = run_many(options.seed, options.graphs, options.jobs)
    wrong, crashed, silent = (tally.counts[name] for name in ("wrong", "crashed", "silent"))
    note = (
        f"{tally.counts['sites']} quantized matmuls: {tally.counts['rewritten']} rewritten, "
        f"{tally.counts['recognised']} recognised, {tally.counts['missed']} missed; "
        f"{wrong} wrong, {crashed} crashed, {silent} silent; {tally.counts['declined']} that PyTorch itself does not run"
    )
    for kind, seeds in sorted(tally.faults.items()):
        note += f"; {kind}: `--only {' '.join(map(str, sorted(seeds)))}`"
    return Counts(tally.counts["graphs"], wrong + crashed + silent, 0, note)


def _plants(options: argparse.Namespace) -> Counts:
    from tests.fuzz.catch import MOST, graphs_to_catch
    from tests.fuzz.planted import PLANTS

    needed = {plant.name: graphs_to_catch(plant, MOST) for plant in PLANTS}
    uncaught = sum(1 for count in needed.values() if count is None)
    note = "programs until it is seen: " + ", ".join(f"{name} {count or 'never'}" for name, count in needed.items())
    return Counts(len(PLANTS), uncaught, 0, note)


WRONG, SILENT, CRASH, SLOW = "never wrong", "never silent", "never in the way", "never slower"
ROWS = (
    Row(WRONG, "random programs against float64: values, aliases, state, every matmul accounted for", run=_programs),
    Row(WRONG, "mistakes planted in rules and passes, all seen by the random programs", run=_plants),
    Row(
        WRONG,
        "random recipes of dequantized operands and epilogues, each within its numerics class",
        ("test_property.py",),
        checks=("check_recipe", "check_decoded"),
    ),
    Row(WRONG, "near misses that must not be rewritten", ("test_algebra_soundness.py", "test_adversarial.py")),
    Row(
        WRONG,
        "every kernel that runs here, on every problem that it accepts, against the canonical op",
        ("test_conformance.py",),
        checks=("assert_within",),
        slow=True,
    ),
    Row(WRONG, "an eager call and a compiled graph do the same steps, for every kernel", ("test_realise.py",)),
    Row(WRONG, "every write to a weight, counted or not, by layout and face", ("test_staleness.py",), slow=True),
    Row(WRONG, "outputs, inputs and parameters keep memory of their own", ("test_aliasing.py",)),
    Row(WRONG, "ops that are no function of their arguments are neither merged nor folded", ("test_purity.py",)),
    Row(WRONG, "calls made from the schemas, every argument by position and by name", ("test_schema_arguments.py",)),
    Row(WRONG, "zero points outside of the range of their codes", ("test_zero_point_range.py",)),
    Row(WRONG, "operands with strides of zero and of other tensors", ("test_hostile_strides.py",)),
    Row(SILENT, "contractions of quantized operands that no rule claims", ("test_deny_by_default.py",)),
    Row(SILENT, "schemes in words that are true", ("test_scheme_words.py",)),
    Row(SILENT, "modules that hold codes and are in no graph", ("test_coded_modules.py",)),
    Row(SILENT, "names of modules, whatever way a graph came to them", ("test_module_names.py",)),
    Row(SILENT, "a second process with warm caches", ("test_cached_reports.py",), slow=True),
    Row(SILENT, "many explains and checks, and what they leave behind", ("test_capture.py",), slow=True),
    Row(SILENT, "what explain and check say", ("test_explain.py",), slow=True),
    Row(SILENT, "each way to quantize a linear, by library", ("test_dialects.py",), slow=True),
    Row(CRASH, "a step that raises loses its own site, never the graph", ("test_rule_failures.py",)),
    Row(CRASH, "infinite, huge, symbolic and other constants in every rule", ("test_rule_arguments.py",)),
    Row(CRASH, "sizes that are not known", ("test_unbacked.py",)),
    Row(CRASH, "sizes of zero in every kernel, pass and template", ("test_empty_sizes.py",)),
    Row(CRASH, "hostile and broken checkpoints", ("test_checkpoint.py", "test_hostile_checkpoints.py")),
    Row(CRASH, "no home, and cache folders and files of every wrong kind", ("test_measurements.py",)),
    Row(CRASH, "memory of packed weights that die", ("test_huge_pages.py",)),
    Row(CRASH, "classes of somebody else behind vLLM's interface", ("test_linear_kernels.py",)),
    Row(
        SLOW, "a kernel is chosen where it pays, and says why where it is not", ("test_selection.py", "test_support.py")
    ),
)


class _Recorder:
    """A pytest plugin that notes how each test ended, and how often its file's checks were called."""

    def __init__(self, checks: dict[str, tuple[str, ...]]) -> None:
        self.ended: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self._checks = checks
        self._current = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for module in {item.module for item in items}:
            for name in self._checks.get(Path(module.__file__).name, ()):
                setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[self._current] += 1
            return function(*args, **kwargs)

        return counted

    def pytest_runtest_setup(self, item: Any) -> None:
        self._current = item.nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.nodeid] = report.outcome

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.ended[report.nodeid] = "failed"


def run_tests(rows: Sequence[Row]) -> dict[Row, Counts | None]:
    """What came of the tests of ``rows``; None where a row has none."""
    there = sorted({name.partition("::")[0] for row in rows for name in row.tests if (TESTS / _file(name)).exists()})
    recorder = _Recorder({_file(name): row.checks for row in rows for name in row.tests if row.checks})
    if there:
        paths = [str(TESTS / name) for name in there]
        pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", *paths], plugins=[recorder])
    return {row: _counts(row, recorder) for row in rows}


def _file(name: str) -> str:
    return name.partition("::")[0]


def _counts(row: Row, recorder: _Recorder) -> Counts | None:
    ended = {node: how for node, how in recorder.ended.items() if any(f"tests/{name}" in node for name in row.tests)}
    if any(not any(f"tests/{name}" in node for node in ended) for name in row.tests):
        return None
    hows = Counter(ended.values())
    ran = hows["passed"] + hows["failed"]
    if row.checks:
        ran = sum(recorder.calls[node] for node in ended)
    return Counts(ran, hows["failed"], hows["skipped"])


def table(counts: dict[Row, Counts | None]) -> str:
    """The rows as Markdown."""
    lines = []
    for row, found in counts.items():
        where = " ".join(f"`tests/{name}`" for name in row.tests) or "`python -m tests.fuzz`"
        if found is None:
            lines.append([row.promise, row.attack, where, "missing", "", ""])
        else:
            lines.append([row.promise, row.attack, where, found.cases, found.failures, found.skipped or ""])
    heads = ("promise", "attacked by", "where", "cases", "failures", "not on this machine")
    notes = [f"- {row.attack}: {found.note}." for row, found in counts.items() if found is not None and found.note]
    return "\n".join([tabulate(lines, heads, tablefmt="github"), "", *notes])


def page(counts: dict[Row, Counts | None], seconds: float, options: argparse.Namespace) -> str:
    """The whole of ``docs/promises.md``."""
    left = [row.attack for row in ROWS if row not in counts]
    return "\n".join(
        [
            "# What is promised, and how it is attacked",
            "",
            "Printed by `python -m tests.promises --write`: every number is of what ran for it. A case is a test, or one",
            "check within a test that has many.",
            "",
            table(counts),
            *(["", "Left out by `--quick`: " + "; ".join(left) + "."] if left else []),
            "",
            f"{made_with()}; {seconds / 60:.0f} minutes, random programs from seed {options.seed}.",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.promises", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(TESTS.parent)}")
    parser.add_argument("--quick", action="store_true", help="200 random programs, and no row of some minutes")
    parser.add_argument("--graphs", type=int, default=20000, help="random programs (20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes for them (all cores)")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    rows = [row for row in ROWS if not (options.quick and row.slow)]
    options.graphs = min(options.graphs, 200) if options.quick else options.graphs
    counts: dict[Row, Counts | None] = {row: row.run(options) for row in rows if row.run is not None}
    counts |= run_tests([row for row in rows if row.run is None])
    counts = {row: counts[row] for row in rows}
    text = page(counts, time.perf_counter() - started, options)
    if options.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
    print(text)
    missing = [row for row, found in counts.items() if found is None]
    failed = [row for row, found in counts.items() if found is not None and found.failures]
    for what, of in (("no tests", missing), ("failures", failed)):
        for row in of:
            print(f"{what}: {row.attack}", file=sys.stderr)
    return 1 if missing or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
