"""Outputs keep memory of their own: what a caller writes to one result, parameter or input changes no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from fx_quant.config import Options
from fx_quant.passes.memory import Memory
from fx_quant.passes.pipeline import rewrite_graph, to_kernels
from fx_quant.passes.verify import VerificationError, verify
from fx_quant.target import named_target
from tests.graphs import calls, copy_of, rewrite, trace

M, K, N = 4, 64, 64
X86 = named_target("x86_vnni")
ops, aten = torch.ops.fx_quant, torch.ops.aten


def given() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator)
    weight = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    return [x, weight, torch.rand(N, generator=generator) * 0.1, torch.randn(N, generator=generator)]


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5)
    return torch.round(x / scale).clamp(-128, 127).to(torch.int8), scale


def linear(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    codes, scale = quantized(x)
    return torch._int_mm(codes, w.t()).float() * scale * s


def codes_and_result(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale = quantized(x)
    return torch._int_mm(codes, w.t()).float() * scale * s, codes, scale, codes.view(-1)


def scale_behind_a_view(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    amax = (x.abs().amax(-1) / 127).clamp(min=1e-5)
    codes = torch.round(x / amax.unsqueeze(-1)).clamp(-128, 127).to(torch.int8)
    return torch._int_mm(codes, w.t()).float() * amax.unsqueeze(-1) * s, amax, amax.view(-1, 1)


def unpacked(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decoded weight and its codes are returned too, which the rewritten graph folds."""
    codes = (w & 15) + 0
    return x @ (codes.float() * s[:, None]).t(), codes, codes * 1


