"""Quantized linears and MLPs on a GPU, against every peer that is installed and the GPU's own floor.

``python benchmarks/gpu.py run [--sections linears ...]`` measures; ``... report FILE ...`` prints what earlier runs
wrote, and what was asked for. Each result is compared with float64 before it is timed. Times are those of a call in a
replayed CUDA graph over weights that no cache holds, in microseconds, p20, p50 and p80 of interleaved rounds.

A run ends by itself within ``--minutes``; what it did not get to is said, and measured by the next run, which takes up
the rows that are in the file already. Data is random: on zeros a GPU runs faster than on any model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_compile
import gpu_table
import gpu_ways
import torch
from gpu_cases import MODELS, RECIPES, ROWS, SECTIONS, Case
from gpu_measure import Way, failure, measure, timed
from machine import machine

from fx_quant.kernels.triton.architectures import Architecture, architecture_of

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("triton", "torchao", "vllm", "deep_gemm", "flashinfer-python", "humming-kernels")
# Of L2 cache, where torch does not say.
_CACHE = 50 << 20


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME", help=str(SECTIONS))
    recipes = tuple(RECIPES)
    run.add_argument("--recipes", nargs="+", choices=recipes, default=recipes, metavar="NAME", help=str(recipes))
    run.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    run.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M", help="rows of the activation")
    peers = ("all", *gpu_ways.FAMILIES)
    run.add_argument("--peers", nargs="+", choices=peers, default=[], help="default: all but tuned, which is slow")
    run.add_argument("--seconds", type=float, default=0.3, help="least time of the rounds of a row (default: 0.3)")
    run.add_argument("--minutes", type=float, default=9.0, help="no case begins after that (default: 9)")
    run.add_argument("--again", action="store_true", help="measure again what is in the file")
    run.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>/gpu.json")
    report = commands.add_parser("report", help="print what earlier runs wrote")
    report.add_argument("files", nargs="+", type=Path)
    report.add_argument("--plot", type=Path, metavar="FILE", help="also draw a PNG or SVG (needs matplotlib)")
    return parser


def missing_gpu() -> str | None:
    """What a run needs and has not, in a line."""
    if torch.cuda.is_available():
        return None
    return f"a GPU is needed, and torch {torch.__version__} finds none; 'report FILE' prints recorded results"


def described() -> dict[str, Any]:
    """Machine, GPU, driver and versions as JSON holds them."""
    found = machine(*PACKAGES)
    if torch.cuda.is_available():
        asked = gpu_state("name", "driver_version", "clocks.max.sm", "power.limit")
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "processors": properties.multi_processor_count, **asked}
    return found


def gpu_state(*names: str) -> dict[str, str]:
    """What ``nvidia-smi`` says of the first GPU; empty where it is not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (each.strip() for each in said.strip().split(",")), strict=False))


def default_path() -> Path:
    """Where the results of this GPU belong."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") / "gpu.json"


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is of."""
    return tuple(row.get(field.name) for field in dataclasses.fields(Case))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Machine and rows as JSON; called after each case, since a run may be stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": described(), "rows": rows}, indent=1) + "\n")


