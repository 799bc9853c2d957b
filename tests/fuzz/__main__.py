"""``python -m tests.fuzz --graphs 20000 --seed 0 [--jobs 2]``: random programs, and what is wrong with their rewriting.

Ends with 1 when anything is. ``--only N`` prints and judges the program of one seed, made small where it fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tests.fuzz.run import Tally, run_many, run_one


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(argv)
    if options.only is not None:
        return run_one(options.only, shrinks=not options.whole)
    started = time.perf_counter()

    def progress(tally: Tally) -> None:
        seconds = time.perf_counter() - started
        found = "".join(f"\n  {key}: --only {seeds[0]}" for key, seeds in tally.faults.items())
        print(f"{tally.counts['graphs']} graphs, {seconds:.0f} s{found}", file=sys.stderr, flush=True)

    tally = run_many(options.seed, options.graphs, options.jobs, progress)
    print(tally.table(time.perf_counter() - started))
    return 1 if tally.faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--graphs", type=int, default=2000, help="how many programs (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the others follow (0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--only", type=int, metavar="SEED", help="judge the program of this seed alone, and print it")
    parser.add_argument("--whole", action="store_true", help="with --only: do not make it smaller")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
