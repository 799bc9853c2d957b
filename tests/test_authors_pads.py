"""Pads that an author wrote for eager calls: which go, and near misses that must keep theirs."""

from __future__ import annotations

from dataclasses import replace

import expecttest
import pytest
import torch
import torch.nn.functional as F

from fx_quant import Fp8LinearOp
from fx_quant.errors import NoKernelError
from fx_quant.kernels import registry
from fx_quant.kernels.registry import kernel
from fx_quant.passes import pads, pipeline
from fx_quant.passes.pipeline import to_kernels
from fx_quant.passes.reporting import report_on
from fx_quant.report import Report
from tests.graphs import assert_same_meaning, calls, capture, copy_of, rewrite, trace
from tests.printer import print_graph

aten = torch.ops.aten
M, K, N = 5, 32, 24
RNG = torch.Generator().manual_seed(0)
X = torch.randn(M, K, generator=RNG)
W = torch.randint(-127, 128, (K, N), dtype=torch.int8, generator=RNG)
WS = torch.rand(N, generator=RNG) + 0.5
BIAS = torch.randn(N, generator=RNG)
W8 = torch.randn(N, K, generator=RNG).to(torch.float8_e4m3fn)
S = torch.tensor(0.02)
PADS = (aten.constant_pad_nd.default, aten.cat.default, aten.slice_scatter.default)


def rows(x, to=17, value=0.0):
    """``x`` with at least ``to`` rows, as ``max(to, m)`` is traced."""
    return F.pad(x, (0, 0, 0, torch.sym_max(to - x.shape[0], 0)), value=value)


def codes(x, scale):
    return (x / scale).round().clamp(-128, 127).to(torch.int8)


