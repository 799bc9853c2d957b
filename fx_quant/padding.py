"""Padding: one plan per selection, made by one function."""

from __future__ import annotations

from dataclasses import dataclass

from fx_quant.problem import Problem


@dataclass(frozen=True)
class Padding:
    """How far the operands grow before a kernel and what is sliced off after it.

    ``n`` and ``k`` are the padded sizes. Padded codes are 0, padded scales 1 and padded bias 0, so the result on the
    original ``[m, n]`` is unchanged.
    """

    n: int
    k: int

    def changes(self, problem: Problem) -> bool:
        """Whether anything is padded at all."""
        return (self.n, self.k) != (problem.n, problem.k)

    def describe(self, problem: Problem) -> str:
        """``none``, or ``n 30->32, k 60->64``."""
        parts = [
            f"{name} {size}->{padded}"
            for name, size, padded in (
                ("n", problem.n, self.n),
                ("k", problem.k, self.k),
            )
            if size != padded
        ]
        return ", ".join(parts) or "none"


def plan_padding(problem: Problem, align: int) -> Padding:
    """The least padding of ``n`` and ``k`` to multiples of ``align``."""
    return Padding(-(-problem.n // align) * align, -(-problem.k // align) * align)
