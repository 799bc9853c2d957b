"""``tune``: measure kernels on this machine within a budget of time, and keep what is faster."""

from __future__ import annotations

import argparse
import json

import torch
from tabulate import tabulate

from fx_quant.errors import FxQuantError


def run(arguments: argparse.Namespace) -> int:
    """Measure, or print or delete what was measured."""
    from fx_quant.kernels.cpu import plans as tuning

    if arguments.device == "cuda":
        return _tune_gpu(arguments)
    if arguments.show:
        return _show_plans(arguments.json)
    if arguments.reset:
        path = tuning.PLANS.reset(tuning.this_machine())
        text = "nothing was saved for this machine" if path is None else f"deleted {path}"
        print(json.dumps({"deleted": path and str(path)}) if arguments.json else text)
        return 0
    from fx_quant.kernels.cpu.tuner import tune

    report = tune([_shape(text) for text in arguments.shapes], budget_seconds=arguments.budget)
    print(report.to_json() if arguments.json else report.to_text(wide=arguments.wide))
    return 0


def _tune_gpu(arguments: argparse.Namespace) -> int:
    from fx_quant.kernels.triton.measured import CONFIGURATIONS, measured, this_gpu
    from fx_quant.kernels.triton.tuner import SHAPES, tune

    if not torch.cuda.is_available():
        raise FxQuantError("--device cuda needs a GPU, and PyTorch finds none; see `python -m fx_quant doctor`")
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.show:
        found = {case: str(each) for case, each in measured(device).items()}
        print(json.dumps(found, indent=2) if arguments.json else tabulate(found.items(), headers=("case", "measured")))
        return 0
    if arguments.reset:
        path = CONFIGURATIONS.reset(this_gpu(device))
        text = "nothing was saved for this GPU" if path is None else f"deleted {path}"
        print(json.dumps({"deleted": path and str(path)}) if arguments.json else text)
        return 0
    report = tune([_shape(text) for text in arguments.shapes] or SHAPES, budget_seconds=arguments.budget)
    print(report.to_json() if arguments.json else report.to_text(wide=arguments.wide))
    return 0


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal()):
        raise FxQuantError(f"a shape must be NxK, such as 4096x4096, got {text!r}")
    return int(n), int(k)


def _show_plans(as_json: bool) -> int:
    from fx_quant.kernels.cpu import plans as tuning

    machine, measured = tuning.this_machine(), tuning.tuned_tables()
    tables = {"any other": tuning.DEFAULT, **tuning.DEFAULTS, **measured}
    path = str(tuning.PLANS.path(machine)) if measured else None
    if as_json:
        data = {kind: {"measured": kind in measured, "plans": each.to_data()} for kind, each in tables.items()}
        print(json.dumps({"path": path, "kernels": data}, indent=2))
        return 0
    rows = [
        (kind, "measured" if kind in measured else "default", *row.values())
        for kind, each in tables.items()
        for row in each.to_data()
    ]
    names = ("ahead", "next_panel", "chunk_k", "alone")
    print(tabulate(rows, headers=("kernel", "from", "rows up to", *names), missingval="any"))
    print(
        f"\nfor {machine.cpu}, {machine.threads} threads: "
        + (path or "nothing was measured, the defaults are in force")
    )
    return 0
