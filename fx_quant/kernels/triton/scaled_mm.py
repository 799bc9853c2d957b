"""A scaled matmul on a GPU: the form and the configuration that compute it, and its launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fx_quant.kernels.triton import persistent, swapped, tile
from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.kernels.triton.choose import configurations
from fx_quant.kernels.triton.launch import Configuration, Launch
from fx_quant.kernels.triton.operands import ScaledOperands


@dataclass(frozen=True)
class Form:
    """One kernel of scaled matmuls.

    Args:
        plan: its launch.
        unfit: why it cannot compute some operands, in a line, or None.
    """

    plan: Callable[[ScaledOperands, Configuration, Architecture], Launch]
    unfit: Callable[[ScaledOperands, Configuration, Architecture], str | None]


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "persistent": Form(persistent.plan_scaled_mm, persistent.unfit),
        "swapped": Form(swapped.plan_scaled_mm, swapped.unfit),
        "tile": Form(tile.plan_scaled_mm, tile.unfit),
    }
)


def fits(operands: ScaledOperands, configuration: Configuration, architecture: Architecture) -> bool:
    """Whether the configuration's form can compute these operands there."""
    return FORMS[configuration.form].unfit(operands, configuration, architecture) is None


def plan_scaled_mm(
    operands: ScaledOperands, architecture: Architecture, configuration: Configuration | None = None
) -> Launch:
    """The launch of ``triton_scaled_mm``: as given, or by the first configuration in order that can compute it.

    Raises:
        RuntimeError: the given one cannot.
    """
    if configuration is None:
        configuration = next(c for c in configurations(operands, architecture) if fits(operands, c, architecture))
    return FORMS[configuration.form].plan(operands, configuration, architecture)
