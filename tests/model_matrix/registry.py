"""What a model, a way to quantize one and a row of the matrix are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.dialects.registry import installed


@dataclass(frozen=True)
class Model:
    """A small model of a real architecture.

    Args:
        name: as in the table.
        build: makes it, float32 with random weights that are always the same, in eval mode.
        inputs: its keyword arguments for ``(batch, length)``; a model of images may ignore the length.
        needs: distributions that must be installed.
        sizes: of the first call, and of those that may compile again.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    needs: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] = ((2, 8), (3, 11), (4, 13))


@dataclass(frozen=True)
class Way:
    """A way to quantize a model.

    Args:
        name: as in the table.
        quantize: quantizes a model of ``dtype``; returns the same or another one.
        dtype: of the model.
        needs: distributions that must be installed.
        only: whether the library takes such a model at all.
    """

    name: str
    quantize: Callable[[nn.Module], nn.Module]
    dtype: torch.dtype
    needs: tuple[str, ...] = ()
    only: Callable[[Model], bool] | None = None


def missing(needs: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``needs`` that are not installed."""
    return tuple(name for name in needs if not installed(name))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """What ``make`` makes, with the same random numbers each time, in eval mode and without gradients.

    Weights keep the size of what they multiply, and no bias is zero: a lost one would not be seen.
    """
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``inputs``, those that are floats in ``dtype``."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
