"""One plan, two faces: what an eager call does and what is written into a graph are the same steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fx_quant.kernels.context import EAGER, GRAPH
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.padding import Padding, plan_padding
from fx_quant.kernels.registry import Kernel, kernels
from fx_quant.kernels.select import Selection
from fx_quant.passes.assign import assign
from fx_quant.passes.canonical import CANONICAL
from fx_quant.problem import Problem
from fx_quant.scheme import INT4_DTYPES, Scheme
from fx_quant.target import named_target
from tests.test_conformance import ALL_SCHEMES, EPILOGUES, activation_scale, problem

aten, prims = torch.ops.aten, torch.ops.prims
# Views, and names for one result of several: no work.
VIEWS = (
    "prim.device.default",
    "aten.t.default",
    "aten.permute.default",
    "<built-in function getitem>",
    "aten.detach.default",
)
CASTS = ("aten._to_copy.default", "prims.convert_element_type.default")
OPERANDS = ("a", "weight", "a_scale", "b_scale", "bias", "a_zero_point", "b_zero_point")
M = 5


def fake_operands(asked: Problem) -> dict[str, Any]:
    """Tensors of the shapes that ``asked`` has, without values."""
    activation, weight, block = asked.scheme.activation, asked.scheme.weight, asked.scheme.weight.block
    packed = weight.dtype in INT4_DTYPES
    shape = weight.scale_shape(asked.n, asked.k)
    if block is None:
        shape = (asked.n,) if len(shape) else ()
    scale = activation_scale(asked.scheme, M, asked.k)
    return {
        "a": torch.empty(M, asked.k, dtype=activation.dtype),
        "weight": torch.empty(
            asked.n, asked.k // weight.codes_per_element, dtype=torch.uint8 if packed else weight.dtype
        ),
        "a_scale": scale,
        "b_scale": torch.empty(shape),
        "bias": None if asked.bias is None else torch.empty(asked.n, dtype=asked.bias),
        "a_zero_point": None if activation.symmetric else torch.empty(scale.shape, dtype=torch.int32),
        "b_zero_point": None if weight.symmetric else torch.empty(shape, dtype=torch.int32),
    }


def canonical(asked: Problem, a, weight, a_scale, b_scale, bias, a_zero_point, b_zero_point) -> Tensor:
    ops, block = torch.ops.fx_quant, asked.scheme.weight.block
    if asked.scheme.weight_only:
        return ops.weight_only_mm(a, weight.t(), b_scale, b_zero_point, bias, asked.out_dtype, block=block)
    more = {"a_zero_point": a_zero_point, "b_zero_point": b_zero_point, "block": block}
    return ops.scaled_mm(a, weight.t(), a_scale, b_scale, bias, asked.out_dtype, **more)


class Recorded(TorchDispatchMode):
    """The calls of ops that reach it, as ``steps`` reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((str(func), (*args, out), dict(kwargs or {})))
        return out


def plain(value: object) -> object:
    """A tensor as its dtype and shape."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape)
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def steps(calls: list[tuple[str, tuple, dict]]) -> list[tuple]:
    """``calls`` without views; a cast is one however it is spelled, and what is packed comes first."""
    found = []
    for name, args, kwargs in calls:
        if name in CASTS:
            # Through a wider dtype is one exact cast.
            if found and found[-1][0] == "cast" and found[-1][2] == plain(args[0]):
                found[-1] = ("cast", found[-1][1], plain(args[-1]))
            else:
                found.append(("cast", plain(args[0]), plain(args[-1])))
        elif name not in VIEWS:
            # PyTorch leaves out what is the default.
            values = [value for value in args if isinstance(value, (Tensor, Node)) or value != 0]
            found.append((name, plain(values), {key: plain(value) for key, value in kwargs.items()}))
    return sorted(found, key=lambda step: "prepack" not in step[0])


def eager_steps(selection: Selection, given: dict[str, Any], constant: tuple[str, ...]) -> list[tuple]:
    with FakeTensorMode() as mode, Recorded() as recorded:
        there = {name: None if x is None else mode.from_tensor(x) for name, x in given.items()}
        run_kernel(selection, constant=constant, **there)
    return steps(recorded.calls)


def graph_steps(selection: Selection, given: dict[str, Any], constant: tuple[str, ...]) -> list[tuple]:
    traced = make_fx(lambda *operands: canonical(selection.problem, *operands), tracing_mode="fake")(
        *(given[name] for name in OPERANDS)
    )
    graph: Graph = traced.graph
    (node,) = [node for node in graph.nodes if node.target in CANONICAL]
    factors = dict(zip(OPERANDS, graph.find_nodes(op="placeholder"), strict=True))
    runtime = {node for name, node in factors.items() if name not in constant and name.startswith("b_")}
    assign(graph, {node: selection}, runtime)
    graph.eliminate_dead_code()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return steps([(str(node.target), (*node.args, node), dict(node.kwargs)) for node in calls])


def asked_of(kernel: Kernel, scheme: Scheme, n: int, k: int) -> Problem | None:
    """A problem of ``scheme`` that ``kernel`` runs, with a bias where it adds one."""
    for out, bias in sorted(EPILOGUES, key=lambda epilogue: epilogue[1] is None):
        for out_dtype in (out, scheme.activation.dtype):
            asked = problem(scheme, n, k, out_dtype, bias, M)
            if not kernel.requires.unmet_by_problem(asked):
                return asked
    return None


CASES = [
    pytest.param(kernel, n, k, id=f"{kernel.name}-{n}x{k}")
    for kernel, (n, k) in itertools.product(kernels(), ((128, 256), (70, 36)))
    if any(asked_of(kernel, scheme, n, k) for scheme in ALL_SCHEMES)
]


@pytest.mark.parametrize(("kernel", "n", "k"), CASES)
def test_an_eager_call_and_a_graph_do_the_same_steps(kernel, n, k):
    for asked in filter(None, (asked_of(kernel, scheme, n, k) for scheme in ALL_SCHEMES)):
        given = fake_operands(asked)
        padded = Padding(-(-asked.n // 32) * 32, -(-asked.k // 64) * 64, 17) if kernel.layout is None else None
        plans = [plan_padding(asked, kernel, context) for context in (EAGER, GRAPH)]
        for plan in dict.fromkeys([*plans, padded or plans[0]]):
            selection = Selection(asked, named_target("x86"), kernel, plan, ())
            factors = [("b", "b_scale", "b_zero_point")] if kernel.panel_factors else []
            for constant in (*factors, ("b",)):
                eager = eager_steps(selection, given, constant)
                assert eager == graph_steps(selection, given, constant), (asked, plan, constant)
                assert any(kernel.op in step[0] for step in eager)
