"""What a CPU can do at most: bytes read in a second, and operations of each dot-product instruction.

``python benchmarks/ceilings.py [--threads 1 2]`` prints them. ``cpu.py`` times them in turns with the linears, so that
a linear's share of a ceiling is a share of what the machine gave at that moment.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fx_quant.kernels.cpu.native import load
from fx_quant.target import cpu_features

# (streams, bytes that a prefetch runs ahead; 0 leaves it to the hardware)
READS = ((1, 0), (2, 0), (4, 0), (8, 0), (1, 2048), (1, 8192), (4, 512), (4, 1024))
MIB = 1 << 20

_SOURCE = r"""
#include <cstdint>
#include <omp.h>
#if defined(__AMX_TILE__)
#include <immintrin.h>
#endif

typedef int Line __attribute__((vector_size(64)));

template <int STREAMS, int AHEAD>
static int read_streams(const char* p, int64_t size)
{
  const int64_t part = size / STREAMS / 256 * 256;
  Line s0 = {}, s1 = {}, s2 = {}, s3 = {};
  for (int64_t i = 0; i < part; i += 256) {
#pragma GCC unroll 8
    for (int s = 0; s < STREAMS; s++) {
      const char* q = p + s * part + i;
      if constexpr (AHEAD > 0) {
        for (int line = 0; line < 4; line++) {
          __builtin_prefetch(q + AHEAD + 64 * line, 0, 3);
        }
      }
      const Line* lines = reinterpret_cast<const Line*>(q);
      s0 += lines[0];
      s1 += lines[1];
      s2 += lines[2];
      s3 += lines[3];
    }
  }
  const Line sum = (s0 + s1) + (s2 + s3);
  int total = 0;
  for (int i = 0; i < 16; i++) {
    total += sum[i];
  }
  return total;
}

extern "C" __attribute__((visibility("default")))
int fxq_read(const char* p, int64_t size, int variant, int64_t repeats, int threads)
{
  int total = 0;
  const int64_t part = size / threads / 4096 * 4096;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const char* mine = p + part * omp_get_thread_num();
    for (int64_t r = 0; r < repeats; r++) {
      switch (variant) {
%(cases)s
      }
      asm volatile("" ::: "memory");  // the next repeat must read again
    }
  }
  return total;
}

// Twelve independent chains hide the latency of any of these instructions. Each function returns the operations of one
// repeat, a multiply and an add being two; 0 where the compiler's target lacks the instruction.
#define CHAINS(NAME, VECTOR, INSTRUCTION, OPERATIONS)                                            \
  extern "C" __attribute__((visibility("default"))) int NAME(int64_t repeats, int threads)       \
  {                                                                                              \
    _Pragma("omp parallel num_threads(threads)")                                                 \
    {                                                                                            \
      VECTOR a[12] = {}, b = {}, c = {};                                                         \
      for (int64_t r = 0; r < repeats; r++) {                                                    \
        _Pragma("GCC unroll 12")                                                                 \
        for (int i = 0; i < 12; i++) {                                                           \
          asm volatile(INSTRUCTION " %%1, %%2, %%0" : "+v"(a[i]) : "v"(b), "v"(c));              \
        }                                                                                        \
      }                                                                                          \
    }                                                                                            \
    return 12 * OPERATIONS;                                                                      \
  }
#define ABSENT(NAME) \
  extern "C" __attribute__((visibility("default"))) int NAME(int64_t, int) { return 0; }

typedef float Floats __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32)));

// Four tiles of sums of 16 x 16, each of two tiles of 1 KiB.
#define TILES(NAME, PRODUCT, OPERATIONS)                                                         \
  extern "C" __attribute__((visibility("default"))) int NAME(int64_t repeats, int threads)       \
  {                                                                                              \
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } all = {1}; \
    for (int tile = 0; tile < 8; tile++) {                                                       \
      all.bytes[tile] = 64;                                                                      \
      all.rows[tile] = 16;                                                                       \
    }                                                                                            \
    _Pragma("omp parallel num_threads(threads)")                                                 \
    {                                                                                            \
      _tile_loadconfig(&all);                                                                    \
      for (int64_t r = 0; r < repeats; r++) {                                                    \
        PRODUCT(0, 4, 6);                                                                        \
        PRODUCT(1, 4, 7);                                                                        \
        PRODUCT(2, 5, 6);                                                                        \
        PRODUCT(3, 5, 7);                                                                        \
      }                                                                                          \
      _tile_release();                                                                           \
    }                                                                                            \
    return 4 * OPERATIONS;                                                                       \
  }

