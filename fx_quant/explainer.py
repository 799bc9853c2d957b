"""``explain``: what fx_quant would do with a model, on this machine or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph

from fx_quant.capture import run_captured, run_eagerly
from fx_quant.compat import static_input_indices
from fx_quant.config import Options
from fx_quant.passes.pipeline import holds_codes, report_on, to_canonical
from fx_quant.prepare import needs_prepare
from fx_quant.report import Report
from fx_quant.target import Target, resolve_target


def explain(
    model: Callable[..., Any],
    *args: Any,
    target: Target | str | None = None,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Every quantized matmul of ``model``: its scheme, kernel and losers, or why it would be missed.

    The model runs once, op by op and without gradients, on ``args`` and ``kwargs``; nothing is compiled to machine
    code, and the target need not be present.

    Args:
        target: a machine by name (``"sm90"``), a ``Target``, or None for the one the inputs are on.
        dynamic: as for ``torch.compile``.
        options: as for the backend; ``strict`` is ignored, as a report is the purpose.

    Raises:
        UnknownNameError: an unknown target, option or kernel.
        NoKernelError: a forced kernel cannot run a site.
    """
    parsed = Options.parse({**(options or {}), "strict": False})
    resolved = resolve_target(target, _device(args, kwargs))
    reports: list[Report] = []

    def on_graph(graph: Graph) -> None:
        if holds_codes(graph):
            reports.append(report_on(to_canonical(graph, resolved, parsed, static_input_indices(graph)), resolved))
        else:
            reports.append(Report(str(resolved), (), ()))

    _, breaks = run_captured(model, args, kwargs, on_graph=on_graph, inner_compile=run_eagerly, dynamic=dynamic)
    report = Report(str(resolved), (), (), graphs=0, graph_breaks=breaks, note=needs_prepare(model) or "")
    for each in reports:
        report = report.merged(each)
    return report


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return tensors[0].device if tensors else "cpu"
