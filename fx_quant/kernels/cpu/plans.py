"""What the native kernels do for each number of rows: a table of defaults, and what was measured on this machine.

A ``Plan`` changes when memory is asked for, in which parts a weight is read and which threads work: never what int8
kernels compute, and of float kernels only (``chunk_k``) the order in which the groups of a sum are added, so the
numerics class of a kernel holds under every plan. ``fx_quant.tune()`` measures and saves; what it saved is in force
for the same processor, number of threads, PyTorch and native sources.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fx_quant.target import cpu_features
from fx_quant.tuning.saved import Store

ANY_ROWS = 2**63 - 1
_MOST = 2**40


@dataclass(frozen=True)
class Plan:
    """What the native code does for a range of rows.

    Args:
        ahead: bytes that one block of rows, at most six, asks memory for ahead of what it multiplies; 0 is none.
        next_panel: whether several blocks of rows, that share part of a panel in cache, ask for what comes after it.
        chunk_k: k of a panel that all rows are multiplied by before the next; a multiple of 64.
        alone: multiply-adds (m * n * k) up to which the calling thread computes alone; beyond, all threads work.

    Raises:
        ValueError: a value that the native code cannot take.
    """

    ahead: int = 8192
    next_panel: bool = True
    chunk_k: int = 2048
    alone: int = 2**15

    def __post_init__(self) -> None:
        if type(self.next_panel) is not bool:
            raise ValueError(f"next_panel must be true or false, got {self.next_panel!r}")
        for name, least in (("ahead", 0), ("chunk_k", 64), ("alone", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= _MOST:
                raise ValueError(f"{name} must be a whole number from {least} to {_MOST}, got {value!r}")
        if self.chunk_k % 64:
            raise ValueError(f"chunk_k must be a multiple of 64, got {self.chunk_k}")


class _Row(ctypes.Structure):
    """``FxqPlan`` of ``kernels/cpu/source/plan.h``."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("rows", "ahead", "next_panel", "chunk_k", "alone"))


@dataclass(frozen=True)
class PlanTable:
    """Plans by ranges of rows.

    Args:
        ranges: ``(most rows, plan)``, ascending; the last holds for any number (``ANY_ROWS``).

    Raises:
        ValueError: the ranges are not that.
    """

    ranges: tuple[tuple[int, Plan], ...]

    def __post_init__(self) -> None:
        limits = [limit for limit, _ in self.ranges]
        is_rising = all(type(limit) is int and limit > 0 for limit in limits) and limits == sorted(set(limits))
        if not limits or not is_rising or limits[-1] != ANY_ROWS:
            raise ValueError(f"the ranges of rows must rise from 1 or more to {ANY_ROWS}, got {limits}")

    def plan_for(self, m: int) -> Plan:
        """The plan of the first range that holds ``m`` rows."""
        return next(plan for limit, plan in self.ranges if m <= limit)

    def replaced(self, m: int, **changes: Any) -> PlanTable:
        """The table with another plan in the range that holds ``m`` rows."""
        at = next(i for i, (limit, _) in enumerate(self.ranges) if m <= limit)
        limit, plan = self.ranges[at]
        changed = (limit, dataclasses.replace(plan, **changes))
        return PlanTable((*self.ranges[:at], changed, *self.ranges[at + 1 :]))

    @functools.cached_property
    def array(self) -> Any:
        """The table as C has it, ``FxqPlan[]``."""
        return (_Row * len(self.ranges))(*self._rows())

    def rendered(self) -> str:
        """The table as an initializer in C++."""
        return "{" + ", ".join("{" + ", ".join(f"{value}LL" for value in row) + "}" for row in self._rows()) + "}"

    def _rows(self) -> list[tuple[int, ...]]:
        return [(limit, *map(int, dataclasses.astuple(plan))) for limit, plan in self.ranges]

    def to_data(self) -> list[dict[str, Any]]:
        """The table as JSON holds it; ``rows`` of the last range is null."""
        return [
            {"rows": None if limit == ANY_ROWS else limit, **dataclasses.asdict(plan)} for limit, plan in self.ranges
        ]

    @staticmethod
    def from_data(data: Sequence[Mapping[str, Any]]) -> PlanTable:
        """The table of ``to_data()``.

        Raises:
            ValueError, TypeError, KeyError: the data is not of that form.
        """
        ranges = []
        for row in data:
            values = dict(row)
            limit = values.pop("rows")
            ranges.append((ANY_ROWS if limit is None else limit, Plan(**values)))
        return PlanTable(tuple(ranges))