#if defined(__AMX_INT8__)
TILES(fxq_tdpbssd, _tile_dpbssd, 2 * 16 * 16 * 64)
#else
ABSENT(fxq_tdpbssd)
#endif
#if defined(__AMX_BF16__)
TILES(fxq_tdpbf16ps, _tile_dpbf16ps, 2 * 16 * 16 * 32)
#else
ABSENT(fxq_tdpbf16ps)
#endif
#if defined(__AVX512VNNI__)
CHAINS(fxq_vpdpbusd, Line, "vpdpbusd", 128)
#else
ABSENT(fxq_vpdpbusd)
#endif
#if defined(__AVX512BF16__)
CHAINS(fxq_vdpbf16ps, Floats, "vdpbf16ps", 64)
#else
ABSENT(fxq_vdpbf16ps)
#endif
#if defined(__AVX512F__)
CHAINS(fxq_vfmadd231ps, Floats, "vfmadd231ps", 32)
#elif defined(__FMA__)
CHAINS(fxq_vfmadd231ps, HalfFloats, "vfmadd231ps", 16)
#else
ABSENT(fxq_vfmadd231ps)
#endif
"""

INSTRUCTIONS = ("tdpbssd", "tdpbf16ps", "vpdpbusd", "vdpbf16ps", "vfmadd231ps")
# Of tiles, where a processor lets the process use them.
_BY_TILES = {"vpdpbusd": "tdpbssd", "vdpbf16ps": "tdpbf16ps"}


@functools.cache
def library() -> Any:
    """The micro-benchmarks, compiled once for this machine.

    Raises:
        RuntimeError: they do not compile.
    """
    cases = "\n".join(
        f"        case {i}: total += read_streams<{streams}, {ahead}>(mine, part); break;"
        for i, (streams, ahead) in enumerate(READS)
    )
    found = load("the ceilings' micro-benchmarks", _SOURCE % {"cases": cases})
    if found is None:
        raise RuntimeError("the ceilings need a C++ compiler, and none worked; install g++ or set CXX")
    size, number, address = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    found.fxq_read.argtypes = [address, size, number, size, number]
    for name in INSTRUCTIONS:
        getattr(found, f"fxq_{name}").argtypes = [size, number]
    return found


@dataclass(frozen=True)
class Ceiling:
    """Something whose rate is a limit.

    Args:
        run: one measurement.
        amount: bytes or operations of one measurement; the rate is ``amount / seconds / 1e9``.
        what: of the variant that was fastest, for people.
    """

    run: Callable[[], object]
    amount: float
    what: str = ""

    def rate(self, repeats: int = 5) -> float:
        """GB/s or Gop/s of the fastest of ``repeats`` measurements."""
        return self.amount / min(_seconds(self.run) for _ in range(repeats)) / 1e9


@dataclass(eq=False)
class Buffer:
    """``size`` bytes of memory of our own, of 4 KiB pages or of huge ones, every page touched.

    Args:
        huge: ask for transparent huge pages; what the kernel gives depends on its settings.
    """

    size: int
    huge: bool
    _memory: mmap.mmap = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Shared memory, which is the default, follows another setting and gets no huge pages.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, self.size + 2 * MIB, flags=flags)
        advice = getattr(mmap, "MADV_HUGEPAGE" if self.huge else "MADV_NOHUGEPAGE", None)
        if advice is not None:
            self._memory.madvise(advice)
        ctypes.memset(self.address, 1, self.size)

    @property
    def address(self) -> int:
        """Of the first byte, at a multiple of 2 MiB."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        return -(-start // (2 * MIB)) * 2 * MIB


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def reading(buffer: Buffer, threads: int, *, size: int | None = None) -> Ceiling:
    """The fastest way to read from ``buffer``.

    Args:
        size: bytes that are read again and again, for the bandwidth of a cache; None reads the whole buffer, an eighth
            at a time, so that what is read was long evicted.
    """
    read = library().fxq_read
    if size is None:
        part, repeats = buffer.size // 8, 1
        turns = iter(range(1 << 62))
        start = lambda: buffer.address + part * (next(turns) % 8)  # noqa: E731
    else:
        part, repeats = size, max(1, 64 * MIB // size)
        start = lambda: buffer.address  # noqa: E731
    ceilings = [
        Ceiling(
            lambda variant=variant: read(start(), part, variant, repeats, threads),
            part * repeats,
            f"{streams} streams" + (f", prefetch {ahead}" if ahead else ""),
        )
        for variant, (streams, ahead) in enumerate(READS)
    ]
    rounds = [[_seconds(ceiling.run) for ceiling in ceilings] for _ in range(4)]
    medians = [statistics.median(taken) for taken in zip(*rounds, strict=True)]
    return ceilings[medians.index(min(medians))]


def peak(instruction: str, threads: int) -> Ceiling | None:
    """The rate of ``instruction`` without any memory; None where the machine lacks it."""
    if instruction in _BY_TILES.values() and "amx" not in cpu_features():
        return None
    run, repeats = getattr(library(), f"fxq_{instruction}"), 2_000_000
    operations = run(1, threads)
    if not operations:
        return None
    return Ceiling(lambda: run(repeats, threads), float(operations) * repeats * threads)


def fastest(instruction: str, threads: int) -> str:
    """``instruction``, or the one by which tiles multiply the same numbers."""
    by_tiles = _BY_TILES.get(instruction)
    return instruction if by_tiles is None or peak(by_tiles, threads) is None else by_tiles


def peaks(threads: int) -> dict[str, Ceiling]:
    """``peak`` of every instruction that this machine has."""
    return {name: found for name in INSTRUCTIONS if (found := peak(name, threads)) is not None}


def cache_sizes() -> dict[str, int]:
    """Bytes of this machine's ``L2`` of one core and of its ``L3``, from sysfs; empty where that does not say."""
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size = (cache / "level").read_text().strip(), (cache / "size").read_text().strip()
        if level in ("2", "3"):
            sizes[f"L{level}"] = int(size.rstrip("KM")) * (MIB if size.endswith("M") else 1024)
    return sizes


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where sysfs does not say."""
    return max(cache_sizes().values(), default=32 * MIB)


def measured(threads: int, size: int = 512 * MIB) -> dict[str, Any]:
    """Every ceiling in GB/s and Gop/s: memory with huge pages and without, the caches, the instructions."""
    huge, small = Buffer(size, huge=True), Buffer(size, huge=False)
    found: dict[str, Any] = {"threads": threads}
    for name, buffer in (("memory, huge pages", huge), ("memory, 4 KiB pages", small)):
        best = reading(buffer, threads)
        found[name] = best.rate(16)
        found[f"{name}, read by"] = best.what
    sizes = cache_sizes()
    if "L2" in sizes:
        found["L2"] = reading(huge, threads, size=sizes["L2"] // 2 * threads).rate()
    if "L3" in sizes:
        found["L3"] = reading(huge, threads, size=sizes["L3"] // 2).rate()
    return found | {name: ceiling.rate() for name, ceiling in peaks(threads).items()}


_HELD = r"""
from cpu_process import memory
import torch
held = [memory("VmRSS")]
import torch._dynamo, torch._inductor.compile_fx
held.append(memory("VmRSS"))
torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
held.append(memory("VmRSS"))
print(*held)
"""


def held_by_torch() -> str:
    """What a process holds that compiles anything at all, in MiB: PyTorch, its compiler's modules, one tiny graph."""
    folder = str(Path(__file__).resolve().parent)
    told = subprocess.run(
        [sys.executable, "-c", _HELD],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": folder},
    )
    torch, compiler, graph = map(float, told.stdout.split())
    return (
        f"memory of a process: {torch:.0f} MiB with torch, {compiler - torch:.0f} more with the modules of "
        f"torch.compile, {graph - compiler:.0f} more with a graph of one line"
    )


def table(found: list[Mapping[str, Any]]) -> str:
    """What ``measured`` gave, one column for each number of threads."""
    names = [name for name in found[0] if name != "threads"]
    unit = {name: "Gop/s" if name in INSTRUCTIONS else "GB/s" for name in names}
    cells = []
    for name in names:
        values = [each[name] for each in found]
        text = [value if isinstance(value, str) else f"{value:.1f} {unit[name]}" for value in values]
        cells.append((name, *text))
    headers = ("ceiling", *(f"{each['threads']} threads" for each in found))
    return tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads (default: 1)")
    options = parser.parse_args()
    print(table([measured(threads) for threads in options.threads]))
    print(held_by_torch())


if __name__ == "__main__":
    main()
