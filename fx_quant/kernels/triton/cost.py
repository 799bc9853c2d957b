"""What a matmul costs on a GPU: the floor that no kernel beats, and what a configuration should take.

The model ranks configurations, so that a tuner has few to time and an untuned shape a sensible one::

    seconds = max(waves * tile, memory + epilogue / programs of a processor) + start + reduction
    tile    = steps * max(products, shared memory, cache) + epilogue

Nothing was fitted: rates are those of ``architectures.py``. ``tests/test_gpu_cost.py`` says what it is held to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.launch import Configuration

# From the launch to the first product, and between tiles whose loads do not overlap: memory's latency, a few times.
_START = 1.5e-6
_FILL = 0.8e-6
# A round of partial sums through the cache, and of the counter that orders it.
_REDUCTION = 1.0e-6
# Seconds for which a byte is on its way from memory: as many bytes must be, for all of the bandwidth.
_LATENCY = 0.8e-6
# A processor can have this many times its share of memory's bandwidth, where others have none.
_PROCESSOR_SHARE = 1.5
# Tensor cores read operands from shared memory, 128 bytes a cycle, for 64 rows at a time.
_SHARED_ROWS = 64
# Candidates that are worth a measurement.
MOST = 10


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Matmul:
    """The sizes of ``out[m, n] = a[m, k] @ b[k, n]`` and what its operands take.

    Args:
        m, n, k: sizes.
        a_dtype: dtype of ``a``: codes, or the float activation of a weight-only matmul.
        b_bits: bits of one code of the weight.
        out_dtype: dtype of the result.
        group: codes along k that share a scale of the weight; 0 where scales do not vary along k.
    """

    m: int
    n: int
    k: int
    a_dtype: torch.dtype
    b_bits: int = 8
    out_dtype: torch.dtype = torch.bfloat16
    group: int = 0

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.m * self.n * self.k

    @property
    def weight_bytes(self) -> float:
        """Of the weight's codes, and of its scales where a group has one: two bytes each."""
        groups = _ceil(self.k, self.group) if self.group else 0
        return self.n * self.k * self.b_bits / 8 + 2.0 * self.n * groups

    @property
    def bytes(self) -> float:
        """Of all operands and the result, each read or written once."""
        return self.weight_bytes + self.m * (self.k * self.a_dtype.itemsize + self.n * self.out_dtype.itemsize)


@dataclass(frozen=True)
class Floor:
    """The least time of a matmul.

    Args:
        seconds: that its products or its bytes take, whichever is more.
        bound: ``memory`` or ``compute``.
    """

    seconds: float
    bound: str


def floor(matmul: Matmul, architecture: Architecture) -> Floor:
    """The roofline: all products at the architecture's rate, all bytes at its bandwidth; nothing for no result."""
    if not matmul.m * matmul.n:
        return Floor(0.0, "memory")
    compute, memory = matmul.operations / architecture.rate(matmul.a_dtype), matmul.bytes / architecture.bandwidth
    return Floor(max(compute, memory), "compute" if compute >= memory else "memory")


@dataclass(frozen=True)
class Cost:
    """What a configuration should take.

    Args:
        configuration: the configuration.
        seconds: the estimate.
        programs: tiles of the result, times the parts of a sum.
        waves: rounds of programs over the processors, whole ones.
        limit: what takes most of the time: ``products``, ``shared memory``, ``cache``, ``memory`` or ``epilogue``.
    """

    configuration: Configuration
    seconds: float
    programs: int
    waves: int
    limit: str


