"""Quantized linears and models on a CPU, against every peer and the machine's own ceilings.

``python benchmarks/cpu.py linears [--quick]`` times single linears, ``... models`` whole models (cpu_models.py), and
``... table FILE ...`` prints what earlier runs wrote. Each case has a process of its own, in which all ways take turns
and each is compared with float64 before it is timed; of a model, each variant has one, and the processes take turns.
Peers that are not installed are left out, and named; of llama.cpp, which no package of Python's has ready-made, the
table says how to get it.

Times are medians. Linears of few rows are timed as a list of distinct weights larger than the last-level cache, so that
m = 1 reads its weight from memory, as a decode does. Ratios are the peer's time over ours: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import cpu_model_table
import cpu_table
import cpu_turns
import cpu_variants
from cpu_cases import KINDS, ROWS, SHAPES, Case
from cpu_measure import Settings
from cpu_ways import FAMILIES
from machine import described, machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("torchao", "onnxruntime", "openvino")
QUICK_SCHEMES = ("w8a8", "w8a16", "w4a16-g128", "fp8")
DTYPES = ("float32", "bfloat16")


def shape(text: str) -> tuple[int, int]:
    """``4096x11008`` as ``(n, k)``.

    Raises:
        argparse.ArgumentTypeError: it is not two positive numbers.
    """
    n, cross, k = text.partition("x")
    if not (cross and n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"a shape must be NxK such as 4096x11008, got {text!r}")
    return int(n), int(k)


def positive(text: str) -> int:
    """A whole number of 1 or more.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    linears = commands.add_parser("linears", help="single linears")
    linears.add_argument("--schemes", nargs="+", choices=tuple(KINDS), help="default: all; quick: the usual ones")
    linears.add_argument("--shapes", nargs="+", type=shape, metavar="NxK", help="default: those of common models")
    linears.add_argument("--rows", nargs="+", type=positive, metavar="M", help="rows of the activation")
    linears.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    linears.add_argument("--threads", nargs="+", type=positive, help="default: 1 and all; quick: 1")
    peers = ("all", "torch", *FAMILIES)
    linears.add_argument("--peers", nargs="+", choices=peers, default=["all"], help="torch: all but other runtimes")
    linears.add_argument("--quick", action="store_true", help="4096 x 4096, m of 1, 16 and 256, fewer peers")
    linears.add_argument(
        "--static", action="store_true", help="compile each way for each m, ours and plain Inductor too"
    )
    linears.add_argument("--seconds", type=float, help="least time of a row (default: 2, quick 1)")
    linears.add_argument("--cpu-time", action="store_true", help="time of the processor, not of the clock; one thread")
    linears.add_argument(
        "--cache", type=positive, metavar="BYTES", help="cache that weights must outgrow (default: the last level's)"
    )
    linears.add_argument("--lock", default="", metavar="FILE", help="flock it: shared to compile, alone to time")
    linears.add_argument("--timeout", type=float, default=900, help="seconds that a case may take (default: 900)")
    linears.add_argument("--json", type=Path, metavar="FILE", help="results (default: benchmarks/results/linears.json)")
    linears.add_argument("--plot", type=Path, metavar="FILE", help="also draw a PNG or SVG (needs matplotlib)")
    models = commands.add_parser("models", help="whole models")
    models.add_argument(
        "--models", nargs="+", choices=tuple(cpu_variants.WORKLOADS), help="default: all; quick: decoder"
    )
    variants = tuple(cpu_variants.VARIANTS)
    models.add_argument(
        "--variants", nargs="+", choices=variants, metavar="NAME", help=f"these and no others: {', '.join(variants)}"
    )
    families = ("all", *cpu_variants.FAMILIES)
    models.add_argument("--peers", nargs="+", choices=families, default=["all"], help="whom to compare ours with")
    schemes = cpu_variants.SCHEMES
    models.add_argument("--schemes", nargs="+", choices=schemes, default=schemes)
    models.add_argument("--threads", nargs="+", type=positive, help="default: 1; quick: all")
    models.add_argument("--prompt", type=positive, default=cpu_variants.PROMPT, help="tokens of it (default: 128)")
    models.add_argument("--huge-pages", action="store_true", help="ask for them for every variant's weights")
    models.add_argument("--quick", action="store_true", help="a short decoder, in our layers and in llama.cpp")
    models.add_argument("--layers", type=positive, help="of the decoder (default: 6, quick 2)")
    models.add_argument("--rounds", type=positive, help="turns of each variant (default: 5, quick 3)")
    models.add_argument("--seconds", type=float, help="least time of a phase in a turn (default: 1, quick 0.5)")
    models.add_argument("--lock", default="", metavar="FILE", help="flock it: shared to compile, alone to time")
    models.add_argument(
        "--timeout", type=float, default=1200, help="seconds that a variant may take to prepare (default: 1200)"
    )
    models.add_argument("--json", type=Path, metavar="FILE", help="results (default: benchmarks/results/models.json)")
    table = commands.add_parser("table", help="print what earlier runs wrote")
    table.add_argument("files", nargs="+", type=Path)
    table.add_argument("--markdown", action="store_true", help="whole models as the README has them")
    table.add_argument("--plot", type=Path, metavar="FILE", help="also draw a PNG or SVG (needs matplotlib)")
    return parser


