"""Measures which configurations of the Triton matmuls suit this GPU, within a budget of time.

The cost model leaves few candidates for a case. Each is verified against the canonical op before it is timed, all in
turns; what is chosen must be at least 3 % faster than the model's own choice, in two rounds, or the model's stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fx_quant.errors import FxQuantError
from fx_quant.kernels.triton.architectures import Architecture, architecture_of
from fx_quant.kernels.triton.choose import case_of, ranked
from fx_quant.kernels.triton.launch import Configuration
from fx_quant.kernels.triton.measured import CONFIGURATIONS, load, save, this_gpu
from fx_quant.kernels.triton.operands import ScaledOperands, scaled_operands
from fx_quant.kernels.triton.scaled_mm import FORMS, plan_scaled_mm
from fx_quant.ops import scaled_mm
from fx_quant.tuning.measurements import check_path

# Linears (n, k) of Llama 3 8B: query, key and value in one, output, gate and up in one, down.
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (16, 64, 256, 1024, 4096)
RECIPES = ("float8", "int8", "float8_block")
GAIN = 1.03
# Weights in turn, which together exceed the second-level cache of every GPU, unless one alone does.
_CACHE = 512 * 2**20

# Median seconds of each candidate on operands that take turns.
Measure = Callable[[Sequence[ScaledOperands], Sequence[Configuration], Architecture], Sequence[float]]


@dataclass(frozen=True)
class Asked:
    """One case to tune: a recipe, rows and a weight's sizes."""

    recipe: str
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Decision:
    """What was found for one case.

    Args:
        case: as files of measurements name it.
        default: what the model ranks first.
        chosen: what is used from now on.
        default_seconds, chosen_seconds: medians.
        tried: candidates that were timed.
        wrong: candidates that did not compute what the canonical op does, and are never chosen.
    """

    case: str
    default: Configuration
    chosen: Configuration
    default_seconds: float
    chosen_seconds: float
    tried: int
    wrong: tuple[Configuration, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a tuning run decided.

    Args:
        decisions: in the order in which they were made.
        unreached: cases for which no time was left.
        seconds: that the run took.
        path: the file that holds them, or None where nothing was decided.
    """

    decisions: tuple[Decision, ...]
    unreached: tuple[Asked, ...]
    seconds: float
    path: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "decisions": [
                {
                    "case": each.case,
                    "default": str(each.default),
                    "chosen": str(each.chosen),
                    "default_us": round(each.default_seconds * 1e6, 2),
                    "chosen_us": round(each.chosen_seconds * 1e6, 2),
                    "tried": each.tried,
                    "wrong": list(map(str, each.wrong)),
                }
                for each in self.decisions
            ],
            "unreached": [f"{asked.recipe} m {asked.m}, n {asked.n}, k {asked.k}" for asked in self.unreached],
            "seconds": round(self.seconds, 3),
            "path": None if self.path is None else str(self.path),
        }

    def __str__(self) -> str:
        rows = [
            (
                each.case,
                each.default,
                f"{each.default_seconds * 1e6:.1f}",
                each.chosen if each.chosen != each.default else "the same",
                f"{each.chosen_seconds * 1e6:.1f}",
            )
            for each in self.decisions
        ]
        headers = ("case", "the model's", "us", "chosen", "us")
        lines = [tabulate(rows, headers=headers, disable_numparse=True)] if rows else ["nothing was decided"]
        wrong = [f"{found} for {each.case}" for each in self.decisions for found in each.wrong]
        lines += [f"wrong, and never used: {line}" for line in wrong]
        lines.append(f"\n{len(rows)} cases in {self.seconds:.1f} s")
        if self.unreached:
            lines.append(f"not reached within the budget, so as before: {len(self.unreached)} cases")
        lines.append(f"saved in {self.path}" if self.path else "nothing is saved: the model's choices are in force")
        return "\n".join(lines)


def tune(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    rows: Sequence[int] = ROWS,
    recipes: Sequence[str] = RECIPES,
    budget_seconds: float = 300.0,
) -> Report:
    """Measure the Triton matmuls on this GPU and keep, for each case, what is faster than the model's choice.

    Args:
        shapes: ``(n, k)`` of weights.
        rows: rows of the activation.
        recipes: of ``RECIPES``; those that the GPU has no products for are left out.
        budget_seconds: after which no case begins.

    Raises:
        FxQuantError: there is no GPU; the configurations cannot be written.
    """
    if not torch.cuda.is_available():
        raise FxQuantError("tuning Triton kernels needs a GPU, and PyTorch finds none; see `python -m fx_quant doctor`")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, on = this_gpu(device), architecture_of(device)
    check_path(gpu.path(), CONFIGURATIONS)
    known = [recipe for recipe in recipes if recipe == "int8" or on.float8]
    asked = [Asked(recipe, m, n, k) for m in rows for recipe in known for n, k in shapes]
    start = time.perf_counter()

    def make(each: Asked) -> Iterator[ScaledOperands]:
        return (random_operands(each, on, device) for _ in range(weights_in_turn(each)))

    decisions = tuple(decide_all(asked, on, make, measure, budget_seconds, time.perf_counter))
    path = None
    if decisions:
        path = save({**load(gpu), **{each.case: each.chosen for each in decisions}}, gpu)
    return Report(decisions, tuple(asked[len(decisions) :]), time.perf_counter() - start, path)


def weights_in_turn(asked: Asked) -> int:
    """Weights whose turns keep each out of the cache."""
    return max(2, min(32, -(-_CACHE // (asked.n * asked.k))))


def random_operands(asked: Asked, on: Architecture, device: torch.device) -> ScaledOperands:
    """Operands of one case, none of them zeros, which take less power and so less time."""
    m, n, k = asked.m, asked.n, asked.k
    if asked.recipe == "int8":
        a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    else:
        dtype = torch.float8_e4m3fnuz if on.name == "gfx942" else torch.float8_e4m3fn
        a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    block = (128, 128) if asked.recipe == "float8_block" else None
    groups = -(-k // 128)
    a_scale = torch.rand(groups, m, device=device).t() if block else torch.rand(m, 1, device=device)
    b_scale = torch.rand(-(-n // 128), groups, device=device) if block else torch.rand(n, device=device)
    return scaled_operands(a, b.t(), a_scale, b_scale, None, n, torch.bfloat16, block=block)


def measure(operands: Sequence[ScaledOperands], found: Sequence[Configuration], on: Architecture) -> list[float]:
    """Median seconds of each configuration, on operands that take turns."""
    from fx_quant.kernels.triton.timing import medians

    return medians([[plan_scaled_mm(each, on, one).run for each in operands] for one in found])


def decide_all(
    asked: Sequence[Asked],
    on: Architecture,
    make: Callable[[Asked], Iterator[ScaledOperands]],
    measure: Measure,
    budget: float,
    clock: Callable[[], float],
) -> Iterator[Decision]:
    """Decide case by case until ``budget`` seconds are over."""
    start = clock()
    for each in asked:
        if clock() - start >= budget:
            return
        yield decide(list(make(each)), on, measure)


def decide(operands: Sequence[ScaledOperands], on: Architecture, measure: Measure) -> Decision:
    """What is fastest for a case, of which ``operands`` are some: the model's choice, unless another wins twice."""
    first = operands[0]
    costs = ranked(case_of(first), on)
    fitting = [c.configuration for c in costs if FORMS[c.configuration.form].unfit(first, c.configuration, on) is None]
    right = [found for found in fitting if is_right(first, found, on)]
    if not right:
        raise FxQuantError(f"{case_of(first)}: no configuration computes what the canonical op does; please report it")
    times = list(measure(operands, right, on))
    best = min(range(len(right)), key=times.__getitem__)
    chosen = 0
    if times[0] >= GAIN * times[best]:
        again = measure(operands, (right[0], right[best]), on)
        chosen = best if again[0] >= GAIN * again[1] else 0
    wrong = tuple(found for found in fitting if found not in right)
    case = str(case_of(first))
    return Decision(case, right[0], right[chosen], times[0], times[chosen], len(right), wrong)


def is_right(operands: ScaledOperands, found: Configuration, on: Architecture) -> bool:
    """Whether the configuration computes what the canonical op does: int8 exactly, float8 to the tensor cores' sums."""
    actual = plan_scaled_mm(operands, on, found).run()
    expected = scaled_mm(
        operands.a,
        operands.b,
        operands.a_scale,
        operands.b_scale,
        operands.bias,
        operands.out_dtype,
        a_zero_point=operands.a_zero_point,
        block=operands.block,
    )
    if operands.a.dtype is torch.int8:
        return torch.equal(actual, expected)
    # Sums in the tensor cores keep 14 bits of their terms; the result has 8.
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    return bool(error <= 2.0**-7)
