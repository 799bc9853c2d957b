"""Milliseconds per batch of MiniLM-L6 in int8 and fp8: eager, plain Inductor and fx_quant, taking turns.

``python benchmarks/minilm.py [--threads N] [--json FILE]`` (or ``make bench``). Outputs are compared before they are
timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from encoder import QUANTIZED, onednn_spoils_float8, tokenize, use_onednn
from machine import add_threads, described, machine
from sentences import SENTENCES
from stopwatch import interleaved_medians, verify

BACKENDS = ("inductor", "fx_quant")


def measure(model_name: str, sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """One row for each batch size: its shape and the median milliseconds of every way to run the model."""
    torch._dynamo.reset()  # what was compiled for another model counts towards Dynamo's limit
    use_onednn(not (model_name == "fp8" and onednn_spoils_float8()))
    model = QUANTIZED[model_name]()
    ways = {"eager": model, **{backend: torch.compile(model, backend=backend) for backend in BACKENDS}}
    rows = []
    for size in sizes:
        batch = tokenize(SENTENCES[:size])
        print(f"{model_name}, batch {size}: compiling and comparing", file=sys.stderr, flush=True)
        verify(ways, batch)
        ms = interleaved_medians(ways, batch, seconds=seconds)
        ratio = ms["fx_quant"] / ms["inductor"]
        rows.append({"model": model_name, "batch": size, "tokens": batch[0].shape[1], "ms": ms, "ratio": ratio})
    return rows


@torch.no_grad()
def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_threads(parser)
    parser.add_argument("--models", nargs="+", choices=sorted(QUANTIZED), default=sorted(QUANTIZED))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32], help="sentences in a batch (default: 1 32)")
    parser.add_argument("--seconds", type=float, default=10.0, help="least time for each row (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write machine, versions and rows as JSON")
    options = parser.parse_args()
    if not all(1 <= size <= len(SENTENCES) for size in options.batch):
        parser.error(f"--batch must be 1 to {len(SENTENCES)}, got {options.batch}")

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run eagerly and be timed
    where = machine("torchao", "transformers")
    rows = [row for name in options.models for row in measure(name, options.batch, options.seconds)]
    print(described(where))
    headers = ("model", "batch x tokens", "eager ms", "inductor ms", "fx_quant ms", "fx_quant / inductor")
    cells = [
        (
            row["model"],
            f"{row['batch']} x {row['tokens']}",
            *(f"{ms:.1f}" for ms in row["ms"].values()),
            f"{row['ratio']:.2f}",
        )
        for row in rows
    ]
    print(tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True))
    if options.json:
        options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
