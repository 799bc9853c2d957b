"""What the algebra may not prove: for each rule a graph that it proves, and the same graph with one premise broken.

All matrices are square unless the rule is about shapes, so that whatever lies along the wrong axis fits all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from fx_quant.passes.axes import own_dims
from fx_quant.passes.rules.scaled_matmuls import scaled_product
from fx_quant.passes.values import Codes, Product
from tests.graphs import Proven, assert_same_meaning, calls, capture, prove, run, trace

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT8, UINT8, INT32, INT64, E4M3 = torch.int8, torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn
SIZE = 4

Graph = Callable[..., Tensor]


def codes(*shape: int, dtype: torch.dtype = INT8) -> Tensor:
    if dtype is E4M3:
        return torch.randn(shape).to(E4M3)
    return torch.randint(0 if dtype is UINT8 else -128, 256 if dtype is UINT8 else 128, shape).to(dtype)


def points(*shape: int, dtype: torch.dtype = INT32) -> Tensor:
    return torch.randint(1, 30, shape).to(dtype)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def int_mm(a: Tensor, w: Tensor) -> Tensor:
    return torch._int_mm(a, w.t())


def sums(w: Tensor, dim: int = 1, **arguments: bool) -> Tensor:
    return w.sum(dim, dtype=INT32, **arguments)


def grouped(x: Tensor, scale: Tensor) -> Tensor:
    """``x [rows, k]`` times one scale for each group along k."""
    return (x.unflatten(1, (scale.shape[-1], -1)) * scale[..., None]).flatten(1)


def square() -> tuple[Tensor, ...]:
    """Codes a and w."""
    return codes(SIZE, SIZE), codes(SIZE, SIZE)


def with_points(*shape: int, dtype: torch.dtype = INT32) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*square(), points(*shape, dtype=dtype))


def with_scales(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*square(), *(scales(*shape) for shape in shapes))


def with_float_activation(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(SIZE, SIZE), codes(SIZE, SIZE), *(scales(*shape) for shape in shapes))


@dataclass(frozen=True)
class Rule:
    """A graph that a rule proves, what is found of it, and graphs that break a premise with what is found of those.

    Args:
        inputs: makes the operands; the first is the activation's codes, or the float activation.
        dynamic: the rows are symbolic.
    """

    inputs: Callable[[], tuple[Tensor, ...]]
    graph: Graph
    found: str
    broken: Mapping[str, tuple[Graph, str]] = field(default_factory=dict)
    dynamic: bool = False


def outcome(graph: Graph, inputs: tuple[Tensor, ...], *, dynamic: bool = False) -> str:
    """What is found of ``graph``, which must mean what it meant."""
    source = trace(graph, *inputs, dynamic=dynamic)
    proven = prove(source)
    assert_same_meaning(source, proven.graph, inputs)
    return said(proven)


def said(proven: Proven) -> str:
    """Sites and misses, in words."""
    found = [f"{site.scheme} -> {site.numerics}" for site in proven.found.sites]
    return "; ".join([*found, *(f"miss: {miss.rule}" for miss in proven.found.misses)]) or "nothing"


INT_PRODUCT = "int8 unscaled (static) x int8 unscaled -> exact"
INT_POINT = "int8 unscaled asymmetric (static) x int8 unscaled -> exact"
FLOAT_POINT = "int8 unscaled asymmetric (static) x int8 unscaled -> same_accum"
NO_POINT = "the zero point is no integer tensor that follows the rows, columns, groups or blocks"
INT_WEIGHT_ONLY = "miss: a weight-only matmul of torch.int32 that returns torch.int32 has no rule"
ENDS = "miss: nothing that can be returned is proven: the sum ends in torch.int32"
WEIGHT_ONLY = "float32 x int8 unscaled -> same_accum"
GROUPS = "float32 x int8 per_group(2) -> reassociated"
DECODED = "miss: the weight is decoded from stored codes"
EVERY_SCALE = "miss: every code has a scale of its own"
WEIGHT_AS_IS = "float32 x int8 unscaled -> same_accum"
TOKENS = "int8 per_token (static) x int8 unscaled -> reassociated"

RULES: dict[str, Rule] = {
    # --- zero points before the sum ---------------------------------------------------------------------------
    "zero_point_of_rows": Rule(
        with_points(SIZE, 1),
        lambda a, w, z: (a.float() - z) @ w.float().t(),
        FLOAT_POINT.replace("same_accum", "reassociated"),
        {
            "along_k": (lambda a, w, z: (a.float() - z.t()) @ w.float().t(), WEIGHT_ONLY),
            "added": (lambda a, w, z: (a.float() + z) @ w.float().t(), WEIGHT_ONLY),
            "subtracted_from": (lambda a, w, z: (z - a.float()) @ w.float().t(), WEIGHT_ONLY),
            "twice_by_alpha": (lambda a, w, z: torch.sub(a.float(), z, alpha=2) @ w.float().t(), WEIGHT_ONLY),
            "after_the_scale": (lambda a, w, z: (a.float() * 0.5 - z) @ w.float().t(), WEIGHT_ONLY),
            "not_an_integer": (lambda a, w, z: (a.float() - z * 0.5) @ w.float().t(), WEIGHT_ONLY),
            "an_integer_in_a_float": (lambda a, w, z: (a.float() - z.cos().round()) @ w.float().t(), WEIGHT_ONLY),
            "infinite": (lambda a, w, z: ((a.float() - float("inf")) @ w.float().t()).isnan() * z, WEIGHT_ONLY),
            "not_a_number": (lambda a, w, z: ((a.float() + float("nan")) @ w.float().t()).isnan() * z, WEIGHT_ONLY),
            "one_for_each_code": (lambda a, w, z: (a.float() - z.expand(SIZE, SIZE) * w) @ w.float().t(), WEIGHT_ONLY),
        },
    ),
    "zero_point_in_int32": Rule(
        with_points(SIZE, 1),
        lambda a, w, z: ((a.to(INT32) - z) @ w.to(INT32).t()).float(),
        INT_POINT,
        {
            "wraps_around_in_int8": (
                lambda a, w, z: ((a - z.to(INT8)).to(INT32) @ w.to(INT32).t()).float(),
                INT_WEIGHT_ONLY,
            ),
            "wraps_around_in_int16": (
                lambda a, w, z: ((a.to(torch.int16) - z.to(torch.int16)).to(INT32) @ w.to(INT32).t()).float(),
                INT_WEIGHT_ONLY,
            ),
            "cast_back_to_int8": (lambda a, w, z: int_mm((a.to(INT32) - z).to(INT8), w).float(), INT_PRODUCT),
            "along_k": (
                lambda a, w, z: ((a.to(INT32) - z.t()) @ w.to(INT32).t()).float(),
                "miss: the zero point of a varies along k, so it cannot leave the sum",
            ),
        },
    ),
    "zero_point_of_a_byte_in_bfloat16": Rule(
        with_points(SIZE, 1, dtype=INT8),
        lambda a, w, z: (a.to(BF16) - z) @ w.to(BF16).t(),
        FLOAT_POINT,
        {
            # 255 less -128 is 383, which bfloat16 does not hold.
            "of_unsigned_codes": (
                lambda a, w, z: (a.view(UINT8).to(BF16) - z) @ w.to(BF16).t(),
                FLOAT_POINT.replace("same_accum", "reassociated"),
            ),
            "of_more_than_a_byte": (
                lambda a, w, z: (a.to(BF16) - z.to(torch.int16) * 9) @ w.to(BF16).t(),
                FLOAT_POINT.replace("same_accum", "reassociated"),
            ),
        },
    ),
    "zero_point_of_the_weight": Rule(
        with_points(SIZE, 1),
        lambda a, w, z: ((a.to(INT32)) @ (w.to(INT32) - z).t()).float(),
        "int8 unscaled (static) x int8 unscaled asymmetric -> exact",
        {
            "along_k": (
                lambda a, w, z: (a.to(INT32) @ (w.to(INT32) - z.t()).t()).float(),
                "miss: the zero point of b varies along k, so it cannot leave the sum",
            ),
            "corrected_by_sums_of_other_codes": (
                lambda a, w, z: (a.to(INT32) @ (w.to(INT32) - z).t() - z * sums(w)).float(),
                ENDS,
            ),
            "offset_corrected_by_sums_of_other_codes": (
                lambda a, w, z: ((a.to(INT32) + 9) @ (w.to(INT32) - z).t() - 9 * sums(w)).float(),
                ENDS,
            ),
        },
    ),
    # --- zero points corrected after the sum ------------------------------------------------------------------
    "correction_of_rows": Rule(
        with_points(SIZE, 1),
        lambda a, w, z: (int_mm(a, w) - z * sums(w)).float(),
        INT_POINT,
        {
            "sums_along_rows": (lambda a, w, z: (int_mm(a, w) - z * sums(w, keepdim=True)).float(), INT_PRODUCT),
            "transposed": (lambda a, w, z: (int_mm(a, w) - (z * sums(w)).t()).float(), INT_PRODUCT),
            "points_along_columns": (lambda a, w, z: (int_mm(a, w) - z.t() * sums(w)).float(), INT_PRODUCT),
            "sums_over_n": (lambda a, w, z: (int_mm(a, w) - z * sums(w, 0)).float(), INT_PRODUCT),
            "sums_of_another_weight": (lambda a, w, z: (int_mm(a, w) - z * sums(a)).float(), INT_PRODUCT),
            "sums_of_shifted_codes": (
                lambda a, w, z: (int_mm(a, w) - z * sums(w.to(INT32) + 1)).float(),
                INT_PRODUCT,
            ),
            "added": (lambda a, w, z: (int_mm(a, w) + z * sums(w)).float(), INT_PRODUCT),
            "subtracted_from": (lambda a, w, z: (z * sums(w) - int_mm(a, w)).float(), INT_PRODUCT),
            "doubled": (lambda a, w, z: (int_mm(a, w) - 2 * (z * sums(w))).float(), INT_PRODUCT),
            "squared": (lambda a, w, z: (int_mm(a, w) - z * (z * sums(w))).float(), INT_PRODUCT),
            "by_alpha": (lambda a, w, z: torch.sub(int_mm(a, w), z * sums(w), alpha=3).float(), INT_PRODUCT),
            "after_the_scale": (
                lambda a, w, z: int_mm(a, w) * 0.5 - z * sums(w),
                "int8 per_tensor (static) x int8 unscaled -> exact",
            ),
            "of_float_points": (lambda a, w, z: int_mm(a, w) - (z * 0.5) * sums(w), INT_PRODUCT),
        },
    ),
    "correction_of_everything": Rule(
        with_points(),
        lambda a, w, z: (int_mm(a, w) - z * sums(w)[None]).float(),
        INT_POINT,
        {
            "along_rows": (lambda a, w, z: (int_mm(a, w) - z * sums(w)[:, None]).float(), INT_PRODUCT),
            "along_rows_later": (lambda a, w, z: (int_mm(a, w) - (z * sums(w))[:, None]).float(), INT_PRODUCT),
            "keepdim": (lambda a, w, z: (int_mm(a, w) - z * sums(w, keepdim=True)).float(), INT_PRODUCT),
        },
    ),
    "correction_of_a_batch": Rule(
        lambda: (codes(2 * SIZE, SIZE), codes(SIZE, SIZE), points(2, SIZE, 1)),
        lambda a, w, z: (int_mm(a, w).view(2, SIZE, SIZE) - z * sums(w)).float(),
        INT_POINT,
        {
            "shared_by_the_batch": (
                lambda a, w, z: (int_mm(a, w).view(2, SIZE, SIZE) - z[0] * sums(w)).float(),
                INT_PRODUCT,
            ),
        },
    ),
    # --- scales along k ---------------------------------------------------------------------------------------
    "scale_of_groups": Rule(
        with_float_activation((SIZE, 2)),
        lambda x, w, s: x @ grouped(w.float(), s).t(),
        GROUPS,
        {
            "tiled_instead_of_repeated": (lambda x, w, s: x @ (w.float() * s.repeat(1, 2)).t(), EVERY_SCALE),
            "sliced": (
                lambda x, w, s: x[:, :3] @ grouped(w.float(), s)[:, :3].t(),
                "miss: a part of a decoded weight that is no slice of its codes, scales and zero points",
            ),
            "ragged": (
                lambda x, w, s: x @ (w.float() * s.repeat_interleave(3, 1)[:, :SIZE]).t(),
                EVERY_SCALE,
            ),
            "flipped": (
                lambda x, w, s: x @ grouped(w.float(), s).flip(1).t(),
                f"{DECODED}, and no rule proves prims.rev.default",
            ),
            "of_the_other_axis": (
                lambda x, w, s: x @ (w.float().view(2, 2, SIZE) * s.t()[:, None]).view(SIZE, SIZE).t(),
                "miss: the scale of b varies along k, so it cannot leave the sum",
            ),
            "used_untransposed": (
                lambda x, w, s: x @ grouped(w.float(), s),
                "miss: the scale of b varies along k, so it cannot leave the sum",
            ),
        },
    ),
    "scale_of_blocks": Rule(
        with_float_activation((2, 2)),
        lambda x, w, s: x @ (w.float().view(2, 2, 2, 2) * s[:, None, :, None]).view(SIZE, SIZE).t(),
        "float32 x int8 per_block(2, 2) -> reassociated",
        {
            "interleaved": (
                lambda x, w, s: x @ (w.float().view(2, 2, 2, 2) * s[None, :, None, :]).view(SIZE, SIZE).t(),
                "miss: the scale of b varies along k, so it cannot leave the sum",
            ),
            "of_rows_that_are_no_neighbours": (
                lambda x, w, s: x @ (w.float().view(2, 2, 2, 2) * s[None, :, :, None]).view(SIZE, SIZE).t(),
                GROUPS,
            ),
            "scaled_by_columns_too": (
                lambda x, w, s: (
                    (x @ (w.float().view(2, 2, 2, 2) * s[:, None, :, None]).view(SIZE, SIZE).t()) * s.view(-1)
                ),
                GROUPS,
            ),
            "of_all_rows_scaled_by_columns_too": (
                lambda x, w, s: (x @ (w.float().view(SIZE, 2, 2) * s[0][:, None]).view(SIZE, SIZE).t()) * s.view(-1),
                GROUPS,
            ),
        },
    ),
    "groups_of_both": Rule(
        with_scales((SIZE, 2), (SIZE, 2)),
        lambda a, w, s, t: grouped(a.float(), s) @ grouped(w.float(), t).t(),
        "int8 per_group(2) (static) x int8 per_group(2) -> reassociated",
        {
            "of_another_size": (
                lambda a, w, s, t: grouped(a.float(), torch.cat((s, s), 1)) @ grouped(w.float(), t).t(),
                GROUPS,
            ),
            "out_of_step": (
                lambda a, w, s, t: (a.float().view(-1, 2, 2) * s[:, None]).flatten(1) @ grouped(w.float(), t).t(),
                GROUPS,
            ),
            "of_unsigned_codes": (
                lambda a, w, s, t: grouped(a.view(UINT8).float(), s) @ grouped(w.float(), t).t(),
                "int8 per_group(2) asymmetric (static) x int8 per_group(2) -> reassociated",
            ),
            "beside_a_zero_point": (
                lambda a, w, s, t: grouped(a.float() - 3, s) @ grouped(w.float(), t).t(),
                "int8 per_group(2) asymmetric (static) x int8 per_group(2) -> reassociated",
            ),
            "beside_a_zero_point_of_the_weight": (
                lambda a, w, s, t: grouped(a.float(), s) @ grouped(w.float() - 3, t).t(),
                "int8 per_group(2) (static) x int8 per_group(2) asymmetric -> reassociated",
            ),
            "beside_a_zero_point_of_groups": (
                lambda a, w, s, t: (
                    (a.float().unflatten(1, (2, -1)) - (s * 9).to(INT8)[..., None]).flatten(1)
                    @ grouped(w.float(), t).t()
                ),
                GROUPS,
            ),
            "beside_a_zero_point_that_may_lie_far_out": (
                lambda a, w, s, t: grouped(a.float() - (s[:, :1] * 1e6).to(INT32), s) @ grouped(w.float(), t).t(),
                GROUPS,
            ),
            "shared_by_all_rows": (
                lambda a, w, s, t: grouped(a.float(), s[:1]) @ w.float().t(),
                "int8 per_group(2) (static) x int8 per_group(2) -> reassociated",
            ),
        },
    ),
    "scale_of_rows": Rule(
        with_scales((SIZE, 1)),
        lambda a, w, s: (a.float() * s) @ w.float().t(),
        TOKENS,
        {
            "along_k": (lambda a, w, s: (a.float() * s.t()) @ w.float().t(), WEIGHT_ONLY),
            "divided_by": (lambda a, w, s: (s / a.float()).isfinite().float() @ w.float().t(), WEIGHT_ONLY),
            "of_other_rows": (
                lambda a, w, s: (a.float() * s).t() @ w.float().t(),
                WEIGHT_ONLY,
            ),
            "by_nothing": (lambda a, w, s: ((a.float() / 0) @ w.float().t()).isfinite() * s, WEIGHT_ONLY),
        },
    ),
    # --- rows that repeat -------------------------------------------------------------------------------------
    "rows_of_a_batch": Rule(
        lambda: (codes(2, 3, SIZE), codes(SIZE, SIZE), scales(2, 3, 1)),
        lambda a, w, s: (a.float() * s) @ w.float().t(),
        TOKENS,
        {
            "one_row_repeated_before_its_scale": (
                lambda a, w, s: (a[:, :1].expand(2, 3, SIZE).float() * s) @ w.float().t(),
                WEIGHT_ONLY,
            ),
            "stretched_along_k": (
                lambda a, w, s: (a[..., :1].expand(2, 3, SIZE).float() * s) @ w.float().t(),
                TOKENS,
            ),
            "stretched_along_k_with_a_scale_there": (
                lambda a, w, s: (a[..., :1].expand(2, 3, SIZE).float() * s[0, 0, 0].cos() * w[0]) @ w.float().t(),
                WEIGHT_ONLY,
            ),
            "rows_and_batch_exchanged": (
                lambda a, w, s: (a.float() * s).transpose(0, 1) @ w.float().t(),
                TOKENS,
            ),
        },
    ),
    "weight_of_a_batch": Rule(
        lambda: (codes(3, SIZE, SIZE), codes(SIZE, SIZE), scales(SIZE, 1), scales(3, 1, 1)),
        lambda a, w, s, t: torch.bmm(a.float(), (w.float() * s).t().expand(3, SIZE, SIZE)),
        "int8 unscaled (static) x int8 per_channel -> reassociated",
        {
            "scaled_by_batch": (
                lambda a, w, s, t: torch.bmm(a.float(), w.float().t().expand(3, SIZE, SIZE) * t),
                "miss: the scale does not follow the rows, columns, groups or blocks of the codes",
            ),
            "stretched_along_k": (
                lambda a, w, s, t: torch.bmm(a.float(), w[:, :1].float().t().expand(3, SIZE, SIZE)),
                "miss: a batched matmul whose second operand differs from batch to batch",
            ),
            "stretched_along_n": (
                lambda a, w, s, t: torch.bmm(a.float(), w[:1].float().t().expand(3, SIZE, SIZE)),
                "miss: a batched matmul whose second operand differs from batch to batch",
            ),
        },
    ),
    "symbolic_rows": Rule(
        lambda: (torch.randn(2, 3, SIZE), codes(SIZE, SIZE)),
        lambda x, w: (quantized(x).float() * tokens(x)) @ w.float().t(),
        "int8 per_token (dynamic) x int8 unscaled -> reassociated",
        {
            "one_scale_a_batch": (
                lambda x, w: (quantized(x).float() * tokens(x)[:, :1]) @ w.float().t(),
                "int8 per_token (dynamic) x int8 unscaled -> reassociated",
            ),
            "one_scale_a_position": (
                lambda x, w: (quantized(x).float() * tokens(x)[:1]) @ w.float().t(),
                "int8 per_token (dynamic) x int8 unscaled -> reassociated",
            ),
            "batch_and_rows_exchanged": (
                lambda x, w: (quantized(x).float() * tokens(x)).transpose(0, 1) @ w.float().t(),
                "int8 per_token (dynamic) x int8 unscaled -> reassociated",
            ),
            "zero_point_a_batch": (
                lambda x, w: ((quantized(x).to(torch.int64) - tokens(x)[:, :1].to(INT32)) * 0.5) @ w.float().t(),
                "int8 per_tensor asymmetric (static) x int8 unscaled -> reassociated",
            ),
        },
        dynamic=True,
    ),
    # --- sizes of one -----------------------------------------------------------------------------------------
    "one_row": Rule(
        lambda: (codes(1, SIZE), codes(SIZE, SIZE), scales(1, 1), scales(SIZE, 1)),
        lambda a, w, s, t: (a.float() * s) @ (w.float() * t).t(),
        "int8 per_tensor (static) x int8 per_channel -> reassociated",
        {"scaled_along_k": (lambda a, w, s, t: (a.float() * t.t()) @ w.float().t(), WEIGHT_ONLY)},
    ),
    "one_column": Rule(
        lambda: (codes(SIZE, SIZE), codes(1, SIZE), scales(SIZE, 1), scales(1, 1)),
        lambda a, w, s, t: (a.float() * s) @ (w.float() * t).t(),
        "int8 per_token (static) x int8 per_tensor -> reassociated",
        {"scaled_along_k": (lambda a, w, s, t: a.float() @ (w.float() * s.t()).t(), EVERY_SCALE)},
    ),
    "one_column_corrected": Rule(
        lambda: (codes(SIZE, SIZE), codes(1, SIZE), points(SIZE, 1)),
        lambda a, w, z: ((a.to(INT32) @ w.to(INT32).t()) - z * sums(w)).float(),
        INT_POINT,
        {
            "by_a_point_for_each_other_row": (
                lambda a, w, z: ((a.to(INT32) @ w.to(INT32).t()) - z.flip(0) * sums(a, keepdim=True)).float(),
                INT_PRODUCT,
            )
        },
    ),
    "one_term": Rule(
        lambda: (codes(SIZE, 1), codes(SIZE, 1), scales(1, 1)),
        lambda a, w, s: (a.float() * s) @ w.float().t(),
        "int8 per_tensor (static) x int8 unscaled -> reassociated",
        {"scaled_by_rows": (lambda a, w, s: (a.float() * (a[:, :1].float().abs() + s)) @ w.float().t(), WEIGHT_ONLY)},
    ),
    # --- packed codes -----------------------------------------------------------------------------------------
    "nibbles": Rule(
        lambda: (torch.randn(SIZE, 2 * SIZE), codes(SIZE, SIZE, dtype=UINT8)),
        lambda x, p: x @ (torch.stack((p & 15, p >> 4), -1).flatten(1).float() - 8).t(),
        "float32 x int4 unscaled -> same_accum",
        {
            "of_signed_bytes": (
                lambda x, p: x @ torch.stack((p & 15, (p.view(INT8) >> 4) & 15), -1).flatten(1).float().t(),
                "float32 x int4 unscaled asymmetric -> same_accum",
            ),
            "shifted_with_their_sign": (
                lambda x, p: x @ torch.cat((p.view(INT8) >> 4, p.view(INT8) >> 4), -1).float().t(),
                "float32 x int8 unscaled -> same_accum",
            ),
            "of_five_bits": (
                lambda x, p: x @ torch.stack((p & 31, p >> 3), -1).flatten(1).float().t(),
                "float32 x uint8 unscaled -> same_accum",
            ),
        },
    ),
    "codes_in_int32": Rule(
        lambda: (torch.randn(SIZE, SIZE), torch.randint(0, 2**20, (SIZE, SIZE), dtype=INT32)),
        lambda x, p: x @ (p & 255).float().t(),
        "float32 x uint8 unscaled -> same_accum",
        {
            "wider_than_a_byte": (
                lambda x, p: x @ (p & 511).float().t(),
                f"{DECODED}, and no rule proves aten.bitwise_and.Scalar",
            ),
            "joined_of_signed_and_unsigned": (
                lambda x, p: x @ torch.cat((p & 255, (p & 255).to(INT32) - 128), 0).float().t(),
                "miss: no rule proves aten.cat of quantized codes",
            ),
        },
    ),
    "joined_codes": Rule(
        square,
        lambda a, w: a.float() @ torch.cat((w.to(INT32), w.to(INT32))).float().t(),
        "int8 unscaled (static) x int8 unscaled -> exact",
        {
            "beyond_a_byte": (
                lambda a, w: a.float() @ torch.cat((w.to(INT32), w.view(UINT8).to(INT32))).float().t(),
                "miss: no rule proves aten.cat of quantized codes",
            ),
        },
    ),
}


def tokens(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True) / 127


def quantized(x: Tensor) -> Tensor:
    return (x / tokens(x)).round().clamp(-128, 127).to(INT8)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_proves_its_graph(name):
    rule = RULES[name]
    assert outcome(rule.graph, rule.inputs(), dynamic=rule.dynamic) == rule.found


BROKEN = [(name, premise) for name, rule in RULES.items() for premise in rule.broken]


@pytest.mark.parametrize(("name", "premise"), BROKEN)
def test_a_graph_without_one_premise_is_something_else(name, premise):
    rule = RULES[name]
    graph, found = rule.broken[premise]
    assert outcome(graph, rule.inputs(), dynamic=rule.dynamic) == found


# --- ATen's matmuls with scales of blocks -----------------------------------------------------------------------


def float8_operands(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    return codes(m, k, dtype=E4M3), codes(n, k, dtype=E4M3)


def by_columns(*shape: int) -> Tensor:
    """Scales with the strides that ATen asks of those of blocks."""
    return scales(*reversed(shape)).t()


BLOCKS = "float8_e4m3fn per_group(128) (static) x float8_e4m3fn per_block(128, 128) -> same_accum"
COLUMN_GROUPS = "float8_e4m3fn per_group(128) (static) x float8_e4m3fn per_group(128) -> same_accum"
SCALED_MM = {
    "blocks": (16, 256, 256, (16, 2), (2, 2), BLOCKS),
    "ragged_blocks": (16, 256, 272, (16, 2), (2, 3), BLOCKS),
    "groups": (16, 256, 272, (16, 2), (2, 272), COLUMN_GROUPS),
    "groups_on_a_square_grid": (16, 2048, 16, (16, 16), (16, 16), COLUMN_GROUPS),
}


@pytest.mark.parametrize("name", SCALED_MM)
@pytest.mark.parametrize("then", ["nothing", "column"])
def test_scaled_mm_of_blocks_means_what_aten_says(name, then):
    m, k, n, shape_a, shape_b, found = SCALED_MM[name]

    def graph(a: Tensor, w: Tensor, s: Tensor, t: Tensor, column: Tensor) -> Tensor:
        y = torch._scaled_mm(a, w.t(), scale_a=s, scale_b=t, out_dtype=F32)
        return y if then == "nothing" else y * column

    expected = found
    if then == "column" and name == "blocks":
        expected = COLUMN_GROUPS
    inputs = (*float8_operands(m, k, n), by_columns(*shape_a), by_columns(*shape_b), scales(n))
    assert outcome(graph, inputs) == expected


SCALED_MM_V2 = {
    "blocks": (16, 512, 256, (16, 4), ("BlockWise1x128", "BlockWise128x128"), (4, 2), BLOCKS),
    "groups": (16, 256, 272, (16, 2), ("BlockWise1x128", "BlockWise1x128"), (272, 2), COLUMN_GROUPS),
    "groups_on_a_square_grid": (
        *(16, 2048, 16, (16, 16), ("BlockWise1x128", "BlockWise1x128"), (16, 16)),
        COLUMN_GROUPS,
    ),
    "rows": (
        *(16, 256, 32, (16, 1), ("RowWise", "RowWise"), (1, 32)),
        "float8_e4m3fn per_token (static) x float8_e4m3fn per_channel -> same_accum",
    ),
}


@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_mm"), reason="torch.nn.functional.scaled_mm is of 2.10")
@pytest.mark.parametrize("name", SCALED_MM_V2)
def test_scaled_mm_of_recipes_means_what_its_recipes_say(name):
    m, k, n, shape_a, recipes, shape_b, found = SCALED_MM_V2[name]
    recipe_a, recipe_b = (getattr(torch.nn.functional.ScalingType, recipe) for recipe in recipes)

    def graph(a: Tensor, w: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.scaled_mm(a, w.t(), s, recipe_a, t, recipe_b, output_dtype=BF16)

    make = by_columns if "Block" in recipes[0] else scales
    assert outcome(graph, (*float8_operands(m, k, n), make(*shape_a), make(*shape_b))) == found


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_weight_int8pack_mm_is_weight_only(dtype):
    inputs = torch.randn(SIZE, SIZE).to(dtype), codes(SIZE, SIZE), scales(SIZE).to(dtype)
    found = outcome(torch._weight_int8pack_mm, inputs)
    assert found == f"{str(dtype).removeprefix('torch.')} x int8 per_channel -> reassociated"
    found = outcome(lambda x, w, s: torch._weight_int8pack_mm(x, (w.to(INT32) + 1).to(INT8), s), inputs)
    assert found == f"{str(dtype).removeprefix('torch.')} x int8 per_channel -> reassociated"


def test_a_librarys_product_of_shifted_codes_keeps_the_shift():
    graph = trace(lambda a, w, s: int_mm(a, w) * s, *square(), scales(SIZE))
    a, w, scale = graph.find_nodes(op="placeholder")
    (gemm,) = calls(graph, torch.ops.aten._int_mm.default)
    gemm.meta["val"] = gemm.meta["val"].float()
    product = scaled_product(gemm, Codes(a, own_dims(a), offset=128), Codes(w, own_dims(w)[::-1]), scale)
    assert isinstance(product, Product)
    assert product.offset == 128


# --- sums that int32 may not hold -------------------------------------------------------------------------------


def ones(k: int) -> tuple[Tensor, ...]:
    return torch.ones(2, k, dtype=INT8), torch.ones(2, k, dtype=INT8), points(2, 1), points(2, 1)


OVERFLOWS = {
    # 128 * 128 * 131071, 255 * 128 * 65793 and 255 * 255 * 33025 are the last below 2**31.
    "codes": (lambda a, w, z, y: a.float() @ w.float().t(), 131071),
    "point_of_a": (lambda a, w, z, y: (a.float() - z) @ w.float().t(), 65793),
    "point_of_b": (lambda a, w, z, y: a.float() @ (w.float() - y).t(), 65793),
    "points_of_both": (lambda a, w, z, y: (a.float() - z) @ (w.float() - y).t(), 33025),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_float_sum_becomes_one_of_integers_only_where_int32_holds_it(name):
    graph, largest = OVERFLOWS[name]
    inputs = ones(largest)
    assert not outcome(graph, inputs).startswith("miss")
    inputs = ones(largest + 1)
    assert outcome(graph, inputs) == f"miss: the sum of integers is taken in int32, which k={largest + 1} may leave"


def test_an_int32_sum_wraps_around_where_its_source_does():
    """Of the largest codes, so that the sum does leave int32 on both sides."""
    k = 33026
    a, w = torch.full((2, k), 127, dtype=INT8), torch.full((2, k), -128, dtype=INT8)
    z, y = torch.full((2, 1), -128, dtype=INT32), torch.full((2, 1), 127, dtype=INT32)
    source = trace(lambda a, w, z, y: ((a.to(INT32) - z) @ (w.to(INT32) - y).t()).float(), a, w, z, y)
    proven = prove(source)
    assert len(proven.found.sites) == 1
    (new,), (old,) = run(proven.graph, a, w, z, y)[0], run(source, a, w, z, y)[0]
    assert old.min() > -(255.0 * 255.0 * k)
    assert torch.equal(new, old)


@pytest.mark.parametrize(("k", "found"), [(65793, INT_POINT), (65794, INT_PRODUCT)])
def test_a_correction_in_int64_is_one_in_int32_only_where_that_holds_it(k, found):
    def graph(a: Tensor, w: Tensor, z: Tensor, _: Tensor) -> Tensor:
        return (int_mm(a, w) - z.clamp(-128, 127).to(INT64) * w.sum(1, dtype=INT64)).float()

    assert outcome(graph, ones(k)) == found


# --- weights that are not what they were ------------------------------------------------------------------------


class Mutated(nn.Module):
    """A linear layer over codes whose weight is overwritten: before the matmul, between two, or after it."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when
        self.register_buffer("weight", codes(16, 16))
        self.register_buffer("scale", scales(16, 1))
        self.register_buffer("zero_point", points(16, 1, dtype=INT8))

    def linear(self, x: Tensor) -> Tensor:
        return x @ ((self.weight.float() - self.zero_point) * self.scale).t()

    def overwrite(self, x: Tensor) -> None:
        self.weight.copy_((x * 8).round().clamp(-128, 127).to(INT8))

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "before":
            self.overwrite(x)
        y = self.linear(x)
        if self.when != "before":
            self.overwrite(x)
        return y + self.linear(x) if self.when == "between" else y


