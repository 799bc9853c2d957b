"""How ``gpu.py`` times: CUDA graphs of calls on weights in turns, replayed in interleaved rounds, each checked before.

A way that gives something else is not timed. On a CPU, for tests, calls are timed as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_cases import Operands, relative_error

# ``call(i)`` computes with set ``i`` of weights.
Call = Callable[[int], Any]

CALLS = 20  # of a graph: a launch of one costs as much as a small kernel
LEAST_ROUNDS, MOST_ROUNDS = 10, 200


@dataclass(frozen=True)
class Way:
    """One way to compute a case.

    Args:
        family: what ``--peers`` selects it by.
        needs: why it cannot run here, or None.
        prepare: operands -> call; what it raises is the way's state.
        tolerance: largest relative error: of rounding, or of what it leaves unquantized.
        part: it computes a part only, such as the matmul of given codes: shown, but no rival.
    """

    name: str
    family: str
    needs: Callable[[], str | None]
    prepare: Callable[[Operands], Call]
    tolerance: float = 2e-2
    part: bool = False


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """``p20``, ``p50`` and ``p80``, each a value that was measured."""
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (20, 50, 80)}


def failure(error: BaseException) -> str:
    """The first line of what went wrong."""
    text = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {text[0] if text else ''}"[:200]


@torch.no_grad()
def prepared(given: Operands, ways: Sequence[Way]) -> tuple[dict[str, dict[str, Any]], dict[str, Call]]:
    """State and error of each way, and the calls of those that are right."""
    states: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for way in ways:
        state: dict[str, Any] = {"status": "ok", "error": None, "part": way.part, "us": None}
        states[way.name] = state
        reason = way.needs()
        if reason is not None:
            state["status"] = f"absent: {reason}"
            continue
        try:
            call = way.prepare(given)
            state["error"] = relative_error(given, call(0))
        except Exception as error:  # noqa: BLE001  (a peer may fail in any way)
            state["status"] = failure(error)
            continue
        # NaN is not below the tolerance either.
        if not state["error"] <= way.tolerance:
            state["status"] = "wrong"
            continue
        calls[way.name] = call
    return states, calls


def _graph(call: Call, sets: int) -> Callable[[], object]:
    """A replay of ``CALLS`` calls, the sets of weights in turns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(sets):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i % sets)
    return graph.replay


def _calls(call: Call, sets: int) -> Callable[[], object]:
    def run() -> None:
        for i in range(CALLS):
            call(i % sets)

    return run


def _microseconds(run: Callable[[], object], on_gpu: bool) -> float:
    """Of one call."""
    if not on_gpu:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start) / CALLS
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / CALLS


@torch.no_grad()
def timed(
    calls: Mapping[str, Call], sets: int, seconds: float, on_gpu: bool
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Percentiles of microseconds by way, and why others could not be timed.

    A round has every way once, and begins with another one each time.
    """
    runs: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        try:
            runs[name] = _graph(call, sets) if on_gpu else _calls(call, sets)
            _microseconds(runs[name], on_gpu)
        except Exception as error:  # noqa: BLE001  (what cannot be captured)
            failures[name] = failure(error)
            runs.pop(name, None)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + seconds, 0
    while runs and (rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end)):
        turns = list(runs.items())
        first = rounds % len(turns)
        for name, run in turns[first:] + turns[:first]:
            taken[name].append(_microseconds(run, on_gpu))
        rounds += 1
    return {name: percentiles(values) for name, values in taken.items()}, failures


def measure(given: Operands, ways: Sequence[Way], seconds: float) -> dict[str, dict[str, Any]]:
    """State, error and microseconds of each way, checked first."""
    states, calls = prepared(given, ways)
    times, failures = timed(calls, len(given.layers), seconds, given.x.is_cuda)
    for name, us in times.items():
        states[name]["us"] = us
    for name, status in failures.items():
        states[name]["status"] = status
    return states
