"""Running a model once through Dynamo and AOTAutograd with our own compiler, to look at its graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import Graph, GraphModule

from fx_quant.backend import compile_with
from fx_quant.compat import row_scales_on_cpu
from fx_quant.diagnose.inputs import check_inputs, failures_in_a_line
from fx_quant.diagnose.isolation import graph_breaks, innermost, isolated, uncompiled, why_nothing_was_captured
from fx_quant.errors import FxQuantError
from fx_quant.loading.module_names import ModuleNames, named_modules_of
from fx_quant.report import BreakReport

InnerCompile = Callable[..., Callable[..., Any]]


@dataclass(frozen=True)
class Capture:
    """One call of a model, as Dynamo saw it.

    Args:
        output: of the model.
        modules: those of the model, by name.
        seen: names of the modules of which a graph took a tensor.
        renamings: for each joint graph the modules that it was called for: those by whose names it goes, renamed so.
        breaks: where a graph ended.
        uncaptured: why there was no graph; empty where there was one.
    """

    output: Any
    modules: dict[str, nn.Module]
    seen: set[str]
    renamings: list[list[dict[str, str]]]
    breaks: tuple[BreakReport, ...]
    uncaptured: str


def run_captured(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    on_graph: Callable[[Graph], None],
    inner_compile: InnerCompile,
    on_dynamo_graph: Callable[[GraphModule], None] = lambda gm: None,
    on_call: Callable[[Mapping[str, str]], None] = lambda renaming: None,
    dynamic: bool | None = None,
    inductor_options: Mapping[str, Any] | None = None,
) -> Capture:
    """Call ``model`` compiled by ``inner_compile``, ``on_graph`` seeing each joint graph, ``on_call`` each call.

    ``on_dynamo_graph`` sees each graph as Dynamo made it, before all others.
    Modules go by their names in ``named_modules()``. What the model or its parts were compiled with is left aside, and
    Dynamo is afterwards as it was before.

    Raises:
        ModelError: ``model`` cannot be run on these inputs.
    """
    check_inputs(model, args, kwargs)
    model = innermost(model)
    modules = named_modules_of(model)
    names = ModuleNames(modules)
    renamings: list[list[dict[str, str]]] = []
    captured = 0

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        nonlocal captured
        captured += 1
        on_dynamo_graph(gm)
        graph, called_for = names.put_into(gm, example_inputs), []

        def rewrite(joint: Graph) -> None:
            renamings.append(called_for)
            on_graph(joint)

        # A hit in the cache of graphs would skip the passes, and what they see is the purpose. C++ that was compiled
        # before is loaded; without any cache each call would compile it again, into a folder that nobody removes.
        compiled = compile_with(
            gm,
            example_inputs,
            rewrite,
            inductor_options={**(inductor_options or {}), "fx_graph_cache": False, "fx_graph_remote_cache": False},
            inner_compile=inner_compile,
        )

        def call(*inputs: Any) -> Any:
            renaming = graph.renaming(inputs)
            if renaming not in called_for:
                called_for.append(renaming)
            on_call(renaming)
            return compiled(*inputs)

        return call

    with isolated(), uncompiled(modules.values()), torch.no_grad(), failures_in_a_line():
        try:
            output = torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
        except BackendCompilerFailed as error:
            # Dynamo wraps what a backend raises; our own errors are for the caller as they are.
            if isinstance(error.inner_exception, FxQuantError):
                raise error.inner_exception from None
            raise
        uncaptured = "" if captured else why_nothing_was_captured(model)
        return Capture(output, modules, names.seen, renamings, graph_breaks(), uncaptured)


def run_eagerly(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """An ``inner_compile`` that runs the graph op by op."""

    def run(inputs: list[Any]) -> Any:
        # A torch-function mode left active by a library must not see the graph's ops a second time.
        with torch._C.DisableTorchFunction(), row_scales_on_cpu():
            return gm(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
