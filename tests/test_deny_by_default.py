"""Whatever multiplies quantized operands ends in the report, under whatever name; what does not is in no report."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx import Graph
from torch.library import custom_op
from torch.utils.flop_counter import flop_registry

import fx_quant
from fx_quant.passes.pipeline import holds_codes
from fx_quant.report import Report
from tests.graphs import prove, rewrite, trace

M, K, N, B = 4, 16, 12, 3
INT8, UINT8, E4M3 = torch.int8, torch.uint8, torch.float8_e4m3fn


def ints(*shape: int, dtype: torch.dtype = INT8, low: int = -100, high: int = 100, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(max(low, 0) if dtype is UINT8 else low, high, shape, dtype=dtype, generator=generator)


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scales(*shape: int) -> Tensor:
    return torch.linspace(0.01, 0.02, Tensor(*shape).numel() if shape else 1).reshape(shape)


W, S = ints(N, K), scales(N, 1)


# --- libraries' ops that no rule knows ------------------------------------------------------------------------------


@custom_op("deny::quantize_op", mutates_args=())
def quantize_op(x: Tensor, amax: Tensor, num_bits: int) -> Tensor:
    """Fake quantization in one opaque op, as modelopt's ``tensorrt::quantize_op`` is."""
    scale = amax / 127
    return (x / scale).round().clamp(-128, 127) * scale


@custom_op("deny::dequantize_blocks", mutates_args=())
def dequantize_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale


@custom_op("deny::to_codes", mutates_args=())
def to_codes(x: Tensor) -> Tensor:
    return x.round().clamp(-128, 127).to(torch.int8)


