"""A scaled matmul on a GPU: the form and the configuration that compute it, and its launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from fx_quant.gpu import tile
from fx_quant.gpu.architectures import Architecture
from fx_quant.gpu.launch import Configuration, Launch
from fx_quant.gpu.operands import ScaledOperands

# Name of a form -> what plans its launch.
FORMS: Mapping[str, Callable[[ScaledOperands, Configuration, Architecture], Launch]] = MappingProxyType(
    {"tile": tile.plan_scaled_mm}
)


def plan_scaled_mm(operands: ScaledOperands, on: Architecture, found: Configuration | None = None) -> Launch:
    """The launch of ``triton_scaled_mm``: by ``found``, or by the configuration that is best there."""
    found = found or tile.configuration("codes", operands.m)
    return FORMS[found.form](operands, found, on)
