"""Times of calls on a GPU: replays of CUDA graphs, in turns, without the launch's own cost on the host."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


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


def times_in_turns(ways: Sequence[Sequence[Callable[[], object]]], rounds: int = 15) -> list[list[float]]:
    """Seconds of one call in each round, for each way: a way is several calls on operands of their own.

    The operands of a way should together exceed the second-level cache, or a weight is read from there.
    """
    graphs = [captured(calls) for calls in ways]
    found: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 2):
        for graph, calls, seconds in zip(graphs, ways, found, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:  # the first warm up clocks and caches
                seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    return found


def medians(ways: Sequence[Sequence[Callable[[], object]]], rounds: int = 15) -> list[float]:
    """The median of ``times_in_turns`` for each way."""
    return [statistics.median(seconds) for seconds in times_in_turns(ways, rounds)]
