"""A GEMM to be run, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fx_quant.scheme import Scheme, dtype_name

Size = int | torch.SymInt


@dataclass(frozen=True)
class SizeRange:
    """The sizes that a dimension may take: ``low <= size <= high``; ``high=None`` means unbounded."""

    low: int
    high: int | None

    def covers(self, other: SizeRange) -> bool:
        """Whether each size of ``other`` is one of these."""
        return self.low <= other.low and (self.high is None or (other.high is not None and other.high <= self.high))

    @classmethod
    def exactly(cls, size: int) -> SizeRange:
        """The range of a static size."""
        return cls(size, size)

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        return f"{self.low}..{'' if self.high is None else self.high}"


@dataclass(frozen=True)
class Problem:
    """One quantized linear: ``out[m, n] = (a[m, k] @ b[k, n]) * a_scale * b_scale + bias[n]``.

    Args:
        scheme: how ``a`` and ``b`` are quantized.
        m: range of the rows of ``a`` (tokens).
        n: columns of ``b`` (output features), static.
        k: the summed dimension, static.
        out_dtype: dtype of the result (``torch.int32`` asks for the raw accumulator).
        bias: dtype of the bias, or None.
        constant_weight: ``b`` is a parameter or constant of the graph, so it may be packed once.
    """

    scheme: Scheme
    m: SizeRange
    n: int
    k: int
    out_dtype: torch.dtype
    bias: torch.dtype | None
    constant_weight: bool

    def __str__(self) -> str:
        bias = "" if self.bias is None else f" + bias {dtype_name(self.bias)}"
        return f"{self.scheme}, m={self.m} n={self.n} k={self.k} -> {dtype_name(self.out_dtype)}{bias}"