@custom_op("deny::apply", mutates_args=())
def apply(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """A quantized linear whose name says nothing."""
    return F.linear(x, codes.float() * scale)


@custom_op("deny::gptq_gemm", mutates_args=())
def gptq_gemm(x: Tensor, packed: Tensor) -> Tensor:
    """A quantized linear over packed int32, whose name says so."""
    return x.new_zeros(x.shape[0], packed.shape[1])


@custom_op("deny::lookup", mutates_args=())
def lookup(ids: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    return table[ids].float() * scale


quantize_op.register_fake(lambda x, amax, num_bits: torch.empty_like(x))
dequantize_blocks.register_fake(lambda codes, scale: torch.empty_like(codes, dtype=torch.float32))
to_codes.register_fake(lambda x: torch.empty_like(x, dtype=torch.int8))
apply.register_fake(lambda x, codes, scale: x.new_empty(*x.shape[:-1], codes.shape[0]))
gptq_gemm.register_fake(lambda x, packed: x.new_empty(x.shape[0], packed.shape[1]))
lookup.register_fake(lambda ids, table, scale: scale.new_empty(*ids.shape, table.shape[1]))


def _unpacked_into_empty(table: Tensor, codes: Tensor) -> Tensor:
    """Two codes of a byte through a table, as gpt-oss unpacks its experts; writes are as AOTAutograd traces them."""
    weight = torch.empty(codes.shape[0], 2 * codes.shape[1])
    for first, code in enumerate((codes & 0x0F, codes >> 4)):
        half = torch.ops.aten.copy.default(weight[:, first::2], table[code.long()])
        weight = torch.slice_scatter(weight, half, 1, first, 2**63 - 1, 2)
    return weight


# --- forms --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One quantized matmul that no rule claims.

    Args:
        function: its spelling; the first input comes with each call, the others are stored.
        says: words of the reason.
    """

    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    says: str
    count: int = 1


def decoded(w: Tensor, s: Tensor) -> Tensor:
    return w.float() * s


def straight_through(x: Tensor) -> Tensor:
    return (x.round() - x) + x


FORMS = {
    "product_and_sum_with_one_row": Form(
        lambda x, w, s: (x.round().to(INT8).float()[:, None, :] * decoded(w, s)).sum(-1),
        (floats(M, K), ints(1, K), scales(1, 1)),
        "without a matmul",
    ),
    "dot": Form(lambda x, w, s: torch.dot(decoded(w, s), x), (floats(K), ints(K), scales()), "without a matmul"),
    "baddbmm": Form(
        lambda x, w, s, b: torch.baddbmm(b, x, decoded(w, s)),
        (floats(B, M, K), ints(B, K, N), scales(B, 1, N), floats(B, 1, N)),
        "differs from batch to batch",
    ),
    "addbmm": Form(
        lambda x, w, s, b: torch.addbmm(b, x, decoded(w, s)),
        (floats(B, M, K), ints(B, K, N), scales(B, 1, N), floats(M, N)),
        "addbmm",
    ),
    "bmm_of_experts": Form(
        lambda x, w, s: torch.bmm(x, decoded(w, s)),
        (floats(B, M, K), ints(B, K, N), scales(B, 1, N)),
        "differs from batch to batch",
    ),
    "grouped_mm": Form(
        lambda x, w, s, o: torch._grouped_mm(x, decoded(w, s).bfloat16(), o),
        (floats(16, K).bfloat16(), ints(2, K, 16), scales(2, 1, 16), torch.tensor([8, 16], dtype=torch.int32)),
        "grouped_mm",
    ),
    "bilinear": Form(
        lambda x, y, w, s: F.bilinear(x, y, decoded(w, s)),
        (floats(M, K), floats(M, 8), ints(N, K, 8), scales(N, 1, 1)),
        "",
    ),
    "decoded_into_an_empty_buffer": Form(
        lambda x, table, codes, e: F.linear(x, _unpacked_into_empty(table, codes).ldexp(e)),
        (floats(M, K), floats(16), ints(N, K // 2, dtype=UINT8), ints(N, 1, low=-3, high=3)),
        "lookup table",
    ),
    "decoded_into_what_is_like_another": Form(
        lambda x, w, s: F.linear(x, torch.ops.aten.copy.default(x.new_empty(N, K), w.float()).logaddexp(s)),
        (floats(M, K), W, S),
        "",
    ),
    "cdist": Form(lambda x, w, s: torch.cdist(x, decoded(w, s)), (floats(M, K), W, S), "cdist"),
    "einsum": Form(
        lambda x, w, s: torch.einsum("bk,bnk->bn", x, decoded(w, s)),
        (floats(B, K), ints(B, N, K), scales(B, N, 1)),
        "",
    ),
    "multiply_then_sum": Form(
        lambda x, w, s: (decoded(w, s) * x[:, None]).sum(-1), (floats(M, K), W, S), "without a matmul"
    ),
    "multiply_then_sum_of_a_row": Form(
        lambda x, w, s: (decoded(w, s) * x).sum(-1), (floats(1, K), W, S), "without a matmul"
    ),
    "multiply_then_mean": Form(
        lambda x, w, s: (x[:, None] * decoded(w, s)).mean(-1), (floats(M, K), W, S), "without a matmul"
    ),
    "conv1d": Form(
        lambda x, w, s: F.conv1d(x, decoded(w, s)),
        (floats(B, K, 8), ints(N, K, 3), scales(N, 1, 1)),
        "convolution of a weight that is decoded",
    ),
    "conv2d": Form(
        lambda x, w, s: F.conv2d(x, decoded(w, s)),
        (floats(B, K, 8, 8), ints(N, K, 1, 1), scales(N, 1, 1, 1)),
        "more than 128 rows",
    ),
    "conv2d_modulated": Form(
        lambda x, g, w, s: F.conv2d(x, decoded(w, s) * (x.mean() + g)),
        (floats(1, K, 8, 8), floats(1, K, 1, 1), ints(N, K, 1, 1), scales(N, 1, 1, 1)),
        "convolution",
    ),
    "conv2d_of_fake_quantized": Form(
        lambda x, w: F.conv2d((x / 0.1).round().clamp(-128, 127) * 0.1, w),
        (floats(B, K, 8, 8), floats(N, K, 1, 1)),
        "convolution of values that are rounded",
    ),
    "attention_over_codes": Form(
        lambda q, k, v, s: F.scaled_dot_product_attention(q, decoded(k, s), decoded(v, s)),
        (floats(1, 2, M, K), ints(1, 2, 8, K), ints(1, 2, 8, K), scales(1, 2, 1, 1)),
        "",
    ),
    "round_without_clamp": Form(
        lambda x, w, s: F.linear((x / 0.1).round() * 0.1, w), (floats(M, K), floats(N, K), S), "rounded in floating"
    ),
    "round_of_the_weight": Form(
        lambda x, w: F.linear(x, (w / 0.1).round().clamp(-8.5, 7.5) * 0.1), (floats(M, K), floats(N, K)), "rounded"
    ),
    "cast_between_round_and_clamp": Form(
        lambda x, w: F.linear((x / 0.1).round().to(torch.int32).clamp(-128, 127).float() * 0.1, w),
        (floats(M, K), floats(N, K)),
        "rounded",
    ),
    "clamp_as_where": Form(
        lambda x, w: F.linear((r := torch.where((r := (x / 0.1).round()) > 127, 127.0, r)).clamp(min=-128) * 0.1, w),
        (floats(M, K), floats(N, K)),
        "rounded",
    ),
    "straight_through_rounding": Form(
        lambda x, w: F.linear(straight_through(x / 0.1).clamp(-128, 127) * 0.1, w),
        (floats(M, K), floats(N, K)),
        "rounded",
    ),
    "opaque_fake_quantization": Form(
        lambda x, w, s: F.linear(torch.ops.deny.quantize_op(x, s, 8), torch.ops.deny.quantize_op(w, s, 8)),
        (floats(M, K), floats(N, K), scales()),
        "deny.quantize_op",
    ),
    "opaque_dequantization": Form(
        lambda x, w, s: F.linear(x, torch.ops.deny.dequantize_blocks(w, s)),
        (floats(M, K), W, S),
        "no rule proves deny.dequantize_blocks",
    ),
    "opaque_codes": Form(
        lambda x, w: F.linear(torch.ops.deny.to_codes(x).float(), w),
        (floats(M, K), floats(N, K)),
        "only the activation",
    ),
    "opaque_linear": Form(torch.ops.deny.apply, (floats(M, K), W, S), "no rule knows what it"),
    "opaque_gemm_of_packed": Form(
        torch.ops.deny.gptq_gemm, (floats(M, K), ints(2, N, dtype=torch.int32)), "deny.gptq_gemm"
    ),
    "exponents": Form(
        lambda x, w: F.linear(x, torch.exp2(w.float())), (floats(M, K), ints(N, K, low=-8, high=0)), "aten.exp2"
    ),
    "additive_codebooks": Form(
        lambda x, c, t: F.linear(x, F.embedding(c.int(), t).sum(1).reshape(N, K)),
        (floats(M, K), ints(N * K // 8, 2, dtype=UINT8), floats(256, 8)),
        "decoded from stored codes",
    ),
    "table_of_the_graph": Form(
        lambda x, w, s: F.linear(x, torch.linspace(-1, 1, 256)[w.int() + 128] * s),
        (floats(M, K), ints(N, K), floats(N, 1)),
        "",
    ),
    "low_rank_merged": Form(
        lambda x, w, s, a, b: F.linear(x, torch.addmm(decoded(w, s), a, b)),
        (floats(M, K), W, S, floats(N, 2), floats(2, K)),
        "",
    ),
    "int32_codes": Form(
        lambda x, w, s: F.linear(x, decoded(w, s)), (floats(M, K), ints(N, K, dtype=torch.int32), S), "decoded from"
    ),
    "experts_chosen": Form(
        lambda i, x, w, s: torch.bmm(x, decoded(w, s)[i]),
        (torch.tensor([0, 1, 0]), floats(B, M, K), ints(2, K, N), scales(2, 1, N)),
        "",
    ),
}


def reported(function: Callable[..., Any], *inputs: Tensor, static: tuple[int, ...] | None = None) -> list[str]:
    """The reasons of all misses; no other row may be there."""
    graph = trace(function, *inputs)
    if not holds_codes(graph):
        return []
    state = rewrite(graph, static=static)
    assert not state.rows and not state.recognised, (state.rows, state.recognised)
    return [miss.rule for miss in state.misses]


@pytest.mark.parametrize("name", FORMS)
def test_a_contraction_that_no_rule_claims_is_a_miss_that_says_why(name):
    form = FORMS[name]
    (reason,) = reported(form.function, *form.inputs)
    assert form.says in reason


def _is_forward(op: object) -> bool:
    return isinstance(op, OpOverloadPacket) and "backward" not in str(op)


# Beside what PyTorch counts, what it does not, or not before it is decomposed.
_WEIGHTS = ("mat2", "batch2", "weight", "key", "w_ih", "other", "tensor", "x2", "vec")
_BESIDE = (
    "mv",
    "addmv",
    "dot",
    "vdot",
    "linear",
    "matmul",
    "addbmm",
    "_grouped_mm",
    "bilinear",
    "cdist",
    "conv2d",
    "lstm_cell",
)
_COUNTED = [*filter(_is_forward, flop_registry), *(getattr(torch.ops.aten, name) for name in _BESIDE)]


@pytest.mark.parametrize("op", _COUNTED, ids=str)
def test_each_op_that_multiplies_and_sums_is_a_miss_of_a_decoded_weight(op):
    overload = getattr(op, op.overloads()[0])
    assert isinstance(overload, OpOverload)
    graph = Graph()
    with FakeTensorMode():
        x, w, s = (graph.placeholder(name) for name in "xws")
        x.meta["val"], w.meta["val"], s.meta["val"] = (
            torch.empty(B, M, K),
            torch.empty(B, K, N, dtype=INT8),
            torch.empty(()),
        )
        weight = graph.call_function(torch.ops.aten.mul.Tensor, (w, s))
        weight.meta["val"] = torch.empty(B, K, N)
        names = [a.name for a in overload._schema.arguments if str(a.type) == "Tensor"]
        of_weight = next(name for name in (*_WEIGHTS, names[0]) if name in names)
        given = {name: weight if name == of_weight else x for name in names}
        first = list(itertools.takewhile(given.__contains__, (a.name for a in overload._schema.arguments)))
        called = graph.call_function(overload, tuple(map(given.pop, first)), given)
        called.meta["val"] = torch.empty(B, M, N)
    graph.output(called)
    assert holds_codes(graph)
    state = rewrite(graph)
    assert len(state.misses) == 1 and not state.recognised
    if op is torch.ops.aten._scaled_mm:
        return  # quantized whatever it is given
    # The same of floats is nobody's business.
    with FakeTensorMode():
        w.meta["val"] = torch.empty(B, K, N)
    assert not rewrite(graph).misses


# --- near misses: none of these is a quantized matmul ---------------------------------------------------------------


def normalised_image(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (image.float() / 255 - mean) / std


class Bert(nn.Module):
    """What surrounds floats in a text encoder: ids, positions, masks, buckets."""

    def forward(self, ids, table, positions, where, mask, w):
        x = F.embedding(ids, table) + F.embedding(where, positions)[:, : ids.shape[1]]
        scores = x @ x.transpose(1, 2) + (1.0 - mask[:, None].float()) * -1e4
        return F.linear(torch.softmax(scores, -1) @ x * mask[..., None], w)


NEAR = {
    "linear": (F.linear, (floats(M, K), floats(N, K))),
    "image_patches": (
        lambda x, mean, std, w: F.conv2d(normalised_image(x, mean, std), w),
        (ints(1, 3, 8, 8, dtype=UINT8), floats(3, 1, 1), scales(3, 1, 1), floats(N, 3, 4, 4)),
    ),
    "image_rows": (
        lambda x, mean, std, w: F.linear(normalised_image(x, mean, std).flatten(1), w),
        (ints(M, 3, 8, dtype=UINT8), floats(1, 1), scales(1, 1), floats(N, 24)),
    ),
    "image_on_the_right": (lambda x, w: w @ (x.float() / 255), (ints(K, M, dtype=UINT8), floats(N, K))),
    "text": (
        Bert(),
        (
            torch.tensor([[1, 2, 3]]),
            floats(10, K),
            floats(8, K),
            torch.arange(8)[None],
            torch.ones(1, 3, dtype=torch.int64),
            floats(N, K),
        ),
    ),
    "byte_mask": (
        lambda x, m, w: F.linear((x @ x.t()).masked_fill(m == 0, -1e4).softmax(-1) @ x, w),
        (floats(M, K), torch.ones(M, M, dtype=UINT8).tril(), floats(N, K)),
    ),
    "byte_mask_as_factor": (
        lambda x, m, w: F.linear(((x @ x.t()) * m - 1e4 * (1 - m)).softmax(-1) @ x, w),
        (floats(M, K), torch.ones(M, M, dtype=UINT8).tril(), floats(N, K)),
    ),
    "byte_mask_of_a_call": (
        lambda m, x, w: F.linear(x * m[:, None].float(), w),
        (torch.ones(M, dtype=UINT8), floats(M, K), floats(N, K)),
        (2,),
    ),
    "byte_mask_of_full_size_of_a_call": (
        lambda m, x, w: F.linear(x * m, w),
        (torch.ones(M, K, dtype=UINT8), floats(M, K), floats(N, K)),
        (2,),
    ),
    "pruned": (lambda x, w, m: F.linear(x, w * m), (floats(M, K), floats(N, K), torch.ones(N, K, dtype=UINT8))),
    "pruned_int8": (lambda x, w, m: F.linear(x, w * m), (floats(M, K), floats(N, K), torch.ones(N, K, dtype=INT8))),
    "rotary": (
        lambda x, p, f, w: F.linear(x * (f[:, None] @ p.float()).t().cos(), w),
        (floats(M, K), torch.arange(M)[None], scales(K), floats(N, K)),
    ),
    "relative_positions": (
        lambda x, p, t, w: F.linear((x @ x.t() + F.embedding(p, t)[..., 0]).softmax(-1) @ x, w),
        (floats(M, K), torch.arange(M)[:, None] + torch.arange(M), floats(2 * M, 1), floats(N, K)),
    ),
    "one_hot_routing": (
        lambda x, w: F.one_hot(x.argmax(-1), K).to(INT8).float() @ w.t(),
        (floats(M, K), floats(N, K)),
    ),
    "low_rank": (
        lambda x, w, a, b: torch.addmm(F.linear(x, w), x @ a, b),
        (floats(M, K), floats(N, K), floats(K, 2), floats(2, N)),
    ),
    "counted_mean": (
        lambda m, x: (x * m[..., None]).sum(1) / m.sum(1, True),
        (torch.ones(2, M, dtype=INT8), floats(2, M, K)),
    ),
    "pixel_rounding": (
        lambda x, t, w: F.linear(F.embedding(x[:, 0].round().clamp(0, 7).long(), t), w),
        (floats(M, K), floats(8, K), floats(N, K)),
    ),
    "quantile": (lambda x, w: F.linear(x - torch.quantile(x, 0.5, 1, True), w), (floats(M, K), floats(N, K))),
    "bool_mask": (lambda x, w: F.linear(x * (x > 0), w), (floats(M, K), floats(N, K))),
    "squared": (lambda x: (x * x).sum(-1), (floats(M, K),)),
    "embedding_of_codes": (
        lambda i, t, s, w: F.linear(F.embedding(i, t).float() * s, w),
        (torch.tensor([1, 2]), ints(8, K), scales(), floats(N, K)),
    ),
    "embedding_of_codes_by_index": (
        lambda i, t, s, w: F.linear(t[i].float() * s[i], w),
        (torch.tensor([1, 2]), ints(8, K), scales(8, 1), floats(N, K)),
    ),
    "library_embedding": (
        lambda i, t, s, w: F.linear(torch.ops.deny.lookup(i, t, s).relu(), w),
        (torch.tensor([1, 2]), ints(8, K), scales(), floats(N, K)),
    ),
    "quantized_then_activated": (
        lambda x, w: F.linear(F.gelu((x / 0.1).round().clamp(-128, 127) * 0.1), w),
        (floats(M, K), floats(N, K)),
    ),
    "quantized_then_added": (
        lambda x, w: F.linear((x / 0.1).round().clamp(-128, 127) * 0.1 + x.tanh(), w),
        (floats(M, K), floats(N, K)),
    ),
    "codes_returned": (
        lambda x, w: (F.linear(x, w), (x / 0.1).round().clamp(-128, 127).to(INT8)),
        (floats(M, K), floats(N, K)),
    ),
    "decoded_bias": (
        lambda x, w, b, s: F.linear(x, w, b.float() * s),
        (floats(M, K), floats(N, K), ints(N), scales()),
    ),
    "decoded_norm": (
        lambda x, w, g, s: F.linear(F.layer_norm(x, (K,)) * (g.float() * s), w),
        (floats(M, K), floats(N, K), ints(K), scales()),
    ),
    "floats_in_bytes": (
        lambda x, t: F.linear(x, t.view(torch.bfloat16).float()),
        (floats(M, K), ints(N, 2 * K, dtype=UINT8)),
    ),
    "wide_floats_in_bytes": (
        lambda x, t: F.linear(x, (t.view(torch.int16).to(torch.int32) << 16).view(torch.float32)),
        (floats(M, K), ints(N, 2 * K, dtype=UINT8)),
    ),
    "mask_of_attention": (
        lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m.float() * -1e4),
        (floats(1, 2, M, K), torch.ones(M, M, dtype=UINT8)),
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_floats_beside_integers_are_no_quantized_matmul(name):
    function, inputs, *static = NEAR[name]
    try:
        found = reported(function, *inputs, static=static[0] if static else None)
    except DataDependentOutputException as error:
        pytest.skip(f"PyTorch {torch.__version__} cannot trace {error.func}")
    assert found == []


def test_a_float_matmul_with_constant_operand_behind_a_quantized_linear_is_none():
    """Attention to relative positions: a quantized linear of constant embeddings, behind a view."""

    def attend(x, w, s, t):
        keys = F.linear(t, decoded(w, s)).view(8, 2, N // 2).permute(1, 2, 0)
        return torch.bmm(x, keys)

    graph = trace(attend, floats(2, M, N // 2), W, S, floats(8, K))
    state = rewrite(graph)
    assert [site.gemm.target for site in state.rows] == [torch.ops.aten.mm.default]
    assert not state.misses


def test_a_low_rank_addmm_beside_a_quantized_linear_is_none():
    def adapted(x, w, s, a, b):
        return torch.addmm(F.linear(x, decoded(w, s)), x @ a, b)

    state = rewrite(trace(adapted, floats(M, K), W, S, floats(K, 2), floats(2, N)))
    assert len(state.rows) == 1
    assert not state.misses


# --- bytes that change from call to call ------------------------------------------------------------------------------


def image(*shape: int) -> Tensor:
    return ints(*shape, dtype=UINT8)


ONE = torch.full((1, 1), 3)
# How codes are decoded, what with, and which of these are parameters; whatever else is brought by the call.
CODED = {
    "stored_bytes_and_a_scale_of_the_call": (lambda w, s: w.float() * s, (image(N, K), S), (0,)),
    "stored_bytes_and_a_scale_along_k_of_the_call": (lambda w, s: w.float() * s, (image(N, K), scales(K)), (0,)),
    "stored_bytes_divided_by_a_scale_of_the_call": (lambda w, s: w.float() / s, (image(N, K), scales(1, 1)), (0,)),
    "stored_bytes_in_groups_and_a_scale_of_the_call": (
        lambda w, s: (w.float().unflatten(-1, (4, K // 4)) * s).flatten(1),
        (image(N, K), scales(N, 4, 1)),
        (0,),
    ),
    "stored_bytes_less_a_zero_point_of_the_call": (lambda w, z: (w - z).float(), (image(N, K), ints(N, 1).int()), (0,)),
    "stored_bytes_less_twice_a_zero_point_of_the_call": (
        lambda w, z: torch.rsub(z, w, alpha=2).float(),
        (image(N, K), ints(N, 1).int()),
        (0,),
    ),
    "stored_bytes_less_a_float_zero_point_of_the_call": (
        lambda w, z: torch.rsub(z, w.float()),
        (image(N, K), floats(N, 1)),
        (0,),
    ),
    "stored_bytes_and_an_added_zero_point_of_the_call": (
        lambda w, z: (w.int() + z).float(),
        (image(N, K), ints(N, 1).int()),
        (0,),
    ),
    "int8_of_a_call_and_a_stored_scale": (lambda w, s: w.float() * s, (ints(N, K), S), (1,)),
    "int8_of_a_call_less_a_stored_zero_point": (lambda w, z: (w - z).float(), (ints(N, K), ints(1, K).int()), (1,)),
    "int8_of_a_call_less_one_stored_number": (lambda w, z: w.float() - z, (ints(N, K), image(1, 1)), (1,)),
    "int8_of_a_call_less_one_number_of_the_call": (lambda w, z: (w.int() - z).float(), (ints(N, K), ONE), ()),
    "int8_of_a_call_with_bits_set": (lambda w, s: ((w | 1) ^ 2).float() * s, (ints(N, K), S), (1,)),
    "bytes_of_a_call_with_bits_flipped": (lambda w, s: (~w).float() * s, (image(N, K), S), ()),
    "bits_of_a_call_that_a_tensor_takes_out": (
        lambda w, s: ((torch.full_like(w, 15)) & w).float() * s,
        (ints(N, K), S),
        (1,),
    ),
    "bytes_of_a_call_and_a_scale_of_the_call": (lambda w, s: w.float() * s, (image(N, K), S), ()),
    "bytes_of_a_call_less_a_zero_point_of_the_call": (lambda w, z: (w.int() - z).float(), (image(N, K), ONE), ()),
    "bytes_normalised_by_constants_and_scaled_by_the_call": (
        lambda w, s: (w.float() / 255 - 1) * s,
        (image(N, K), S),
        (),
    ),
    "int8_that_the_graph_writes_to": (lambda w, _: w.float(), (ints(N, K), ONE), (0,)),
    "bytes_that_the_graph_writes_to_and_a_scale_of_the_call": (lambda w, s: w.float() * s, (image(N, K), S), (0,)),
}
# What comes with them may be a mask, an image or data as well.
PLAIN = {
    "image_and_stored_statistics": (lambda w, s: (w.float() - 3) / s, (image(N, K), S), (1,)),
    "image_less_a_stored_mean": (lambda w, z: w.float() - z, (image(N, K), floats(N, 1)), (1,)),
    "image_and_its_own_statistics": (
        lambda w, _: (w.float() - w.float().mean(1, True)) / w.float().std(1, keepdim=True),
        (image(N, K), ONE),
        (),
    ),
    "mask_and_its_own_count": (lambda w, _: w.float() / w.float().sum(1, True), (ints(N, K), ONE), ()),
    "mask_and_numbers": (lambda w, _: (1 - w.float()) * -1e4, (ints(N, K), ONE), ()),
    "mask_with_bits_flipped": (lambda w, _: (w ^ 1).float(), (ints(N, K), ONE), ()),
    "mask_of_a_stored_weight": (lambda w, s: w * s, (ints(N, K), floats(N, K)), (1,)),
    "mask_of_a_weight_of_the_call": (lambda w, s: w * s, (image(N, K), floats(N, K)), ()),
    "stored_mask_of_a_weight_of_the_call": (lambda w, s: w * s, (image(N, K), floats(N, K)), (0,)),
    "stored_mask_added_to_a_weight_of_the_call": (lambda w, s: w + s, (image(N, K), floats(N, K)), (0,)),
    "stored_mask_of_weights_of_the_call": (
        lambda w, s: (w * s).sum(0),
        (image(N, K), floats(2, N, K)),
        (0,),
    ),
    "frames_that_the_graph_writes_to": (lambda w, _: w.float() / 255, (image(N, K), ONE), (0,)),
    "mask_that_the_graph_writes_to": (lambda w, _: w.float(), (image(N, K), ONE), (0,)),
}
BY = {
    "mm": lambda x, w: x @ w.t(),
    "conv2d": lambda x, w: F.conv2d(x[:, :, None, None], w[:, :, None, None])[:, :, 0, 0],
}


def ends(name: str, cases: dict[str, Any], by: str) -> int:
    """How many matmuls of a call's floats and what the case decodes are in the report."""
    decode, inputs, static = cases[name]

    def called(x: Tensor, *inputs: Tensor) -> Any:
        result = BY[by](x, decode(*inputs))
        return (result, inputs[0].add_(1)) if "writes" in name else result

    found = prove(trace(called, floats(M, K), *inputs), static=[i + 1 for i in static]).found
    return len(found.sites) + len(found.misses) + len(found.recognised)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", CODED)
def test_bytes_that_a_scale_or_a_zero_point_tells_for_codes_are_in_the_report(name, by):
    assert ends(name, CODED, by) == 1


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", PLAIN)
def test_bytes_that_may_be_a_mask_or_an_image_are_no_codes(name, by):
    assert ends(name, PLAIN, by) == 0


def test_a_distance_to_stored_codes_is_no_matmul():
    graph = trace(lambda x, w: ((w.float() - x) * (w.float() - x)).sum(-1), floats(1, K), ints(N, K))
    assert not prove(graph).found.misses


def test_codes_of_the_graph_times_bytes_of_a_call_are_in_the_report():
    def called(x, w, z):
        return (x.to(INT8) - z).float() @ w.float().t()

    graph = trace(called, floats(M, K), image(N, K), ONE)
    assert len(prove(graph, static=[2]).found.misses) == 1
    graph = trace(lambda x, w: x @ w.float().t(), floats(M, K), image(N, K))
    assert not prove(graph, static=[]).found.misses


# --- regions ------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Weight-only int8."""

    def __init__(self, seed: int = 0, n: int = K) -> None:
        super().__init__()
        self.register_buffer("w", ints(n, K, seed=seed))
        self.register_buffer("s", scales(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.float() * self.s[:, None])


class Dynamic(Linear):
    """int8 activations, quantized in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        codes = (x / scale).round().clamp(-128, 127).to(INT8)
        return torch._int_mm(codes, self.w.t()).float() * scale * self.s


class Layers(nn.Module):
    """One region for all layers."""

    def __init__(self, linear: type[Linear], depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(seed) for seed in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        region = torch.compiler.nested_compile_region(lambda layer, x: torch.tanh(layer(x)))
        for layer in self.layers:
            x = region(layer, x)
        return x


class Branches(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(
            x.sum() > 0, lambda x: torch.tanh(self.layers[0](x)), lambda x: torch.tanh(self.layers[1](x)), (x,)
        )


class Mapped(Layers):
    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.map import map as over

        return over(lambda x: torch.tanh(self.layers[0](x)), x[None].expand(2, *x.shape))


class Loop(Layers):
    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        return while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, self.layers[0](x)), (torch.tensor(0), x))[1]


class Checkpointed(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.layers[0], x, use_reentrant=False)


def explained(model: nn.Module, *inputs: Tensor) -> Report:
    torch._dynamo.reset()
    return fx_quant.explain(model, *inputs, target="x86_vnni")


@pytest.mark.parametrize(
    ("model", "matmuls", "op"),
    [(Layers, 3, "invoke_subgraph"), (Branches, 2, "cond"), (Mapped, 1, "map_impl"), (Loop, 1, "while_loop")],
)
def test_a_weight_only_matmul_in_a_region_is_missed_once_for_each_call(model, matmuls, op):
    report = explained(model(Linear), floats(M, K))
    assert len(report.misses) == matmuls
    assert not report.sites and not report.recognised
    assert all(f"inside {op}" in miss.reason for miss in report.misses)


def test_a_checkpointed_matmul_is_rewritten():
    assert len(explained(Checkpointed(Linear), floats(M, K)).sites) == 1


@pytest.mark.parametrize("model", [Layers, Branches])
def test_what_a_region_is_called_with_is_never_taken_for_a_constant(model):
    torch._dynamo.reset()
    module = model(Dynamic)
    compiled = torch.compile(module, backend="fx_quant")
    with torch.no_grad():
        for seed in range(3):
            x = floats(32, K, seed=seed)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)


def test_a_region_of_floats_is_no_business_of_ours():
    class Floats(Linear):
        def forward(self, x):
            return F.linear(x, self.s.expand(K, K))

    report = explained(Layers(Floats), floats(M, K))
    assert not (report.sites or report.misses or report.recognised)


@pytest.mark.parametrize("op", [torch.ops.deny.apply, torch.ops.deny.gptq_gemm], ids=str)
def test_an_op_made_functional_around_its_mutation_is_what_it_calls(op):
    """As AOTAutograd leaves vLLM's ops, which write their result into an argument."""
    graph = Graph()
    with FakeTensorMode():
        out, x, w = (graph.placeholder(name) for name in ("out", "x", "w"))
        out.meta["val"], x.meta["val"], w.meta["val"] = (
            torch.empty(M, N),
            torch.empty(M, K),
            torch.empty(N, K, dtype=INT8),
        )
        given = {"result": out, "x": x, "codes": w}
        both = graph.call_function(torch.ops.higher_order.auto_functionalized, (op.default,), given)
        both.meta["val"] = (torch.empty(M, N), torch.empty(M, N))
        result = graph.call_function(operator.getitem, (both, 1))
        result.meta["val"] = both.meta["val"][1]
    graph.output(result)
    (miss,) = rewrite(graph, static=(2,)).misses
    assert str(op.default).removesuffix(".default") in miss.rule


@pytest.mark.slow
@pytest.mark.parametrize(("quantized", "rewritten"), [(False, 0), (True, 8)])
def test_attention_to_relative_positions_is_no_quantized_matmul(quantized, rewritten):
    transformers = pytest.importorskip("transformers")
    torchao = pytest.importorskip("torchao.quantization")
    config = transformers.DebertaV2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=99,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=16,
        share_att_key=True,
    )
    model = transformers.DebertaV2Model(config).eval()
    if quantized:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    report = explained(model, torch.arange(24).view(2, 12) + 3)
    assert (len(report.sites), report.recognised, report.misses) == (rewritten, (), ())


def test_getitem_of_an_unknown_quantize_gives_codes():
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    with FakeTensorMode():
        x.meta["val"], w.meta["val"] = torch.empty(M, K), torch.empty(K, N)
        both = graph.call_function(torch.ops.deny.quantize_op.default, (x, x, 8))
        both.meta["val"] = (torch.empty(M, K, dtype=INT8), torch.empty(M, 1))
        codes = graph.call_function(operator.getitem, (both, 0))
        codes.meta["val"] = both.meta["val"][0]
        cast = graph.call_function(torch.ops.prims.convert_element_type.default, (codes, torch.float32))
        cast.meta["val"] = torch.empty(M, K)
        mm = graph.call_function(torch.ops.aten.mm.default, (cast, w))
        mm.meta["val"] = torch.empty(M, N)
    graph.output(mm)
    assert len(rewrite(graph).misses) == 1


def test_a_float_linear_behind_a_missed_one_is_no_quantized_matmul():
    x, w, s, other = (
        torch.randn(4, 64),
        torch.randint(-128, 128, (64, 64), dtype=torch.int8),
        torch.rand(64),
        torch.randn(64, 64),
    )
    for between in (lambda y: y, torch.relu, lambda y: y * 0.1):
        # Scaled along k, which no kernel takes.
        graph = trace(lambda x, w, s, o: between(x @ (w.float() * s).t()) @ o.t(), x, w, s, other)  # noqa: B023
        proven = prove(graph)
        assert [miss.rule for miss in proven.found.misses] == [
            "the scale of b varies along k, so it cannot leave the sum"
        ]
        assert not proven.found.sites


def test_a_zero_point_that_is_written_to_hides_no_quantized_matmul():
    def graph(x, w, y):
        out = F.conv2d(x[:, :, None, None], (w.float() - y)[:, :, None, None])[:, :, 0, 0]
        return out, y.copy_(y + 1)

    x, w = torch.randn(4, 16), torch.randint(-128, 128, (8, 16), dtype=torch.int8)
    for y in (torch.ones(1, 1, dtype=torch.int8), torch.ones(8, 1, dtype=torch.int32), torch.ones(1)):
        proven = prove(trace(graph, x, w, y), static=[1])
        assert [miss.gemm.target for miss in proven.found.misses] == [torch.ops.aten.convolution.default]
