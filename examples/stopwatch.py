"""Fair timing of several ways to run one model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

Ways = Mapping[str, Callable[..., Tensor]]

# A wrong kernel is far below; quantization that was rounded in another order is above.
MIN_COSINE = 0.95


def verify(ways: Ways, inputs: Sequence[Tensor]) -> None:
    """Run each way once, so that it is compiled, and compare its rows with those of the first way.

    Raises:
        RuntimeError: a row's cosine with the first way is below ``MIN_COSINE``.
    """
    outputs = {way: call(*inputs) for way, call in ways.items()}
    reference, *others = outputs
    for way in others:
        least = F.cosine_similarity(outputs[way], outputs[reference], dim=-1).min().item()
        if not least >= MIN_COSINE:
            raise RuntimeError(f"{way}: cosine with {reference} must be >= {MIN_COSINE}, got {least:.4f}; not timed")


def interleaved_medians(
    ways: Ways, inputs: Sequence[Tensor], *, seconds: float = 3.0, least: int = 5, most: int = 50
) -> dict[str, float]:
    """Median milliseconds of each way on ``inputs``.

    The ways take turns in one process, so that a slow moment of the machine falls on all of them. Rounds go on until
    ``seconds`` are over, at least ``least`` and at most ``most``.
    """
    times: dict[str, list[float]] = {way: [] for way in ways}
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for way, call in ways.items():
            start = time.perf_counter()
            call(*inputs)
            times[way].append(time.perf_counter() - start)
    return {way: 1e3 * statistics.median(taken) for way, taken in times.items()}
