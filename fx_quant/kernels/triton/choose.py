"""Which configuration computes a scaled matmul: what was measured here, else what the cost model ranks first.

A choice holds for a *case*: what is multiplied, n and k, and a range of rows up to a power of two.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fx_quant.kernels.triton import persistent, swapped, tile
from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.cost import Cost, Matmul, estimate, rank
from fx_quant.kernels.triton.launch import Configuration
from fx_quant.kernels.triton.measured import measured
from fx_quant.kernels.triton.operands import ScaledOperands
from fx_quant.scheme import dtype_name

# Rows between the first and the last are rounded up to a power of two: a tile has at least as many as the first, and
# beyond the last all processors are busy.
LEAST_ROWS, MOST_ROWS = 16, 8192
# Tensor cores take as many rows at a time.
_LEAST_TILE = 64


# Recipe -> that of the swapped form, whose sums leave the tensor cores after few products.
_SWAPPED = {
    "float8": "float8",
    "int8": "int8",
    "float8_block": "block",
    "float8_group": "block",
    "int8_group": "block",
}


@dataclass(frozen=True)
class Case:
    """What a configuration is chosen for.

    Args:
        recipe: how codes are multiplied and scaled, as ``ScaledOperands.recipe`` says it.
        a_dtype, out_dtype: dtypes.
        rows: most rows of ``a``.
        n, k: sizes.
    """

    recipe: str
    a_dtype: torch.dtype
    out_dtype: torch.dtype
    rows: int
    n: int
    k: int

    def __str__(self) -> str:
        """The case as files of measurements name it."""
        dtypes = f"{dtype_name(self.a_dtype)} to {dtype_name(self.out_dtype)}"
        return f"{self.recipe} {dtypes}, rows {self.rows}, n {self.n}, k {self.k}"

    @property
    def matmul(self) -> Matmul:
        """The case's sizes, as the cost model takes them."""
        return Matmul(self.rows, self.n, self.k, self.a_dtype, out_dtype=self.out_dtype)


def rows_up_to(m: int) -> int:
    """The range of rows that holds ``m``, by its last."""
    return min(MOST_ROWS, max(LEAST_ROWS, 1 << max(m - 1, 0).bit_length()))


def case_of(operands: ScaledOperands) -> Case:
    """The case that these operands belong to."""
    return Case(
        operands.recipe,
        operands.a.dtype,
        operands.out_dtype,
        rows_up_to(operands.m),
        operands.n,
        operands.k,
    )


def candidates(case: Case, architecture: Architecture) -> list[Configuration]:
    """Everything that is shipped for the case; of the portable form only where tiles cannot be loaded by TMA."""
    split = []
    for configuration in swapped.CONFIGURATIONS[_SWAPPED[case.recipe]].get(architecture.name, ()):
        if case.rows <= configuration.block_m:
            splits = {1, swapped.best_split(configuration, case.n, case.k, architecture)}
            split += [replace(configuration, split_k=parts) for parts in sorted(splits)]
    many = (
        *persistent.CONFIGURATIONS.get(architecture.name, {}).get(case.recipe, ()),
        *tile.CONFIGURATIONS.get(architecture.name, {}).get(case.recipe, ()),
    )
    # A tile of twice the rows that there are does nothing better than one of half its size.
    return split + [configuration for configuration in many if configuration.block_m <= max(_LEAST_TILE, case.rows)]


@functools.lru_cache(4096)
def ranked(case: Case, architecture: Architecture) -> tuple[Cost, ...]:
    """What the cost model says of the case's candidates, best first; the portable form, which always fits, is last."""
    portable = estimate(tile.configuration("codes", case.rows), case.matmul, architecture)
    return (*rank(candidates(case, architecture), case.matmul, architecture), portable)


def configurations(operands: ScaledOperands, architecture: Architecture) -> Sequence[Configuration]:
    """What to try for these operands, in order."""
    case = case_of(operands)
    fastest = measured(operands.a.device).get(str(case))
    rest = tuple(cost.configuration for cost in ranked(case, architecture))
    return rest if fastest is None else (fastest, *rest)