RUNTIME = "miss: the dequantized operand changes from call to call; only weights are rewritten"


# A weight that the graph itself writes to is none at any point of it: packing it would not outlive the call.
@pytest.mark.parametrize(
    ("when", "found"), [("before", RUNTIME), ("after", RUNTIME), ("between", f"{RUNTIME}; {RUNTIME}")]
)
def test_a_weight_that_is_overwritten_is_another_weight(when, found):
    (captured,) = capture(Mutated(when), torch.randn(16, 16))
    proven = prove(captured.source, sorted(captured.static or ()))
    assert said(proven) == found
    assert_same_meaning(captured.source, proven.graph, captured.inputs)


COMPUTED = {
    "weight_only": (lambda x, v: x @ (quantized(v).float() * 0.5).t(), RUNTIME),
    "weight_only_in_groups": (
        lambda x, v: x @ grouped(quantized(v).float(), tokens(v.view(-1, 2)).view(4, 2)).t(),
        RUNTIME,
    ),
    "both_quantized": (
        lambda x, v: (quantized(x).float() * tokens(x)) @ (quantized(v).float() * tokens(v)).t(),
        "int8 per_token (dynamic) x int8 per_channel -> reassociated",
    ),
    "attention_over_codes": (
        lambda x, v: torch.bmm(quantized(x).float().expand(2, 4, 4), quantized(torch.stack((v, v + 1))).float()),
        "miss: a batched matmul whose second operand differs from batch to batch",
    ),
    "a_mask": (lambda x, v: x @ (v > 0).to(INT8).float(), "nothing"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_is_not_packed_as_a_constant(name):
    graph, found = COMPUTED[name]
    inputs = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    source = trace(graph, *inputs)
    proven = prove(source, static=())
    assert said(proven) == found
    assert not any(site.problem.constant_weight for site in proven.found.sites)
    assert_same_meaning(source, proven.graph, inputs)
