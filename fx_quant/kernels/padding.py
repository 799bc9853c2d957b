"""Padding: one plan per selection, made by one function."""

from __future__ import annotations

from dataclasses import dataclass

from fx_quant.problem import Problem

SCALED_MM_ROWS = 17  # vLLM's: torch._scaled_mm on CUDA is faster with more than 16 rows


@dataclass(frozen=True)
class Padding:
    """How far the operands grow before a kernel and what is sliced off after it.

    ``n`` and ``k`` are the padded sizes; ``rows`` is what fewer rows are padded to, 0 for none. Padded codes are 0,
    padded scales 1 and padded bias 0, so the result on the original ``[m, n]`` is unchanged.
    """

    n: int
    k: int
    rows: int = 0

    def describe(self, problem: Problem) -> str:
        """``none``, or ``m <17->17, n 30->32, k 60->64``."""
        parts = [f"m <{self.rows}->{self.rows}"] if problem.m.low < self.rows else []
        parts += [
            f"{name} {size}->{padded}"
            for name, size, padded in (
                ("n", problem.n, self.n),
                ("k", problem.k, self.k),
            )
            if size != padded
        ]
        return ", ".join(parts) or "none"


def plan_padding(problem: Problem, align: int, *, mode: str = "graph", eager_rows: int = 0) -> Padding:
    """The least padding of ``n`` and ``k`` to multiples of ``align``, and of rows where the mode pads them.

    Args:
        mode: ``eager`` or ``graph``. Only eager calls pad rows: a graph would carry the padding for every m.
        eager_rows: what the kernel wants fewer rows padded to.
    """
    rows = eager_rows if mode == "eager" and problem.m.low < eager_rows else 0
    return Padding(-(-problem.n // align) * align, -(-problem.k // align) * align, rows)
