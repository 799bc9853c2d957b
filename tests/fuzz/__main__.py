"""``python -m tests.fuzz --graphs 20000 --seed 0 [--jobs 2]``: random programs, and what is wrong with their rewriting.

Ends with 1 when anything is. ``--seed N --only N`` prints and judges one program; ``--shrink`` makes it small.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence

from tests.fuzz.run import Tally, run, run_one


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(argv)
    if options.only is not None:
        return run_one(options.only, shrinks=not options.whole)
    started = time.perf_counter()
    tally = Tally()
    chunk = 100
    starts = range(options.seed, options.seed + options.graphs, chunk)
    work = [(start, min(chunk, options.seed + options.graphs - start)) for start in starts]
    context = multiprocessing.get_context("spawn")
    if options.jobs == 1:
        found = (run(*each) for each in work)
        for one in found:
            tally.add(one)
            _progress(tally, started)
    else:
        with context.Pool(options.jobs) as pool:
            for one in pool.imap_unordered(_run, work):
                tally.add(one)
                _progress(tally, started)
    print(tally.table(time.perf_counter() - started))
    return 1 if tally.faults else 0


def _run(work: tuple[int, int]) -> Tally:
    return run(*work)


def _progress(tally: Tally, started: float) -> None:
    print(f"{tally.counts['graphs']} graphs, {time.perf_counter() - started:.0f} s", file=sys.stderr, end="\r", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--graphs", type=int, default=2000, help="how many programs (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the others follow (0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--only", type=int, help="judge the program of this seed alone, and print it")
    parser.add_argument("--whole", action="store_true", help="with --only: do not shrink it")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
