"""Milliseconds of one eager linear: float, ``QuantizedLinear``, and the same by hand with PyTorch's ops, taking turns.

``python benchmarks/eager.py [--threads N] [--quick]`` (or ``make bench-eager``). Each result is compared with the
matmul of the decoded codes in float64 before it is timed. Linears have no bias; scales and packed weights of the ways
by hand are made before the clock starts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from machine import add_threads, described, machine
from stopwatch import interleaved_medians

from fx_quant.errors import NoKernelError
from fx_quant.layers.activation import quantize_activation
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.scheme import dtype_name

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((2048, 2048), (4096, 4096), (11008, 4096))
ROWS = (1, 16, 64, 256)
GROUP = 128

# Largest error of a result, in units of the largest result. float32: a sum of 4096 products in another order. bfloat16:
# scales and decoded weights rounded to 8 bits, and so the result, 2**-9 each, which the sum does not always average.
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Call = Callable[[Tensor], Tensor]


# --- by hand ----------------------------------------------------------------------------------------------------------


def int_mm(layer: QuantizedLinear, dtype: torch.dtype) -> Call:
    """Each token to int8, ``torch._int_mm``, scales."""
    codes, scale = layer.weight.t(), layer.weight_scale.flatten()
    least = torch.finfo(torch.float32).tiny

    def call(x: Tensor) -> Tensor:
        step = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=least)
        a = (x.float() / step).round().clamp(-127, 127).to(torch.int8)
        return (torch._int_mm(a, codes).float() * step * scale).to(dtype)

    return call


def scaled_mm(layer: QuantizedLinear, dtype: torch.dtype) -> Call:
    """Each token to float8, ``torch._scaled_mm`` with row-wise scales."""
    codes, scale = layer.weight.t(), layer.weight_scale.reshape(1, -1)
    largest = torch.finfo(torch.float8_e4m3fn).max

    def call(x: Tensor) -> Tensor:
        step = (x.abs().amax(-1, keepdim=True).float() / largest).clamp(min=1 / (512 * largest))
        a = (x.float() * step.reciprocal()).clamp(-largest, largest).to(torch.float8_e4m3fn)
        return torch._scaled_mm(a, codes, scale_a=step, scale_b=scale, out_dtype=dtype)

    return call


def int8pack(layer: QuantizedLinear, dtype: torch.dtype) -> Call:
    """``torch.ops.aten._weight_int8pack_mm``."""
    codes, scale = layer.weight, layer.weight_scale.flatten().to(dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scale)


def int4pack(layer: QuantizedLinear, dtype: torch.dtype) -> Call:
    """``torch.ops.aten._weight_int4pack_mm_for_cpu``."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_nibbles(layer.weight).to(torch.int32), 2)
    scale = layer.weight_scale.to(dtype).t()
    scales = torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


@dataclass(frozen=True)
class Kind:
    """A scheme, whose ``x`` stands for the dtype of a float activation, and the way to run it by hand.

    Args:
        scheme: as schemes print.
        op: name of the op that runs it by hand.
        by_hand: the layer and the dtype of ``x`` to the call.
    """

    scheme: str
    op: str
    by_hand: Callable[[QuantizedLinear, torch.dtype], Call]


KINDS: Mapping[str, Kind] = {
    "int8 dynamic": Kind("int8 per_token (dynamic) x int8 per_channel", "_int_mm", int_mm),
    "float8 dynamic": Kind("float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel", "_scaled_mm", scaled_mm),
    "int8 weight-only": Kind("{dtype} x int8 per_channel", "_weight_int8pack_mm", int8pack),
    "int4 weight-only": Kind(f"{{dtype}} x int4 per_group({GROUP})", "_weight_int4pack_mm_for_cpu", int4pack),
}


# --- what is right ----------------------------------------------------------------------------------------------------


def _nibbles(packed: Tensor) -> Tensor:
    """int4 codes ``[n, k / 2]``, two to a byte, as ``code + 8``, ``[n, k]``."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(1)


def in_float64(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The product of the decoded codes of ``x [m, k]`` and of the weight."""
    if layer.weight.dtype is torch.uint8:
        weight = (_nibbles(layer.weight).double() - 8) * layer.weight_scale.double().repeat_interleave(GROUP, 1)
    else:
        weight = layer.weight.double() * layer.weight_scale.double()
    if layer.scheme.weight_only:
        return x.double() @ weight.t()
    codes, scale, _ = quantize_activation(x, layer.scheme.activation)
    return codes.double() @ weight.t() * scale.double()


