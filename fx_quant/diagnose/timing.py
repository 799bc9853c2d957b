"""What each rewritten matmul takes on this machine, beside Inductor alone: measured on the values that it has there.

Alike matmuls (those of repeated layers) are one compile each way, and take turns with their own weights, as they do in
the model, so that none finds its weight in a cache because it was the last.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fx_quant.backend import compile_graph, compile_plainly
from fx_quant.compat import copy_graph, restore_matmul_decompositions, row_scales_on_cpu, second_compile
from fx_quant.diagnose.capture import run_eagerly
from fx_quant.diagnose.cuts import Keeper, cut_out
from fx_quant.diagnose.isolation import innermost, isolated, uncompiled
from fx_quant.loading.module_names import named_modules_of
from fx_quant.passes.rewriting import Rewriting
from fx_quant.report import CallReport, SiteReport, TimeReport

_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 7, 200, 0.5

Run = Callable[[list[Any]], Any]


def take_turns(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each of ``runs``, which take turns; each ran before."""
    taken: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        if turn >= _LEAST_ROUNDS and time.perf_counter() - begin > _SECONDS * len(runs):
            break
        for run, times in zip(runs, taken, strict=True):
            before = time.perf_counter()
            run()
            _wait()
            times.append(time.perf_counter() - before)
    return [statistics.median(times) for times in taken]


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass
class _Alike:
    """Matmuls that differ in their weights alone.

    Args:
        members: the number of each among the sites of its graph.
        inputs: for each the names of the source nodes that it takes.
        ours, plain: compiled for the first, and right for all.
    """

    members: list[int]
    inputs: list[list[str]]
    ours: Run
    plain: Run


class SiteTimes:
    """Times the sites of each graph as it runs op by op; an ``inner_compile`` for ``run_captured``.

    ``times`` are the seconds of ours and of Inductor alone, for each graph and site, in order.
    """

    def __init__(self) -> None:
        self.times: list[list[tuple[float, float]]] = []
        self._state: Rewriting | None = None
        self._sites: tuple[SiteReport, ...] = ()

    def on_state(self, state: Rewriting, sites: tuple[SiteReport, ...]) -> None:
        """The graph that is compiled next is the source of ``state``."""
        self._state, self._sites = state, sites

    def inner_compile(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile each kind of site both ways; the first call of the result measures them."""
        state, sites, self._state = self._state, self._sites, None
        found: list[tuple[float, float]] = []
        self.times.append(found)
        if state is None or not state.rows:
            return run_eagerly(gm, example_inputs)
        groups = _groups(gm, state, sites, kwargs)
        source = GraphModule(gm, copy_graph(state.before)[0])

        def run(inputs: list[Any]) -> Any:
            keeper = Keeper(source, {name for group in groups for names in group.inputs for name in names})
            with torch._C.DisableTorchFunction(), row_scales_on_cpu():
                result = keeper.run(*inputs)
            if not found:
                measured = {
                    member: times for group in groups for member, times in _measured(group, keeper.kept).items()
                }
                found.extend(measured[member] for member in range(len(sites)))
            return result

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _groups(gm: GraphModule, state: Rewriting, sites: Sequence[SiteReport], kwargs: Mapping[str, Any]) -> list[_Alike]:
    alike: dict[tuple[Any, ...], _Alike] = {}
    for member, (row, site) in enumerate(zip(state.rows.values(), sites, strict=True)):
        ours, inputs = cut_out(state, [row.written()[1]])
        kind = (site.scheme, site.m, site.n, site.k, site.kernel, site.padding, site.excerpt, *_types(ours))
        if kind not in alike:
            plain = _source_of(state, row.site.root, inputs)
            alike[kind] = _Alike(
                [], [], _compiled(gm, ours, compile_graph, kwargs), _compiled(gm, plain, compile_plainly, kwargs)
            )
        alike[kind].members.append(member)
        alike[kind].inputs.append(inputs)
    return list(alike.values())


def _types(graph: Graph) -> tuple[str, ...]:
    return tuple(str(node.meta.get("val")) for node in graph.find_nodes(op="placeholder"))


def _source_of(state: Rewriting, root: Node, inputs: Sequence[str]) -> Graph:
    """The steps of the source that lead from ``inputs`` to ``root``."""
    graph, copied = Graph(state.before.owning_module), {}
    source = {node.name: node for node in state.before.nodes}
    for name in inputs:
        copied[source[name]] = graph.placeholder(name)
        copied[source[name]].meta = dict(source[name].meta)
    needed, waiting = set(copied), [source[root.name]]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    for node in state.before.nodes:
        if node in needed and node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output((copied[source[root.name]],))
    return graph


def _compiled(gm: GraphModule, graph: Graph, compile: Callable[..., Run], kwargs: Mapping[str, Any]) -> Run:
    restore_matmul_decompositions(graph)
    fakes = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    with second_compile():
        return compile(GraphModule(gm, graph), fakes, **{**kwargs, "static_input_idxs": ()})


def _measured(group: _Alike, kept: Mapping[str, Tensor]) -> dict[int, tuple[float, float]]:
    turns = [[kept[name] for name in names] for names in group.inputs]
    with torch._C.DisableTorchFunction():
        for values, run in itertools.product(turns, (group.ours, group.plain)):
            run(list(values))
        ours, plain = itertools.cycle(turns), itertools.cycle(turns)
        times = take_turns((lambda: group.ours(list(next(ours))), lambda: group.plain(list(next(plain)))))
    return dict.fromkeys(group.members, (times[0], times[1]))


def call_times(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: bool | None,
    options: Mapping[str, Any],
    inductor_options: Mapping[str, Any],
) -> CallReport:
    """What a call of ``model`` takes, compiled by fx_quant and by Inductor alone."""
    model = innermost(model)
    with isolated(), uncompiled(named_modules_of(model).values()), torch.no_grad():
        ours = torch.compile(model, backend="fx_quant", dynamic=dynamic, options=dict(options))
        plain = torch.compile(model, backend="inductor", dynamic=dynamic, options=dict(inductor_options) or None)
        for _, run in itertools.product(range(2), (ours, plain)):
            run(*args, **kwargs)
        seconds = take_turns((lambda: ours(*args, **kwargs), lambda: plain(*args, **kwargs)))
    return CallReport(seconds[0], seconds[1])


def timed(
    sites: Sequence[SiteReport], times: Sequence[tuple[float, float]], call: CallReport
) -> tuple[SiteReport, ...]:
    """``sites`` with their ``times``."""
    return tuple(
        replace(site, time=TimeReport(ours, plain, ours / call.seconds))
        for site, (ours, plain) in zip(sites, times, strict=True)
    )


def model_bytes(modules: Mapping[str, nn.Module]) -> int:
    """Bytes of all storages that the tensors of ``modules`` have."""
    from fx_quant.loading.release import Ledger

    ledger = Ledger()
    return sum(size for module in dict.fromkeys(modules.values()) for _, size in ledger.memory_of(module).storages)