def measured(
    case: Case, on: Architecture, device: torch.device, ways: Callable[[gpu_cases.Operands], list[Way]], seconds: float
) -> dict[str, Any]:
    """The row of a case."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", _CACHE) if device.type == "cuda" else 0
    given = gpu_cases.operands(case, device, cache)
    found = measure(given, ways(given), seconds)
    us, limit = gpu_cases.floor(case, on)
    row = dataclasses.asdict(case) | {"sets": len(given.layers), "floor_us": us, "limit": limit, "ways": found}
    return row | ({"clock": gpu_state("clocks.sm", "power.draw")} if device.type == "cuda" else {})


def ceilings(on: Architecture) -> list[dict[str, Any]]:
    """What the GPU gives to a copy, to PyTorch's matmuls and to an empty kernel, beside what the floors assume."""
    device = torch.device("cuda")
    size, f8 = 8192, gpu_cases.float8(device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    codes, one = (a.to(f8), b.to(f8)), torch.ones((), device=device)
    integers = [torch.randint(-128, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2)]
    source = torch.randn(1 << 29, device=device, dtype=torch.bfloat16)
    target, small = torch.empty_like(source), torch.zeros(1, device=device)
    products = 2.0 * size**3
    asked: dict[str, tuple[Callable[[], Any], float, str, float]] = {
        "copy": (lambda: target.copy_(source), 2e-12 * source.nbytes, "TB/s", on.bandwidth / 1e12),
        "bfloat16 matmul": (lambda: a @ b, products / 1e12, "TFLOP/s", on.half / 1e12),
        "float8 _scaled_mm": (
            lambda: torch._scaled_mm(codes[0], codes[1].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
            products / 1e12,
            "TFLOP/s",
            on.float8 / 1e12,
        ),
        "int8 _int_mm": (lambda: torch._int_mm(integers[0], integers[1].t()), products / 1e12, "TOP/s", on.int8 / 1e12),
        "least kernel": (lambda: small.add_(1.0), 0.0, "us", 0.0),
    }
    rows = []
    for name, (run, amount, unit, assumed) in asked.items():
        row: dict[str, Any] = {"section": "ceilings", "what": name, "unit": unit, "assumed": assumed}
        row |= {"value": None, "status": "ok"}
        times, failures = timed({name: lambda i, run=run: run()}, 1, 0.5, True)
        if name in failures:
            row["status"] = failures[name]
        else:
            us = times[name]["p50"]
            row["value"] = amount / (us * 1e-6) if amount else us
        rows.append(row | {"clock": gpu_state("clocks.sm", "power.draw")})
    return rows


def run(options: argparse.Namespace) -> int:
    """Measure what was asked for; 1 where our own way was wrong or failed."""
    reason = missing_gpu()
    if reason is not None:
        print(f"gpu.py: {reason}", file=sys.stderr)
        return 1
    device, path = torch.device("cuda", 0), options.json or default_path()
    on = architecture_of(device)
    rows = read(path)
    families = set(options.peers) or set(gpu_ways.FAMILIES) - {"tuned"}
    peers = gpu_ways.FAMILIES if "all" in families else tuple(families)
    end = time.monotonic() + 60 * options.minutes
    left, wrong = [], 0
    if "ceilings" in options.sections:
        rows = [row for row in rows if row["section"] != "ceilings"] + ceilings(on)
        write(path, rows)
    for section in options.sections:
        for case in gpu_cases.cases(section, options.recipes, options.models, options.rows):
            done = [row for row in rows if key(row) == dataclasses.astuple(case)]
            if done and not options.again:
                continue
            if time.monotonic() > end:
                left.append(str(case))
                continue
            print(case, file=sys.stderr, flush=True)
            try:
                row = measured(case, on, device, lambda given: gpu_ways.ways(given, peers), options.seconds)
            except Exception as error:  # noqa: BLE001  (out of memory, say: the other cases go on)
                wrong += 1
                print(f"{case}: {failure(error)}", file=sys.stderr, flush=True)
                continue
            finally:
                torch.cuda.empty_cache()
            wrong += row["ways"][gpu_table.OURS]["status"] != "ok"
            rows = [other for other in rows if key(other) != key(row)] + [row]
            write(path, rows)
    if "compile" in options.sections:
        found = gpu_compile.measured(end, [row for row in rows if row["section"] == "compile" and not options.again])
        rows = [row for row in rows if row["section"] != "compile"] + found
        write(path, rows)
    print(report(rows, described()))
    if left:
        print(f"\nnot measured in {options.minutes:g} minutes, run again for: {len(left)} cases, first {left[0]}")
    print(f"\nwritten to {path}")
    return 1 if wrong else 0


def report(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> str:
    """Machine, ceilings, tables, what did not run, and the goals."""
    timed_rows = [row for row in rows if "ways" in row]
    parts = [", ".join(f"{name}: {value}" for name, value in where.items())]
    bounds = [row for row in rows if row["section"] == "ceilings"]
    if bounds:
        lines = [(r["what"], _value(r), f"{r['assumed']:.2f}" if r["assumed"] else "", _clock(r)) for r in bounds]
        parts.append(gpu_table.columns(("ceiling", "measured", "floors assume", "SM MHz"), lines))
    if timed_rows:
        parts += [gpu_table.ways_table(timed_rows), gpu_table.table(timed_rows)]
        parts.append("\n".join(["did not run:", *gpu_table.absent(timed_rows)]))
    compiles = [row for row in rows if row["section"] == "compile"]
    if compiles:
        parts.append(gpu_compile.table(compiles))
    goals = [gpu_table.goals(timed_rows), *gpu_compile.goals(compiles)]
    parts.append("\n".join(["goals, asked (wished for):", *goals]))
    return "\n\n".join(parts)


def _value(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.2f} {row['unit']}" if row["value"] else row["status"]


def _clock(row: Mapping[str, Any]) -> str:
    return row.get("clock", {}).get("clocks.sm", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    options = parser().parse_args(arguments)
    if options.command == "run":
        return run(options)
    rows = [row for file in options.files for row in read(file)]
    print(report(rows, json.loads(options.files[0].read_text())["machine"]))
    if options.plot is not None:
        gpu_table.plot([row for row in rows if "ways" in row], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
