"""``python -m tests.dialects [names or globs]``: what fx_quant makes of each flow in each variant.

Ends with 1 when a flow of the developers' group is not as expected, or when any flow is missed silently.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.dialects.outcome import Outcome
from tests.dialects.registry import Flow, matching
from tests.dialects.run import run
from tests.dialects.table import reason_list, result_table, totals, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        flows = matching(options.names, options.group)
    except LookupError as error:
        print(f"dialects: {error.args[0]}", file=sys.stderr)
        return 2
    if options.list:
        for flow in flows:
            print(f"{flow.name:34s} {flow.group:10s} {flow.expected:11s} {flow.what}")
        return 0
    started = time.perf_counter()
    # Before the workers start: no downloads, and no progress bars but ours.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    progress = functools.partial(print, flush=True)
    outcomes = run(flows, options.variants, options.target, options.numbers, options.jobs, progress)
    print()
    print(result_table(flows, outcomes))
    reasons = reason_list(flows, outcomes)
    if reasons:
        print(f"\n{reasons}")
    if options.json is not None:
        options.json.write_text(json.dumps(_as_json(flows, outcomes), indent=2) + "\n")
    bad = wrong(flows, outcomes)
    if bad:
        print(f"\nnot as expected: {', '.join(bad)}")
    print(f"\n{totals(flows, outcomes, time.perf_counter() - started)}")
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.dialects", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="flows by name or glob; all of the group unless given")
    parser.add_argument("--group", choices=("developers", "all"), default="developers")
    parser.add_argument("--variants", choices=("few", "all"), default="few")
    parser.add_argument("--target", help="choose kernels for another machine, such as sm90")
    parser.add_argument("--numbers", action="store_true", help="compile with fx_quant and inductor, compare with eager")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome as JSON")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list the flows and end")
    return parser


def _as_json(flows: Sequence[Flow], outcomes: dict[str, list[Outcome]]) -> list[dict[str, object]]:
    return [
        {
            "flow": flow.name,
            "what": flow.what,
            "group": flow.group,
            "expected": flow.expected,
            "why": flow.why,
            "unavailable": list(flow.missing()),
            "outcomes": [_outcome_as_json(each) for each in outcomes[flow.name]],
        }
        for flow in flows
    ]


def _outcome_as_json(outcome: Outcome) -> dict[str, object]:
    # JSON has no infinity.
    errors = {name: error if math.isfinite(error) else str(error) for name, error in outcome.errors.items()}
    return {**dataclasses.asdict(outcome), "verdict": str(outcome.verdict), "errors": errors}


if __name__ == "__main__":
    sys.exit(main())
