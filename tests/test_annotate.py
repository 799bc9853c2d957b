"""Each rule of the value algebra: a graph that satisfies it, and graphs that break one of its premises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from fx_quant.passes.annotate import Annotation
from fx_quant.passes.axes import REPEAT, own_dims
from fx_quant.passes.matrices import axis_of, holds_exactly, matrix_base
from fx_quant.passes.values import Affine, Axis, Codes, ColumnSum, Product, Unknown, Value
from fx_quant.scheme import Numerics
from tests.graphs import trace
from tests.models import require_uint8_int_mm

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT8, UINT8, E4M3, E5M2 = torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2
M, K, N = 4, 8, 6

A = torch.ones(M, K, dtype=INT8)
W = torch.ones(N, K, dtype=INT8)
A8, W8 = A.to(E4M3), W.to(E4M3)


# Values of which nothing is known but their shape; a graph makes them itself.
def row() -> Tensor:
    return torch.rand(M, 1)


def column() -> Tensor:
    return torch.rand(N)


def integers(*shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int32)


def along_k() -> Tensor:
    return torch.rand(K)


def scalar() -> Tensor:
    return torch.rand(())


def bias() -> Tensor:
    return torch.rand(N)


def value_of(function: Callable[..., Tensor], *inputs: Tensor) -> Value | None:
    """What is proven of ``function``'s result."""
    graph = trace(function, *inputs)
    (output,) = graph.find_nodes(op="output")
    return Annotation(graph).value(output.args[0])


def rule_of(function: Callable[..., Tensor], *inputs: Tensor) -> str:
    value = value_of(function, *inputs)
    assert isinstance(value, Unknown), value
    return value.rule


def fake_node(dtype: torch.dtype, *shape: int) -> Node:
    node = Graph().placeholder("x")
    with FakeTensorMode():
        node.meta["val"] = torch.empty(shape, dtype=dtype)
    return node


# --- axes and ranges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "like", "axis"),
    [
        ((), (4, 6), Axis.SCALAR),
        ((1,), (4, 6), Axis.SCALAR),
        ((1, 1), (4, 6), Axis.SCALAR),
        ((4, 1), (4, 6), Axis.ROW),
        ((6,), (4, 6), Axis.COLUMN),
        ((1, 6), (4, 6), Axis.COLUMN),
        ((2, 4, 1), (2, 4, 6), Axis.ROW),
        ((4, 1), (2, 4, 6), Axis.ROW),
        ((2, 1, 1), (2, 4, 6), Axis.ROW),
        ((1, 1, 6), (2, 4, 6), Axis.COLUMN),
        ((4, 6), (4, 6), None),
        ((4, 6), (2, 4, 6), None),
        ((3,), (4, 6), None),
        ((2, 4, 1), (4, 6), None),
        ((1, 1, 1), (4, 6), None),
    ],
)
def test_axis_is_along_what_a_factor_varies(factor, like, axis):
    assert axis_of(fake_node(F32, *factor), fake_node(F32, *like)) is axis


def test_a_number_is_a_scalar_factor():
    assert axis_of(0.5, fake_node(F32, 4, 6)) is Axis.SCALAR


@pytest.mark.parametrize(
    ("codes", "offset", "to", "exact"),
    [
        (INT8, 0, BF16, True),
        (INT8, 0, F16, True),
        (INT8, 0, torch.int32, True),
        (INT8, 0, UINT8, False),
        (INT8, 0, torch.bool, False),
        (INT8, 128, UINT8, True),
        (INT8, 127, UINT8, False),
        (INT8, 129, UINT8, False),
        (INT8, 128, INT8, False),
        (INT8, 129, BF16, True),
        (INT8, 130, BF16, False),
        (UINT8, 0, BF16, True),
        (UINT8, 0, INT8, False),
        (UINT8, -128, INT8, True),
        (E4M3, 0, BF16, True),
        (E4M3, 0, F16, True),
        (E5M2, 0, BF16, True),
        (E5M2, 0, F16, True),
        (E4M3, 0, E5M2, False),
        (E4M3, 0, INT8, False),
    ],
)
def test_codes_are_held_exactly_where_every_code_fits(codes, offset, to, exact):
    assert holds_exactly(dataclasses.replace(Codes.of(fake_node(codes, 4)), offset=offset), to) is exact


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
@pytest.mark.parametrize("to", [BF16, F16, F32])
def test_every_float8_code_survives_the_casts_that_are_called_exact(dtype, to):
    codes = torch.arange(256, dtype=torch.int32).to(UINT8).view(dtype)
    assert holds_exactly(Codes.of(fake_node(dtype, 4)), to)
    torch.testing.assert_close(codes.to(to).double(), codes.double(), rtol=0, atol=0, equal_nan=True)


