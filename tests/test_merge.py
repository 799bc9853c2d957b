"""Merging equal computations: what becomes one node, what may not, and PyTorch's own pass as the reference."""

from __future__ import annotations

import operator

import pytest
import torch
from torch._functorch.compile_utils import fx_graph_cse

from fx_quant.passes.merge import call_key, common_subexpressions_merged
from tests.graphs import calls, capture, run, trace
from tests.models import build, inputs
from tests.printer import print_graph

aten = torch.ops.aten
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def merged(function, *given):
    graph = trace(function, *given)
    text = print_graph(graph)
    after = common_subexpressions_merged(graph)
    assert print_graph(graph) == text, "the graph given is not to be changed"
    after.lint()
    for old, new in zip(run(graph, *given)[0], run(after, *given)[0], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    return after


def test_equal_chains_become_one():
    graph = merged(lambda x: x.abs().amax(-1) + x.abs().amax(-1), X)
    assert (len(calls(graph, aten.abs.default)), len(calls(graph, aten.amax.default))) == (1, 1)


def test_a_list_and_keywords_are_compared_too():
    graph = merged(lambda x: x.sum([0], dtype=torch.float64) + x.sum([1], dtype=torch.float64)[:1].sum(), X)
    assert len(calls(graph, aten.sum.dim_IntList)) == 2


@pytest.mark.parametrize(("left", "right"), [(1, 1.0), (1, True), (0.0, -0.0)])
def test_numbers_that_only_compare_equal_are_kept_apart(left, right):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    one, other = (graph.call_function(aten.div.Tensor, (x, number)) for number in (left, right))
    assert call_key(one, {}) != call_key(other, {})
    assert call_key(one, {}) == call_key(graph.call_function(aten.div.Tensor, (x, left)), {})


def test_two_outputs_stay_two_tensors():
    graph = merged(lambda x: (x + 1, x + 1), X)
    assert len(calls(graph, aten.add.Tensor)) == 2


def test_random_numbers_are_drawn_as_often_as_before():
    graph = common_subexpressions_merged(trace(lambda x: torch.rand_like(x) - torch.rand_like(x), X))
    seeded = torch.Tag.nondeterministic_seeded
    assert sum(node.op == "call_function" and seeded in node.target.tags for node in graph.nodes) == 2


def test_a_write_in_between_keeps_reads_apart():
    def function(x):
        x = x.clone()
        before = x.sum()
        x.view(-1).add_(1)
        return before * x.sum()

    assert len(calls(merged(function, X), aten.sum.default)) == 2


def test_results_of_one_call_are_told_apart():
    graph = merged(lambda x: x.max(-1)[0] + x.max(-1)[0] + x.max(-1)[1], X)
    assert len(calls(graph, aten.max.dim)) == 1
    assert len(calls(graph, operator.getitem)) == 2


@pytest.mark.parametrize("name", ["fp8_vllm_channelwise", "torchao_int8", "qkv_shared"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_s_graph_is_merged_as_by_pytorch(name, dynamic):
    (captured,) = capture(build(name), inputs(torch.bfloat16, 3), dynamic_rows=dynamic)
    assert print_graph(common_subexpressions_merged(captured.source)) == print_graph(fx_graph_cse(captured.source))