def per_token(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return codes(x, scale), scale


def pads_left(graph):
    return [node.name for op in PADS for node in calls(graph, op)]


def settled(function, *given, dynamic=False, functional=False, static=None):
    """The rewritten graph of ``function``, which means what its source does, and the notes of its sites."""
    function = torch.func.functionalize(function, remove="mutations") if functional else function
    graph = trace(function, *given, dynamic=dynamic)
    source = copy_of(graph)
    state = rewrite(graph, static=static, numerics="reassociated")
    assert_same_meaning(source, state.graph, given)
    return state, [list(site.notes) for site in report_on(state).sites]


def gone(function, *given, sides, **how):
    """That no pad of ``function`` is left, and what the report says of it."""
    state, notes = settled(function, *given, **how)
    assert pads_left(state.graph) == []
    assert calls(state.graph, aten.slice.Tensor) == []
    assert notes == [[f"author's pad of {side} removed" for side in site] for site in sides]
    return state


# --- rows -------------------------------------------------------------------------------------------------------


def padded_before_the_quantize(x, w, ws):
    q, scale = per_token(rows(x))
    return (torch._int_mm(q, w).float() * scale * ws).narrow(0, 0, x.shape[0])


def padded_after_the_quantize(x, w, ws):
    q, scale = per_token(x)
    return torch._int_mm(rows(q), w).narrow(0, 0, x.shape[0]).float() * scale * ws


def scale_padded_with_ones(x, w, ws):
    q, scale = per_token(x)
    return (torch._int_mm(rows(q), w).float() * rows(scale, value=1.0) * ws)[: x.shape[0]]


def per_tensor_scale_of_padded_rows(x, w, ws):
    x17 = rows(x)
    scale = x17.abs().amax() / 127
    return (torch._int_mm(codes(x17, scale), w).float() * scale * ws)[: x.shape[0]]


def epilogue_of_padded_rows(x, w, ws):
    q, scale = per_token(rows(x))
    y = torch._int_mm(q, w).float() * (scale * ws) + ws
    return F.gelu(y).softmax(-1)[: x.shape[0]]


def dequantized_before_the_matmul(x, w, ws):
    q, scale = per_token(rows(x))
    return ((q.float() * scale) @ (w.float() * ws))[: x.shape[0]]


def joined_with_zeros(x, w, ws):
    q = codes(x, 0.02)
    q = torch.cat([q, q.new_zeros(12, q.shape[1])])
    return (torch._int_mm(q, w).float() * ws)[: x.shape[0]]


def padded_twice(x, w, ws):
    q = rows(rows(codes(x, 0.02)), 32)
    return (torch._int_mm(q, w).float() * ws)[: x.shape[0]]


FLOWS_OF_ROWS = [
    padded_before_the_quantize,
    padded_after_the_quantize,
    scale_padded_with_ones,
    per_tensor_scale_of_padded_rows,
    epilogue_of_padded_rows,
    dequantized_before_the_matmul,
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("flow", FLOWS_OF_ROWS, ids=lambda flow: flow.__name__)
def test_rows_padded_and_narrowed_go(flow, dynamic):
    state = gone(flow, X, W, WS, dynamic=dynamic, sides=[["m to 17"]])
    (site,) = state.sites
    assert str(site.problem.m) == ("2.." if dynamic else "5")


@pytest.mark.parametrize(("flow", "to"), [(joined_with_zeros, 17), (padded_twice, 32)])
def test_rows_padded_in_other_words_go(flow, to):
    gone(flow, X, W, WS, sides=[[f"m to {to}"]])


@pytest.mark.parametrize("fill", [torch.zeros, torch.empty])
def test_rows_written_into_a_larger_buffer_go(fill):
    def flow(x, w, ws):
        buffer = fill(17, K, dtype=torch.int8)
        buffer[: x.shape[0]] = codes(x, 0.02)
        return (torch._int_mm(buffer, w).float() * ws)[: x.shape[0]]

    gone(flow, X, W, WS, functional=True, sides=[["m to 17"]])


def test_the_seed_pads_codes_and_narrows_the_result():
    def fp8_linear(x, w, scale, ws):
        x_2d = x.view(-1, x.shape[-1])
        q = (x_2d * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)
        q = F.pad(q, (0, 0, 0, max(17 - x_2d.shape[0], 0)))
        y = torch._scaled_mm(q, w.t(), scale_a=scale, scale_b=ws, out_dtype=torch.bfloat16)
        return torch.narrow(y, 0, 0, x_2d.shape[0]).view(*x.shape[:-1], w.shape[0])

    state = gone(fp8_linear, X.view(1, M, K), W8, S, torch.tensor(0.5), sides=[["m to 17"]])
    assert len(calls(state.graph, torch.ops.fx_quant.scaled_mm.default)) == 1


def test_row_wise_scales_padded_with_the_rows_go():
    def fp8_linear(x, w, ws):
        scale = x.abs().amax(-1, keepdim=True) / 448
        q = rows((x / scale).to(torch.float8_e4m3fn))
        y = torch._scaled_mm(q, w.t(), rows(scale, value=1.0), ws[None], out_dtype=torch.bfloat16)
        return y[: x.shape[0]]

    for dynamic in (False, True):
        gone(fp8_linear, X, W8, WS, dynamic=dynamic, sides=[["m to 17"]])


def test_a_factor_with_a_row_for_each_padded_row_is_cut():
    def flow(x, w, ws, factor):
        q, scale = per_token(rows(x))
        return (torch._int_mm(q, w).float() * scale * ws * factor)[: x.shape[0]]

    state, notes = settled(flow, X, W, WS, torch.rand(17, 1))
    assert notes == [["author's pad of m to 17 removed"]]
    assert [node.args[1:] for node in calls(state.graph, aten.slice.Tensor)] == [(0, 0, M)]


def test_rows_of_a_weight_only_matmul_go():
    def flow(x, w, ws):
        return (rows(x) @ (w.float() * ws))[: x.shape[0]]

    gone(flow, X, W, WS, sides=[["m to 17"]])


def test_rows_around_a_canonical_op_go():
    def flow(x, w, ws):
        q, scale = torch.ops.fx_quant.quantize.dynamic(rows(x), **QUANTIZE)
        return torch.ops.fx_quant.scaled_mm(q, w, scale, ws, None, torch.float32)[: x.shape[0]]

    for dynamic in (False, True):
        gone(flow, X, W, WS, dynamic=dynamic, sides=[["m to 17"]])


QUANTIZE = {
    "dtype": torch.int8,
    "reciprocal": False,
    "lo": -128.0,
    "hi": 127.0,
    "granularity": "per_token",
    "divisor": 127.0,
    "divide_dtype": torch.float32,
    "floor": 0.0,
    "floor_on": "none",
    "scale_dtype": torch.float32,
}


def test_a_pad_that_the_range_of_rows_rules_out_goes_without_a_word():
    def flow(x, w, ws):
        torch._check(x.shape[0] >= 17)
        return padded_before_the_quantize(x, w, ws)

    gone(flow, X.repeat(5, 1), W, WS, dynamic=True, sides=[[]])


def test_sizes_that_are_read_off_padded_rows_stay_what_they_were():
    def flow(x, w, ws):
        x17 = rows(x)
        return padded_before_the_quantize(x, w, ws) / x17.shape[0], (x17 * 2)[: x.shape[0]].reshape(-1) + x17.shape[0]

    for dynamic in (False, True):
        gone(flow, X, W, WS, dynamic=dynamic, sides=[["m to 17"]])


def test_rows_of_blocks_go_though_their_k_was_padded_for_the_groups():
    def flow(x, w, ws):
        x17 = rows(x[:, :20])
        groups = F.pad(x17, (0, 12)).reshape(x17.shape[0], 2, 16)
        scale = groups.abs().amax(-1, keepdim=True) / 127
        q = codes(groups, scale).reshape(x17.shape[0], 32)[:, :20].contiguous()
        y = torch.ops.fx_quant.scaled_mm(q, w, scale.squeeze(-1), ws, None, torch.float32, block=[1, 16])
        return y[: x.shape[0]]

    for dynamic in (False, True):
        state, notes = settled(flow, X, W[:20].clone(), torch.rand(N, 2), dynamic=dynamic)
        assert notes == [["author's pad of m to 17 removed"]]
        assert [node.args[1] for node in calls(state.graph, aten.constant_pad_nd.default)] == [[0, 12]]


def test_a_site_says_that_it_keeps_the_pad_of_a_quantize():
    def flow(x, w, ws):
        q, scale = torch.ops.fx_quant.quantize.dynamic(rows(x, value=9.0), **QUANTIZE | {"granularity": "per_tensor"})
        return torch.ops.fx_quant.scaled_mm(q, w, scale, ws, None, torch.float32)[: x.shape[0]]

    _, notes = settled(flow, X, W, WS)
    why = "fx_quant.quantize takes the largest magnitude of what is padded, which changes with it"
    assert notes == [[f"author's pad of m to 17 kept: {why}"]]


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_that_an_author_keeps_padded_are_not_padded_again(monkeypatch, dynamic):
    padded = replace(kernel("pytorch_int_mm"), least_rows=17)
    monkeypatch.setitem(registry._KERNELS, padded.name, padded)
    graph = trace(all_of_them, X, W, WS, dynamic=dynamic)
    state = rewrite(graph, padding="always", force_kernel=padded.name)
    to_kernels(state)
    (site,) = report_on(state).sites
    assert (site.m, site.padding) == ("17.." if dynamic else "17", "none")
    assert len(calls(state.graph, torch.sym_max)) == (1 if dynamic else 0)


def a_fixed_number_more(x, w, ws):
    return (torch._int_mm(F.pad(codes(x, 0.02), (0, 0, 0, 12)), w).float() * ws)[: x.shape[0]]


def to_a_multiple(x, w, ws):
    m = x.shape[0]
    return (torch._int_mm(F.pad(codes(x, 0.02), (0, 0, 0, -m % 16)), w).float() * ws)[:m]


@pytest.mark.parametrize(
    ("flow", "dynamic", "to"),
    [
        (a_fixed_number_more, False, "17"),
        (a_fixed_number_more, True, "m + 12"),
        (to_a_multiple, False, "16"),
        (to_a_multiple, True, "m + (PythonMod(-m, 16))"),
    ],
)
def test_rows_padded_by_another_rule_go(flow, dynamic, to):
    gone(flow, X, W, WS, dynamic=dynamic, sides=[[f"m to {to}"]])


@pytest.mark.parametrize("fill", [7.0, float("nan")])
def test_rows_filled_with_anything_go_where_each_row_has_a_scale_of_its_own(fill):
    def flow(x, w, ws):
        q, scale = per_token(rows(x, value=fill))
        return (torch._int_mm(q, w).float() * scale * ws)[: x.shape[0]]

    gone(flow, X, W, WS, sides=[["m to 17"]])


# --- n and k ----------------------------------------------------------------------------------------------------


def test_columns_padded_and_narrowed_go():
    def flow(x, w, ws, bias):
        q, scale = per_token(x)
        w, ws, bias = F.pad(w, (0, 8)), F.pad(ws, (0, 8), value=1.0), F.pad(bias, (0, 8))
        return (torch._int_mm(q, w).float() * scale * ws + bias)[:, :N]

    gone(flow, X, W, WS, BIAS, sides=[["n to 32"]])


def test_k_padded_on_both_sides_goes():
    def flow(x, w, ws):
        q, scale = per_token(x)
        return torch._int_mm(F.pad(q, (0, 32)), F.pad(w, (0, 0, 0, 32))).float() * scale * ws

    for dynamic in (False, True):
        gone(flow, X, W, WS, dynamic=dynamic, sides=[["k to 64"]])


def test_k_padded_before_the_quantize_goes():
    def flow(x, w, ws):
        q, scale = per_token(F.pad(x, (0, 32)))
        return torch._int_mm(q, F.pad(w, (0, 0, 0, 32))).float() * scale * ws

    gone(flow, X, W, WS, sides=[["k to 64"]])


def test_k_of_float8_codes_as_torchao_pads_it_goes():
    def flow(x, w, scale):
        q = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        q, w = F.pad(q, (0, 16)), F.pad(w, (0, 16))
        return torch._scaled_mm(q, w.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)

    gone(flow, X, W8, S, sides=[["k to 48"]])


def test_k_goes_under_a_zero_point_whose_other_factor_is_zero():
    def flow(x, w, ws, point):
        q = F.pad(x, (0, 32)) / 0.02
        q = (q.round() + point).clamp(0, 255).to(torch.uint8)
        wide = F.pad(w, (0, 0, 0, 32)).to(torch.int32)
        return ((q.to(torch.int32) - point) @ wide).float() * ws

    gone(flow, X, W, WS, torch.tensor(3, dtype=torch.int32), sides=[["k to 64"]])


def test_rows_columns_and_k_padded_at_once_go():
    def flow(x, w, ws):
        q = F.pad(codes(x, 0.02), (0, 32, 0, 12))
        y = torch._int_mm(q, F.pad(w, (0, 8, 0, 32))).float() * F.pad(ws, (0, 8))
        return y[:M, :N]

    gone(flow, X, W, WS, sides=[["k to 64", "m to 17", "n to 32"]])


def test_columns_of_one_layer_that_are_k_of_the_next_go():
    def flow(x, w, w2, ws):
        y = torch._int_mm(codes(x, 0.02), F.pad(w, (0, 8)))
        q = (F.relu(y.float()) * 1e-3).round().clamp(-128, 127).to(torch.int8)
        return torch._int_mm(q, F.pad(w2, (0, 0, 0, 8))).float() * ws

    gone(flow, X, W, W.t().contiguous(), torch.rand(K), sides=[["n to 32"], ["k to 32"]])


def test_only_the_dim_that_nothing_else_needs_is_taken_out():
    def flow(x, w, ws):
        q = F.pad(codes(x, 0.02), (0, 32, 0, 12))
        return torch._int_mm(q, F.pad(w, (0, 0, 0, 32))).float() * ws

    state, (notes,) = settled(flow, X, W, WS)
    assert notes == ["author's pad of k to 64 removed", "author's pad of m to 17 kept: the padded tensor is returned"]
    (pad,) = calls(state.graph, aten.constant_pad_nd.default)
    assert pad.args[1] == [0, 0, 0, 12]
    (site,) = state.sites
    assert (str(site.problem.m), site.problem.k) == ("17", K)


# --- near misses: what must stay --------------------------------------------------------------------------------


def quantized_rows(x, w, ws):
    """Padded rows, a matmul, and what is left to do with its result."""
    q, scale = per_token(rows(x))
    return torch._int_mm(q, w).float() * scale * ws


def only_fewer(x, w, ws):
    return quantized_rows(x, w, ws)[:3]


def also_the_padding(x, w, ws):
    return quantized_rows(x, w, ws)[:9]


def not_from_the_first(x, w, ws):
    return quantized_rows(x, w, ws)[1:M]


def every_other(x, w, ws):
    return quantized_rows(x, w, ws)[: 2 * M : 2]


def all_of_them(x, w, ws):
    return quantized_rows(x, w, ws)


def softmax_over_rows(x, w, ws):
    return quantized_rows(x, w, ws).softmax(0)[:M]


def mean_of_rows(x, w, ws):
    y = quantized_rows(x, w, ws)
    return (y - y.mean(0))[:M]


def running_sum_of_rows(x, w, ws):
    return quantized_rows(x, w, ws).cumsum(0)[:M]


def reversed_rows(x, w, ws):
    return quantized_rows(x, w, ws).flip(0)[:M]


def rows_and_columns_regrouped(x, w, ws):
    return quantized_rows(x, w, ws).reshape(24, 17)[:M]


def rows_times_their_own_transpose(x, w, ws):
    y = quantized_rows(x, w, ws)
    return (y @ y.t() @ y)[:M]


def another_user_of_the_padded_rows(x, w, ws):
    x17 = rows(x)
    q, scale = per_token(x17)
    return (torch._int_mm(q, w).float() * scale * ws)[:M], x17.std()


def a_user_that_counts_them(x, w, ws):
    y = quantized_rows(x, w, ws)
    return y[:M] / y.count_nonzero()


def least_and_largest_of_padded_rows(x, w, ws):
    x17 = rows(x + 5)
    low, high = x17.amin(), x17.amax()
    scale = (high - low) / 255
    q = ((x17 - low) / scale).round().clamp(0, 255) - 128
    return (torch._int_mm(q.to(torch.int8), w).float() * scale * ws)[:M]


def largest_of_rows_padded_with_more(x, w, ws):
    x17 = rows(x, value=100.0)
    scale = x17.abs().amax() / 127
    return (torch._int_mm(codes(x17, scale), w).float() * scale * ws)[:M]


def largest_of_what_is_no_magnitude(x, w, ws):
    x17 = rows(x - 9)
    scale = x17.amax() / 127 + 1
    return (torch._int_mm(codes(x17, scale), w).float() * scale * ws)[:M]


def padded_at_the_front(x, w, ws):
    q, scale = per_token(F.pad(x, (0, 0, 12, 0)))
    return (torch._int_mm(q, w).float() * scale * ws)[:M]


def padded_around(x, w, ws):
    q, scale = per_token(F.pad(x, (0, 0, 1, 11)))
    return (torch._int_mm(q, w).float() * scale * ws)[:M]


def zeros_first(x, w, ws):
    q = codes(x, 0.02)
    return (torch._int_mm(torch.cat([q.new_zeros(12, K), q]), w).float() * ws)[:M]


def joined_with_more_rows(x, w, ws):
    q = codes(x, 0.02)
    return (torch._int_mm(torch.cat([q, q[:3] + 1]), w).float() * ws)[:M]


def written_to_in_between(x, w, ws):
    q = codes(x, 0.02)
    padded = rows(q)
    q.zero_()
    return (torch._int_mm(padded, w).float() * ws)[:M]


def two_zero_points_along_k(x, w, ws):
    a = F.pad(codes(x, 0.02), (0, 32)).to(torch.int32) - 3
    b = F.pad(w, (0, 0, 0, 32)).to(torch.int32) - 5
    return (a @ b).float() * ws


def ones_along_k(x, w, ws):
    a, b = F.pad(codes(x, 0.02), (0, 32), value=1), F.pad(w, (0, 0, 0, 32), value=1)
    return torch._int_mm(a, b).float() * ws


def k_of_a_weight_that_was_stored_padded(x, w, ws):
    return torch._int_mm(F.pad(codes(x, 0.02)[:, :20], (0, 12)), w).float() * ws


def k_padded_after_one_operand_was_padded_less(x, w, ws):
    a, b = F.pad(codes(x, 0.02), (0, 32)), F.pad(w[:20], (0, 0, 0, 44))
    return torch._int_mm(a, b).float() * ws


def columns_that_are_summed(x, w, ws):
    y = torch._int_mm(codes(x, 0.02), F.pad(w, (0, 8), value=1)).float()
    return y[:, :N] * ws + y.sum(1, keepdim=True)


def rows_of_a_batch(x, w, ws):
    """Three sequences, each padded, and flattened to rows."""
    x = x[None].expand(3, M, K) * 1.5
    q, scale = per_token(F.pad(x, (0, 0, 0, 12)).reshape(51, K))
    y = torch._int_mm(q, w).float() * scale * ws
    return y[:M]


def scale_padded_and_not_the_codes(x, w, ws):
    """No operand of the matmul is padded."""
    q, scale = per_token(x)
    return torch._int_mm(q, w).float() * rows(scale, value=1.0)[:M] * ws


def scale_that_is_counted(x, w, ws):
    """The rows go, and what is computed of the padded scale stays."""
    q, scale = per_token(x)
    s17 = rows(scale, value=1.0)
    return (torch._int_mm(rows(q), w).float() * s17 * ws)[:M] + s17.sum()


def one_row_of_the_padding(x, w, ws):
    y = quantized_rows(x, w, ws)
    return y[:M] + y[16]


def k_padded_with_ones_under_a_zero_point(x, w, ws):
    q = (F.pad(x, (0, 32)) / 0.02).round() + 3
    wide = F.pad(w, (0, 0, 0, 32), value=1)
    return ((q.clamp(0, 255).to(torch.uint8).to(torch.int32) - 3) @ wide.to(torch.int32)).float() * ws


def cut_by_a_negative_pad(x, w, ws):
    return torch._int_mm(F.pad(F.pad(codes(x, 0.02), (0, 0, 0, 12)), (0, 0, 0, -12)), w).float() * ws


NEAR_MISSES = {
    scale_padded_and_not_the_codes: None,
    scale_that_is_counted: "aten.sum reduces over what is padded",
    one_row_of_the_padding: "takes one index of what is padded",
    k_padded_with_ones_under_a_zero_point: "not known to add nothing to the sum",
    cut_by_a_negative_pad: None,
    only_fewer: "does not drop just the padding",
    also_the_padding: "does not drop just the padding",
    not_from_the_first: "does not drop just the padding",
    every_other: "does not drop just the padding",
    all_of_them: "the padded tensor is returned",
    softmax_over_rows: "aten.amax reduces over what is padded",
    mean_of_rows: "aten.mean.dim reduces over what is padded",
    running_sum_of_rows: "aten.cumsum",
    reversed_rows: "prims.rev",
    rows_and_columns_regrouped: "view regroups what is padded",
    rows_times_their_own_transpose: "along k",
    another_user_of_the_padded_rows: "aten.var.correction",
    a_user_that_counts_them: "aten.sum.dim_IntList reduces over what is padded",
    least_and_largest_of_padded_rows: "aten.amin reduces over what is padded",
    largest_of_rows_padded_with_more: "aten.amax reduces over what is padded",
    largest_of_what_is_no_magnitude: "aten.amax reduces over what is padded",
    padded_at_the_front: None,
    padded_around: None,
    zeros_first: None,
    joined_with_more_rows: None,
    written_to_in_between: None,
    two_zero_points_along_k: "not known to add nothing to the sum",
    ones_along_k: "not known to add nothing to the sum",
    k_of_a_weight_that_was_stored_padded: "only one operand of the matmul is padded along k",
    k_padded_after_one_operand_was_padded_less: "a dim padded from 32 meets one padded from 20",
    columns_that_are_summed: "aten.sum.dim_IntList reduces over what is padded",
    rows_of_a_batch: None,
}


@pytest.mark.parametrize(("flow", "reason"), NEAR_MISSES.items(), ids=lambda flow: getattr(flow, "__name__", ""))
def test_pads_that_matter_stay(flow, reason):
    source = trace(flow, X, W, WS)
    state, notes = settled(flow, X, W, WS)
    assert pads_left(state.graph) or not state.rows
    assert not any("removed" in note for site in notes for note in site)
    assert pads_left(state.before) == pads_left(source)
    if reason is not None:
        assert any(reason in note for site in notes for note in site)


def test_a_pad_stays_with_a_matmul_that_is_left_as_it_is():
    def flow(x, w, ws, other):
        y = quantized_rows(x, w, ws)
        return (y @ other)[:M]

    state, (notes,) = settled(flow, X, W, WS, torch.randn(N, 8))
    assert notes == ["author's pad of m to 17 kept: the matmul mm is not rewritten"]
    assert pads_left(state.graph) == pads_left(trace(flow, X, W, WS, torch.randn(N, 8)))


def test_a_site_that_is_missed_keeps_its_pads():
    state = rewrite(trace(padded_before_the_quantize, X, W, WS), disabled_kernels=["cpu", "pytorch", "triton"])
    assert not state.rows
    assert pads_left(state.before) == ["constant_pad_nd"]
    assert [str(left.site.problem.m) for left in state.recognised] == ["17"]


def test_pads_of_which_a_step_raises_stay(monkeypatch):
    """However many there are, they are tried twice."""
    removals, run = [], pads._Removal.run
    monkeypatch.setattr(pads._Removal, "_recall", _raises)
    monkeypatch.setattr(pads._Removal, "run", lambda removal: (removals.append(removal), run(removal)))

    def flow(x, ws, *weights):
        return [(torch._int_mm(rows(codes(x, 0.02 + i)), w).float() * ws)[:M] for i, w in enumerate(weights)]

    state = rewrite(trace(flow, X, WS, *[W + i for i in range(4)]))
    assert len(removals) == 2
    kept = "kept: taking it out of aten._int_mm failed with ZeroDivisionError: no step"
    assert [site.notes for site in report_on(state).sites] == [(f"author's pad of m to 17 {kept}",)] * 4


def _raises(*_):
    raise ZeroDivisionError("no step")


def test_results_of_two_pads_of_one_tensor_stay_two_tensors():
    def flow(x, w, ws):
        q = codes(x, 0.02)
        one, other = rows(q), rows(q, 20)
        return (torch._int_mm(one, w).float() * ws)[:M], (torch._int_mm(other, w).float() * ws)[:M], one[:M], other[:M]

    settled(flow, X, W, WS)
    state = rewrite(trace(flow, X, W, WS))
    to_kernels(state)
    assert len(state.rows) == 2


def test_a_kernel_that_is_forced_and_needs_the_rows_gets_them(monkeypatch):
    def choose(problem, **rest):
        if problem.m.low < 17:
            raise NoKernelError("needs 17 rows")
        return chosen(problem, **rest)

    chosen = pipeline._choose
    monkeypatch.setattr(pipeline, "_choose", choose)
    state, (notes,) = settled(padded_before_the_quantize, X, W, WS)
    assert notes == ["author's pad of m to 17 kept: needs 17 rows"]
    assert str(state.sites[0].problem.m) == "17"


def test_a_row_that_is_not_there_has_no_largest_magnitude():
    empty = trace(per_tensor_scale_of_padded_rows, X[:0], W, WS)
    state = rewrite(empty)
    assert pads_left(state.before) == ["constant_pad_nd"]
    assert str(state.sites[0].problem.m) == "17"


# --- as Dynamo traces them --------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """``flow(x, w, ws)`` of a weight that is a buffer."""

    def __init__(self, flow, w):
        super().__init__()
        self.flow = flow
        self.register_buffer("w", w)
        self.register_buffer("ws", WS)

    def forward(self, x):
        return self.flow(x, self.w, self.ws)


def as_vllm_pads(x, w, ws):
    x_2d = x.view(-1, x.shape[-1])
    q, scale = per_token(x_2d)
    q = F.pad(q, (0, 0, 0, max(17 - x_2d.shape[0], 0)))
    y = torch.narrow(torch._int_mm(q, w), 0, 0, x_2d.shape[0])
    return (y.float() * scale * ws).view(*x.shape[:-1], w.shape[1])


def only_few_rows(x, w, ws):
    m = x.shape[0]
    q, scale = per_token(x)
    if m < 17:
        q = torch.cat([q, q.new_zeros(17 - m, q.shape[1])])
    return torch._int_mm(q, w)[:m].float() * scale * ws


def into_a_buffer(x, w, ws):
    q, scale = per_token(x)
    buffer = q.new_zeros(17, q.shape[1])
    buffer[: x.shape[0]] = q
    return torch._int_mm(buffer, w)[: x.shape[0]].float() * scale * ws


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("flow", [as_vllm_pads, only_few_rows, into_a_buffer], ids=lambda flow: flow.__name__)
def test_pads_that_dynamo_traced_go(flow, dynamic):
    (graph,) = capture(Layer(flow, W), X, dynamic_rows=dynamic and flow is not into_a_buffer)
    assert pads_left(graph.state.graph) == []
    ((note,),) = [site.notes for site in report_on(graph.state).sites]
    assert note == "author's pad of m to 17 removed"
    assert_same_meaning(graph.source, rewrite(graph.source, graph.static).graph, graph.inputs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_rows_that_the_seeds_layer_pads_go(per_token, dynamic):
    layer = Fp8LinearOp(per_token, pad_output=True)
    (graph,) = capture(Layer(lambda x, w, ws: layer.apply(x, w.t(), ws), W8), X, dynamic_rows=dynamic)
    assert pads_left(graph.state.graph) == []
    assert [site.notes for site in report_on(graph.state).sites] == [("author's pad of m to 17 removed",)]
    assert_same_meaning(graph.source, rewrite(graph.source, graph.static).graph, graph.inputs)


def test_the_report_says_what_was_taken_out_and_json_too():
    state, _ = settled(padded_before_the_quantize, X, W, WS)
    report = report_on(state)
    assert "author's pad of m to 17 removed" in report.to_text(wide=True)
    assert Report.from_json(report.to_json()) == report
    assert '"notes": [\n        "author\'s pad of m to 17 removed"' in report.to_json()


class TestGolden(expecttest.TestCase):
    def test_a_site_before_and_after(self):
        graph = trace(padded_after_the_quantize, X, W, WS)
        self.assertExpectedInline(
            print_graph(graph),
            """\
a0: f32[5, 32]
a1: i8[32, 24]
a2: f32[24]
%0: f32[5, 32] = aten.abs(a0)
%1: f32[5, 1] = aten.amax(%0, [-1], True)
%2: f32[5, 1] = aten.div.Tensor(%1, 127)
%3: f32[5, 32] = aten.div.Tensor(a0, %2)
%4: f32[5, 32] = aten.round(%3)
%5: f32[5, 32] = aten.clamp_min(%4, -128)
%6: f32[5, 32] = aten.clamp_max(%5, 127)
%7: i8[5, 32] = prims.convert_element_type(%6, i8)
%8: i8[17, 32] = aten.constant_pad_nd(%7, [0, 0, 0, 12], 0)
%9: i32[17, 24] = aten._int_mm(%8, a1)
%10: i32[5, 24] = aten.slice.Tensor(%9, 0, 0, 5)
%11: f32[5, 24] = prims.convert_element_type(%10, f32)
%12: f32[5, 24] = aten.mul.Tensor(%11, %2)
%13: f32[5, 24] = aten.mul.Tensor(%12, a2)
return %13
""",
        )
        self.assertExpectedInline(
            print_graph(rewrite(graph).graph),
            """\
a0: f32[5, 32]
a1: i8[32, 24]
a2: f32[24]
%0: (i8[5, 32], f32[5, 1]) = fx_quant.quantize.dynamic(a0, divide_dtype=f32, divisor=127, dtype=i8, floor=0, floor_on=none, granularity=per_token, hi=127, lo=-128, reciprocal=False, scale_dtype=f32)
%1: i8[5, 32] = getitem(%0, 0)
%2: f32[5, 1] = getitem(%0, 1)
%3: f32[5, 24] = fx_quant.scaled_mm(%1, a1, %2, a2, None, f32)
return %3
""",
        )
        self.assertExpectedInline(
            str(report_on(rewrite(graph))).partition("not chosen")[0],
            """\
fx_quant: 1 of 1 quantized matmuls rewritten on x86_vnni, 0 missed

int8 token dyn x int8 channel, cpu_int8_vnni, exact, m 5, padding none; author's
pad of m to 17 removed

module  sites  n   k
------  -----  --  --
?       1      24  32

""",
        )
