"""Weight-only and block-scaled linears on a CPU against the float linear and everything else that could run them.

``python benchmarks/cpu_weight_only.py [--quick] [--threads 1 2] [--json FILE]``. Every way is verified against float64
before it is timed; the ways take turns in one process. Ratios are ours to the fastest other way: above 1 we are faster.
With ``--cpu-time``, times are those of the thread, which neighbours on a busy machine do not lengthen; one thread only.

Int4 codes run as ``QuantizedLinear``, whose codes stay packed; the other weights as a model writes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import described, machine
from tabulate import tabulate
from torch import Tensor, nn

from fx_quant.linear import QuantizedLinear
from fx_quant.linear_operands import weight_block
from fx_quant.ops import dequantize_weight, scaled_mm
from fx_quant.quantize_weight import quantize_weight
from fx_quant.scheme import INT4_DTYPES, Scheme, dtype_name
from fx_quant.weights import pack_int4

SHAPES = ((2048, 2048), (4096, 4096), (11008, 4096))
ROWS = (1, 4, 16, 64, 256)
SCHEMES = (
    "{} x int8 per_channel",
    "{} x float8_e4m3fn per_channel",
    "{} x int8 per_group(128)",
    "{} x uint4 per_group(128) asymmetric",
    "{} x uint4 per_group(32) asymmetric",
    "float8_e4m3fn per_group(128) x float8_e4m3fn per_block(128, 128)",
)
# Of the norm of the result: bfloat16 operands and result, and no more than rounding in float32.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}

Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One linear: its operands, and the float weight that they stand for."""

    scheme: Scheme
    dtype: torch.dtype
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    block: tuple[int, int] | None
    weight: Tensor


def make_case(text: str, dtype: torch.dtype, n: int, k: int) -> Case:
    """A random weight ``[n, k]`` in the scheme ``text``."""
    scheme = Scheme.parse(text.format(dtype_name(dtype)))
    found = quantize_weight(torch.randn(n, k) / k**0.5, scheme.weight)
    codes, zero_point, scale, block = found.codes, found.zero_point, found.scale, weight_block(scheme)
    if scheme.weight.dtype in INT4_DTYPES:
        codes = pack_int4(codes)
        zero_point = None if zero_point is None else (zero_point - 8).to(torch.int8)
    scale = scale.flatten() if block is None else scale
    return Case(
        scheme, dtype, codes, scale, zero_point, block, dequantize_weight(codes.t(), k, scale, zero_point, block)
    )