def estimate(configuration: Configuration, matmul: Matmul, architecture: Architecture) -> Cost:
    """What ``matmul`` should take by a configuration."""
    programs = _ceil(matmul.m, configuration.block_m) * _ceil(matmul.n, configuration.block_n) * configuration.split_k
    if not programs:
        return Cost(configuration, 0.0, 0, 0, "memory")
    processors = architecture.processors
    waves = _ceil(programs, processors)
    steps = _ceil(_ceil(matmul.k, configuration.block_k), configuration.split_k)
    a_bytes, b_bytes = matmul.a_dtype.itemsize, matmul.b_bits / 8
    # In the tensor cores both operands have the wider dtype.
    element = max(a_bytes, 1.0)
    rows, columns = configuration.block_m, configuration.block_n
    # The operand whose rows the tensor cores take 64 at a time; the other one is read for each 64 of them.
    outer, inner = (columns, rows) if configuration.form == "swapped" else (rows, columns)
    work = 2.0 * outer * inner * configuration.block_k
    products = work / (_rate(configuration, matmul, architecture) / processors)
    groups = _ceil(outer, _SHARED_ROWS)
    shared = (
        groups * (_SHARED_ROWS + inner) * configuration.block_k * element / (architecture.shared_bandwidth / processors)
    )
    # Rows of a tile that are not there are not loaded.
    loaded = (min(rows, matmul.m) * a_bytes + min(columns, matmul.n) * b_bytes) * configuration.block_k
    cache = loaded / (architecture.cache_bandwidth / processors)
    step = max(products, shared, cache)
    epilogue = rows * columns * matmul.out_dtype.itemsize * 4 / (architecture.cache_bandwidth / processors)
    overlapped = configuration.warp_specialized or configuration.flattened
    fill = 0.0 if overlapped else _FILL
    tile = steps * step + epilogue
    computed = waves * (tile + fill)
    # Memory gives all of its bandwidth only to enough processors, which together wait for enough bytes.
    resident_each = _programs_a_processor(configuration, matmul, architecture)
    resident = min(programs, processors * resident_each)
    flying = resident * max(configuration.stages - 1, 1) * loaded
    idle = max(1.0, processors / (_PROCESSOR_SHARE * min(programs, processors)))
    # A program's first loads and its results are waited for, unless another is there to go on.
    transfer = matmul.bytes / architecture.bandwidth * max(idle, _LATENCY * architecture.bandwidth / flying)
    memory = transfer + (fill + epilogue) / resident_each
    reduction = 0.0
    if configuration.split_k > 1:
        reduction = _REDUCTION + 8.0 * configuration.split_k * matmul.m * matmul.n / architecture.cache_bandwidth
    parts = {"products": steps * products, "shared memory": steps * shared, "cache": steps * cache}
    limit = max(parts, key=parts.__getitem__)
    if memory > computed:
        limit = "memory"
    elif epilogue > steps * step:
        limit = "epilogue"
    return Cost(configuration, max(computed, memory) + _START + reduction, programs, waves, limit)


def _rate(configuration: Configuration, matmul: Matmul, architecture: Architecture) -> float:
    """Operations a second of the products as this configuration does them."""
    rate = architecture.rate(matmul.a_dtype)
    # Tensor cores of sm90 take float8 from 64 rows on; fewer are widened to half precision by the old instructions.
    if architecture.capability == 90 and configuration.form == "tile" and configuration.block_m < 64:
        return min(rate, architecture.half) / 2
    return rate


def _programs_a_processor(configuration: Configuration, matmul: Matmul, architecture: Architecture) -> int:
    """Programs that a processor holds at once, by shared memory; a persistent one has it alone."""
    if configuration.form == "persistent":
        return 1
    a_bytes, b_bytes = configuration.block_m * matmul.a_dtype.itemsize, configuration.block_n * matmul.b_bits / 8
    stage = (a_bytes + b_bytes) * configuration.block_k
    return max(1, min(8, int(architecture.shared_bytes // max(stage * configuration.stages, 1))))


def rank(
    candidates: Iterable[Configuration], matmul: Matmul, architecture: Architecture, most: int = MOST
) -> list[Cost]:
    """The ``most`` configurations that should be fastest, best first."""
    costs = (estimate(configuration, matmul, architecture) for configuration in candidates)
    return sorted(costs, key=lambda cost: cost.seconds)[:most]