# --- codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a.float(),
        lambda a: a.to(BF16),
        lambda a: a.to(torch.int32).to(INT8),
        lambda a: a.float() + 0,
        lambda a: a.clone(),
        lambda a: a[:],
    ],
)
def test_exact_casts_and_copies_keep_the_codes(function):
    value = value_of(function, A)
    assert isinstance(value, Codes)
    assert value.offset == 0


@pytest.mark.parametrize(
    ("function", "offset"),
    [
        (lambda a: a.to(torch.int32) + 128, 128),
        (lambda a: (a.to(torch.int32) + 128).to(UINT8), 128),
        (lambda a: a.to(torch.int32) - 3, -3),
        (lambda a: a.to(torch.int32) + 3 - 3, 0),
        (lambda a: a.to(torch.int16) + 128, 128),
    ],
)
def test_an_added_integer_is_an_offset(function, offset):
    value = value_of(function, A)
    assert isinstance(value, Codes)
    assert value.offset == offset


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a + 1,  # wraps around
        lambda a: 3 - a.to(torch.int32),
        lambda a: a.to(torch.int32) + torch.arange(K, dtype=torch.int32),
    ],
)
def test_what_is_no_integer_offset_is_not_proven(function):
    assert isinstance(value_of(function, A), Unknown)


@pytest.mark.parametrize(
    ("function", "factors", "epsilon"),
    [
        (lambda a: a.float() + 0.5, [1], F32),
        (lambda a: a.to(BF16) + 200, [1], BF16),  # not every sum is a bfloat16
        (lambda a: a.float() - torch.rand(M, 1), [2], F32),
        (lambda a: a.float() + integers(M, 1), [1], F32),
        (lambda a: a.float() * row() - integers(M, 1), [2], F32),
        (lambda a: (a.float() - torch.rand(M, 1)) * row() + 0.5, [3, 1], F32),
        (lambda a: (a.float() - torch.rand(M, 1)).to(BF16), [2], BF16),
        (lambda a: a.to(E4M3).float() - integers(), [2], F32),
    ],
)
def test_what_else_is_added_in_floating_point_is_an_offset_of_so_many_factors(function, factors, epsilon):
    value = value_of(function, A)
    assert isinstance(value, Affine)
    assert [len(offset) for offset in value.offsets] == factors
    assert value.epsilon == torch.finfo(epsilon).eps


def test_an_alpha_scales_the_offset_so_it_is_not_proven():
    assert not isinstance(value_of(lambda a: torch.add(a.to(torch.int32), 64, alpha=2), A), Codes)


def test_an_inexact_cast_of_shifted_codes_starts_new_codes():
    value = value_of(lambda a: (a.to(torch.int32) + 127).to(UINT8), A)
    assert isinstance(value, Codes)
    assert (value.offset, value.node.target) == (0, torch.ops.prims.convert_element_type.default)


