"""``explain``, ``bench`` and ``check``: what becomes of the model that a callable of the user's returns."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from fx_quant.cli.targets import target_of
from fx_quant.errors import FxQuantError, MissError, ToleranceError, unknown_name
from fx_quant.report import Report, Reported


def bench(arguments: argparse.Namespace) -> int:
    """Print what the rewritten matmuls of the model take here, beside Inductor alone."""
    return explain(arguments, time=True)


def explain(arguments: argparse.Namespace, *, time: bool = False) -> int:
    """Print what would become of the model; 1 where that is not as expected."""
    from fx_quant.diagnose.explain import explain

    # What is wrong should not wait for a model to load.
    target = target_of(arguments) if arguments.target or arguments.packages else None
    options, before = _options(arguments.option), _saved(arguments.compare)
    _check_writable(arguments.html)
    model, args, kwargs = _load(arguments.model)
    report = explain(model, *args, target=target, dynamic=arguments.dynamic, options=options, time=time, **kwargs)
    if arguments.html:
        try:
            report.to_html(arguments.html)
        except OSError as error:
            raise FxQuantError(f"--html: {error}") from error
    _print(report if before is None else before.compare(report), arguments)
    try:
        report.raise_if(missed=arguments.strict, fewer_than=arguments.expect)
    except MissError as error:
        return _failed(error)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Print how far the compiled model is from its source; 1 where that is not as expected."""
    from fx_quant.diagnose.check import check

    options = _options(arguments.option)
    model, args, kwargs = _load(arguments.model)
    report = check(model, *args, dynamic=arguments.dynamic, options=options, **kwargs)
    _print(report, arguments)
    try:
        report.raise_if(max_rel_err=arguments.max_rel_err, min_sqnr_db=arguments.min_sqnr_db)
        report.raise_if_missed(missed=arguments.strict, fewer_than=arguments.expect)
    except (ToleranceError, MissError) as error:
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    print(f"fx_quant: {error}", file=sys.stderr)
    return 1


def _print(report: Reported, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(report.to_json())
    elif arguments.markdown:
        print(report.to_markdown(), end="")
    else:
        print(report.to_text(wide=arguments.wide))


def _saved(path: str | None) -> Report | None:
    """The report that ``--json`` wrote to ``path``.

    Raises:
        FxQuantError: there is none.
    """
    if path is None:
        return None
    try:
        return Report.from_json(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise FxQuantError(f"--compare needs a file that `explain --json` wrote, got {path!r}: {error!r}") from error


def _check_writable(path: str | None) -> None:
    if path is None:
        return
    file = pathlib.Path(path).absolute()
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise FxQuantError(f"--html needs a file in a folder that exists and may be written to, got {path!r}")


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options by name, read as Python reads them, of ours and of Inductor's.

    Raises:
        FxQuantError: one is not as it must be.
    """
    from fx_quant.backend import split_options

    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise FxQuantError(f"--option must be NAME=VALUE, got {pair!r}")
        options[name] = _value(value)
    split_options(options)
    return options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _load(path: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """``(model, args, kwargs)`` from ``module.path:callable``.

    Raises:
        FxQuantError: the path is malformed, cannot be imported or returns something else.
    """
    module_name, sign, name = path.partition(":")
    if not sign or not module_name or not name:
        raise FxQuantError(f"the model must be given as module.path:callable, got {path!r}")
    if "/" in module_name or module_name.endswith(".py"):
        meant = module_name.removesuffix(".py").removeprefix("./").replace("/", ".")
        raise FxQuantError(f"a module goes by its name, not by its file: {meant}:{name}, got {path!r}")
    module = _imported(module_name)
    build = getattr(module, name, None)
    if not callable(build):
        functions = [each for each, value in vars(module).items() if inspect.isroutine(value)]
        raise unknown_name(f"function of {module_name}", name, functions)
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise FxQuantError(f"{path} must be called with nothing, and return (model, inputs): {error}") from None
    try:
        built = build()
    except SystemExit as error:
        raise FxQuantError(f"{path} ended the process: {error}") from None
    if not isinstance(built, tuple) or len(built) != 2 or not callable(built[0]):
        got = f"a tuple of {len(built)}" if isinstance(built, tuple) and len(built) != 2 else type(built).__name__
        if isinstance(built, tuple) and len(built) == 2:
            got = f"a model that cannot be called: {type(built[0]).__name__}"
        raise FxQuantError(f"{path} must return (model, args) or (model, kwargs), got {got}")
    model, inputs = built
    if isinstance(inputs, Mapping):
        return model, (), dict(inputs)
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def _imported(name: str) -> ModuleType:
    """The module of this name.

    Raises:
        FxQuantError: there is none, or it is no Python.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FxQuantError(f"cannot import {name!r}: {error}. Run from the folder that holds it.") from error
    except SyntaxError as error:
        raise FxQuantError(f"cannot import {name!r}: {error}") from error
    except SystemExit as error:
        raise FxQuantError(f"importing {name!r} ended the process: {error}") from None
