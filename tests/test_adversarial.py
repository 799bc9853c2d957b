"""Near misses: modules that look almost like a quantized linear. What is emitted for them, and that it means the same.

Some wrong rewrites are smaller than any honest tolerance, so the emitted ops are compared, not only the numbers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fx_quant.passes.pipeline import Rewriting, to_kernels
from fx_quant.scheme import Numerics
from tests.graphs import Captured, assert_within_class, calls, capture, clones, copy_of, rewrite, run, run_in_float64
from tests.models import ADVERSARIAL, build

OPERANDS = ("a_scale", "b_scale", "bias")
REWRITTEN = sorted(set(ADVERSARIAL) - {"unrelated_int8", "uint8_image", "scale_varies_along_k", "weight_scale_on_k"}
                   - {"addmm_beta_2"})  # fmt: skip


@functools.cache
def captured(name: str) -> Captured:
    (graph,) = capture(build(name), ADVERSARIAL[name].inputs(torch.bfloat16, 2))
    return graph


@functools.cache
def rewritten(name: str, numerics: str) -> tuple[Rewriting, Graph]:
    """The module's graph rewritten under a cap, and a copy with canonical ops."""
    graph = captured(name)
    state = rewrite(graph.source, graph.static, numerics=numerics)
    return state, copy_of(state.graph)


@dataclass(frozen=True)
class Emitted:
    """What stands in a graph: operands folded into ``scaled_mm`` (None: no such op), and the quantize op."""

    folds: frozenset[str] | None
    quantize: str | None


def emitted(canonical: Graph) -> Emitted:
    gemms = calls(canonical, torch.ops.fx_quant.scaled_mm.default)
    quantizes = {
        "dynamic": calls(canonical, torch.ops.fx_quant.quantize.dynamic),
        "given": calls(canonical, torch.ops.fx_quant.quantize.default),
    }
    found = [name for name, nodes in quantizes.items() for _ in nodes]
    assert len(gemms) <= 1
    assert len(found) <= 1
    folds = frozenset(name for name, arg in zip(OPERANDS, gemms[0].args[2:5], strict=True) if arg) if gemms else None
    return Emitted(folds, found[0] if found else None)


def only(*folds: str, quantize: str | None = "dynamic") -> Emitted:
    return Emitted(frozenset(folds), quantize)


NOTHING = Emitted(None, None)
EVERYTHING = only("a_scale", "b_scale", "bias")
GIVEN = only("a_scale", "b_scale", "bias", quantize="given")
NO_QUANTIZE = only("a_scale", "b_scale", "bias", quantize=None)

