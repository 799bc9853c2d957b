"""Every kernel, and what keeps it from running on a target."""

from __future__ import annotations

from fx_quant.kernels.registry import kernels
from fx_quant.report import Table
from fx_quant.target import Target


def catalogue(target: Target) -> Table:
    """What can run first; within each part, the order in which selection asks."""
    judged = [(kernel, kernel.requires.unmet_by_target(target)) for kernel in kernels()]
    judged.sort(key=lambda pair: bool(pair[1]))
    rows = tuple(
        (kernel.name, kernel.provider, "; ".join(map(str, unmet)) or "can run", kernel.note) for kernel, unmet in judged
    )
    return Table(("kernel", "provider", f"on {target}", "what it is"), rows)
