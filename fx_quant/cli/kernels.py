"""``kernels``: what a target gives each scheme, or each linear of a model on a GPU; the answer first."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from fx_quant.cli.catalogue import catalogue
from fx_quant.cli.targets import target_of
from fx_quant.diagnose.support import SCHEMES, Support, support_matrix
from fx_quant.errors import FxQuantError
from fx_quant.report import Block, Entries, Paragraph, Reported, Table
from fx_quant.scheme import Scheme, short_scheme
from fx_quant.target import Target


@dataclass(frozen=True, repr=False)
class KernelsReport(Reported):
    """What a target gives each scheme.

    Args:
        target: the machine.
        support: of each scheme.
        reasons: whether to say of each why no other kernel is chosen.
        everything: whether to list every kernel.
    """

    target: Target
    support: tuple[Support, ...]
    reasons: bool
    everything: bool

    def summary(self) -> str:
        """One line: for what the answer holds."""
        runs = sum(each.kernel is not None for each in self.support)
        return (
            f"{runs} of {len(self.support)} schemes have a kernel on {self.target}, for constant weights of "
            "4096 x 4096 and any number of rows, to bfloat16"
        )

    def blocks(self, *, wide: bool) -> list[Block]:
        """The kernel of each scheme; where asked, what stands against each other."""
        columns = 3 if wide else 2
        rows = tuple(
            (each.scheme if wide else short_scheme(each.scheme), each.kernel or "none", each.numerics or "-")[:columns]
            for each in self.support
        )
        blocks: list[Block] = [Table(("scheme", "kernel", "numerics")[:columns], rows)]
        if self.reasons:
            for each in self.support:
                items = tuple(f"{name}: {'; '.join(why)}" for name, why in each.candidates().items())
                blocks += [Entries(f"{each.scheme} -> {each.kernel or 'no kernel'}, not", items)] if items else []
        else:
            blocks.append(Paragraph("--scheme fp8 says of one why no other kernel runs it, --all of every one."))
        return [*blocks, catalogue(self.target)] if self.everything else blocks

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "summary": self.summary(),
            "target": str(self.target),
            "schemes": [each.to_dict() for each in self.support],
        }


def run(arguments: argparse.Namespace) -> int:
    """Print what the target gives each scheme, or each linear."""
    target = target_of(arguments)
    scheme = None if arguments.scheme is None else _scheme(arguments.scheme)
    if arguments.shapes:
        return _dispatch(arguments, target, scheme)
    if arguments.rows:
        raise FxQuantError("--rows needs --shapes beside it, such as --shapes 4096x4096")
    support = tuple(support_matrix(target, SCHEMES if scheme is None else (str(scheme),)))
    report = KernelsReport(target, support, arguments.all or scheme is not None, arguments.all)
    print(report.to_json() if arguments.json else report.to_text(wide=arguments.wide))
    return 0


def _scheme(text: str) -> Scheme:
    try:
        return Scheme.parse(text)
    except ValueError as error:
        raise FxQuantError(f"--scheme: {error}") from None


def _dispatch(arguments: argparse.Namespace, target: Target, scheme: Scheme | None) -> int:
    from fx_quant.diagnose.gpu_linears import ROWS, dispatch, table

    found = dispatch(target, arguments.shapes, arguments.rows or ROWS, scheme)
    if arguments.json:
        print(json.dumps({"target": str(target), "linears": [each.to_dict() for each in found]}, indent=2))
    else:
        print(table(found, target))
    return 0
