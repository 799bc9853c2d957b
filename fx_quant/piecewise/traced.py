"""A piece as a functional graph of ATen ops, its number of rows a symbol of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_quant.compat import fresh_size, functional_graph, keeping_node_meta
from fx_quant.piecewise.rows import MixesRowsError


@dataclass(frozen=True)
class Traced:
    """A functional graph of ATen ops, each node with its fake value as ``val``.

    Args:
        symbol: the ``sympy.Symbol`` of its number of rows.
        holds_where: conditions on it, outside of which the ops are others.
    """

    graph: Graph
    symbol: Any
    holds_where: tuple[str, ...] = ()


def trace(module: GraphModule, symbol: Any, low: int, high: int) -> Traced:
    """The ops of a piece of Dynamo's graph, for every number of rows from ``low`` to ``high``.

    Inputs that are tensor subclasses are taken apart. What Dynamo knows of the size, its guards, is left alone.

    Args:
        symbol: the number of rows in the sizes of the piece's inputs, the only symbol there.

    Raises:
        MixesRowsError: it cannot be traced, or writes to its inputs.
    """
    values = [node.meta.get("example_value") for node in module.graph.find_nodes(op="placeholder")]
    rows, mode = fresh_size(low, high, avoid=_numbers(values))
    env = mode.shape_env

    def renamed(size: int | torch.SymInt) -> int | torch.SymInt:
        if isinstance(size, int):
            return size
        expression = size.node.expr.xreplace({symbol: rows.node.expr})
        if expression.is_Integer:
            return int(expression)
        return env.create_symintnode(expression, hint=int(expression.xreplace({rows.node.expr: rows.node.hint})))

    flat: list[Any] = []
    with mode:
        builders = [_flatten(value, renamed, flat) for value in values]

    def run(*given: Any) -> Any:
        each = iter(given)
        with keeping_node_meta():
            return Interpreter(module, garbage_collect_values=False).run(*[build(each) for build in builders])

    return trace_function(run, flat, rows, mode)


def trace_function(run: Callable[..., Any], inputs: Sequence[Any], rows: torch.SymInt, mode: Any) -> Traced:
    """The ops of ``run`` on ``inputs``, fakes of ``mode``, for all numbers of rows that ``rows`` may be.

    Raises:
        MixesRowsError: as ``trace``.
    """
    env, written = mode.shape_env, []
    before = len(env.guards)
    try:
        with mode, torch.no_grad():
            graph = functional_graph(run, inputs, written)
    except Exception as error:
        raise MixesRowsError(f"the piece could not be traced as ATen ops: {error!r}") from error
    if written:
        raise MixesRowsError("the piece writes to its inputs")
    return Traced(graph, rows.node.expr, tuple(str(guard.expr) for guard in env.guards[before:]))


def _flatten(value: Any, renamed: Callable[[Any], Any], flat: list[Any]) -> Callable[[Iterator[Any]], Any]:
    """Put what is in ``value``, with new sizes, into ``flat``; returns what makes ``value`` of such things again."""
    if isinstance(value, torch.SymInt):
        flat.append(renamed(value))
        return next
    if not isinstance(value, Tensor):
        flat.append(value)
        return next
    shape, stride = tuple(map(renamed, value.shape)), tuple(map(renamed, value.stride()))
    if not is_traceable_wrapper_subclass(value):
        flat.append(torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device))
        return next
    names, context = value.__tensor_flatten__()
    inner = [_flatten(getattr(value, name), renamed, flat) for name in names]
    kind: Any = type(value)

    def build(each: Iterator[Any]) -> Any:
        parts = {name: make(each) for name, make in zip(names, inner, strict=True)}
        return kind.__tensor_unflatten__(parts, context, shape, stride)

    return build


def _numbers(values: Sequence[Any]) -> set[int]:
    """All sizes that are numbers."""
    return {size for value in values if isinstance(value, Tensor) for size in value.shape if isinstance(size, int)}