class Source(nn.Module):
    """What a model writes: the weight dequantized, then a linear."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        for name in ("codes", "scale", "zero_point"):
            self.register_buffer(name, getattr(case, name))

    def forward(self, x: Tensor) -> Tensor:
        """``x [m, k]`` times the dequantized weight."""
        case, (m, k) = self.case, x.shape
        if not case.scheme.weight_only:
            return self._blocks(x, m, k)
        codes = self.codes
        if case.scheme.weight.dtype in INT4_DTYPES:
            codes = torch.stack((codes & 0xF, codes >> 4), -1).flatten(1).to(torch.int8) - 8
        weight, scale, zero_point = codes.float(), self.scale, self.zero_point
        if case.block is None:
            return F.linear(x, (weight * scale[:, None]).to(x.dtype))
        weight = weight.unflatten(1, (-1, case.block[1]))
        if zero_point is not None:
            weight = weight - zero_point[..., None]
        return F.linear(x, (weight * scale[..., None]).flatten(1).to(x.dtype))

    def _blocks(self, x: Tensor, m: int, k: int) -> Tensor:
        assert self.case.block is not None
        rows, columns = self.case.block
        groups = x.float().view(m, k // columns, columns)
        a_scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
        a = (groups / a_scale).to(torch.float8_e4m3fn).float() * a_scale
        weight = self.codes.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        weight = (weight * self.scale[:, None, :, None]).flatten(2).flatten(0, 1)
        return F.linear(a.view(m, k).to(x.dtype), weight.to(x.dtype))


def ways_of(case: Case, n: int) -> dict[str, Way]:
    """Every way to run ``case``; the first is ours."""
    model = Source(case)
    ways: dict[str, Way] = {
        "fx_quant": torch.compile(_ours(case, model), backend="fx_quant", dynamic=False),
        "float": _float_linear(case.weight.t().contiguous().to(case.dtype)),
        "inductor": torch.compile(model, dynamic=False),
    }
    if case.dtype is torch.bfloat16 and case.scheme.weight.dtype is torch.int8 and case.block is None:
        scale = case.scale.to(case.dtype)
        ways["aten int8pack"] = lambda x: torch._weight_int8pack_mm(x, case.codes, scale)
    if case.scheme.weight.dtype in INT4_DTYPES and case.zero_point is not None:
        nibbles = torch.stack((case.codes & 0xF, case.codes >> 4), -1).flatten(1).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 2)
        scales = torch.stack((case.scale.t(), (-case.scale * case.zero_point).t()), -1).contiguous().to(case.dtype)
        ways["aten int4pack"] = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, case.block[1], scales)
    return ways


def _ours(case: Case, model: Source) -> nn.Module:
    if case.scheme.weight.dtype not in INT4_DTYPES:
        return model
    zero_point = None if case.zero_point is None else case.zero_point + 8  # of codes 0..15
    return QuantizedLinear(case.scheme, case.codes, case.scale, weight_zero_point=zero_point)


def _float_linear(weight: Tensor) -> Way:
    return lambda x: F.linear(x, weight)


def exact(case: Case, x: Tensor) -> Tensor:
    """The result in float64; the activation is quantized where the scheme says so."""
    if case.scheme.weight_only:
        return x.double() @ case.weight.double()
    assert case.block is not None
    k, columns = x.shape[1], case.block[1]
    groups = x.float().view(x.shape[0], k // columns, columns)
    a_scale = groups.abs().amax(-1).clamp_min(1e-12) / 448
    a = (groups / a_scale[..., None]).to(torch.float8_e4m3fn).flatten(1)
    return scaled_mm(a, case.codes.t(), a_scale, case.scale, None, torch.float32, block=case.block).double()


def verify(ways: dict[str, Way], case: Case, x: Tensor) -> None:
    """Run each way once and compare it with float64.

    Raises:
        RuntimeError: a way is further from float64 than its dtype explains.
    """
    expected = exact(case, x)
    for name, way in ways.items():
        if name == "float" and not case.scheme.weight_only:
            continue  # its activation is not quantized
        error = ((way(x).double() - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE[case.dtype]:
            raise RuntimeError(
                f"{name} on {case.scheme}: relative error must be <= {TOLERANCE[case.dtype]}, got {error:.2e}"
            )


def medians(ways: dict[str, Way], x: Tensor, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each way; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while len(times["fx_quant"]) < 5 or (time.perf_counter() < end and len(times["fx_quant"]) < 100):
        for name, way in ways.items():
            start = clock()
            way(x)
            times[name].append(clock() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


def measure(text: str, dtype: torch.dtype, shape: tuple[int, int], rows: list[int], options) -> list[dict]:
    """One row of the table for each number of rows of the activation."""
    n, k = shape
    torch._dynamo.reset()
    case = make_case(text, dtype, n, k)
    ways = ways_of(case, n)
    size = sum(x.nbytes for x in (case.codes, case.scale, case.zero_point) if x is not None)
    found = []
    for m in rows:
        x = torch.randn(m, k).to(dtype)
        verify(ways, case, x)
        ms = medians(ways, x, options.seconds, time.thread_time if options.cpu_time else time.perf_counter)
        best = min((name for name in ms if name != "fx_quant"), key=ms.__getitem__)
        row = {"threads": torch.get_num_threads(), "dtype": dtype_name(dtype), "scheme": str(case.scheme)}
        row |= {"n": n, "k": k, "m": m, "ms": ms, "best": best, "ratio": ms[best] / ms["fx_quant"]}
        row["float_ratio"] = ms["float"] / ms["fx_quant"]
        row |= {"gigabytes": size / ms["fx_quant"] / 1e6 if m == 1 else None}
        found.append(row)
        print(_line(row), file=sys.stderr, flush=True)
    return found


def _line(row: dict) -> str:
    ways = ", ".join(f"{name} {ms:.2f}" for name, ms in row["ms"].items())
    return f"{row['scheme']} {row['n']} x {row['k']}, m={row['m']}: {ways}"


@torch.no_grad()
def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4096 x 4096, one thread, m of 1, 16 and 256")
    parser.add_argument("--threads", nargs="+", type=int, help="numbers of threads (default: 1 and all)")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, help="least time for each row (default: 2, quick 0.5)")
    parser.add_argument("--cpu-time", action="store_true", help="time of the thread, not of the clock")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    options = parser.parse_args()
    options.seconds = options.seconds or (0.5 if options.quick else 2.0)
    threads = options.threads or ([1] if options.quick else sorted({1, torch.get_num_threads()}))
    if options.cpu_time and threads != [1]:
        parser.error("--cpu-time is for one thread; say --threads 1")
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        for dtype in (getattr(torch, name) for name in options.dtypes):
            for shape in ((4096, 4096),) if options.quick else SHAPES:
                for text in SCHEMES:
                    rows += measure(text, dtype, shape, [1, 16, 256] if options.quick else list(ROWS), options)
    print(described(machine()))
    headers = ("threads", "dtype", "scheme", "n x k", "m", "ms", "best other", "to it", "to float", "GB/s")
    cells = [
        (
            row["threads"],
            row["dtype"],
            row["scheme"],
            f"{row['n']} x {row['k']}",
            row["m"],
            f"{row['ms']['fx_quant']:.2f}",
            f"{row['best']} {row['ms'][row['best']]:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['float_ratio']:.2f}",
            "" if row["gigabytes"] is None else f"{row['gigabytes']:.1f}",
        )
        for row in rows
    ]
    print(tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
