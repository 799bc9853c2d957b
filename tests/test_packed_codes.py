"""Codes of 4 bits beside a quantized activation: packed two to a byte and given to the kernels of int8 arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.kernels.cpu.groups_kernels import GROUP_LEVELS
from fx_quant.passes.canonical import operands_of
from tests.graphs import (
    assert_roundings_allowed,
    assert_same_meaning,
    calls,
    copy_of,
    prove,
    rewrite,
    run,
    run_in_float64,
    to_kernels,
    trace,
)

N, K, GROUP = 64, 128, 32
INT8, INT32, UINT8 = torch.int8, torch.int32, torch.uint8
INT4_KERNELS = [level.kernel.replace("int8_groups", "int8_int4") for level in GROUP_LEVELS]
SCALED_MM = torch.ops.fx_quant.scaled_mm.default


def drawn(high: int, *shape: int, low: int = 0, dtype: torch.dtype = UINT8) -> Tensor:
    return torch.randint(low, high, shape, dtype=dtype, generator=torch.Generator().manual_seed(high + shape[-1]))


X = torch.linspace(-3, 4, 16 * K).reshape(16, K).mul(17).sin() + 0.3
PACKED = drawn(256, N, K // 2)
S, SG = torch.linspace(0.01, 0.02, N), torch.linspace(0.01, 0.02, N * K // GROUP).reshape(N, -1)
Z, ZG = drawn(16, N, 1, dtype=INT8), drawn(16, N, K // GROUP, dtype=INT8)


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127).to(INT8), scale


def asymmetric(x: Tensor, low: int = -128) -> tuple[Tensor, Tensor, Tensor]:
    least, most = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (most - least) / 255
    point = (low - (least / scale).round()).clamp(low, low + 255).to(INT8 if low else UINT8)
    return ((x / scale).round() + point).clamp(low, low + 255).to(point.dtype), scale, point


def nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def groups(codes: Tensor, scale: Tensor, point: Tensor | float = 8) -> Tensor:
    point = point[..., None] if isinstance(point, Tensor) else point
    return ((codes.float().unflatten(1, (-1, GROUP)) - point) * scale[..., None]).flatten(1)


def products(x, packed, s):
    codes, scale = per_token(x)
    return torch._int_mm(codes, (nibbles(packed).to(INT8) - 8).t()).float() * scale * s


def channels(x, packed, s, z):
    codes, scale = per_token(x)
    return F.linear(codes.float() * scale, (nibbles(packed).float() - z) * s[:, None])


def asymmetric_rows(x, packed, s):
    codes, scale, point = asymmetric(x)
    return F.linear((codes.float() - point) * scale, (nibbles(packed).float() - 8) * s[:, None])


def unsigned_rows(x, packed, s):
    codes, scale, point = asymmetric(x, 0)
    return F.linear((codes.float() - point.float()) * scale, groups(nibbles(packed), s))


def symmetric_groups(x, packed, s):
    codes, scale = per_token(x)
    return F.linear(codes.float() * scale, groups(nibbles(packed), s))


def asymmetric_groups(x, packed, s, z):
    codes, scale, point = asymmetric(x)
    return F.linear((codes.float() - point) * scale, groups(nibbles(packed), s, z))


def groups_of_both(x, packed, s, z):
    rows = x.unflatten(-1, (-1, GROUP))
    scale = rows.abs().amax(-1, keepdim=True) / 127
    codes = (rows / scale).round().clamp(-128, 127).to(INT8)
    return F.linear((codes.float() * scale).flatten(-2), groups(nibbles(packed), s, z))


def static(x, packed, s):
    codes = (x / 0.03).round().clamp(-128, 127).to(INT8)
    return F.linear(codes.float() * 0.03, groups(nibbles(packed), s)) + s[:, 0]


def in_int32(x, packed, s):
    """Eight codes to an int32, as compressed-tensors packs them; less 8."""
    shifts = torch.arange(0, 32, 4, dtype=INT32)
    codes = ((packed.view(INT32)[..., None] >> shifts & 15).flatten(1) - 8).to(INT8)
    scaled, scale = per_token(x)
    return F.linear(scaled.float() * scale, groups(codes, s, 0))


FORMS = {
    "products": (products, (S,), "int8 per_token (dynamic) x int4 per_channel"),
    "channels": (channels, (S, Z), "int8 per_token (dynamic) x int4 per_channel asymmetric"),
    "asymmetric_rows": (asymmetric_rows, (S,), "int8 per_token asymmetric (dynamic) x int4 per_channel"),
    "unsigned_rows": (unsigned_rows, (SG,), "int8 per_token asymmetric (dynamic) x int4 per_group(32)"),
    "groups": (symmetric_groups, (SG,), "int8 per_token (dynamic) x int4 per_group(32)"),
    "asymmetric_groups": (
        asymmetric_groups,
        (SG, ZG),
        "int8 per_token asymmetric (dynamic) x int4 per_group(32) asymmetric",
    ),
    "groups_of_both": (groups_of_both, (SG, ZG), "int8 per_group(32) (dynamic) x int4 per_group(32) asymmetric"),
    "static": (static, (SG,), "int8 per_tensor (static) x int4 per_group(32)"),
    "in_int32": (in_int32, (SG,), "int8 per_token (dynamic) x int4 per_group(32)"),
}


@pytest.mark.parametrize(("form", "factors", "words"), FORMS.values(), ids=FORMS)
def test_codes_of_4_bits_are_packed_and_multiplied_as_integers(form, factors, words):
    inputs = (X, PACKED, *factors)
    graph = trace(form, *inputs)
    state = rewrite(graph)
    (site,), (row,) = state.rows, state.rows.values()
    assert (site.words, row.selection.kernel.name) == (words, "cpu_int8_int4_vnni")
    (op,) = calls(state.graph, SCALED_MM)
    assert op.args[1].meta["val"].shape == (K // 2, N)
    assert_same_meaning(state.before, state.graph, inputs)
    proven = prove(graph)
    assert_roundings_allowed(proven.found.sites[0], proven, inputs)


@pytest.mark.parametrize(("form", "factors", "words"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_computes_what_the_source_means(form, factors, words, dtype):
    inputs = (X, PACKED, *factors)
    graph = trace(lambda *inputs: form(*inputs).to(dtype), *inputs)
    state = rewrite(graph)
    (exact,), _ = run_in_float64(state.before, *inputs)
    to_kernels(state)
    (actual,), _ = run(state.graph, *inputs)
    assert actual.dtype is dtype
    error = (actual.double() - exact).norm() / exact.norm()
    assert error < (1e-6 if dtype is torch.float32 else 4e-3)


def test_packing_and_the_sums_of_codes_are_computed_once():
    state = rewrite(trace(asymmetric_groups, X, PACKED, SG, ZG))
    to_kernels(state)
    (fold,) = calls(state.graph, torch.ops.fx_quant.fold.default)
    kernel = next(node for node in state.graph.nodes if str(node.target).startswith("fx_quant.cpu_int8"))
    assert kernel.args[1].args[0] is fold
    assert kernel.kwargs["b_sum"].args[0] is fold
    assert not calls(state.graph, torch.ops.aten.bitwise_and.Scalar)


@pytest.mark.parametrize(("form", "factors", "words"), FORMS.values(), ids=FORMS)
def test_without_a_kernel_of_packed_codes_each_has_a_byte(form, factors, words):
    inputs = (X, PACKED, *factors)
    state = rewrite(trace(form, *inputs), disabled_kernels=INT4_KERNELS)
    (site,) = state.rows
    assert site.words == words
    assert not site.problem.scheme.weight.packed
    assert site.problem.scheme.weight.dtype is INT8
    assert_same_meaning(state.before, state.graph, inputs)


def test_the_packed_weight_of_another_call_is_packed_again():
    state = rewrite(trace(asymmetric_groups, X, PACKED, SG, ZG))
    source = copy_of(state.before)
    to_kernels(state)
    for packed in (PACKED, PACKED.flip(0), 255 - PACKED):
        inputs = (X, packed, SG, ZG)
        torch.testing.assert_close(run(state.graph, *inputs)[0], run(source, *inputs)[0], rtol=1e-5, atol=1e-4)


# --- int8 codes, as torchao's 8da4w stores those of 4 bits -------------------------------------------------------

W = drawn(8, N, K, low=-8, dtype=INT8)
ZEROS = torch.zeros(N, K // GROUP, dtype=INT8)
FAR = torch.randint(-(2**30), 2**30, (16, 1), dtype=INT32)


def eight_bits(x, codes, s, z):
    rows, scale, point = asymmetric(x)
    return F.linear((rows.float() - point) * scale, groups(codes, s, z))


def in_bfloat16(x, codes, s, z):
    rows, scale, point = asymmetric(x)
    weight = (codes.unflatten(1, (-1, GROUP)).bfloat16() - z[..., None]) * s.bfloat16()[..., None]
    return F.linear((rows.bfloat16() - point.bfloat16()) * scale.bfloat16(), weight.flatten(1))


@pytest.mark.parametrize("form", [eight_bits, in_bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_fake_quantized_activation_and_groups_with_zero_points_are_a_product_of_integers(form, dynamic):
    inputs = (X, W, SG, ZEROS)
    graph = trace(form, *inputs, dynamic=dynamic)
    state = rewrite(graph)
    (site,), (row,) = state.rows, state.rows.values()
    assert site.words == "int8 per_token asymmetric (dynamic) x int8 per_group(32) asymmetric"
    assert row.selection.kernel.name == "cpu_int8_groups_vnni"
    assert_same_meaning(state.before, state.graph, inputs)
    # A byte for each group is read.
    assert operands_of(row.op).b_zero_point.meta["val"].dtype is INT8
    exact, _ = run_in_float64(state.before, *inputs)
    to_kernels(state)
    actual, _ = run(state.graph, *inputs)
    error = (actual[0].double() - exact[0]).norm() / exact[0].norm()
    assert error < (1e-6 if form is eight_bits else 1e-2)


NOT_INTEGERS = {
    "zero_point_along_k": (
        lambda a, w, s, z: (
            ((a.unflatten(1, (-1, GROUP)).float() - z[:16, :, None]) * 0.1).flatten(1) @ groups(w, s).t()
        ),
        "the zero point of a varies along k, so it cannot leave the sum",
    ),
    "zero_point_far_out": (
        lambda a, w, s, z, far: ((a.float() - far) * 0.1) @ groups(w, s).t(),
        "a zero point of a that may lie far out, beside scales that vary along k",
    ),
    "rows_of_other_groups": (
        lambda a, w, s, z: (
            ((a.unflatten(1, (-1, 16)).float() - 3) * s[:16].repeat(1, 2)[..., None]).flatten(1) @ groups(w, s, z).t()
        ),
        "the scales of a and b have groups of different sizes along k",
    ),
}


@pytest.mark.parametrize(("form", "obstacle"), NOT_INTEGERS.values(), ids=NOT_INTEGERS)
def test_what_no_sum_of_groups_states_is_of_a_float_activation(form, obstacle):
    codes = drawn(128, 16, K, low=-128, dtype=INT8)
    inputs = (codes, W, SG, ZG, *([FAR] if "far" in obstacle else []))
    state = rewrite(trace(form, *inputs))
    (site,), (row,) = state.rows, state.rows.values()
    assert site.product.obstacle == obstacle
    assert row.selection.kernel.name.startswith("cpu_weight_only")
    assert_same_meaning(state.before, state.graph, inputs)


def test_a_zero_point_that_is_written_to_before_the_matmul_is_a_miss():
    def written(x, codes, s, z):
        rows, scale, point = asymmetric(x)
        weight = groups(codes, s, z)
        z.add_(1)
        return F.linear((rows.float() - point) * scale, weight)

    state = rewrite(trace(written, X, W, SG, ZG.clone()))
    assert [miss.rule for miss in state.misses] == ["z_1 is written to before the rewritten matmul would read it"]


def test_an_activation_that_was_decoded_more_coarsely_than_the_result_stays_a_float():
    def coarse(x, codes, s, z):
        rows, scale, point = asymmetric(x)
        decoded = (rows.bfloat16() - point.bfloat16()) * scale.bfloat16()
        return F.linear(decoded.float(), groups(codes, s, z))

    ((name, _),) = kernels_of(coarse, X, W, SG, ZG)
    assert name.startswith("cpu_weight_only")


# --- what is not packed -----------------------------------------------------------------------------------------


def kernels_of(function, *inputs: Tensor, **options) -> list[tuple[str, torch.dtype]]:
    state = rewrite(trace(function, *inputs), **options)
    assert_same_meaning(state.before, state.graph, inputs)
    return [(row.selection.kernel.name, site.problem.scheme.weight.dtype) for site, row in state.rows.items()]


def test_a_sum_that_is_returned_is_one_of_bytes():
    def summed(x, packed):
        return torch._int_mm(per_token(x)[0], (nibbles(packed).to(INT8) - 8).t())

    assert kernels_of(summed, X, PACKED) == [("cpu_int8_vnni", INT8)]


def test_what_is_to_be_exact_is_one_of_bytes_as_packed_codes_are_summed_in_float32():
    assert kernels_of(products, X, PACKED, S, numerics="exact") == [("cpu_int8_vnni", INT8)]


def test_codes_of_17_values_are_bytes():
    def wide(x, packed, s):
        codes, scale = per_token(x)
        weight = torch.cat((packed & 15, (packed & 16) + 1), 1).to(INT8)
        return torch._int_mm(codes, weight.t()).float() * scale * s

    assert kernels_of(wide, X, PACKED, S) == [("cpu_int8_vnni", INT8)]


def test_an_odd_k_is_one_of_bytes():
    def odd(x, codes, s):
        rows, scale = per_token(x)
        return F.linear(rows.float() * scale, (codes & 15).float() * s[:, None])

    assert kernels_of(odd, X[:, :63], PACKED[:, :63], S) == [("cpu_int8_vnni", INT8)]


def test_a_zero_point_that_may_lie_anywhere_is_corrected_around_bytes():
    z = torch.randint(0, 16, (N, 1), dtype=INT32)
    assert kernels_of(channels, X, PACKED, S, z) == [("cpu_int8_vnni", INT8)]


def test_codes_that_change_from_call_to_call_are_not_packed():
    state = rewrite(trace(symmetric_groups, X, PACKED, SG), static=())
    assert [site for site in state.rows if site.problem.scheme.weight.packed] == []


def test_groups_that_no_kernel_sums_are_of_a_float_activation():
    def sixteen(x, packed, s):
        codes, scale, point = asymmetric(x)
        weight = ((nibbles(packed).float().unflatten(1, (-1, 16)) - 8) * s[..., None]).flatten(1)
        return F.linear((codes.float() - point) * scale, weight)

    ((name, _),) = kernels_of(sixteen, X, PACKED, SG.repeat_interleave(2, 1))
    assert name.startswith("cpu_weight_only")


@pytest.mark.parametrize(
    ("mask", "less", "words"),
    [(15, 8, "int4"), (7, 0, "int4"), (7, 3, "int4"), (15, 7, "int4 asymmetric"), (15, 0, "int4 asymmetric")],
)
@pytest.mark.parametrize("activation", [per_token, lambda x: (x, torch.ones(()))], ids=["codes", "float"])
def test_a_weight_whose_codes_are_those_of_int4_has_no_zero_point(mask, less, words, activation):
    def masked(x, codes, s):
        rows, scale = activation(x)
        return F.linear(rows.float() * scale, groups((codes & mask).to(INT8), s, less))

    inputs = (X, PACKED.repeat(1, 2), SG)
    state = rewrite(trace(masked, *inputs))
    (site,), (row,) = state.rows, state.rows.values()
    kind, _, asymmetric = words.partition(" ")
    assert site.words.split(" x ")[1] == f"{kind} per_group(32) {asymmetric}".strip()
    assert operands_of(row.op).b_zero_point is None or asymmetric
    assert site.problem.scheme.weight.packed
    assert_same_meaning(state.before, state.graph, inputs)


# --- bytes of an unsigned weight --------------------------------------------------------------------------------

BYTES = drawn(256, N, K)


def shifted_bytes(x, codes, s):
    rows, scale = per_token(x)
    return F.linear(rows.float() * scale, (codes.float() - 128) * s[:, None])


def bytes_of_channels(x, codes, s, z):
    rows, scale = per_token(x)
    return F.linear(rows.float() * scale, (codes.float() - z.view(UINT8)) * s[:, None])


def bytes_of_groups(x, codes, s, z):
    rows, scale, point = asymmetric(x)
    return F.linear((rows.float() - point) * scale, groups(codes, s, z.view(UINT8)))


@pytest.mark.parametrize(
    ("form", "factors", "kernel"),
    [
        (shifted_bytes, (S,), "cpu_int8_vnni"),
        (bytes_of_channels, (S, drawn(128, N, 1, low=-128, dtype=INT8)), "cpu_int8_vnni"),
        (bytes_of_groups, (SG, drawn(128, N, K // GROUP, low=-128, dtype=INT8)), "cpu_int8_groups_vnni"),
    ],
)
def test_an_unsigned_weight_becomes_int8_as_a_constant(form, factors, kernel):
    inputs = (X, BYTES, *factors)
    assert kernels_of(form, *inputs) == [(kernel, INT8)]
    state = rewrite(trace(form, *inputs))
    (exact,), _ = run_in_float64(state.before, *inputs)
    to_kernels(state)
    (actual,), _ = run(state.graph, *inputs)
    assert (actual.double() - exact).norm() / exact.norm() < 1e-6


def test_an_unsigned_operand_that_changes_from_call_to_call_is_not_rearranged():
    state = rewrite(trace(shifted_bytes, X, BYTES, S), static=(2,))
    assert not [site for site in state.rows if site.problem.scheme.weight.dtype is INT8]
