"""Measures which configurations of the Triton matmuls suit this GPU, within a budget of time.

The cost model leaves few candidates for a case. Each is verified against the canonical op before it is timed, all in
turns; what is chosen must be at least 3 % faster than the model's own choice, in two rounds, or the model's stays.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fx_quant.errors import FxQuantError
from fx_quant.kernels.triton.architectures import Architecture, architecture_of
from fx_quant.kernels.triton.choose import case_of, ranked
from fx_quant.kernels.triton.launch import Configuration
from fx_quant.kernels.triton.measured import CONFIGURATIONS, this_gpu
from fx_quant.kernels.triton.operands import ScaledOperands, scaled_operands
from fx_quant.kernels.triton.scaled_mm import fits, plan_scaled_mm
from fx_quant.ops import scaled_mm
from fx_quant.tuning.search import Budget, Report, choose, decide_all

# Linears (n, k) of Llama 3 8B: query, key and value in one, output, gate and up in one, down.
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (16, 64, 256, 1024, 4096)
RECIPES = ("float8", "int8", "float8_block")
# Weights in turn, which together exceed the second-level cache of every GPU, unless one alone does.
_CACHE = 512 * 2**20
# Rounds of turns that count, and before them those that warm up clocks and caches.
_ROUNDS, _WARM_UP = 15, 2

# Median seconds of each candidate on operands that take turns.
Measure = Callable[[Sequence[ScaledOperands], Sequence[Configuration], Architecture], Sequence[float]]


@dataclass(frozen=True)
class Asked:
    """One case to tune: a recipe, rows and a weight's sizes."""

    recipe: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.recipe} m {self.m}, n {self.n}, k {self.k}"


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

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON holds it."""
        return {
            "case": self.case,
            "default": str(self.default),
            "chosen": str(self.chosen),
            "default_us": round(self.default_seconds * 1e6, 2),
            "chosen_us": round(self.chosen_seconds * 1e6, 2),
            "tried": self.tried,
            "wrong": list(map(str, self.wrong)),
        }

    def row(self) -> tuple[object, ...]:
        """The decision as cells of the report's table."""
        chosen = self.chosen if self.chosen != self.default else "the same"
        return self.case, self.default, f"{self.default_seconds * 1e6:.1f}", chosen, f"{self.chosen_seconds * 1e6:.1f}"


@dataclass(frozen=True, repr=False)
class GpuReport(Report[Decision]):
    """What a tuning run decided; ``unreached`` holds what was ``Asked``."""

    headers = ("case", "the model's", "us", "chosen", "us")
    otherwise = "the model's choices are"

    def decided(self) -> str:
        """How many cases were decided."""
        return f"{len(self.decisions)} cases"

    def summary_of_unreached(self) -> str:
        """How many were not."""
        return f"{len(self.unreached)} cases"

    def remarks(self) -> list[str]:
        """What computed something else."""
        return [
            f"wrong, and never used: {configuration} for {decision.case}"
            for decision in self.decisions
            for configuration in decision.wrong
        ]


def tune(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    rows: Sequence[int] = ROWS,
    recipes: Sequence[str] = RECIPES,
    budget_seconds: float = 300.0,
) -> GpuReport:
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
    gpu, architecture = this_gpu(device), architecture_of(device)
    CONFIGURATIONS.check_writable(gpu)
    known = [recipe for recipe in recipes if recipe == "int8" or architecture.float8]
    asked = [Asked(recipe, m, n, k) for m in rows for recipe in known for n, k in shapes]
    budget = Budget(budget_seconds)

    def decided(case: Asked) -> Decision:
        operands = [random_operands(case, architecture, device) for _ in range(weights_in_turn(case))]
        return decide(operands, architecture, measure)

    decisions = tuple(decide_all(asked, decided, budget))
    path = None
    if decisions:
        chosen = {decision.case: decision.chosen for decision in decisions}
        path = CONFIGURATIONS.save({**CONFIGURATIONS.load(gpu), **chosen}, gpu)
    return GpuReport(decisions, tuple(asked[len(decisions) :]), budget.spent, path)


def weights_in_turn(asked: Asked) -> int:
    """Weights whose turns keep each out of the cache."""
    return max(2, min(32, -(-_CACHE // (asked.n * asked.k))))


def random_operands(asked: Asked, architecture: Architecture, device: torch.device) -> ScaledOperands:
    """Operands of one case, none of them zeros, which take less power and so less time."""
    m, n, k = asked.m, asked.n, asked.k
    if asked.recipe == "int8":
        a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    else:
        dtype = torch.float8_e4m3fnuz if architecture.name == "gfx942" else torch.float8_e4m3fn
        a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    block = (128, 128) if asked.recipe == "float8_block" else None
    groups = -(-k // 128)
    a_scale = torch.rand(groups, m, device=device).t() if block else torch.rand(m, 1, device=device)
    b_scale = torch.rand(-(-n // 128), groups, device=device) if block else torch.rand(n, device=device)
    return scaled_operands(a, b.t(), a_scale, b_scale, None, n, torch.bfloat16, block=block)


def measure(
    operands: Sequence[ScaledOperands], configurations: Sequence[Configuration], architecture: Architecture
) -> list[float]:
    """Median seconds of each configuration, on operands that take turns.

    They are those of replays of CUDA graphs, in turns, without the launch's own cost on the host. The operands should
    together exceed the second-level cache, or a weight is read from there.
    """
    graphs = [
        captured([plan_scaled_mm(given, architecture, configuration).run for given in operands])
        for configuration in configurations
    ]
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(_ROUNDS + _WARM_UP):
        for graph, seconds in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= _WARM_UP:
                seconds.append(start.elapsed_time(end) / 1e3 / len(operands))
    return list(map(statistics.median, times))


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all ``calls``, in order; each is run once before, so that it is compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def decide(operands: Sequence[ScaledOperands], architecture: Architecture, measure: Measure) -> Decision:
    """What is fastest for a case, of which ``operands`` are some: the model's choice, unless another wins twice."""
    first = operands[0]
    case = case_of(first)
    ranking = [cost.configuration for cost in ranked(case, architecture)]
    fitting = [candidate for candidate in ranking if fits(first, candidate, architecture)]
    right = [candidate for candidate in fitting if is_right(first, candidate, architecture)]
    if not right:
        raise FxQuantError(f"{case}: no configuration computes what the canonical op does; please report it")
    choice = choose(right, [lambda tried: measure(operands, tried, architecture)])
    wrong = tuple(candidate for candidate in fitting if candidate not in right)
    return Decision(str(case), right[0], right[choice.index], *choice.seconds, len(right), wrong)


def is_right(operands: ScaledOperands, configuration: Configuration, architecture: Architecture) -> bool:
    """Whether the configuration computes what the canonical op does: int8 exactly, float8 to the tensor cores' sums."""
    actual = plan_scaled_mm(operands, architecture, configuration).run()
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