# Rows that a model has while it decodes, alone or in a batch, and while it reads a prompt. Six are a block, and three
# blocks still wait for memory.
LIMITS = (2, 6, 18, 128, ANY_ROWS)
DEFAULT = PlanTable(tuple((limit, Plan()) for limit in LIMITS))
# Kinds of kernel, as ``native.Dot.kind`` and ``decode.Decode.kind`` name them, that another default suits.
# Those that decode nothing read memory faster: on one thread and on two, 4096 bytes ahead are best of all or near it.
_NEARER = DEFAULT.replaced(6, ahead=4096)
# A part of 16 KiB stays in the first cache for the second block and the third. More rows wait for the instructions:
# there a part is as deep as rows and panel fit into the second cache.
DEFAULTS: Mapping[str, PlanTable] = MappingProxyType(
    {
        "int8_vnni": _NEARER.replaced(18, chunk_k=256).replaced(ANY_ROWS, chunk_k=4096),
        "bf16": _NEARER.replaced(18, chunk_k=128).replaced(128, chunk_k=1024),
        # Two codes to a byte take twice as long to multiply as to read, so that memory is asked later.
        **dict.fromkeys(
            (f"int8_{level}_{codes}" for level in ("vnni", "avx512") for codes in ("groups", "int4_groups")),
            DEFAULT.replaced(2, ahead=2048).replaced(6, ahead=2048).replaced(18, chunk_k=256),
        ),
    }
)

# One plan for any number of rows, whatever was measured: each row is summed in the same parts.
FIXED = PlanTable(((ANY_ROWS, Plan()),))


def default_table(kind: str) -> PlanTable:
    """The plans of kernels of ``kind`` where nothing was measured."""
    return DEFAULTS.get(kind, DEFAULT)


def table(kind: str) -> PlanTable:
    """The plans in force for kernels of ``kind`` and PyTorch's present number of threads."""
    return tuned_tables().get(kind) or default_table(kind)


def tuned_tables() -> Mapping[str, PlanTable]:
    """What was measured here for PyTorch's present number of threads, by kind of kernel; read once per process."""
    return PLANS.in_force(torch.get_num_threads())


# --- what persists ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a measurement holds for.

    Args:
        cpu: the processor's model.
        features: instruction sets that PyTorch is let use.
        threads: PyTorch's.
        torch: its version.
        sources: hash of the native code.
    """

    cpu: str
    features: tuple[str, ...]
    threads: int
    torch: str
    sources: str


def this_machine(threads: int | None = None) -> Machine:
    """The machine that we run on, with ``threads`` in place of PyTorch's number."""
    threads = torch.get_num_threads() if threads is None else threads
    return Machine(_cpu_model(), tuple(sorted(cpu_features())), threads, torch.__version__, _native_sources())


@functools.cache
def _cpu_model() -> str:
    """The processor's name; with family and model, as virtual machines shorten the name of several to one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" in facts:
        return " ".join(facts[name] for name in ("model name", "cpu family", "model", "stepping") if name in facts)
    return platform.processor() or platform.machine()


@functools.cache
def _native_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "source").glob("*.h")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


PLANS = Store(
    "plans", "native sources", "python -m fx_quant tune", this_machine, PlanTable.to_data, PlanTable.from_data
)
