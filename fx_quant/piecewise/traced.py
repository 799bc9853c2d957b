"""A piece outside of the compile that it came from: as a functional graph of ATen ops, or compiled for other inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.traceback import preserve_node_meta
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
        with preserve_node_meta():
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


def fresh_size(low: int, high: int, avoid: Collection[int]) -> tuple[torch.SymInt, Any]:
    """A symbolic size from ``low`` to ``high`` whose hint is none of ``avoid``, and the fake mode in which it lives."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
        StrictMinMaxConstraint,
    )
    from torch.utils._sympy.value_ranges import ValueRanges

    hint = next((size for size in range(low, high + 1) if size not in avoid), high)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC],
        constraint_sizes=[StrictMinMaxConstraint(vr=ValueRanges(low, high), warn_only=True)],
    )
    shape: Any = mode.from_tensor(torch.empty(hint, device="meta"), symbolic_context=context).shape
    return shape[0], mode


def functional_graph(run: Callable[..., Any], inputs: Sequence[Any], written: list[int]) -> Graph:
    """The ATen ops of ``run`` on fake ``inputs``, none of which writes to memory, without those that do nothing.

    Args:
        written: is given the positions of the inputs that ``run`` writes to, of which the graph says nothing.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._pytree import tree_map_only

    def functional(*given: Any) -> Any:
        outside = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with outside, FunctionalTensorMode():
            taken = tree_map_only(Tensor, FunctionalTensor.to_functional, given)
            results = run(*taken)
            for position, tensor in enumerate(taken):
                if isinstance(tensor, FunctionalTensor):
                    torch._sync(tensor)
                    if torch._functionalize_has_data_mutation(tensor.elem):  # type: ignore[missing-attribute]
                        written.append(position)
            return tree_map_only(FunctionalTensor, plain, results)

    def plain(tensor: Any) -> Any:
        torch._sync(tensor)
        return torch._from_functional_tensor(tensor.elem)

    with enable_python_dispatcher():
        graph = make_fx(functional, tracing_mode="real")(*inputs).graph
    graph.eliminate_dead_code()
    return graph


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


@contextlib.contextmanager
def compiling_later(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    """Within, a graph can be compiled for ``inputs`` as Dynamo would have it compiled; yields what stands for them.

    Nothing of the sizes is a symbol. Inputs that are the same tensor are not for the compiled graph.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Any] = []
    seen: set[int] = set()
    for given in inputs:
        if not isinstance(given, Tensor):
            fakes.append(given)
            continue
        fakes.append(mode.from_tensor(given.detach() if id(given) in seen else given, static_shapes=True))
        seen.add(id(given))
    with tracing(TracingContext(mode)):
        yield fakes
