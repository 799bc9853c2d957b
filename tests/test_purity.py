"""Two calls are one, and a call of constants is made once, only where the op is known to be a function."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from fx_quant.ops.fold import can_fold
from fx_quant.ops.purity import is_pure
from fx_quant.passes.inputs import classify_inputs
from fx_quant.passes.merge import common_subexpressions_merged
from fx_quant.passes.pipeline import to_kernels
from fx_quant.passes.rulebook import _RULES
from tests.graphs import calls, copy_of, rewrite, trace

aten, prims = torch.ops.aten, torch.ops.prims
M, K, N = 4, 64, 32
_COUNT = itertools.count()


@torch.library.custom_op("purity_test::noise", mutates_args=())
def noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


@torch.library.custom_op("purity_test::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    return x + next(_COUNT)


@torch.library.custom_op("purity_test::codes", mutates_args=())
def stateful_codes(w: Tensor) -> Tensor:
    return w + 1


@torch.library.custom_op("purity_test::shout", mutates_args=(), schema="(Tensor x) -> Tensor")
def shout(x):
    return x.clone()


for op in (noise, counted, stateful_codes, shout):
    op.register_fake(torch.empty_like)

X = torch.randn(M, K, generator=torch.Generator().manual_seed(0))

TWICE = {
    "a_random_custom_op": (lambda x: noise(x) - noise(x), "purity_test.noise.default"),
    "a_stateful_custom_op": (lambda x: counted(x) - counted(x), "purity_test.counted.default"),
    "a_custom_op_that_prints": (lambda x: shout(x) + shout(x), "purity_test.shout.default"),
    "uninitialised": (lambda x: torch.empty(4) + torch.empty(4), "aten.empty.memory_format"),
    "uninitialised_strided": (
        lambda x: torch.empty_strided((4,), (1,)) + torch.empty_strided((4,), (1,)),
        "aten.empty_strided.default",
    ),
    "multinomial": (
        lambda x: torch.multinomial(x.abs(), 2) + torch.multinomial(x.abs(), 2),
        "aten.multinomial.default",
    ),
    "uniform": (lambda x: torch.rand_like(x) + torch.rand_like(x), None),
}


@pytest.mark.parametrize("name", TWICE)
def test_two_calls_stay_two(name):
    function, target = TWICE[name]
    graph = trace(function, X)

    def count(of: Graph) -> int:
        seeded = torch.Tag.nondeterministic_seeded
        return sum(
            node.op == "call_function" and (str(node.target) == target if target else seeded in node.target.tags)
            for node in of.nodes
        )

    assert count(graph) == 2
    assert count(common_subexpressions_merged(graph)) == 2


def by_hand(target, *args, **kwargs) -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output([graph.call_function(target, (x, *args), kwargs) for _ in range(2)])
    return graph


def _wait(graph: Graph) -> None:
    """Returned through another op each, so that it is not their memory that keeps them apart."""
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        output.args = ([graph.call_function(aten.add.Tensor, (node, i)) for i, node in enumerate(output.args[0])],)


COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "all_to_all_single", "broadcast", "wait_tensor")


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_stay_as_many_as_they_were(name):
    op = getattr(torch.ops._c10d_functional, name, None)
    if op is None:
        pytest.skip("this torch is built without distributed")
    graph = by_hand(op.default)
    _wait(graph)
    assert not is_pure(op.default)
    assert len(calls(common_subexpressions_merged(graph), op.default)) == 2


HIGHER_ORDER = [
    *(torch.ops.higher_order.cond, torch.ops.higher_order.auto_functionalized_v2, torch.ops.higher_order.with_effects),
    torch.ops.higher_order.run_and_save_rng_state,
]


@pytest.mark.parametrize("op", HIGHER_ORDER, ids=str)
def test_higher_order_ops_stay_as_many_as_they_were(op):
    graph = by_hand(op)
    _wait(graph)
    assert len(calls(common_subexpressions_merged(graph), op)) == 2


@pytest.mark.parametrize("name", ["empty_like", "new_empty", "empty_strided", "empty_permuted", "_philox_normal"])
def test_memory_as_it_was_found_is_of_no_function(name):
    packet = getattr(aten, name, None)
    assert packet is None or not any(is_pure(getattr(packet, overload)) for overload in packet.overloads())


READ_OFF_VALUES = {
    "rows": lambda x: (x.nonzero().sum() + x.nonzero().sum(), aten.nonzero.default),
    "masked": lambda x: (x[x > 0].sum() + x[x > 0].sum(), aten.index.Tensor),
}


@pytest.mark.parametrize("name", READ_OFF_VALUES)
def test_sizes_that_only_their_call_knows_stay_two(name):
    targets = []

    def function(x):
        y, target = READ_OFF_VALUES[name](x)
        targets.append(target)
        return y

    merged = common_subexpressions_merged(trace(function, X))
    assert len(calls(merged, targets[0])) == 2


def test_rows_of_a_known_number_are_chosen_once():
    i = torch.tensor([1, 0])
    merged = common_subexpressions_merged(trace(lambda x, i: x[i] + x[i].sum(), X, i))
    assert len(calls(merged, aten.index.Tensor)) == 1


def test_an_op_that_asserts_or_draws_by_a_generator_is_not_pure():
    for target in (
        *(aten._assert_async.msg, aten._functional_assert_async.msg, aten._print.default, aten.rand.generator),
        *(aten.bernoulli.p, aten.native_dropout.default, prims.inductor_seed.default, aten.copy_.default),
        *(aten.add_.Tensor, aten.add.out, print, len, torch.manual_seed),
    ):
        assert not is_pure(target)


def test_every_aten_op_that_a_rule_reads_is_pure():
    assert [op for op in _RULES if not is_pure(op)] == []


def test_what_one_op_of_a_kernel_needs_is_pure():
    for name in ("fold", "prepack", "pack", "scaled_mm", "weight_only_mm", "quantize"):
        assert is_pure(getattr(torch.ops.fx_quant, name).default)


# --- folding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [torch.ops.purity_test.noise.default, aten.rand_like.default, aten.empty_like.default, aten.copy_.default]
)
def test_what_is_not_known_to_be_a_function_is_not_folded(target):
    graph = Graph()
    x = graph.placeholder("x")
    assert not can_fold(graph.call_function(target, (x,)))
    assert can_fold(graph.call_function(aten.add.Tensor, (x, 1)))


def _linear_of_drawn_codes(x, w, s):
    return x @ (stateful_codes(w).float() * s[:, None]).t()


def test_codes_of_an_unknown_op_change_from_call_to_call():
    w, s = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N)
    graph = trace(_linear_of_drawn_codes, X, w, s)
    (drawn,) = calls(graph, torch.ops.purity_test.codes.default)
    assert drawn in classify_inputs(graph, frozenset({1, 2})).runtime
    state = rewrite(graph)
    (miss,) = state.misses
    assert "changes from call to call" in miss.rule


def _integers_of_drawn_codes(x, w, s):
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5)
    codes = torch.round(x / scale).clamp(-128, 127).to(torch.int8)
    return torch._int_mm(codes, stateful_codes(w).t()).float() * scale * s


def test_codes_of_an_unknown_op_are_computed_in_every_call():
    w, s = torch.randint(-128, 127, (N, K), dtype=torch.int8), torch.rand(N)
    graph = trace(_integers_of_drawn_codes, X, w, s)
    state = rewrite(graph)
    to_kernels(state)
    (drawn,) = calls(state.graph, torch.ops.purity_test.codes.default)
    assert drawn.users
    with torch.no_grad():
        actual = GraphModule(torch.nn.Module(), copy_of(state.graph))(X, w, s)
    expected = _integers_of_drawn_codes(X, w, s)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