def test_a_reshape_of_codes_is_codes_under_a_view():
    value = value_of(lambda a: a.float().reshape(2, M // 2, K), A)
    assert isinstance(value, Codes)
    assert [[piece.size for piece in dim] for dim in value.dims] == [[2], [M // 2], [K]]
    assert {piece.axis for dim in value.dims[:2] for piece in dim} == {0}


def test_a_weight_repeated_over_the_batch_is_itself_beside_a_dim_that_repeats():
    value = value_of(lambda w: w.float().t().unsqueeze(0).expand(3, K, N), W)
    assert value.dims[1:] == own_dims(value.node)[::-1]
    assert [piece.axis for piece in value.dims[0]] == [REPEAT]


def test_a_weight_stretched_along_k_is_no_matrix_of_codes():
    rule = rule_of(lambda a, w: a.float() @ w[:, :1].float().t().expand(K, N), A, W)
    assert rule == "a batched matmul whose second operand differs from batch to batch"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda w: w.t(), True),
        (lambda w: w.t().t(), False),
        (lambda w: w.t().contiguous(), True),
        (lambda w: w.permute(1, 0), True),
        (lambda w: w.transpose(-1, -2), True),
        (lambda w: w.t().reshape(K, N), True),
    ],
)
def test_the_base_of_a_weight_is_found_through_its_views(function, expected):
    graph = trace(function, W)
    (output,) = graph.find_nodes(op="output")
    (weight,) = graph.find_nodes(op="placeholder")
    value = Annotation(graph).value(output.args[0])
    assert matrix_base(value.node, value.dims) == (weight, expected)
    assert matrix_base(output.args[0]) == (weight, expected)


def test_another_view_of_a_weight_is_a_base_of_its_own():
    graph = trace(lambda w: w.reshape(K, N).t(), W)
    (weight,) = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    assert (matrix_base(output.args[0]) or (None,))[0] is not weight


# --- dequantized tensors ----------------------------------------------------------------------------------------


def varied(value: Affine, factors: str = "scales") -> list[list[tuple[int, int]]]:
    """Axis of the codes and size of each piece that each factor varies along."""
    return [[(of.axis, of.size) for of, _ in factor.pairs] for factor in getattr(value, factors)]


@pytest.mark.parametrize(
    ("function", "pieces"),
    [
        (lambda a: a.float() * row(), [[(0, M)]]),
        (lambda a: row() * a.float(), [[(0, M)]]),
        (lambda a: a.float() * along_k(), [[(1, K)]]),
        (lambda a: a.float() * 0.5 * row(), [[], [(0, M)]]),
        (lambda a: (a.float() * row()).t(), [[(0, M)]]),
        (lambda a: (a.float() * row()).t().t(), [[(0, M)]]),
        (lambda a: (a.float() * row()).to(BF16), [[(0, M)]]),
        (lambda a: (a.float() * row()).reshape(2, 2, K), [[(0, M)]]),
        (lambda a: (a.float() * row()).reshape(-1, 2), [[(0, M)]]),
        (lambda a: (a.float().view(2, 2, K) * torch.rand(2, 2, 1)).permute(1, 0, 2), [[(0, 2), (0, 2)]]),
        (lambda a: (a.float() * 0.5).reshape(-1), [[]]),
        (lambda a: a.float().view(M, 2, K // 2) * torch.rand(M, 2, 1), [[(0, M), (1, 2)]]),
        (lambda a: a.float().view(M, 2, K // 2) * torch.rand(2, 1), [[(1, 2)]]),
        (lambda a: a.float() * torch.rand(M, 2).repeat_interleave(K // 2, 1), [[(0, M), (1, 2)]]),
        (lambda a: a.float() * torch.rand(2, 2).repeat_interleave(2, 0).repeat_interleave(4, 1), [[(0, 2), (1, 2)]]),
        (lambda a: a.float() * torch.rand(2, 1).expand(2, 4).reshape(-1), [[(1, 2)]]),
    ],
)
def test_scaled_codes_are_affine_along_the_pieces_of_the_scale(function, pieces):
    value = value_of(function, A)
    assert isinstance(value, Affine)
    assert varied(value) == pieces


@pytest.mark.parametrize(
    ("function", "pieces"),
    [
        (lambda a: a.to(torch.int32) - integers(M, 1), [[(0, M)]]),
        (lambda a: a.float() - integers(M, 1), [[(0, M)]]),
        (lambda a: a.float() - integers(M, 1).to(BF16).float(), [[(0, M)]]),
        (lambda a: a.float().view(M, 2, 4) - integers(M, 2).to(INT8).unsqueeze(-1), [[(0, M), (1, 2)]]),
        (lambda a: (a.float() - integers()) * row(), [[]]),
    ],
)
def test_an_integer_that_is_subtracted_before_the_scale_is_a_zero_point(function, pieces):
    value = value_of(function, A)
    assert isinstance(value, Affine)
    assert varied(value, "zero_points") == pieces


@pytest.mark.parametrize(
    ("function", "epsilon"),
    [
        (lambda a: a.to(torch.int32) - integers(M, 1), 0.0),
        (lambda a: a.to(BF16) - integers(M, 1).to(INT8), 0.0),
        (lambda a: a.to(BF16) - integers(M, 1).to(BF16), torch.finfo(BF16).eps),
    ],
)
def test_a_zero_point_of_more_than_a_byte_may_round(function, epsilon):
    assert value_of(function, A).epsilon == epsilon


@pytest.mark.parametrize(
    ("function", "epsilon"),
    [
        (lambda a: a.float() * row(), torch.finfo(F32).eps),
        (lambda a: (a.float() * row()).to(BF16).float(), torch.finfo(BF16).eps),
        (lambda a: a.to(BF16) * row().to(BF16), torch.finfo(BF16).eps),
        (lambda a: a.to(BF16).float() * row(), torch.finfo(F32).eps),
        (lambda a: ((a.float() * row()).to(BF16) * 0.5).t(), torch.finfo(BF16).eps),
    ],
)
def test_an_affine_value_remembers_its_coarsest_rounding(function, epsilon):
    assert value_of(function, A).epsilon == epsilon


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda a: row() / a.float(), "no rule proves aten.div.Tensor of quantized codes"),
        (lambda a: a.to(torch.int32) * 2, "the codes are scaled in torch.int32, which has no rule"),
        (lambda a: a.double() * 0.5, "the codes are scaled in torch.float64, which has no rule"),
        (lambda a: a.float() * torch.rand(M, K), "every code has a scale of its own"),
        (
            lambda a: a.to(torch.int32) + integers(M, 1),
            "something else than a zero point is added to the codes in torch.int32, which has no rule",
        ),
        (
            lambda a: a.double() * 1.0 + torch.rand(M, 1),
            "the codes are scaled in torch.float64, which has no rule",
        ),
        (
            lambda a: a.double() + torch.rand(M, 1).double(),
            "something else than a zero point is added to the codes in torch.float64, which has no rule",
        ),
        (lambda a: a.view(1, -1).float() + torch.rand(M * K), "every code has an offset of its own"),
        (
            lambda a: a.expand(3, M, K).float() + torch.rand(3, 1, 1),
            "what is added to the codes does not follow their rows, columns, groups or blocks",
        ),
        (
            lambda a: a - integers(M, 1).to(INT8),
            "a zero point is subtracted in torch.int8, where the difference may wrap around",
        ),
        (lambda a: (a.to(torch.int32) + 130).to(BF16), "a cast of the codes to torch.bfloat16 is not exact"),
    ],
)
def test_a_dequantize_step_without_a_rule_says_so(function, rule):
    assert rule_of(function, A) == rule


def test_the_failed_rule_is_carried_to_the_matmul():
    rule = rule_of(lambda a, w: a.float() @ ((w.double() - torch.rand(N, 1)) * torch.rand(N, 1)).float().t(), A, W)
    assert rule == "something else than a zero point is added to the codes in torch.float64, which has no rule"


@pytest.mark.parametrize(
    "function",
    [
        lambda a: torch.randn(M, K) + a.float() * row(),  # embeddings added to embeddings
        lambda a: torch.randn(M, K) * a[0].float(),  # a mask
        lambda a: torch.randn(M, K) * a[:, :1].float(),
        lambda a: torch.relu(a.float() * row()),
    ],
)
def test_a_float_tensor_that_met_codes_is_plain_floating_point(function):
    assert value_of(function, A) is None


# --- matmuls ----------------------------------------------------------------------------------------------------


def int_mm(a: Tensor, w: Tensor) -> Tensor:
    return torch._int_mm(a, w.t())


@pytest.mark.parametrize(
    ("function", "numerics", "dtype"),
    [
        (int_mm, Numerics.EXACT, torch.int32),
        (lambda a, w: a.to(torch.int32) @ w.t().to(torch.int32), Numerics.EXACT, torch.int32),
        (lambda a, w: a.float() @ w.t().float(), Numerics.EXACT, F32),
        (lambda a, w: a.to(BF16) @ w.t().to(BF16), Numerics.SAME_ACCUM, BF16),
        (lambda a, w: (a.float() * row()) @ w.t().float(), Numerics.REASSOCIATED, F32),
        (lambda a, w: a.float() @ (w.float() * column()[:, None]).t(), Numerics.REASSOCIATED, F32),
        (lambda a, w: (a.to(BF16) * 0.5) @ w.t().to(BF16), Numerics.REASSOCIATED, BF16),
        (lambda a, w: (a.to(BF16) * 0.5).float() @ w.t().float(), Numerics.APPROXIMATE, F32),
        (lambda a, w: (a.to(BF16) * 0.5).to(F16) @ w.t().to(F16), Numerics.APPROXIMATE, F16),
        (lambda a, w: (a.to(F16) * 0.5).to(BF16) @ w.t().to(BF16), Numerics.REASSOCIATED, BF16),
    ],
)
def test_a_matmul_of_codes_starts_a_product(function, numerics, dtype):
    value = value_of(function, A, W)
    assert isinstance(value, Product)
    assert (value.numerics, value.dtype) == (numerics, dtype)


@pytest.mark.parametrize(("k", "numerics"), [(1024, Numerics.EXACT), (1025, Numerics.SAME_ACCUM)])
def test_a_float32_sum_of_integers_is_exact_up_to_2_to_24(k, numerics):
    a, w = torch.ones(M, k, dtype=INT8), torch.ones(N, k, dtype=INT8)
    assert value_of(lambda a, w: a.float() @ w.t().float(), a, w).numerics == numerics


def test_a_sum_of_float8_codes_is_never_exact():
    assert value_of(lambda a, w: a.float() @ w.t().float(), A8, W8).numerics == Numerics.SAME_ACCUM


@pytest.mark.parametrize(
    ("function", "rows", "columns"),
    [
        (lambda a, w: (a.float() * row()) @ (w.float() * column()[:, None]).t(), 1, 1),
        (lambda a, w: (a.float() * row() * 0.5) @ w.t().float(), 2, 0),
        (lambda a, w: a.float() @ (w.t().float() * column()), 0, 1),
    ],
)
def test_scales_of_the_operands_leave_the_sum(function, rows, columns):
    value = value_of(function, A, W)
    assert (len(value.rows), len(value.columns)) == (rows, columns)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (
            lambda a, w: a.float() @ (w.float() * along_k()).t(),
            "the scale of b varies along k, so it cannot leave the sum",
        ),
        (
            lambda a, w: a.to(torch.int32) @ (w.t().to(torch.int32) - integers(K, 1)),
            "the zero point of b varies along k, so it cannot leave the sum",
        ),
        (lambda a, w: a.float() @ w.to(E4M3).float().t(), "one operand is float8 and the other integer"),
        (
            lambda a, w: a.float().round().to(INT8).float() @ torch.randn(K, N),
            "only the activation is quantized; the weight is floating point",
        ),
        (
            lambda a, w: torch.bmm(a.float()[None].expand(2, M, K), torch.stack([w.t(), w.t()]).float()),
            "a batched matmul whose second operand differs from batch to batch",
        ),
        (lambda a, w: a.double() @ w.t().double(), "a matmul of codes that returns torch.float64 has no rule"),
        (lambda a, w: torch.addmm(bias(), a.float(), w.t().float(), alpha=2), "addmm with alpha or beta other than 1"),
        (lambda a, w: torch.addmm(bias(), a.float(), w.t().float(), beta=2), "addmm with alpha or beta other than 1"),
        (
            lambda a, w: torch.addmm(torch.ones(M, N), a.float(), w.t().float()),
            "addmm adds a matrix, not a bias along n",
        ),
        (lambda a, w: torch.addmm(row(), a.float(), w.t().float()), "addmm adds a matrix, not a bias along n"),
    ],
)
def test_a_matmul_without_a_rule_says_so(function, rule):
    assert rule_of(function, A, W) == rule


def test_a_float_matmul_is_no_product():
    assert value_of(lambda a, w: torch.randn(M, K) @ torch.randn(K, N), A, W) is None


def test_an_image_times_a_float_weight_is_no_miss():
    assert value_of(lambda a, w: a.float() / 255 @ torch.randn(K, N), A.to(UINT8), W) is None


def test_addmm_is_a_product_with_a_bias():
    value = value_of(lambda a, w: torch.addmm(bias(), a.float(), w.t().float()), A, W)
    assert isinstance(value, Product)
    assert value.bias is not None
    assert value.numerics == Numerics.SAME_ACCUM


def test_a_matmul_in_three_dimensions_is_a_product():
    a = torch.ones(2, M, K, dtype=INT8)
    value = value_of(lambda a, w: torch.nn.functional.linear(a.float() * 0.5, w.float() * column()[:, None]), a, W)
    assert isinstance(value, Product)


def test_bmm_with_a_broadcast_weight_is_a_product():
    a = torch.ones(2, M, K, dtype=INT8)
    value = value_of(lambda a, w: torch.bmm(a.float(), w.t().float().unsqueeze(0).expand(2, K, N)), a, W)
    assert isinstance(value, Product)


# --- torch._scaled_mm -------------------------------------------------------------------------------------------


def scaled_mm(a: Tensor, w: Tensor, **arguments: Any) -> Tensor:
    made = {name: argument() if callable(argument) else argument for name, argument in arguments.items()}
    given: dict[str, Any] = {"scale_a": scalar(), "scale_b": scalar(), "out_dtype": BF16, **made}
    return torch._scaled_mm(a, w.t(), **given)


@pytest.mark.parametrize(
    ("arguments", "rows", "columns", "biased"),
    [
        ({}, [None], [None], False),
        ({"scale_a": row, "scale_b": lambda: column()[None]}, [1], [1], False),
        ({"bias": lambda: bias().to(BF16)}, [None], [None], True),
    ],
)
def test_scaled_mm_holds_its_scales_and_bias(arguments, rows, columns, biased):
    value = value_of(lambda a, w: scaled_mm(a, w, **arguments), A8, W8)
    assert isinstance(value, Product)
    assert [factor.row_block for factor in value.rows] == rows
    assert [factor.row_block for factor in value.columns] == columns
    assert (value.bias is not None, value.numerics) == (biased, Numerics.SAME_ACCUM)


def test_scaled_mm_drops_scales_that_are_known_to_be_one():
    value = value_of(lambda a, w: scaled_mm(a, w, scale_a=torch.ones(())), A8, W8)
    assert (value.rows, len(value.columns)) == ((), 1)


def test_scaled_mm_with_a_result_scale_is_unknown():
    rule = rule_of(lambda a, w: scaled_mm(a, w, scale_result=scalar()), A8, W8)
    assert rule == "_scaled_mm with scale_result, which compiled code ignores"


def test_scaled_mm_that_returns_codes_is_unknown():
    rule = rule_of(lambda a, w: scaled_mm(a, w, out_dtype=E4M3), A8, W8)
    assert rule == "_scaled_mm that returns torch.float8_e4m3fn has no rule"


@pytest.mark.parametrize(
    ("scale_b", "block"),
    [((2, 3), (128, 128)), ((2, 300), (1, 128))],
)
def test_scaled_mm_with_scales_of_blocks_of_128(scale_b, block):
    a, w = torch.ones(16, 256).to(E4M3), torch.ones(300, 256).to(E4M3)
    value = value_of(lambda a, w: scaled_mm(a, w, scale_a=torch.rand(16, 2), scale_b=torch.rand(scale_b)), a, w)
    assert isinstance(value, Product)
    assert value.block == block


def test_scaled_mm_with_one_scale_for_128_rows_of_the_activation_is_unknown():
    a, w = torch.ones(128, 256).to(E4M3), torch.ones(256, 256).to(E4M3)
    rule = rule_of(lambda a, w: scaled_mm(a, w, scale_a=torch.rand(1, 2), scale_b=torch.rand(2, 256)), a, w)
    assert rule == (
        "_scaled_mm with scales that are neither float32 per tensor, row-wise nor of blocks of 128 "
        "(scale_a [1, 2], scale_b [2, 256])"
    )


# --- weight-only, groups, blocks and zero points ----------------------------------------------------------------


def grouped(x: Tensor, scale: Tensor) -> Tensor:
    """``x [rows, k]`` times one scale for each group along k."""
    return (x.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


WEIGHT_ONLY = {
    "unscaled": (lambda x, w: x @ w.float().t(), None, 0),
    "per_channel": (lambda x, w: x @ (w.float() * torch.rand(N, 1)).t(), None, 0),
    "per_group": (lambda x, w: x @ grouped(w.float(), torch.rand(N, 2)).t(), (1, 4), 0),
    "per_group_of_all_rows": (lambda x, w: x @ grouped(w.float(), torch.rand(1, 2)).t(), (N, 4), 0),
    "per_block": (lambda x, w: x @ grouped(w.float(), torch.rand(3, 2).repeat_interleave(2, 0)).t(), (2, 4), 0),
    "zero_point": (lambda x, w: x @ ((w.float() - integers(N, 1)) * torch.rand(N, 1)).t(), None, 1),
    "batch": (lambda x, w: torch.bmm(x.expand(3, M, K), w.float().t().expand(3, K, N)), None, 0),
    "linear_3d": (lambda x, w: torch.nn.functional.linear(x.expand(3, M, K), w.float()), None, 0),
}


@pytest.mark.parametrize(("function", "block", "zero_points"), WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_a_float_activation_times_a_dequantized_weight_is_weight_only(function, block, zero_points):
    value = value_of(function, torch.rand(M, K), W)
    assert isinstance(value, Product)
    assert isinstance(value.a, Node)
    assert (value.block, len(value.b_zero_points)) == (block, zero_points)


@pytest.mark.parametrize(
    ("function", "obstacle"),
    [
        (
            lambda a, w: (a.float() * along_k()) @ w.t().float(),
            "the scale of a varies along k, so it cannot leave the sum",
        ),
        (
            lambda a, w: grouped(a.float(), torch.rand(M, 4)) @ grouped(w.float(), torch.rand(N, 2)).t(),
            "the scales of a and b have groups of different sizes along k",
        ),
        (
            lambda a, w: (a.float() - integers(M, 1)) @ grouped(w.float(), torch.rand(N, 2)).t(),
            "a zero point of a that may lie far out, beside scales that vary along k",
        ),
    ],
)
def test_what_cannot_be_a_matmul_of_codes_is_weight_only_and_says_why(function, obstacle):
    value = value_of(function, A, W)
    assert isinstance(value, Product)
    assert isinstance(value.a, Node)
    assert value.obstacle == obstacle


@pytest.mark.parametrize(
    ("function", "block"),
    [
        (lambda a, w: grouped(a.float(), torch.rand(M, 2)) @ grouped(w.float(), torch.rand(N, 2)).t(), (1, 4)),
        (lambda a, w: (a.float() * row()) @ grouped(w.float(), torch.rand(N, 2)).t(), (1, 4)),
        (lambda a, w: grouped(a.float(), torch.rand(M, 2)) @ (w.float() * column()[:, None]).t(), (1, 4)),
    ],
)
def test_scales_of_groups_along_k_leave_the_sum_group_by_group(function, block):
    value = value_of(function, A8, W8)
    assert isinstance(value, Product)
    assert isinstance(value.a, Codes)
    assert value.block == block


def test_zero_points_of_both_operands_leave_the_sum():
    value = value_of(lambda a, w: (a.to(torch.int32) - integers(M, 1)) @ (w.to(torch.int32) - integers(N, 1)).t(), A, W)
    assert isinstance(value, Product)
    assert (len(value.a_zero_points), len(value.b_zero_points), value.numerics) == (1, 1, Numerics.EXACT)


def test_a_zero_point_corrected_after_the_sum_is_a_zero_point():
    value = value_of(lambda a, w: int_mm(a, w) - integers(M, 1) * w.sum(1, dtype=torch.int32), A, W)
    assert isinstance(value, Product)
    assert (len(value.a_zero_points), value.numerics) == (1, Numerics.EXACT)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, w: int_mm(a, w) + integers(M, 1) * w.sum(1, dtype=torch.int32),
        lambda a, w: int_mm(a, w) - integers(M, 1) * w.sum(0, dtype=torch.int32)[:N],
        lambda a, w: int_mm(a, w) - integers(M, 1) * (w + 0).clone().roll(1, 0).sum(1, dtype=torch.int32),
        lambda a, w: int_mm(a, w) - (integers(M, 1) * w.sum(1, dtype=torch.int32)) * integers(M, 1),
    ],
)
def test_another_term_is_no_correction(function):
    assert not isinstance(value_of(function, A, W), Product)


def test_nibbles_are_codes_of_sixteen_values():
    def unpacked(p: Tensor) -> Tensor:
        return torch.stack([p & 15, p >> 4], -1).flatten(1)

    value = value_of(unpacked, torch.ones(N, K // 2, dtype=UINT8))
    assert isinstance(value, Codes)
    assert value.bounds == (0, 15)


# --- epilogues --------------------------------------------------------------------------------------------------


def epilogue(function: Callable[[Tensor], Tensor], a: Tensor = A, w: Tensor = W) -> Value | None:
    """What is proven of ``function`` of an int32 accumulator."""
    return value_of(lambda a, w: function(int_mm(a, w)), a, w)


EXACT_EPILOGUES = {
    "row_column_bias_cast": lambda y: (y.float() * row() * column() + bias()).to(BF16),
    "row": lambda y: y.float() * row(),
    "promoted_row": lambda y: y * row(),
    "column": lambda y: y.float() * column(),
    "scalar_column": lambda y: y.float() * scalar() * column(),
    "number_column": lambda y: y.float() * 0.5 * column(),
    "left": lambda y: column() * (row() * y.float()),
    "half_factor": lambda y: y.float() * column().to(BF16),
    "half_bias": lambda y: y.float() + bias().to(F16),
    "bias_of_one": lambda y: y.float() * column() + bias()[:1],
    "number_bias": lambda y: y.float() * column() + 0.25,
    "cast": lambda y: y.to(BF16),
    "three_d": lambda y: (y.float().view(2, M // 2, N) * row().view(2, M // 2, 1)) * column(),
    "clone": lambda y: (y.float() * row()).clone() * column(),
    "full_slice": lambda y: (y.float() * row())[:M] * column(),
}


@pytest.mark.parametrize("name", EXACT_EPILOGUES)
def test_the_canonical_epilogue_is_exact(name):
    value = epilogue(EXACT_EPILOGUES[name])
    assert isinstance(value, Product)
    assert (value.numerics, value.skipped) == (Numerics.EXACT, 0)


INEXACT_EPILOGUES = {
    "column_then_row": (lambda y: y.float() * column() * row(), 0),
    "two_columns": (lambda y: y.float() * column() * column(), 0),
    "two_rows": (lambda y: y.float() * row() * row(), 0),
    "scales_first": (lambda y: y.float() * (row() * column()), 0),
    "divided_column": (lambda y: y.float() / column(), 0),
    "scale_after_cast": (lambda y: y.to(BF16) * column(), 1),
    "promoted_to_half": (lambda y: y * column().to(BF16), 0),
    "half_scales": (lambda y: y.to(BF16) * row().to(BF16) * column().to(BF16), 2),
    "bias_after_cast": (lambda y: (y.float() * column()).to(BF16) + bias().to(BF16), 1),
    "cast_back": (lambda y: (y.float() * column()).to(BF16).float(), 1),
    "half_to_other_half": (lambda y: (y.float() * column()).to(BF16).to(F16), 1),
}


@pytest.mark.parametrize("name", INEXACT_EPILOGUES)
def test_another_epilogue_is_the_same_accumulator_only(name):
    function, skipped = INEXACT_EPILOGUES[name]
    value = epilogue(function)
    assert isinstance(value, Product)
    assert (value.numerics, value.skipped) == (Numerics.SAME_ACCUM, skipped)


NOT_EPILOGUES = {
    "scale_after_bias": lambda y: (y.float() + bias()) * column(),
    "two_biases": lambda y: y.float() + bias() + bias(),
    "subtracted_bias": lambda y: y.float() - bias(),
    "subtracted_from_bias": lambda y: bias() - y.float(),
    "alpha": lambda y: torch.add(y.float(), bias(), alpha=3),
    "bias_along_m": lambda y: y.float() + row(),
    "residual": lambda y: y.float() + torch.randn(M, N),
    "full_scale": lambda y: y.float() * torch.randn(M, N),
    "integer_bias": lambda y: y + 1,
    "integer_scale": lambda y: y * 2,
    "double": lambda y: y.double(),
    "reciprocal": lambda y: column() / y.float(),
    "square": lambda y: y.float() * y.float(),
    "relu": lambda y: (y.float() * column()).relu(),
    "transposed": lambda y: (y.float() * row()).t(),
    "flipped": lambda y: (y.float() * column()).flip(0),
    "columns_mixed": lambda y: y.float().view(-1, 2 * N),
    "rows_swapped": lambda y: y.view(2, M // 2, N).transpose(0, 1).reshape(M, N).float(),
    "sliced": lambda y: y.float()[1:],
    "double_scale": lambda y: y.float() * column().double(),
}


@pytest.mark.parametrize("name", NOT_EPILOGUES)
def test_what_is_no_epilogue_step_ends_the_product(name):
    assert not isinstance(epilogue(NOT_EPILOGUES[name]), Product)


@pytest.mark.parametrize("function", [lambda y: y * y, lambda y: y + y])
def test_one_row_is_neither_its_own_scale_nor_its_own_bias(function):
    value = epilogue(lambda y: function(y.float()), A[:1])
    assert not isinstance(value, Product)


def test_scales_that_met_each_other_first_are_told_apart():
    value = epilogue(lambda y: y.float() * (column() * row()))
    assert [tuple(factor.source.meta["val"].shape) for factor in value.rows] == [(M, 1)]
    assert [tuple(factor.source.meta["val"].shape) for factor in value.columns] == [(N,)]


def test_a_product_of_two_scales_along_the_same_axis_is_one_factor():
    value = epilogue(lambda y: y.float() * (column() * column()))
    assert (len(value.rows), len(value.columns)) == (0, 1)


# --- corrections of asymmetric codes ----------------------------------------------------------------------------


def shifted(a: Tensor, by: int = 128) -> Tensor:
    return (a.to(torch.int32) + by).to(UINT8)


def sums(w: Tensor) -> Tensor:
    return w.sum(1, dtype=torch.int32)


SQUARE = torch.ones(N, K, dtype=INT8)

CORRECTIONS = {
    "subtracted": lambda a, w: int_mm(shifted(a), w) - 128 * sums(w),
    "negative_added": lambda a, w: int_mm(shifted(a), w) + -128 * sums(w),
    "keepdim": lambda a, w: int_mm(shifted(a), w) - 128 * w.t().sum(0, keepdim=True, dtype=torch.int32),
    "negative_dim": lambda a, w: int_mm(shifted(a), w) - 128 * w.sum(-1, dtype=torch.int32),
    "factors_in_two_steps": lambda a, w: int_mm(shifted(a), w) - 2 * (sums(w) * 64),
    "int64_then_int32": lambda a, w: int_mm(shifted(a), w) - (128 * w.sum(1)).to(torch.int32),
    "copied_weight": lambda a, w: int_mm(shifted(a), w.clone()) - 128 * sums(w),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_right_correction_takes_the_offset_off(name):
    require_uint8_int_mm()
    value = value_of(CORRECTIONS[name], A, W)
    assert isinstance(value, Product)
    assert (value.offset, value.numerics) == (0, Numerics.EXACT)


WRONG_CORRECTIONS = {
    "none": lambda a, w: int_mm(shifted(a), w),
    "127": lambda a, w: int_mm(shifted(a), w) - 127 * sums(w),
    "added": lambda a, w: int_mm(shifted(a), w) + 128 * sums(w),
    "reversed": lambda a, w: 128 * sums(w) - int_mm(shifted(a), w),
    "twice": lambda a, w: int_mm(shifted(a), w) - 128 * sums(w) - 128 * sums(w),
    "another_weight": lambda a, w: int_mm(shifted(a), w) - 128 * sums(w.flip(0)),
    "flipped": lambda a, w: int_mm(shifted(a), w) - 128 * sums(w).flip(0),
    "along_rows": lambda a, w: int_mm(shifted(a), w) - 128 * sums(w)[:, None],
    "along_rows_keepdim": lambda a, w: int_mm(shifted(a), w) - 128 * w.sum(1, keepdim=True, dtype=torch.int32),
    "sum_over_n": lambda a, w: int_mm(shifted(a), w) - 128 * w.reshape(K, N).sum(0, dtype=torch.int32),
    "float_sums": lambda a, w: int_mm(shifted(a), w) - 128 * w.float().sum(1),
    "shifted_sums": lambda a, w: int_mm(shifted(a), w) - 128 * (w.to(torch.int32) + 1).sum(1, dtype=torch.int32),
    "alpha": lambda a, w: torch.sub(int_mm(shifted(a), w), 128 * sums(w), alpha=2),
    "after_the_scale": lambda a, w: int_mm(shifted(a), w) * column() - 128 * sums(w),
}


@pytest.mark.parametrize("name", WRONG_CORRECTIONS)
def test_a_wrong_correction_never_ends_as_a_corrected_product(name):
    """With m == n, so that what lies along the wrong axis fits all the same."""
    require_uint8_int_mm()
    value = value_of(WRONG_CORRECTIONS[name], SQUARE, W)
    assert not isinstance(value, Product) or value.offset != 0


def test_a_sum_of_the_weight_along_k_is_a_column_sum():
    value = value_of(lambda w: 3 * w.t().sum(0, dtype=torch.int32), W)
    assert isinstance(value, ColumnSum)
    assert (value.dim, value.multiplier) == (1, 3)


def test_a_sum_over_everything_is_no_column_sum():
    assert not isinstance(value_of(lambda w: w.sum(dtype=torch.int32), W), ColumnSum)
