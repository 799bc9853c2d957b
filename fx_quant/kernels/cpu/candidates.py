"""The native kernels that this machine can tune, and how they are timed: interleaved, on weights that are not in cache.

Every result is compared with that of the first plans before anything is timed.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fx_quant.errors import FxQuantError
from fx_quant.kernels.cpu.decode import decode_of, decoded_matmul, is_int4
from fx_quant.kernels.cpu.int8_kernels import LEVELS
from fx_quant.kernels.cpu.native import BFLOAT16, Dot, matmul
from fx_quant.kernels.cpu.plans import PlanTable, default_table
from fx_quant.kernels.layouts import packed_layout
from fx_quant.report.progress import progress
from fx_quant.tuning.search import Budget

Shape = tuple[int, int]

_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS_EACH = 7, 60, 0.03


@dataclass(frozen=True)
class TunedKernel:
    """One kind of native kernel that this machine can run.

    Args:
        kind: what its plans are called.
        layout: of its packed weight.
        a_dtype: of the activation.
        code_dtype: of the weight before it is packed.
        dot: what multiplies the codes; None where the weight is decoded in registers.
        block: ``(rows, k)`` of the weight for each scale; None is one for each row.
    """

    kind: str
    layout: str
    a_dtype: torch.dtype
    code_dtype: torch.dtype
    dot: Dot | None = None
    block: tuple[int, int] | None = None

    @property
    def decodes(self) -> bool:
        """Whether the weight is decoded in registers."""
        return self.dot is None

    def weight(self, shape: Shape) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of the packed weight ``[n, k]``."""
        layout = packed_layout(self.layout)
        n, k = shape
        return layout.dtype or self.code_dtype, layout.shape(n, k // 2 if self.is_int4 else k)

    @property
    def is_int4(self) -> bool:
        """Whether a byte holds two codes."""
        return self.layout == "int4_words"


def tuned_kernels(budget: Budget | None = None) -> tuple[TunedKernel, ...]:
    """The kinds of native kernel that this machine has the instructions and a compiler for, in order of preference.

    Args:
        budget: once compiling them has taken a half of it, no other is compiled; the first always is.
    """
    found: list[TunedKernel] = []
    longest = 0.0
    for kernel in progress(supported_kernels(), "compiling", "kernel"):
        if found and budget is not None and not budget.leaves(longest, share=0.5):
            break
        begin = time.perf_counter()
        if _runs(kernel):
            found.append(kernel)
        longest = max(longest, time.perf_counter() - begin)
    return tuple(found)


def supported_kernels() -> tuple[TunedKernel, ...]:
    """The kinds of native kernel that this machine has the instructions for; nothing is compiled."""
    int8 = [(level.dot, level.dot.layout) for level in LEVELS if level.dot.layout and level.dot.exists_here()]
    # Of several the first is preferred.
    kernels = [TunedKernel(dot.kind, layout, torch.int8, torch.int8, dot) for dot, layout in int8[:1]]
    if BFLOAT16.exists_here():
        kernels.append(TunedKernel(BFLOAT16.kind, "bf16_pairs", torch.bfloat16, torch.bfloat16, BFLOAT16))
    for a_dtype, bytes_layout in ((torch.bfloat16, "pairs"), (torch.float32, "columns")):
        for code_dtype, layout, block in (
            (torch.int8, bytes_layout, None),
            (torch.float8_e4m3fn, bytes_layout, (128, 128)),
            (torch.uint8, "int4_words", (1, 128)),
        ):
            decode = decode_of(a_dtype, code_dtype, layout == "int4_words")
            if decode.takes(block):
                kernels.append(TunedKernel(decode.kind, layout, a_dtype, code_dtype, block=block))
    return tuple(kernels)


def _runs(kernel: TunedKernel) -> bool:
    """Whether the native code compiles here."""
    shape = (64, 128)
    dtype, packed = kernel.weight(shape)
    weight = torch.zeros(_bytes(dtype, packed), dtype=torch.uint8).view(dtype).view(packed)
    return _call(kernel, 1, shape)(weight, default_table(kernel.kind)) is not None


class Timer:
    """Medians of interleaved calls on weights that are not in cache: a ``Measure``.

    Args:
        kernels, shapes: what will be measured, which says how much memory the weights take.
    """

    def __init__(self, kernels: Sequence[TunedKernel], shapes: Sequence[Shape]) -> None:
        largest = max(_bytes(*kernel.weight(shape)) for kernel in kernels for shape in shapes)
        # Twice the cache goes by before a weight comes again.
        size = max(2 * min(cache_bytes(), 2**28), 2 * _aligned(largest))
        # Moderate numbers as int8, as float8 and as bfloat16; every byte is two codes of int4.
        codes = torch.randint(0, 32, (min(size, 2**22),), dtype=torch.uint8)
        codes = (codes & 15) | 0x30 | (codes & 16) << 3
        self.bytes = codes.repeat(-(-size // codes.numel()))[:size]

    def __call__(self, kernel: TunedKernel, rows: int, shape: Shape, tables: Sequence[PlanTable]) -> list[float]:
        """Seconds of ``kernel`` for ``rows`` rows and a weight ``[n, k]``, under each of ``tables``.

        Raises:
            FxQuantError: a table changes the result.
        """
        weights = itertools.cycle(self._weights(kernel, shape))
        run = _call(kernel, rows, shape)
        _verify(kernel, shape, [run(next(iter(self._weights(kernel, shape))), plans) for plans in tables], tables)
        times: list[list[float]] = [[] for _ in tables]
        begin, allowed = time.perf_counter(), _SECONDS_EACH * len(tables)
        for i in range(_MOST_ROUNDS):
            if i >= _LEAST_ROUNDS and time.perf_counter() - begin > allowed:
                break
            for at in range(len(tables)):
                turn = (i + at) % len(tables)
                weight = next(weights)
                before = time.perf_counter()
                run(weight, tables[turn])
                times[turn].append(time.perf_counter() - before)
        return [statistics.median(seconds) for seconds in times]

    def _weights(self, kernel: TunedKernel, shape: Shape) -> list[Tensor]:
        dtype, packed = kernel.weight(shape)
        size = _bytes(dtype, packed)
        starts = range(0, self.bytes.numel() - size + 1, _aligned(size))
        return [self.bytes[start : start + size].view(dtype).view(packed) for start in starts]


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _aligned(size: int) -> int:
    return -(-size // 4096) * 4096


def _call(kernel: TunedKernel, rows: int, shape: Shape) -> Callable[[Tensor, PlanTable], Tensor | None]:
    """The kernel as a function of its weight and the plans, the rest of its operands made once."""
    n, k = shape
    is_int8 = kernel.a_dtype is torch.int8
    a = torch.randint(-128, 128, (rows, k), dtype=torch.int8) if is_int8 else torch.randn(rows, k).to(kernel.a_dtype)
    if kernel.dot is not None:
        return partial(_tile, kernel.dot, a, n)
    block = kernel.block
    scale = torch.rand((n,) if block is None else (-(-n // block[0]), -(-k // block[1])))
    return partial(_decoded, a, n, scale, block)


def _tile(dot: Dot, a: Tensor, n: int, b: Tensor, plans: PlanTable) -> Tensor | None:
    return matmul(dot, a, b, n, plans)


def _decoded(
    a: Tensor, n: int, scale: Tensor, block: tuple[int, int] | None, b: Tensor, plans: PlanTable
) -> Tensor | None:
    decode = decode_of(a.dtype, b.dtype, is_int4(b))
    return decoded_matmul(decode, a, b, n, None, scale, None, None, torch.float32, block, plans)


def _verify(kernel: TunedKernel, shape: Shape, results: Sequence[Tensor | None], tables: Sequence[PlanTable]) -> None:
    """The results are the first one: bit-equal where they are integers, else but for the order of a float32 sum."""
    first = results[0]
    assert first is not None
    is_exact = not first.is_floating_point()
    allowed = 0.0 if is_exact else 2.0**-20 * math.sqrt(shape[1]) * first.abs().max().item()
    for result, plans in zip(results, tables, strict=True):
        assert result is not None
        error = (result.double() - first.double()).abs().max().item()
        if not error <= allowed:
            raise FxQuantError(
                f"a plan must not change results, but {kernel.kind} of a weight {shape} differs by {error:.3g} "
                f"(at most {allowed:.3g}) under {plans.ranges}; nothing is saved, report this with the processor's name"
            )


def cache_bytes() -> int:
    """Size of the last-level cache that a core has, 64 MiB where the system does not say."""
    sizes = [64 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        number, unit = text.rstrip("KMG"), text[-1:]
        if number.isdigit():
            sizes.append(int(number) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(unit, 1))
    return max(sizes[1:] or sizes)
