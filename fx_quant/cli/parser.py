"""What the command line takes, checked before anything is loaded."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import fx_quant
from fx_quant.cli import doctor, kernels, models, tune
from fx_quant.errors import FxQuantError, unknown_name
from fx_quant.target import named_targets

_CHOICE = re.compile(r"argument (?P<what>[\w-]+): invalid choice: '(?P<name>.*)' \(choose from (?P<known>.*)\)")


class _Parser(argparse.ArgumentParser):
    """Errors are one line, and name what is near."""

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as one line that also says where the options are explained."""
        if choice := _CHOICE.fullmatch(message):
            known = [name.strip("' ") for name in choice["known"].split(",")]
            raise unknown_name(choice["what"], choice["name"], known)
        raise FxQuantError(f"{message}; see `{self.prog} --help`")


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one run; ``run`` of these is what to do.

    Raises:
        FxQuantError: an argument that is not as it must be, with what is near.
    """
    parser, commands = _parser()
    arguments, unknown = parser.parse_known_args(list(argv))
    if unknown:
        if not unknown[0].startswith("-"):
            raise FxQuantError(f"{arguments.command} takes no {unknown[0]!r}; see `{parser.prog} --help`")
        known = commands[arguments.command]._option_string_actions
        raise unknown_name(f"option of {arguments.command}", unknown[0].split("=")[0], known)
    return arguments


def _parser() -> tuple[_Parser, dict[str, Any]]:
    name = "fx-quant" if sys.argv[0].endswith("fx-quant") else "python -m fx_quant"
    parser = _Parser(
        prog=name,
        description="Quantized matmuls of torch.compile graphs: what becomes of them, here or on another machine.",
        epilog="A model is module.path:callable, which returns (model, args) or (model, kwargs).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fx_quant {fx_quant.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command", parser_class=_Parser)

    def command(title: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(title, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    _of_doctor(command("doctor", doctor.run, "what runs on this machine, and what is missing"))
    _of_kernels(command("kernels", kernels.run, "the kernel that a target gives each scheme, and why no other"))
    _of_explain(
        command("explain", models.explain, "every quantized matmul of a model: its kernel, or why it is missed")
    )
    _of_bench(command("bench", models.bench, "what each rewritten matmul and a call take here, beside Inductor alone"))
    _of_check(command("check", models.check, "run a model compiled and uncompiled, and compare each quantized matmul"))
    _of_tune(command("tune", tune.run, "measure the native CPU kernels on this machine and keep what is faster"))
    return parser, dict(commands.choices)


def _of_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="every kernel, and what keeps it from running here")
    _add_json(parser)


def _of_kernels(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    parser.add_argument("--all", action="store_true", help="every kernel, and for each scheme why no other is chosen")
    _add_json(parser)
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="NxK",
        help="what runs these linears on a GPU, and in what time at best: llama3-8b, llama3-70b or sizes",
    )
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help="of the activation, for --shapes")
    parser.add_argument("--scheme", help="one scheme alone: w8a8, fp8, w4a16, ... or as schemes print")


def _of_explain(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_target(parser)
    parser.add_argument("--html", metavar="FILE", help="write a page to look at")
    parser.add_argument("--compare", metavar="FILE", help="what became different from a report that --json gave")
    _add_expectations(parser)


def _of_bench(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--html", metavar="FILE", help="write a page to look at")
    parser.set_defaults(target=None, packages=[], compare=None, strict=False, expect=None)


def _of_check(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--max-rel-err", type=_bound, help="end with status 1 when a site is worse")
    parser.add_argument("--min-sqnr-db", type=_bound, help="end with status 1 when a site is worse")
    _add_expectations(parser)


def _of_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget", type=float, default=20.0, metavar="SECONDS", help="time to take, compiling too; 20 unless given"
    )
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="NxK", help="weights to measure with, such as 4096x4096"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the configurations of Triton kernels on a GPU"
    )
    _add_json(parser)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--show", action="store_true", help="print the plans in force and where they come from")
    only.add_argument("--reset", action="store_true", help="delete what was measured: the defaults are in force again")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--wide", action="store_true", help="print every column and name in full")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="module.path:callable, which returns (model, args) or (model, kwargs)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown, for an issue")
    form.add_argument("--wide", action="store_true", help="print every column and name in full")
    parser.add_argument("--dynamic", action="store_true", default=None, help="compile with dynamic shapes")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the backend or of Inductor; repeatable",
    )


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help=f"one of {', '.join(named_targets())}, h100, zen4, ...; else this machine")
    parser.add_argument(
        "--with",
        dest="packages",
        action="append",
        default=[],
        metavar="NAME==VERSION",
        help="as if this library were installed there; repeatable",
    )


def _add_expectations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="end with status 1 on a miss, or where nothing is found")
    parser.add_argument(
        "--expect", type=_count, metavar="N", help="end with status 1 where fewer matmuls are rewritten"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {value}")
    return value


def _bound(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError("must be a number, got nan")
    return value


# What argparse calls a type where a text is none of it.
_count.__name__, _bound.__name__ = "int", "float"
