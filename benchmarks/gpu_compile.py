"""Seconds that ``torch.compile`` takes for a quantized MLP, with nothing cached and with everything cached.

``python benchmarks/gpu_compile.py VARIANT`` compiles once, in a process and a cache of its own, and prints the seconds;
``gpu.py`` asks it for each variant.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_sources
import torch
from gpu_cases import Case, operands
from gpu_table import columns

VARIANTS = ("inductor", "inductor max-autotune", "fx_quant")
_CASE = Case("chains", "8B MLP", "row", 64, 14336, 4096)
_SECONDS = 240


def seconds(variant: str, case: Case = _CASE, device: str = "cuda") -> float:
    """Of the first call of the compiled MLP."""
    given = operands(case, torch.device(device), 0)
    gate_up, down = given.layers[0]
    arguments = (gate_up.codes, gate_up.scale, down.codes, down.scale)
    function = gpu_sources.chain(case.recipe)
    if variant == "fx_quant":
        from fx_quant.backend import fx_quant

        compiled = torch.compile(function, backend=fx_quant, dynamic=False)
    else:
        mode = "max-autotune-no-cudagraphs" if variant.endswith("max-autotune") else None
        compiled = torch.compile(function, dynamic=False, mode=mode)
    start = time.perf_counter()
    with torch.no_grad():
        compiled(given.x, given.residual, given.norm, *arguments)
    if given.x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_process(variant: str, cache: str) -> float | str:
    """``seconds`` with this cache, or why not."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, str(Path(__file__).resolve()), variant]
    try:
        env = {**os.environ, **folders, "PYTHONPATH": path}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"took more than {_SECONDS} s"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"[:200]
    return float(done.stdout.strip().splitlines()[-1])


def measured(end: float, done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant: ``cold`` and ``warm`` seconds; none begins after ``end``, a time of ``monotonic``."""
    rows = [dict(row) for row in done]
    for variant in VARIANTS:
        if time.monotonic() > end or any(row["what"] == variant for row in rows):
            continue
        with tempfile.TemporaryDirectory() as cache:
            row: dict[str, Any] = {"section": "compile", "what": variant, "status": "ok", "cold": None, "warm": None}
            for name in ("cold", "warm"):
                found = in_process(variant, cache)
                if isinstance(found, str):
                    row["status"] = found
                    break
                row[name] = found
        rows.append(row)
    return rows


def added(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Seconds that fx_quant takes beyond plain Inductor, ``cold`` or ``warm``."""
    seconds = {row["what"]: row[name] for row in rows}
    ours, plain = seconds.get("fx_quant"), seconds.get("inductor")
    return None if ours is None or plain is None else ours - plain


def goals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each goal of compile time: at most so many seconds more than plain Inductor."""
    lines = []
    for name, most in (("cold", 20.0), ("warm", 2.0)):
        got = added(rows, name)
        verdict = "not measured" if got is None else f"got {got:+.1f}: {'reached' if got <= most else 'missed'}"
        lines.append(f"G8   seconds of compiling beside Inductor's, {name}: asked at most {most:g}, {verdict}")
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds by variant."""
    lines = [
        (row["what"], *("" if row[name] is None else f"{row[name]:.1f}" for name in ("cold", "warm")), row["status"])
        for row in rows
    ]
    return columns(("compile, s", "cold", "warm", "state"), lines)


if __name__ == "__main__":
    print(seconds(sys.argv[1]))
