"""Padding: one plan per selection, a pure function of the problem, the kernel and the compile context."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fx_quant.config import PaddingPolicy
from fx_quant.kernels.context import CompileContext, Mode
from fx_quant.kernels.registry import Kernel
from fx_quant.problem import Problem
from fx_quant.reasons import Kind, Unmet

SCALED_MM_ROWS = 17  # vLLM's: torch._scaled_mm on CUDA is faster with more than 16 rows

# Where each policy pads rows for a kernel that is faster with more of them. vLLM's pads below its piecewise mode.
_PADS_ROWS: Mapping[PaddingPolicy, frozenset[Mode]] = MappingProxyType(
    {
        PaddingPolicy.AUTO: frozenset({Mode.EAGER}),
        PaddingPolicy.NEVER: frozenset(),
        PaddingPolicy.CONSTANTS: frozenset(),
        PaddingPolicy.ALWAYS: frozenset(Mode),
        PaddingPolicy.VLLM: frozenset({Mode.EAGER, Mode.GRAPH}),
    }
)


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
        sizes = (f"m <{self.rows}->{self.rows}", f"n {problem.n}->{self.n}", f"k {problem.k}->{self.k}")
        return ", ".join(itertools.compress(sizes, self.padded_dims(problem))) or "none"

    def fills(self, problem: Problem) -> dict[str, int]:
        """The operands that grow, each with what stands in its padding."""
        rows, n, k = self.padded_dims(problem)
        scheme = problem.scheme
        by_row = bool(scheme.activation.scale_shape(1, problem.k))
        before, after = (scheme.weight.scale_shape(*size) for size in ((problem.n, problem.k), (self.n, self.k)))
        more_groups = scheme.activation.group is not None and before[1] != after[1]
        grows = {
            "a": (0, rows or k),
            "a_scale": (1, scheme.activation.quantized and ((rows and by_row) or more_groups)),
            "a_zero_point": (0, rows and by_row and not scheme.activation.symmetric),
            "b": (0, n or k),
            "b_scale": (1, before != after),
            "b_sum": (0, n and not scheme.activation.symmetric),
            "b_zero_point": (0, before != after and not scheme.weight.symmetric),
            "b_offset": (0, before != after and scheme.weight.offset),
            "bias": (0, n and problem.bias is not None),
        }
        return {name: fill for name, (fill, padded) in grows.items() if padded}

    def padded_dims(self, problem: Problem) -> tuple[bool, bool, bool]:
        """Whether m, n and k grow."""
        return problem.m.low < self.rows, self.n != problem.n, self.k != problem.k


def plan_padding(problem: Problem, kernel: Kernel, context: CompileContext) -> Padding:
    """The least padding of ``n`` and ``k`` that ``kernel`` needs, and of rows where the context's policy pads them.

    A deterministic context pads no rows, as that would be another plan for few rows than for many. What the policy
    forbids is not for the plan to say: ``unmet_by_context`` keeps such a kernel from being chosen.
    """
    align, rows = kernel.requires.align, kernel.least_rows
    pads_rows = context.mode in _PADS_ROWS[context.padding] and not context.deterministic
    return Padding(
        -(-problem.n // align) * align,
        -(-problem.k // align) * align,
        rows if pads_rows and problem.m.low < rows else 0,
    )


def unmet_by_context(problem: Problem, kernel: Kernel, context: CompileContext) -> list[Unmet]:
    """What ``context`` asks for and ``kernel`` cannot do for ``problem``; empty where it can."""
    unmet = []
    requires, policy = kernel.requires, context.padding
    pads_n, pads_k = problem.n % requires.align != 0, problem.k % requires.align != 0
    spared = None
    if policy is PaddingPolicy.NEVER and (pads_n or pads_k):
        spared = "none"
    elif policy is PaddingPolicy.CONSTANTS and pads_k:
        spared = "no activation"
    elif policy is PaddingPolicy.CONSTANTS and pads_n and not problem.constant_weight:
        spared = "no weight that is computed"
    # A kernel that nothing is padded for says so by itself.
    if spared is not None and requires.paddable:
        unmet.append(Unmet(Kind.ALIGNMENT, f"{requires.alignment_of(problem)}, and padding='{policy}' pads {spared}"))
    if context.deterministic and (kernel.deterministic_op is None or requires.rows is not None):
        unmet.append(Unmet(Kind.DETERMINISTIC, "may compute a row in another order when other rows stand beside it"))
    return unmet
