"""What it costs to pad rows: one eager linear at m = 1 to 32 rows as they are, and padded to 16, 17 and 32 rows.

``python benchmarks/padding.py [--threads N] [--quick]``. The padded call pads the activation, runs the same kernel and
slices, as vLLM's ``Fp8LinearOp`` does; its rows are compared with those of the unpadded call before either is timed.
The figures led to the rule of ``padding="auto"`` on a CPU, which pads no rows. Where ``torch._scaled_mm`` runs on CUDA
the rule is vLLM's, to 17 rows, and has been measured by no command of this repository.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from eager import KINDS, MAX_ERROR
from machine import add_threads, described, machine
from stopwatch import interleaved_medians

from fx_quant.layers.linear import QuantizedLinear
from fx_quant.scheme import dtype_name

ROWS = (1, 2, 4, 8, 12, 15, 16, 24, 31)
PADDED = (16, 17, 32)
# The kernel that is chosen, and PyTorch's own op where it runs here.
FORCED = {"int8 dynamic": (None, "pytorch_int_mm")}


def padded(layer: QuantizedLinear, rows: int) -> Callable[[Tensor], Tensor]:
    """``layer`` on its input padded to ``rows`` with zeros, and sliced."""
    return lambda x: layer(F.pad(x, (0, 0, 0, rows - x.shape[0])))[: x.shape[0]]


def table_rows(name: str, forced: str | None, dtype: torch.dtype, n: int, k: int, seconds: float) -> list[list[str]]:
    """For each m the milliseconds as it is, and the time padded to each of ``PADDED`` over it."""
    linear = nn.Linear(k, n, bias=False, dtype=dtype)
    layer = QuantizedLinear.from_float(linear, KINDS[name].scheme.format(dtype=dtype_name(dtype)))
    layer.force_kernel = forced
    tokens = torch.randn(max(ROWS), k).to(dtype)
    kernel = layer.selection(tokens).kernel.name
    rows = []
    for m in ROWS:
        x = tokens[:m].clone()
        ways = {"as it is": layer, **{f"to {r}": padded(layer, r) for r in PADDED if r > m}}
        outputs = {way: call(x).double() for way, call in ways.items()}
        largest = outputs["as it is"].abs().max()
        for way, got in outputs.items():
            error = ((got - outputs["as it is"]).abs().max() / largest).item()
            if not error <= MAX_ERROR[dtype]:
                raise RuntimeError(f"{name}, m = {m}, {way}: rows must be those of no padding, got an error of {error}")
        ms = interleaved_medians(ways, (x,), seconds=seconds, least=5, most=200)
        ratios = [f"{ms[f'to {r}'] / ms['as it is']:.2f}" if r > m else "" for r in PADDED]
        rows.append([name, dtype_name(dtype), kernel, str(m), f"{ms['as it is']:.3f}", *ratios])
    return rows


@torch.no_grad()
def main() -> None:
    """Measure, print the table and how often padding was faster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_threads(parser)
    parser.add_argument("--quick", action="store_true", help="a linear of 1024 x 1024 instead of 4096 x 4096")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each row (default: 1)")
    options = parser.parse_args()
    torch.manual_seed(0)
    size = 1024 if options.quick else 4096
    rows = []
    for name in KINDS:
        for forced in FORCED.get(name, (None,)):
            print(f"{name}, {forced or 'the chosen kernel'}", file=sys.stderr, flush=True)
            rows += table_rows(name, forced, torch.float32, size, size, options.seconds)
    print(described(machine()))
    print(f"n = k = {size}")
    headers = ("weights", "x", "kernel", "m", "as it is, ms", *(f"to {r}, / as it is" for r in PADDED))
    print(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))
    for i, r in enumerate(PADDED):
        ratios = [float(row[5 + i]) for row in rows if row[5 + i]]
        faster = sum(ratio < 0.95 for ratio in ratios)
        print(f"to {r}: {statistics.geometric_mean(ratios):.2f} of the time as it is; {faster} of {len(ratios)} faster")


if __name__ == "__main__":
    main()
