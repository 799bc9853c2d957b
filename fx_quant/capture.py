"""Running a model once through Dynamo and AOTAutograd with our own compiler, to look at its graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule

from fx_quant.backend import compile_with
from fx_quant.compat import row_scales_on_cpu
from fx_quant.errors import FxQuantError

InnerCompile = Callable[..., Callable[..., Any]]


def run_captured(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    on_graph: Callable[[Graph], None],
    inner_compile: InnerCompile,
    dynamic: bool | None = None,
) -> tuple[Any, int]:
    """Call ``model`` compiled by ``inner_compile``, ``on_graph`` seeing each joint graph first.

    Returns:
        The model's output and the number of graph breaks.
    """
    model = getattr(model, "_orig_mod", model)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        # A cache hit would skip the passes, and what they see is the purpose.
        return compile_with(
            gm,
            example_inputs,
            on_graph,
            inductor_options={"force_disable_caches": True},
            inner_compile=inner_compile,
        )

    before = sum(counters["graph_break"].values())
    with torch.no_grad():
        try:
            output = torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
        except BackendCompilerFailed as error:
            # Dynamo wraps what a backend raises; our own errors are for the caller as they are.
            if isinstance(error.inner_exception, FxQuantError):
                raise error.inner_exception from None
            raise
    return output, sum(counters["graph_break"].values()) - before


def run_eagerly(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """An ``inner_compile`` that runs the graph op by op."""

    def run(inputs: list[Any]) -> Any:
        # A torch-function mode left active by a library must not see the graph's ops a second time.
        with torch._C.DisableTorchFunction(), row_scales_on_cpu():
            return gm(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
