"""The graph around a matmul in a few lines, before and after its rewrite, for those who look at a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_quant.passes.nodes import qualified_name
from fx_quant.passes.rewriting import Rewriting
from fx_quant.report import ExcerptReport, Report
from fx_quant.scheme import dtype_name

# Steps of an excerpt, at most: of what is rewritten, and of what leads to a matmul that is left.
_MOST, _MOST_LEFT = 24, 10


def with_excerpts(report: Report, state: Rewriting) -> Report:
    """``report`` on ``state`` with the graph around each of its matmuls.

    Of a site, the steps that are gone and those that stand in their place; of what is left, the steps that lead to it.
    """
    before = {node.name: node for node in state.before.nodes}
    after = {node.name for node in state.graph.nodes}

    def left(gemm: Node, mark: str = "") -> ExcerptReport:
        return ExcerptReport(_excerpt(state.before, before.get(gemm.name, gemm), lambda node: True, _MOST_LEFT, mark))

    def rewritten(root: Node, result: Node) -> ExcerptReport:
        return ExcerptReport(
            _excerpt(state.before, before.get(root.name, root), lambda node: node.name not in after, _MOST),
            _excerpt(state.graph, result, lambda node: node.name not in before and not _is_packed(node), _MOST),
        )

    sites = zip(report.sites, state.rows.values(), strict=True)
    recognised = zip(report.recognised, state.recognised, strict=True)
    misses = zip(report.misses, state.misses, strict=True)
    return dataclasses.replace(
        report,
        sites=tuple(_with(told, rewritten(row.site.root, row.written()[1])) for told, row in sites),
        recognised=tuple(_with(told, left(row.gemm)) for told, row in recognised),
        misses=tuple(_with(told, left(row.gemm, row.node.name)) for told, row in misses),
    )


def _with(row: Any, excerpt: ExcerptReport) -> Any:
    return dataclasses.replace(row, excerpt=excerpt)


def _is_packed(node: Node) -> bool:
    """Whether ``node`` is a weight that one op packs beside those of all other sites."""
    return any(each.target is torch.ops.fx_quant.prepack.default for each in node.all_input_nodes)


def _excerpt(graph: Graph, last: Node, within: Callable[[Node], bool], most: int, mark: str = "") -> str:
    """The steps that lead to ``last`` from where ``within`` ends, the nearest first where there are too many."""
    chosen, waiting = {last}, [last]
    while waiting and len(chosen) < most:
        node = waiting.pop(0)
        for each in node.all_input_nodes:
            known = each in chosen or each.op != "call_function" or _is_size(each)
            if not known and within(each) and len(chosen) < most:
                chosen.add(each)
                waiting.append(each)
    steps = [node for node in graph.nodes if node in chosen]
    return "\n".join(_lines(steps, mark))


def _lines(steps: Collection[Node], mark: str) -> list[str]:
    """A line for each value that comes in, and one a step: what is numbered alike in each layer reads alike."""
    names: dict[Node, str] = {}
    needed = (each for step in steps for each in step.all_input_nodes)
    inputs = dict.fromkeys(each for each in needed if each not in steps and not _is_size(each))
    lines = []
    for node in inputs:
        names[node] = f"x{len(names)}"
        lines.append(f"{names[node]}: {_type(node)}" + _here(node, mark))
    for number, node in enumerate(steps):
        names[node] = f"%{number}"
        arguments = [_argument(each, names) for each in node.args]
        arguments += [f"{key}={_argument(each, names)}" for key, each in node.kwargs.items()]
        call = f"{_op(node)}({', '.join(arguments)})"
        lines.append(f"{names[node]}: {_type(node)} = {call}" + _here(node, mark))
    return lines


def _op(node: Node) -> str:
    name = qualified_name(node.target)
    return getattr(node.target, "__name__", name) if "<" in name else name


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def _here(node: Node, mark: str) -> str:
    return "   <- the proof stops here" if mark and node.name == mark else ""


def _type(node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        packed = ", packed" if _is_packed(node) else ""
        return f"{dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]{packed}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} results"
    return type(value).__name__


def _argument(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return str(value.meta["val"]) if _is_size(value) else names.get(value, value.name)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(each, names) for each in value)}]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