def cases(options: argparse.Namespace) -> list[Case]:
    """One for each scheme, dtype, shape and number of threads that was asked for."""
    schemes = options.schemes or (QUICK_SCHEMES if options.quick else tuple(KINDS))
    shapes = options.shapes or (SHAPES[:1] if options.quick else SHAPES)
    rows = tuple(options.rows or ((1, 16, 256) if options.quick else ROWS))
    threads = options.threads or ([1] if options.quick else sorted({1, os.cpu_count() or 1}))
    return [
        Case(scheme, dtype, n, k, count, rows)
        for count, scheme, dtype, (n, k) in product(threads, schemes, options.dtypes, shapes)
    ]


def in_process(asked: Mapping[str, Any], threads: int, timeout: float) -> dict[str, Any] | str:
    """What ``cpu_measure.py`` writes back into the file of what was ``asked``; or why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "asked.json", Path(folder) / "log"
        path.write_text(json.dumps(asked))
        with log.open("w") as said:
            try:
                done = subprocess.run(
                    [sys.executable, str(HERE / "cpu_measure.py"), str(path)],
                    env=cpu_turns.environment(threads),
                    timeout=timeout,
                    stdout=said,
                    stderr=said,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return f"took more than {timeout:.0f} s; allow more with --timeout"
        if done.returncode:
            return f"the process ended with {done.returncode}:\n{log.read_text()[-2000:]}"
        return json.loads(path.read_text())


def linears(options: argparse.Namespace) -> int:
    """Measure the cases, print and write what they gave."""
    settings = Settings(
        seconds=options.seconds or (1.0 if options.quick else 2.0),
        cpu_time=options.cpu_time,
        peers=tuple(options.peers),
        quick=options.quick,
        static=options.static,
        lock=options.lock,
        cache=options.cache or 0,
    )
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    asked = cases(options)
    path = options.json or RESULTS / "linears.json"
    for i, case in enumerate(asked):
        print(f"{i + 1} of {len(asked)}: {case}", file=sys.stderr, flush=True)
        both = {"case": dataclasses.asdict(case), "settings": dataclasses.asdict(settings)}
        found = in_process(both, case.threads, options.timeout)
        if isinstance(found, str):
            failures.append(f"{case}: {found}")
            print(failures[-1], file=sys.stderr, flush=True)
            continue
        rows += found["rows"]
        write(path, rows, settings=dataclasses.asdict(settings))
    print(described(machine(*PACKAGES)))
    report(rows, options.plot)
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


def models(options: argparse.Namespace) -> int:
    """Run the variants of the models, print and write what they gave."""
    rows: list[dict[str, Any]] = []
    quick = options.quick
    rounds, layers, seconds = (3, 2, 0.5) if quick else (5, 6, 1.0)
    rounds, layers, seconds = options.rounds or rounds, options.layers or layers, options.seconds or seconds
    given = {"layers": layers, "seconds": seconds, "prompt": options.prompt, "lock": options.lock}
    given["huge_pages"] = options.huge_pages
    threads = options.threads or [(os.cpu_count() or 1) if quick else 1]
    for count, model in product(threads, options.models or (["decoder"] if quick else cpu_variants.WORKLOADS)):
        names = options.variants or cpu_variants.chosen(model, options.peers, options.schemes, quick=quick)
        names = [name for name in names if cpu_variants.runs(name, model)]
        asked = [{"model": model, "name": name, "threads": count, **given} for name in names]
        rows += cpu_turns.measured(asked, rounds, options.timeout)
        write(options.json or RESULTS / "models.json", rows, rounds=rounds, seconds=seconds)
    print(described(machine(*PACKAGES)))
    print(f"\n{cpu_model_table.table(rows)}")
    return 1 if any(row["status"] == cpu_turns.FAILED for row in rows) else 0


def write(path: Path, rows: Sequence[Mapping[str, Any]], **about: Any) -> None:
    """Machine and rows as JSON; called after each process, since a long run may be stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(*PACKAGES), **about, "rows": rows}, indent=1) + "\n")


def report(rows: Sequence[cpu_table.Row], picture: Path | None) -> None:
    """Print the tables of ``rows``, and draw them where asked."""
    for text in (cpu_table.peers_table(rows), cpu_table.table(rows), cpu_table.summary(rows)):
        print(f"\n{text}")
    if picture is not None and rows:
        cpu_table.plot(rows, picture)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; 1 where a case failed."""
    command = parser()
    options = command.parse_args(arguments)
    if options.command == "table":
        rows = [row for file in options.files for row in json.loads(file.read_text())["rows"]]
        whole = [row for row in rows if "variant" in row]
        if whole:
            print(cpu_model_table.table(whole, markdown=options.markdown))
        if len(whole) < len(rows):
            report([row for row in rows if "variant" not in row], options.plot)
        return 0
    if options.command == "models":
        return models(options)
    if options.cpu_time and options.threads != [1]:
        command.error("--cpu-time is for one thread; say --threads 1")
    return linears(options)


if __name__ == "__main__":
    sys.exit(main())
