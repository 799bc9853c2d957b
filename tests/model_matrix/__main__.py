"""``python -m tests.model_matrix [names or globs]``: what fx_quant makes of real architectures, however quantized.

Ends with 1 when a quantized linear is passed over in silence, a result is wrong, fx_quant fails, or more graphs are
compiled than without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.provenance import ROOT, made_with
from tests.workers import in_workers

PAGE = ROOT / "docs" / "models.md"
PACKAGES = [
    "torchao",
    "transformers",
    "compressed-tensors",
    "optimum-quanto",
    "diffusers",
    "timm",
    "sentence-transformers",
    "peft",
    "accelerate",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    # Before libraries are imported, here and in workers: no downloads, and no progress bars.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", OMP_NUM_THREADS="1")
    from tests.model_matrix import rows
    from tests.model_matrix.outcome import Outcome, faults
    from tests.model_matrix.table import page, reason_list, result_table, totals

    options = _parser().parse_args(argv)
    try:
        names = rows.names(options.names)
    except LookupError as error:
        print(f"models: {error.args[0]}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(names))
        return 0
    started = time.perf_counter()
    found: dict[str, Outcome] = {}

    def done(name: str, row: Outcome) -> None:
        found[name] = row
        said = row.unavailable or "; ".join(faults(row)) or f"{row.rewritten} of {row.linears} rewritten"
        print(f"[{len(found)}/{len(names)}] {name}: {said} ({row.seconds:.1f} s)", flush=True)

    def died(name: str, error: BaseException) -> None:
        model, _, way = name.partition(", ")
        done(name, Outcome(model, way, failed=f"the process ended: {error}"))

    in_workers(names, rows.row, (options.compile,), options.jobs, done, died)
    measured = [found[name] for name in names]
    print(
        f"\n{result_table(measured)}\n\n{reason_list(measured)}\n\n{totals(measured)}; {time.perf_counter() - started:.0f} s"
    )
    if options.json is not None:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in measured], indent=2) + "\n")
    if options.write:
        PAGE.write_text(page(measured, made_with(*PACKAGES)))
    bad = [row for row in measured if faults(row)]
    for row in bad:
        print(f"{row.name}: {'; '.join(faults(row))}", file=sys.stderr)
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.model_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows or models by name or glob; all unless given")
    parser.add_argument("--compile", action="store_true", help="compile a sample, by fx_quant and plain Inductor")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome as JSON")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
