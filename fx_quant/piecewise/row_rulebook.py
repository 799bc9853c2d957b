"""Where the rules of the proof are registered, by the name of the op's schema."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fx_quant.piecewise.rows import Call

Rule = Callable[[Call], Any]


@dataclass(frozen=True)
class Known:
    """A rule, and how it is asked.

    Args:
        rule: the state of the result, or a tuple of those of several; raises ``MixesRowsError``. It is asked of a call
            whose operands have rows.
        sizes: arguments that may depend on the number of rows, as only the shape of the result follows from them, and
            that is checked.
        makes: it is asked of every call, as the op makes a tensor of any size.
    """

    rule: Rule
    sizes: tuple[str, ...] = ()
    makes: bool = False


RULES: dict[str, Known] = {}


def rule(*names: str, sizes: tuple[str, ...] = (), makes: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ops by name, those of ATen without their namespace."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name if "::" in name else f"aten::{name}"] = Known(rule, sizes, makes)
        return rule

    return register