# At numerics="exact": whatever moves a bit stays out.
EXACT = {
    "no_round": NO_QUANTIZE,
    "floor_instead_of_round": NO_QUANTIZE,
    "clamp_at_zero": EVERYTHING,
    "range_-127": EVERYTHING,
    "bf16_scale_division": EVERYTHING,
    "other_x_scale": GIVEN,
    "narrow_accumulator": only(),
    "narrow_between_scales": only("a_scale"),
    "narrow_dequant_scale": EVERYTHING,
    "expanded_rows": EVERYTHING,
    "scale_times_1p5": EVERYTHING,
    "per_token_scale_flipped": EVERYTHING,
    "column_amax": NO_QUANTIZE,
    "bias_alpha_3": only("a_scale", "b_scale"),
    "accumulator_has_foreign_user": only(),
    "codes_returned": EVERYTHING,
    "double_use_of_scaled": only("a_scale", "b_scale"),
    "scale_varies_along_k": NOTHING,
    "weight_scale_on_k": NOTHING,
    "weight_mutated": EVERYTHING,
    "weight_scale_mutated": EVERYTHING,
    "x_scale_mutated": GIVEN,
    "input_mutated": EVERYTHING,
    "unrelated_int8": NOTHING,
    "uint8_image": NOTHING,
    "product_transposed_then_bias": only("a_scale", "b_scale"),
    "rows_swapped_before_scale": only(),
    "colsum_127": only(),
    "colsum_of_another_weight": only(),
    "addmm_beta_2": NOTHING,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_exact_emits_what_its_table_says(name):
    _, canonical = rewritten(name, "exact")
    assert emitted(canonical) == EXACT[name]


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_exact_emits_nothing_that_the_module_forbids(name):
    near_miss = ADVERSARIAL[name]
    _, canonical = rewritten(name, "exact")
    found = emitted(canonical)
    assert found.folds is None or (near_miss.gemm and found.folds <= near_miss.folds)
    assert found.quantize is None or near_miss.codes
    assert found.quantize != "dynamic" or near_miss.dynamic is not None


@pytest.mark.parametrize("name", [name for name, near_miss in ADVERSARIAL.items() if near_miss.dynamic])
@pytest.mark.parametrize("numerics", ["exact", "reassociated"])
def test_dynamic_quantize_carries_the_formula_of_the_module(name, numerics):
    _, canonical = rewritten(name, numerics)
    for node in calls(canonical, torch.ops.fx_quant.quantize.dynamic):
        assert dict(node.kwargs) == dict(ADVERSARIAL[name].dynamic)


@pytest.mark.parametrize("name", REWRITTEN)
def test_exact_is_the_class_of_what_exact_emits(name):
    state, _ = rewritten(name, "exact")
    assert [site.product.numerics for site in state.rows] == [Numerics.EXACT]


def run_mutating(graph: Graph, inputs: list) -> tuple[list, list]:
    """Outputs of ``graph`` and what became of its inputs."""
    given = clones(inputs)
    with torch.no_grad():
        outputs = GraphModule(torch.nn.Module(), copy_of(graph))(*given)
    return list(outputs), given


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_exact_is_bit_equal_to_the_source_graph(name):
    _, canonical = rewritten(name, "exact")
    inputs = captured(name).inputs
    actual, expected = run_mutating(canonical, inputs), run_mutating(captured(name).source, inputs)
    for new, old in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", REWRITTEN)
def test_default_is_within_the_class_that_it_declares(name):
    state, canonical = rewritten(name, "reassociated")
    for site in state.rows:
        assert_within_class(site, state, canonical, captured(name).inputs)


@pytest.mark.parametrize("name", REWRITTEN)
def test_kernels_are_bit_equal_to_the_canonical_op(name):
    """Their eager bodies, on int8 codes: the same sum and the same epilogue."""
    state = rewrite(captured(name).source, captured(name).static)
    canonical = copy_of(state.graph)
    to_kernels(state)
    inputs = captured(name).inputs
    actual, expected = run_mutating(state.graph, inputs), run_mutating(canonical, inputs)
    for new, old in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_default_means_the_same_without_rounding(name):
    """In float64 the tolerance is a billionth, so no wrong factor hides behind a bfloat16 result."""
    _, canonical = rewritten(name, "reassociated")
    inputs = captured(name).inputs
    actual, expected = run_in_float64(canonical, *inputs)[0], run_in_float64(captured(name).source, *inputs)[0]
    for new, old in zip(actual, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["narrow_accumulator", "narrow_between_scales"])
def test_a_scale_past_a_narrowing_cast_is_not_called_exact(name):
    state, _ = rewritten(name, "reassociated")
    assert [site.product.numerics for site in state.rows] == [Numerics.SAME_ACCUM]


@pytest.mark.parametrize("name", ["no_round", "floor_instead_of_round", "column_amax"])
def test_a_quantize_that_is_left_says_why(name):
    state, _ = rewritten(name, "reassociated")
    (reason,) = [row.quantizer for row in state.rows.values()]
    assert reason in {
        "integer codes are cut off, not rounded",
        "the codes are not the result of a cast",
        "x is not divided by a scale per token or per tensor",
    }


@pytest.mark.parametrize("name", ["unrelated_int8", "uint8_image"])
def test_a_model_without_a_quantized_matmul_has_no_miss(name):
    state, _ = rewritten(name, "reassociated")
    assert state.misses == []


MISSES = {
    "weight_scale_on_k": "the scale of b varies along k, so it cannot leave the sum",
    "addmm_beta_2": "addmm with alpha or beta other than 1",
}


def test_a_scale_of_the_activation_along_k_leaves_a_weight_only_matmul():
    state, _ = rewritten("scale_varies_along_k", "reassociated")
    ((site, row),) = state.rows.items()
    assert site.scheme.weight_only
    assert row.selection.kernel.name == "cpu_weight_only_float32"


@pytest.mark.parametrize("name", MISSES)
def test_a_matmul_that_is_left_says_why(name):
    state, _ = rewritten(name, "reassociated")
    assert [miss.rule for miss in state.misses] == [MISSES[name]]


def only_call(name: str, op: object) -> Node:
    (node,) = calls(rewritten(name, "reassociated")[1], op)
    return node


def test_a_mutated_weight_is_not_packed():
    state = rewrite(captured("weight_mutated").source, captured("weight_mutated").static)
    to_kernels(state)
    assert calls(state.graph, torch.ops.fx_quant.prepack.default) == []


def test_a_scale_that_changes_between_quantize_and_dequantize_is_two_scales():
    quantize = only_call("x_scale_mutated", torch.ops.fx_quant.quantize.default)
    gemm = only_call("x_scale_mutated", torch.ops.fx_quant.scaled_mm.default)
    assert quantize.args[1] is not gemm.args[2]


def test_the_accumulator_with_a_foreign_user_is_computed_once():
    _, canonical = rewritten("accumulator_has_foreign_user", "reassociated")
    gemm = only_call("accumulator_has_foreign_user", torch.ops.fx_quant.scaled_mm.default)
    (output,) = canonical.find_nodes(op="output")
    assert gemm in output.args[0]


def test_near_misses_are_all_in_the_table():
    assert set(EXACT) == set(ADVERSARIAL)


def test_every_captured_graph_runs_as_its_module():
    """The source graph is the oracle of this file, so it must itself be the module."""
    for name in ("range_-127", "narrow_between_scales", "expanded_rows"):
        x = ADVERSARIAL[name].inputs(torch.bfloat16, 2)
        (value, *_), _ = run(captured(name).source, *captured(name).inputs)
        assert isinstance(value, Tensor)
        assert torch.equal(value, build(name)(x))
