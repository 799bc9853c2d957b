"""What is known of a compile, or of an eager call, beside the problem and the machine: it decides the plan."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from fx_quant.compat import not_compiled_alone
from fx_quant.config import Options, PaddingPolicy, parse_padding, parse_ranges
from fx_quant.errors import FxQuantError, must, unknown_name
from fx_quant.problem import SizeRange


class Mode(str, Enum):
    """How the kernel is called."""

    EAGER = "eager"
    """At once, with a number of rows that is known."""
    GRAPH = "graph"
    """From a compiled graph, for every number of rows that its range holds."""
    PIECEWISE = "piecewise"
    """From a piece of a graph that is cut at its attention, likewise."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class CompileContext:
    """What kernel and padding plan depend on beside the problem and the target; equal contexts give equal plans.

    Args:
        mode: how the kernel is called, as a mode or its name.
        padding: what may be padded, as a policy or its name.
        deterministic: a row's bits must not depend on how many rows stand beside it.
        ranges: the ranges of m for each of which a graph is compiled; none, and one is for all.

    Raises:
        UnknownNameError: no such mode or policy.
        FxQuantError: ranges that are none, or a ``deterministic`` that is no bool.
    """

    mode: Mode = Mode.GRAPH
    padding: PaddingPolicy = PaddingPolicy.AUTO
    deterministic: bool = False
    ranges: tuple[SizeRange, ...] = ()

    def __post_init__(self) -> None:
        must(
            isinstance(self.deterministic, bool),
            f"'deterministic' must be True or False, got {self.deterministic!r}",
            FxQuantError,
        )
        object.__setattr__(self, "mode", _parse_mode(self.mode))
        object.__setattr__(self, "padding", parse_padding(self.padding))
        object.__setattr__(self, "ranges", parse_ranges(self.ranges))

    @classmethod
    def of(cls, options: Options) -> CompileContext:
        """The context of a compile with ``options``."""
        mode = Mode.PIECEWISE if options.piecewise else Mode.GRAPH
        return cls(mode, options.padding, options.deterministic, options.ranges)


# Made once, as for padding policies.
_MODES = {str(mode): mode for mode in Mode}


def _parse_mode(name: str | Mode) -> Mode:
    if str(name) not in _MODES:
        raise unknown_name("mode", str(name), _MODES)
    return _MODES[str(name)]


EAGER = CompileContext(Mode.EAGER)
GRAPH = CompileContext(Mode.GRAPH)

# The `with` blocks that this thread or task is in, each with its context, the innermost last.
_ENTERED: ContextVar[tuple[tuple[AbstractContextManager[CompileContext], CompileContext], ...]] = ContextVar(
    "fx_quant_entered", default=()
)


def _current() -> CompileContext:
    entered = _ENTERED.get()
    return entered[-1][1] if entered else EAGER


def mode(
    mode: Mode | str | None = None, *, padding: PaddingPolicy | str | None = None, deterministic: bool | None = None
) -> AbstractContextManager[CompileContext]:
    """``with fx_quant.mode("piecewise", padding="vllm"):`` what eager calls inside the block are planned for.

    A layer of fx_quant, wherever and whenever it was built, pads as the block says in which it is called. What is left
    out is as it is around the block; around all it is eager and ``auto``. It holds for this thread, or this asyncio
    task, alone. A layer with a context of its own keeps its padding policy and ``deterministic``; the mode is always
    that of the call.

    Compiled code pads as its compile's options say, in a block or not, and no graph is compiled anew for it.

    Args:
        mode: ``eager``, ``graph`` or ``piecewise``: pad as in a call of that kind.
        padding: what may be padded: ``auto``, ``never``, ``constants``, ``always`` or ``vllm``.
        deterministic: a row's bits must not depend on how many rows stand beside it.

    Returns:
        A context manager that gives the whole context; it may be entered again, also within itself.

    Raises:
        UnknownNameError: no such mode or policy.
        FxQuantError: a ``deterministic`` that is no bool.
    """
    asked = {"mode": mode, "padding": padding, "deterministic": deterministic}
    return _Block({name: value for name, value in asked.items() if value is not None})


class _Block(AbstractContextManager[CompileContext]):
    """Enters the context around it with ``changes``. All state is in ``_ENTERED``, so that threads may share one."""

    def __init__(self, changes: dict[str, Any]) -> None:
        replace(EAGER, **changes)  # what is wrong with them is said here
        self._changes = changes

    def __enter__(self) -> CompileContext:
        # What is traced is planned by its compile; Dynamo looks at neither the variable nor the block.
        if torch.compiler.is_compiling():
            return GRAPH
        context = replace(_current(), **self._changes)
        _ENTERED.set((*_ENTERED.get(), (self, context)))
        return context

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        # Its own entry, which is not the last where a generator is closed within another block.
        entered = _ENTERED.get()
        last = max((i for i, (block, _) in enumerate(entered) if block is self), default=len(entered))
        _ENTERED.set((*entered[:last], *entered[last + 1 :]))


# Around what cannot be traced of a traced block, Dynamo has Python enter it again, and would compile that by itself.
not_compiled_alone(_Block.__enter__)
not_compiled_alone(_Block.__exit__)


def of_call(own: CompileContext | None) -> CompileContext:
    """What an eager call is planned for: as ``mode`` says, with the policy and the determinism of ``own`` if given."""
    entered = _current()
    return entered if own is None else replace(own, mode=entered.mode)