def check(way: str, got: Tensor, exact: Tensor) -> None:
    """Raise unless ``got`` is ``exact`` up to ``MAX_ERROR`` of its dtype.

    Raises:
        RuntimeError: it is not.
    """
    error = ((got.double() - exact).abs().max() / exact.abs().max()).item()
    if not error <= MAX_ERROR[got.dtype]:
        raise RuntimeError(f"{way}: error must be <= {MAX_ERROR[got.dtype]} of the result, got {error:.1e}; not timed")


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Medians of one problem."""

    kind: str
    dtype: torch.dtype
    n: int
    k: int
    m: int
    kernel: str
    ms: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """Time of ``QuantizedLinear`` over that of the float linear."""
        return self.ms["fx_quant"] / self.ms["float"]

    def cells(self) -> tuple[str, ...]:
        """As the table has them."""
        peer = self.ms["fx_quant"] / self.ms["by hand"]
        times = (f"{ms:.2f}" for ms in self.ms.values())
        problem = (self.kind, dtype_name(self.dtype), f"{self.n} x {self.k}", str(self.m))
        return (*problem, self.kernel, *times, f"{self.ratio:.2f}", KINDS[self.kind].op, f"{peer:.2f}")


HEADERS = (
    "weights",
    "x",
    "n x k",
    "m",
    "kernel",
    "float ms",
    "fx_quant ms",
    "by hand ms",
    "/ float",
    "by hand",
    "/ hand",
)


def rows_of(name: str, dtype: torch.dtype, n: int, k: int, seconds: float) -> Iterator[Row]:
    """One row for each number of tokens; none where no kernel of this machine runs the scheme."""
    linear = nn.Linear(k, n, bias=False, dtype=dtype)
    layer = QuantizedLinear.from_float(linear, KINDS[name].scheme.format(dtype=dtype_name(dtype)))
    tokens = torch.randn(max(ROWS), k).to(dtype)
    try:
        kernel = layer.selection(tokens).kernel.name
    except NoKernelError as error:
        print(f"{name}, {dtype_name(dtype)}: {error}", file=sys.stderr, flush=True)
        return
    weight, exact = linear.weight, in_float64(layer, tokens)
    float_exact = tokens.double() @ weight.double().t()
    ways: dict[str, Call] = {
        "float": lambda x: F.linear(x, weight),
        "fx_quant": layer,
        "by hand": KINDS[name].by_hand(layer, dtype),
    }
    for m in ROWS:
        x = tokens[:m].clone()
        for way, call in ways.items():
            check(f"{way} of {name}", call(x), (float_exact if way == "float" else exact)[:m])
        yield Row(name, dtype, n, k, m, kernel, interleaved_medians(ways, (x,), seconds=seconds, least=3))


def summary(rows: list[Row]) -> str:
    """Geometric mean over the float linear for each kind and dtype, then the rows that are slower."""
    lines = []
    for name in KINDS:
        for dtype in DTYPES:
            ratios = [row.ratio for row in rows if (row.kind, row.dtype) == (name, dtype)]
            if ratios:
                lines.append(
                    f"{name}, {dtype_name(dtype)}: {statistics.geometric_mean(ratios):.2f} of the float linear"
                )
    slower = [row for row in rows if row.ratio > 1]
    lines.append(f"slower than the float linear: {len(slower)} of {len(rows)} rows")
    lines += [f"  {r.kind}, {dtype_name(r.dtype)}, {r.n} x {r.k}, m = {r.m}: {r.ratio:.2f}" for r in slower]
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_threads(parser)
    parser.add_argument("--quick", action="store_true", help=f"leave {SHAPES[-1][0]} x {SHAPES[-1][1]} out")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each row (default: 1)")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for n, k in SHAPES[:-1] if options.quick else SHAPES:
        for name in KINDS:
            for dtype in DTYPES:
                print(f"{name}, {dtype_name(dtype)}, {n} x {k}", file=sys.stderr, flush=True)
                rows += rows_of(name, dtype, n, k, options.seconds)
    print(described(machine()))
    print(tabulate([row.cells() for row in rows], headers=HEADERS, tablefmt="simple", disable_numparse=True))
    print(summary(rows))


if __name__ == "__main__":
    main()
