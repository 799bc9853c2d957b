"""Every rule on calls made from its op's schema, with arguments that nobody writes: none raises."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the ops of PT2E
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fx_quant.passes import annotate, rulebook
from tests.graphs import copy_of, trace

aten, pt2e = torch.ops.aten, torch.ops.quantized_decomposed
NUMBERS = [math.inf, -math.inf, math.nan, -0.0, 0, 1, True, False, 1e300, 2**31, -(2**63), 2**70, 200, 3.5, 7, -1, 2]
SIZES = [0, 1, -1, 2, 8, 64, 4, 16]
DTYPES = [torch.float32, torch.int8, torch.int32, torch.float64, torch.bool, torch.float16]
CALLS = 24


def everything(rows: Tensor, q: Tensor, f8: Tensor, x: Tensor, s: Tensor, point: Tensor, batch: Tensor) -> list[Any]:
    """Codes, what is decoded, products, sums and plain tensors, of known and of symbolic sizes."""
    decoded, product = q.float() * s[:, None], torch._int_mm(rows, q)
    return [
        *(decoded, q.float() - point, q.int(), product, product.float() * s, q.sum(1, keepdim=True, dtype=torch.int32)),
        *(torch.full((), math.inf), torch.zeros(8, 1), torch.full((), 300), torch.round(decoded), x.max(-1).values),
        *(rows.shape[0] * x, rows.shape[0] * 0.5 * x, f8.view(torch.uint8) & 15, batch.float() * s, q[:0], s[:1]),
    ]


@functools.cache
def _pool() -> Graph:
    given = (
        *(torch.zeros(6, 8, dtype=torch.int8), torch.zeros(8, 8, dtype=torch.int8)),
        *(torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.randn(8, 8), torch.rand(8)),
        *(torch.zeros((), dtype=torch.int32), torch.zeros(2, 8, 8, dtype=torch.int8)),
    )
    return trace(everything, *given, dynamic=True)


def pool() -> Graph:
    return copy_of(_pool())


def drawn(kind: str, name: str, nodes: Sequence[Node], choose: random.Random) -> Any:
    """An argument of a schema's type."""
    if name in ("layout", "memory_format"):
        return None  # integers in a schema, of which PyTorch reads past the known ones
    if kind.startswith("Optional["):
        return None if choose.random() < 0.4 else drawn(kind[9:-1], name, nodes, choose)
    tensors = [node for node in nodes if isinstance(node.meta["val"], Tensor)]
    numbers = [node for node in nodes if isinstance(node.meta["val"], (torch.SymInt, torch.SymFloat))]
    if kind == "Tensor":
        return choose.choice(tensors)
    if "Tensor" in kind:
        return choose.choices(tensors, k=choose.randint(0, 3))
    if kind in ("number", "float"):
        return choose.choice([*NUMBERS, *numbers])
    if "dtype" in name:
        return choose.choice(DTYPES)
    if kind in ("int", "SymInt"):
        return choose.choice([*SIZES, True, 200, 2**31])
    if kind == "bool":
        return choose.random() < 0.5
    return choose.choices(SIZES, k=choose.randint(0, 3)) if kind.startswith("List[") else None


def call(graph: Graph, op: Any, nodes: Sequence[Node], choose: random.Random) -> Node | None:
    """A call of ``op`` with drawn arguments; None where PyTorch refuses it."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in op._schema.arguments:
        value = drawn(str(argument.type), argument.name, nodes, choose)
        if not argument.kwarg_only:
            args.append(value)
        elif value is not None and choose.random() < 0.3:
            kwargs[argument.name] = value
    while args and op._schema.arguments[len(args) - 1].has_default_value() and choose.random() < 0.3:
        args.pop()
    given = map_arg((tuple(args), kwargs), lambda node: node.meta["val"])
    mode = nodes[0].meta["val"].fake_mode
    try:
        with mode, torch.no_grad():
            value = op(*given[0], **given[1])
    except Exception:  # noqa: BLE001  whatever PyTorch says of a call that nobody writes
        return None
    node = graph.call_function(op, tuple(args), kwargs)
    node.meta["val"] = value
    return node


def named(name: str) -> Any:
    namespace, op, overload = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), op, None)
    return getattr(packet, overload, None)


OPS = [op for op in (*rulebook._RULES, *map(named, rulebook._NAMED)) if isinstance(op, torch._ops.OpOverload)]


@pytest.mark.parametrize("op", sorted(OPS, key=str), ids=str)
def test_no_call_raises_in_a_rule(op, monkeypatch):
    graph, choose = pool(), random.Random(str(op))
    nodes = [node for node in graph.nodes if node.op != "output" and node.meta.get("val") is not None]
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        for _ in range(CALLS):
            call(graph, op, nodes, choose)

    def unguarded(step: Callable, *arguments: Any) -> Any:
        return step(*arguments)

    monkeypatch.setattr(annotate, "attempt", unguarded)
    annotate.Annotation(graph)


def test_most_rules_are_called():
    """So that the test above does not pass because PyTorch refuses everything."""
    graph, choose = pool(), random.Random(0)
    nodes = [node for node in graph.nodes if node.op != "output" and node.meta.get("val") is not None]
    accepted = [any(call(graph, op, nodes, choose) is not None for _ in range(CALLS)) for op in OPS]
    assert sum(accepted) > 0.75 * len(OPS)