def sums_beside_a_zero_point(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the weight's codes sum to is returned too; the kernel is given a kept sum."""
    codes, scale = quantized(x)
    sums = w.t().sum(0, dtype=torch.int32)
    zero_point = x.amin().round().clamp(-128, 127).to(torch.int32)
    result = torch._int_mm(codes, w.t()) - sums * zero_point
    return result.float() * scale * s, sums, sums.expand(2, N)


ALIASES: dict[str, Callable[..., Any]] = {
    "sums_beside_a_zero_point": lambda x, w, s, b: sums_beside_a_zero_point(x, w, s),
    "one_times_input": lambda x, w, s, b: (x * 1, linear(x, w, s)),
    "plus_zero_of_a_parameter": lambda x, w, s, b: (linear(x, w, s), s + 0.0, b * 1.0),
    "times_one_twice": lambda x, w, s, b: (linear(x, w, s), s * 1.0, s * 1.0, s),
    "integers_plus_zero": lambda x, w, s, b: (linear(x, w, s), w + 0, w * 1),
    "clone_of_a_parameter": lambda x, w, s, b: (linear(x, w, s), s.clone(), w.clone()),
    "cast_to_the_same_dtype": lambda x, w, s, b: (linear(x, w, s), s.to(s.dtype, copy=True)),
    "view_of_a_copy": lambda x, w, s, b: (linear(x, w, s), (s * 1).view(2, -1), s),
    "copy_of_a_view": lambda x, w, s, b: (linear(x, w, s), s.view(2, -1) * 1, s.view(-1, 2)),
    "view_of_a_parameter": lambda x, w, s, b: (linear(x, w, s), s.view(-1), w.t(), x.view(2, -1)),
    "copies_of_one_result": lambda x, w, s, b: (y := linear(x, w, s), y * 1, y + 0, y.view(-1)),
    "copies_of_a_private_result": lambda x, w, s, b: ((y := linear(x, w, s)) * 1, y.view(-1) * 1),
    "one_copy_of_a_copy": lambda x, w, s, b: (linear(x, w, s), (s * 1) * 1),
    "equal_results": lambda x, w, s, b: (linear(x, w, s), linear(x, w, s)),
    "equal_results_and_sums": lambda x, w, s, b: (linear(x, w, s) + b, linear(x, w, s) + b, linear(x, w, s)),
    "result_twice": lambda x, w, s, b: (y := linear(x, w, s), y),
    "codes_scale_and_result": lambda x, w, s, b: codes_and_result(x, w, s),
    "scale_behind_a_view": lambda x, w, s, b: scale_behind_a_view(x, w, s),
    "unpacked_weight": lambda x, w, s, b: unpacked(x, w, s),
    "input_through_a_kept_slice": lambda x, w, s, b: (linear(x, w, s), x[0:], x[:, 0:] * 1),
    "split_of_an_input": lambda x, w, s, b: (linear(x, w, s), *s.split(32), *(part * 1 for part in s.split(32))),
    "expanded": lambda x, w, s, b: (linear(x, w, s), s.expand(64), s.expand(64) * 1),
    "codes_as_they_are": lambda x, w, s, b: (x @ (w.float() * s[:, None]).t(), w * 1, w.view(-1)),
}


def rewritten(graph: Graph) -> Graph:
    after = copy_of(graph)
    report = rewrite_graph(after, X86, Options(), frozenset(range(1, 4)))
    assert report.sites
    assert not report.misses
    return after


def owners(graph: Graph, inputs: list[Tensor]) -> list[str]:
    """Whose memory each output of a run has."""
    memory = {x.untyped_storage().data_ptr(): f"input {i}" for i, x in enumerate(inputs)}
    with torch.no_grad():
        outputs = GraphModule(torch.nn.Module(), copy_of(graph))(*inputs)
    return [memory.setdefault(y.untyped_storage().data_ptr(), f"output {i}") for i, y in enumerate(outputs)]


@pytest.mark.parametrize("name", ALIASES)
def test_outputs_share_memory_with_what_they_shared_it_with_before(name):
    inputs = given()
    graph = trace(ALIASES[name], *inputs)
    assert owners(rewritten(graph), inputs) == owners(graph, inputs)


@pytest.mark.parametrize("name", ALIASES)
def test_a_caller_who_writes_to_an_output_changes_no_later_call(name):
    inputs = given()
    graph = trace(ALIASES[name], *inputs)
    module, after = (GraphModule(torch.nn.Module(), copy_of(g)) for g in (graph, rewritten(graph)))
    with torch.no_grad():
        for _ in range(2):
            expected, actual = (
                module(*(old := [x.clone() for x in inputs])),
                after(*(new := [x.clone() for x in inputs])),
            )
            for outputs in (expected, actual):
                for y in outputs:
                    y.zero_()
            for one, other in zip([*new, *actual], [*old, *expected], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
        for one, other in zip(after(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_copy_that_nobody_sees_is_dropped():
    """A library's ``* 1`` and ``+ 0`` between the steps stays out of the way of the algebra."""
    after = rewritten(trace(lambda x, w, s, b: linear((x * 1).view(M, K) * 1, w + 0, s * 1), *given()))
    assert not calls(after, aten.add.Tensor)
    assert not calls(after, aten.mul.Tensor)


def test_a_copy_of_a_result_is_dropped_where_only_the_copy_is_returned():
    graph = trace(lambda x, w, s, b: linear(x, w, s) * 1, *given())
    before, after = len(calls(graph, aten.mul.Tensor)), len(calls(rewritten(graph), aten.mul.Tensor))
    assert (before, after) == (3, 0)


def test_a_dense_copy_is_kept_where_its_source_cannot_be_viewed_so():
    def function(x, w, s, b):
        return linear(x, w, s), (x[:1].expand(4, K) * 1).view(2, -1).abs()

    inputs = given()
    graph = trace(function, *inputs)
    assert owners(rewritten(graph), inputs) == owners(graph, inputs)


# --- writes -----------------------------------------------------------------------------------------------------


def _copied_before_a_write(x, w, s, b):
    kept = x * 1
    x.copy_(x + 1)
    return linear(kept, w, s)


def _codes_copied_before_a_write(x, w, s, b):
    codes, scale = quantized(x)
    kept = codes.clone()
    codes.fill_(3)
    return torch._int_mm(kept, w.t()).float() * scale * s, codes * 1


def _scale_written_after_it_was_read(x, w, s, b):
    decoded = w.float() * s[:, None]
    s.copy_(s * 2)
    return x @ decoded.t()


def _weight_written_after_it_was_read(x, w, s, b):
    decoded = w.float() * s[:, None]
    w.view(-1).zero_()
    return x @ decoded.t()


def _written_between_quantize_and_matmul(x, w, s, b):
    codes, scale = quantized(x)
    x.zero_()
    return torch._int_mm(codes, w.t()).float() * scale * s


def _written_while_it_is_quantized(x, w, s, b):
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5)
    divided = x / scale
    x.zero_()
    return torch._int_mm(torch.round(divided).clamp(-128, 127).to(torch.int8), w.t()).float() * scale * s


def _weight_written_between_two_matmuls(x, w, s, b):
    first = linear(x, w, s)
    w.neg_()
    return first, linear(x, w, s)


def _equal_constants_of_which_one_is_written(x, w, s, b):
    one, other = torch.full((N,), 2.0), torch.full((N,), 2.0)
    one.zero_()
    return linear(x, w, s) * other, one


WRITES = {name.strip("_"): f for name, f in globals().items() if name.startswith("_") and "writ" in name}


@pytest.mark.parametrize("name", WRITES)
def test_nothing_is_read_after_a_write_that_was_read_before_it(name):
    """Graphs that are not functional, as other set-ups of Inductor hand them over."""
    inputs = given()
    graph = trace(WRITES[name], *inputs)
    after = copy_of(graph)
    report = rewrite_graph(after, X86, Options(), frozenset(range(1, 4)))
    assert report.sites or report.misses
    old, new = ([x.clone() for x in inputs] for _ in range(2))
    with torch.no_grad():
        expected = GraphModule(torch.nn.Module(), copy_of(graph))(*old)
        actual = GraphModule(torch.nn.Module(), copy_of(after))(*new)
    expected, actual = ([y] if isinstance(y, Tensor) else list(y) for y in (expected, actual))
    for one, other in zip([*actual, *new], [*expected, *old], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_matmul_across_a_write_is_a_miss_that_says_so():
    state = rewrite(trace(_scale_written_after_it_was_read, *given()))
    assert [miss.rule for miss in state.misses] == ["s_1 is written to before the rewritten matmul would read it"]


# --- the invariant ----------------------------------------------------------------------------------------------


def test_verify_refuses_an_output_with_the_memory_of_an_input():
    graph = trace(lambda x, w, s, b: (linear(x, w, s), s * 1), *given())
    state = rewrite(graph)
    to_kernels(state)
    (output,) = state.graph.find_nodes(op="output")
    s = state.graph.find_nodes(op="placeholder")[2]
    output.args = ((output.args[0][0], s),)
    with pytest.raises(VerificationError, match="output 1 must keep the memory of output 1, got that of input 2"):
        verify(state.graph, graph)


def test_verify_refuses_an_output_that_is_no_view_any_more():
    graph = trace(lambda x, w, s, b: (y := linear(x, w, s), y.view(-1)), *given())
    state = rewrite(graph)
    to_kernels(state)
    (output,) = state.graph.find_nodes(op="output")
    result, view = output.args[0]
    with state.graph.inserting_before(output):
        copy = state.graph.call_function(aten.clone.default, (view,))
        copy.meta["val"] = graph.find_nodes(op="output")[0].args[0][1].meta["val"].clone()
    output.args = ((result, copy),)
    with pytest.raises(VerificationError, match="output 1 must keep the memory of output 0, got that of output 1"):
        verify(state.graph, graph)


def test_verify_refuses_an_output_that_an_op_keeps():
    graph = trace(lambda x, w, s, b: (linear(x, w, s), w.view(-1) + 1), *given())
    state = rewrite(graph)
    to_kernels(state)
    (packed,) = (n for n in state.graph.nodes if n.op == "call_function" and "prepack" in str(n.args[:1]))
    (output,) = state.graph.find_nodes(op="output")
    packed.meta["val"] = output.args[0][1].meta["val"]
    output.args = ((output.args[0][0], packed),)
    with pytest.raises(VerificationError, match="got that of constant getitem"):
        verify(state.graph, graph)


@pytest.mark.parametrize("name", ALIASES)
def test_memory_read_off_a_graph_is_that_of_a_run(name):
    inputs = given()
    graph = trace(ALIASES[name], *inputs)
    assert Memory(graph).outputs() == owners(graph, inputs)
