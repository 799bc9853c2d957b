"""What is known of a compile, or of an eager call, beside the problem and the machine: it decides the plan."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fx_quant.config import Options, PaddingPolicy, parse_padding


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
        mode: how the kernel is called.
        padding: what may be padded, as a policy or its name.
        deterministic: a row's bits must not depend on how many rows stand beside it.

    Raises:
        UnknownNameError: no such policy.
    """

    mode: Mode = Mode.GRAPH
    padding: PaddingPolicy = PaddingPolicy.AUTO
    deterministic: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "padding", parse_padding(self.padding))

    @classmethod
    def of(cls, options: Options) -> CompileContext:
        """The context of a compile with ``options``."""
        return cls(Mode.PIECEWISE if options.piecewise else Mode.GRAPH, options.padding, options.deterministic)


EAGER = CompileContext(Mode.EAGER)
GRAPH = CompileContext(Mode.GRAPH)
