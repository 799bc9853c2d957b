"""The command line: ``python -m fx_quant doctor | kernels | explain | check | tune``."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate

from fx_quant.compat import cpp_compiler
from fx_quant.errors import FxQuantError
from fx_quant.kernels.machine import detect_target, resolve_target
from fx_quant.target import named_target, named_targets


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of ours are one line on standard error and status 2."""
    arguments = _parser().parse_args(argv)
    sys.path.insert(0, str(pathlib.Path.cwd()))
    try:
        return arguments.run(arguments)
    except FxQuantError as error:
        print(f"fx_quant: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fx_quant", description=(__doc__ or "").split(":")[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="this machine: target, libraries, and which kernels can run here")
    doctor.set_defaults(run=_doctor)

    kernels = commands.add_parser(
        "kernels", help="the kernel that a target gives each scheme, and what keeps each other from running there"
    )
    kernels.add_argument("--target", help=f"one of {', '.join(named_targets())}; this machine when left out")
    kernels.add_argument("--json", action="store_true", help="print JSON, every kernel's reasons included")
    kernels.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="NxK",
        help="what runs these linears on a GPU, and in what time at best: llama3-8b, llama3-70b or sizes",
    )
    kernels.add_argument("--rows", nargs="+", type=int, metavar="M", help="of the activation, for --shapes")
    kernels.add_argument("--scheme", help="for --shapes, as schemes print; float8 of tokens and channels unless given")
    kernels.set_defaults(run=_kernels)

    for name, run, text in (
        ("explain", _explain, "every quantized matmul of a model: its kernel, or why it would be missed"),
        ("check", _check, "run a model compiled and uncompiled, and compare each quantized matmul"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "model", help="module.path:callable, which returns a model and its inputs: (model, args) or (model, kwargs)"
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--dynamic", action="store_true", default=None, help="compile with dynamic shapes")
        command.add_argument(
            "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the backend; repeatable"
        )
        command.set_defaults(run=run)
        if name == "explain":
            command.add_argument("--target", help="what would happen on this machine, which need not be present")
            command.add_argument("--strict", action="store_true", help="end with status 1 when anything is missed")
        else:
            command.add_argument("--max-rel-err", type=float, help="end with status 1 when a site is worse")
            command.add_argument("--min-sqnr-db", type=float, help="end with status 1 when a site is worse")

    tune = commands.add_parser("tune", help="measure the native CPU kernels on this machine and keep what is faster")
    tune.add_argument(
        "--budget", type=float, default=20.0, metavar="SECONDS", help="time to measure in; 20 unless given"
    )
    tune.add_argument(
        "--shapes", nargs="+", default=[], metavar="NxK", help="weights to measure with, such as 4096x4096"
    )
    tune.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the configurations of Triton kernels on a GPU"
    )
    tune.add_argument("--json", action="store_true", help="print JSON")
    only = tune.add_mutually_exclusive_group()
    only.add_argument("--show", action="store_true", help="print the plans in force and where they come from")
    only.add_argument("--reset", action="store_true", help="delete what was measured: the defaults are in force again")
    tune.set_defaults(run=_tune)
    return parser


def _doctor(_: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = detect_target(device)
    facts = [
        ("platform", target.platform),
        ("arch", target.arch),
        ("features", ", ".join(sorted(target.features)) or "none"),
        ("threads", torch.get_num_threads()),
        *((name, version) for name, version in sorted(target.packages.items())),
        ("C++ compiler", cpp_compiler() or "none found: install g++ or set CXX; without it no CPU graph compiles"),
    ]
    print(tabulate(facts, tablefmt="plain"))
    print()
    return _print_kernels(target)


def _kernels(arguments: argparse.Namespace) -> int:
    from fx_quant.diagnose.support import support_matrix

    target = resolve_target(arguments.target, "cuda" if torch.cuda.is_available() else "cpu")
    if arguments.shapes:
        return _dispatch(arguments, target)
    matrix = support_matrix(target)
    if arguments.json:
        print(json.dumps({"target": str(target), "schemes": [each.to_dict() for each in matrix]}, indent=2))
        return 0
    _print_kernels(target)
    print(f"\nFor constant weights of 4096 x 4096 and any number of rows, to bfloat16, {target} runs:\n")
    print("\n".join(map(str, matrix)))
    return 0


def _dispatch(arguments: argparse.Namespace, target: Any) -> int:
    from fx_quant.diagnose.gpu_linears import ROWS, dispatch, table
    from fx_quant.scheme import Scheme

    scheme = None if arguments.scheme is None else Scheme.parse(arguments.scheme)
    found = dispatch(target, arguments.shapes, arguments.rows or ROWS, scheme)
    if arguments.json:
        print(json.dumps({"target": str(target), "linears": [each.to_dict() for each in found]}, indent=2))
    else:
        print(table(found, target))
    return 0


def _print_kernels(target: Any) -> int:
    from fx_quant.kernels.registry import kernels

    judged = [(kernel, kernel.requires.unmet_by_target(target)) for kernel in kernels()]
    # What can run first; within each part, the order in which selection asks.
    judged.sort(key=lambda pair: bool(pair[1]))
    rows = [
        (kernel.name, kernel.provider, "; ".join(map(str, unmet)) or "can run", kernel.note) for kernel, unmet in judged
    ]
    headers = ("kernel", "provider", f"on {target}", "what it is")
    print(tabulate(rows, headers=headers, maxcolwidths=[None, None, 40, 44]))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from fx_quant.diagnose.explain import explain

    if arguments.target is not None:
        named_target(arguments.target)  # a wrong name should not wait for a model to load
    model, args, kwargs = _load(arguments.model)
    report = explain(
        model,
        *args,
        target=arguments.target,
        dynamic=arguments.dynamic,
        options=_options(arguments.option),
        **kwargs,
    )
    print(report.to_json() if arguments.json else report)
    return 1 if arguments.strict and report.misses else 0


def _check(arguments: argparse.Namespace) -> int:
    from fx_quant.diagnose.check import check
    from fx_quant.errors import ToleranceError

    model, args, kwargs = _load(arguments.model)
    report = check(model, *args, dynamic=arguments.dynamic, options=_options(arguments.option), **kwargs)
    print(report.to_json() if arguments.json else report)
    try:
        report.raise_if(max_rel_err=arguments.max_rel_err, min_sqnr_db=arguments.min_sqnr_db)
    except ToleranceError as error:
        print(f"fx_quant: {error}", file=sys.stderr)
        return 1
    return 0


def _tune(arguments: argparse.Namespace) -> int:
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
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
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
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
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


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise FxQuantError(f"--option must be NAME=VALUE, got {pair!r}")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def _load(path: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """``(model, args, kwargs)`` from ``module.path:callable``.

    Raises:
        FxQuantError: the path is malformed, cannot be imported or returns something else.
    """
    module_name, sign, name = path.partition(":")
    if not sign:
        raise FxQuantError(f"the model must be given as module.path:callable, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise FxQuantError(f"cannot import {module_name!r}: {error}. Run from the folder that holds it.") from error
    build = getattr(module, name, None)
    if not callable(build):
        raise FxQuantError(
            f"{module_name!r} must have a callable {name!r} that returns (model, inputs), found {build!r}"
        )
    built = build()
    if not isinstance(built, tuple) or len(built) != 2 or not callable(built[0]):
        raise FxQuantError(f"{path} must return (model, args) or (model, kwargs), got {type(built).__name__}")
    model, inputs = built
    if isinstance(inputs, Mapping):
        return model, (), dict(inputs)
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


if __name__ == "__main__":
    sys.exit(main())
