"""Quantization by Triton without a GPU: bit for bit the canonical op in the interpreter, compiled for each GPU."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from triton_interpreter import call, compiler_is_real, every_variant, needs_triton

import fx_quant.kernels.triton_quantize  # noqa: F401  (registers the ops)
from fx_quant.activation import quantize_activation
from fx_quant.gpu.architectures import Architecture, architecture
from fx_quant.gpu.cross_compile import Compiled, compile_launch
from fx_quant.gpu.quantize import LONGEST_ROW, Norm, Plan, plan_asymmetric, plan_dynamic, plan_static, unfit
from fx_quant.ops import quantize_groups
from fx_quant.scheme import FLOAT8_DTYPES, Granularity, OperandSpec, float8_max

fxq = torch.ops.fx_quant
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
I8, U8, I32 = torch.int8, torch.uint8, torch.int32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FNUZ, FNUZ5 = torch.float8_e4m3fnuz, torch.float8_e5m2fnuz
EVERY_DTYPE = (I8, U8, E4M3, E5M2, FNUZ, FNUZ5)


# --- formulas and operands --------------------------------------------------------------------------------------


def limits(dtype: torch.dtype) -> tuple[float, float]:
    if dtype in FLOAT8_DTYPES:
        return -float8_max(dtype), float8_max(dtype)
    return float(torch.iinfo(dtype).min), float(torch.iinfo(dtype).max)


def given(dtype: torch.dtype, *, reciprocal: bool = False) -> dict:
    """Arguments of ``quantize`` beside ``x`` and ``scale``."""
    lo, hi = limits(dtype)
    return {"dtype": dtype, "reciprocal": reciprocal, "lo": lo, "hi": hi}


def formula(dtype: torch.dtype, **changes: object) -> dict:
    """Arguments of ``quantize.dynamic``: the eager layers' formula, unless changed."""
    float8 = dtype in FLOAT8_DTYPES
    hi = limits(dtype)[1]
    chosen = {
        "granularity": "per_token",
        "divisor": hi,
        "divide_dtype": F32,
        "floor": 1 / (hi * 512) if float8 else 2.0**-126,
        "floor_on": "scale",
        "scale_dtype": F32,
    }
    return {**given(dtype, reciprocal=float8), **chosen, **changes}


def hostile(k: int = 40) -> Tensor:
    """Rows of zeros, of what is not finite, of what is hardly there and of what is hardly finite."""
    x = torch.randn(12, k)
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, 3] = -torch.tensor(torch.nan)
    x[3, 5], x[4, 5] = torch.inf, -torch.inf
    x[5] = 1e-42
    x[6] *= 1e38
    x[7] = -0.0
    x[8] = -3.5
    x[9], x[9, k - 1] = 0, 1e-30
    x[10] *= 1e-38
    x[11] = torch.arange(k) + 0.5  # halves under a scale of 1
    return x


def inputs(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(m, k) * torch.logspace(-3, 3, max(m, 1))[:m, None]).to(dtype)


def assert_codes(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    """Equal, NaN included; of integers, only where ``scale`` does not hide the code."""
    if actual.dtype is F32 and expected.dtype is not F32:
        actual = actual.to(expected.dtype)
    assert actual.dtype is expected.dtype and actual.shape == expected.shape
    if scale is not None and not expected.dtype.is_floating_point:
        known = (scale.isfinite() & (scale != 0)).expand(expected.shape)
        actual, expected = actual[known], expected[known]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert actual.stride() == expected.stride()


# --- the interpreter ----------------------------------------------------------------------------------------------


def where(dtype: torch.dtype, processors: int = 132) -> Architecture:
    """A GPU that has the dtype."""
    return replace(architecture("gfx942" if dtype in (FNUZ, FNUZ5) else "sm90"), processors=processors)


def answer_static(x, scale, zero_point, arguments, norm) -> list[Tensor]:
    on, norm = where(arguments["dtype"]), None if norm is None else Norm(*norm)
    return list(plan_static(x, scale, zero_point, **arguments, on=on, norm=norm, stored=F32).run())


def answer_dynamic(x, arguments, group, norm, processors) -> list[Tensor]:
    on, norm = where(arguments["dtype"], processors), None if norm is None else Norm(*norm)
    return list(plan_dynamic(x, **arguments, group=group, on=on, norm=norm, stored=F32).run())


def answer_asymmetric(x, granularity, processors) -> list[Tensor]:
    return list(plan_asymmetric(x, granularity=granularity, on=where(I8, processors)).run())


def answer_far_apart() -> list[Tensor]:
    """Of rows, then of columns, whose offsets reach 2**31, in memory that is hardly touched."""
    x = torch.empty(2**31 + 8, dtype=F16).as_strided((3, 8), (2**30, 1))
    x.copy_(torch.arange(24).view(3, 8) - 12)
    of_rows = fxq.triton_quantize_dynamic(x, **formula(I8))
    return [*of_rows, *fxq.triton_quantize_dynamic(x.t(), **formula(I8))]


@pytest.fixture
def static(interpreter) -> Callable[..., list[Tensor]]:
    def run(x, scale, arguments, zero_point=None, norm=None):
        return call(interpreter, answer_static, x, scale, zero_point, arguments, norm)

    return run


@pytest.fixture
def dynamic(interpreter) -> Callable[..., list[Tensor]]:
    def run(x, arguments, group=0, norm=None, processors=132):
        return call(interpreter, answer_dynamic, x, arguments, group, norm, processors)

    return run


@pytest.fixture
def asymmetric(interpreter) -> Callable[..., list[Tensor]]:
    def run(x, granularity="per_token", processors=132):
        return call(interpreter, answer_asymmetric, x, granularity, processors)

    return run


# --- a given scale ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("reciprocal", [False, True], ids=["divided", "reciprocal"])
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
def test_codes_under_a_given_scale(static, dtype, reciprocal, x_dtype):
    arguments = given(dtype, reciprocal=reciprocal)
    for m, k in ((1, 1), (1, 37), (17, 130), (300, 9), (3, 2100)):
        x, scale = inputs(m, k, x_dtype), torch.tensor(0.037)
        (codes,) = static(x, scale, arguments)
        assert_codes(codes, fxq.quantize(x, scale, **arguments))


@pytest.mark.parametrize("dtype", [I8, E4M3], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5, 1), (37,), (1, 37), (5, 37), (1, 5, 1), (2, 1, 37)], ids=str)
def test_scales_of_every_shape(static, dtype, shape):
    x, scale = torch.randn(2, 5, 37), torch.rand(shape) + 0.1
    (codes,) = static(x, scale, given(dtype))
    assert_codes(codes, fxq.quantize(x, scale, **given(dtype)))


@pytest.mark.parametrize("dtype", [I8, U8, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.0, torch.nan, torch.inf, -0.3, 1e-40], ids=str)
@pytest.mark.parametrize("reciprocal", [False, True], ids=["divided", "reciprocal"])
def test_hostile_values_under_a_hostile_scale(static, dtype, scale, reciprocal):
    x, scale = hostile(), torch.tensor(scale)
    arguments = given(dtype, reciprocal=reciprocal)
    (codes,) = static(x, scale, arguments)
    assert_codes(codes, fxq.quantize(x, scale, **arguments))


@pytest.mark.parametrize("lo", [-128.0, -127.0, -7.0, 3.0])
def test_codes_stay_in_a_narrow_range(static, lo):
    x, arguments = hostile(), {**given(I8), "lo": lo, "hi": 7.0}
    (codes,) = static(x, torch.tensor(0.5), arguments)
    assert_codes(codes, fxq.quantize(x, torch.tensor(0.5), **arguments))


@pytest.mark.parametrize("dtype", [I8, U8], ids=str)
@pytest.mark.parametrize("shape", [(), (12, 1), (40,)], ids=str)
def test_a_given_zero_point_is_added_after_rounding(static, dtype, shape):
    x, arguments, low = hostile(), given(dtype), -128 if dtype is I8 else 0
    scale, zero_point = torch.rand(shape) + 0.5, torch.randint(low, low + 256, shape, dtype=I32)
    (codes,) = static(x, scale, arguments, zero_point)
    expected = fxq.triton_quantize_static(x, scale, **arguments, zero_point=zero_point)
    assert_codes(codes, expected)
    rounded = ((x / scale).round() + zero_point).clamp(*limits(dtype))
    assert_codes(codes, rounded.nan_to_num(0).to(dtype))


# --- a scale of its own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_codes_and_their_scale(dynamic, dtype, x_dtype, granularity):
    arguments = formula(dtype, granularity=granularity)
    for m, k in ((1, 1), (1, 37), (17, 130), (300, 9), (3, 2100)):
        x = inputs(m, k, x_dtype)
        codes, scale = dynamic(x, arguments)
        expected = fxq.quantize.dynamic(x, **arguments)
        assert_equal(scale, expected[1])
        assert_codes(codes, expected[0])


@pytest.mark.parametrize("dtype", [I8, E4M3], ids=str)
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("floor_on", ["none", "amax", "scale"])
@pytest.mark.parametrize("reciprocal", [False, True], ids=["divided", "reciprocal"])
def test_every_formula_on_hostile_rows(dynamic, dtype, granularity, floor_on, reciprocal):
    arguments = formula(dtype, granularity=granularity, floor_on=floor_on, floor=1e-12, reciprocal=reciprocal)
    for x in (hostile(), hostile()[5:]):
        codes, scale = dynamic(x, arguments)
        expected = fxq.quantize.dynamic(x, **arguments)
        assert_equal(scale, expected[1])
        assert_codes(codes, expected[0], expected[1])


@pytest.mark.parametrize("changes", [{"divide_dtype": F16}, {"scale_dtype": F16}, {"divisor": 127.5}], ids=str)
def test_the_scale_is_rounded_where_the_formula_says(dynamic, changes):
    arguments = formula(I8, **changes)
    x = torch.randn(9, 50)
    for actual, expected in zip(dynamic(x, arguments), fxq.quantize.dynamic(x, **arguments), strict=True):
        assert_codes(actual, expected)


@pytest.mark.parametrize("dtype", [I8, E4M3], ids=str)
@pytest.mark.parametrize("m", [1, 3, 300])
def test_rows_longer_than_a_program(dynamic, monkeypatch, dtype, m):
    k = LONGEST_ROW + 7 if m < 300 else LONGEST_ROW + 1
    x = inputs(m, k, F16) if m < 300 else inputs(m, 1, F16).expand(m, k)
    x[0, 1:2] = torch.nan if m == 1 else 9.0
    x = x[:20]
    for processors in (1, 132):
        codes, scale = dynamic(x, formula(dtype), processors=processors)
        expected = fxq.quantize.dynamic(x, **formula(dtype))
        assert_equal(scale, expected[1])
        assert_codes(codes, expected[0], expected[1])


@pytest.mark.parametrize("value", [1.0, torch.nan, -torch.inf], ids=str)
@pytest.mark.parametrize("at", [(0, 0), (33, 999), (32, 768)], ids=str)
def test_the_extremes_of_a_large_tensor_reach_every_program(dynamic, asymmetric, value, at):
    x = torch.randn(34, 1000).clamp(-0.5, 0.5)
    x[at] = value
    for processors in (1, 3, 132):
        codes, scale = dynamic(x, formula(E4M3, granularity="per_tensor"), processors=processors)
        expected = fxq.quantize.dynamic(x, **formula(E4M3, granularity="per_tensor"))
        assert_equal(scale, expected[1])
        assert_codes(codes, expected[0])
        found = asymmetric(x, "per_tensor", processors)
        assert_asymmetric(found, x, Granularity.PER_TENSOR)


def assert_asymmetric(found: list[Tensor], x: Tensor, granularity: Granularity) -> None:
    codes, scale, zero_point = found
    spec = OperandSpec(I8, granularity, dynamic=True, symmetric=False)
    expected = quantize_activation(x, spec)
    assert_equal(scale, expected[1])
    known = scale.isfinite()
    assert_equal(zero_point[known], expected[2][known])
    assert_codes(codes, expected[0], expected[1])


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
def test_a_zero_point_of_its_own(asymmetric, granularity, x_dtype):
    kind = Granularity(granularity)
    for m, k in ((1, 1), (17, 130), (300, 9), (3, 2100), (2, LONGEST_ROW + 9)):
        x = inputs(m, k, x_dtype) + torch.linspace(-2, 2, m, dtype=x_dtype)[:, None]
        assert_asymmetric(asymmetric(x, granularity), x, kind)
    # Of 32 columns no lane of a tile is masked.
    for x in (hostile(), hostile(32), hostile()[5:], hostile()[7:8], hostile(32)[8:9], -hostile(32)[8:9]):
        assert_asymmetric(asymmetric(x, granularity), x, kind)


# --- groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [I8, E4M3, FNUZ], ids=str)
@pytest.mark.parametrize("group", [1, 7, 16, 64, 128, 300])
@pytest.mark.parametrize("m", [1, 17, 300])
def test_scales_of_groups_lie_as_matmuls_want_them(dynamic, dtype, group, m):
    x = inputs(m, 270 if group > 1 else 20, F16)
    codes, scale = dynamic(x, formula(dtype), group)
    expected = quantize_groups(x, group, **formula(dtype))
    assert_equal(scale, expected[1])
    assert scale.stride() == (1, m)
    assert_codes(codes, expected[0])


def test_a_group_is_a_token_of_its_own(dynamic):
    x = hostile(64)
    codes, scale = dynamic(x, formula(E4M3), 16)
    expected = fxq.quantize.dynamic(x.view(12, 4, 16), **formula(E4M3))
    assert torch.equal(scale, scale) or scale.isnan().any()
    torch.testing.assert_close(scale, expected[1].squeeze(-1), rtol=0, atol=0, equal_nan=True)
    assert_codes(codes, expected[0].view(12, 64))


# --- strides ------------------------------------------------------------------------------------------------------


def views() -> dict[str, Tensor]:
    tall, deep = torch.randn(40, 34), torch.randn(4, 6, 80)
    return {
        "row stride": tall[:34, :20],
        "transposed": tall.t(),
        "every other": tall[::2, 3:23:2],
        "one row for all": tall[:1].expand(5, 34),
        "three dims": deep[:, 1:4, 10:50],
        "permuted": deep.permute(1, 0, 2),
        "a vector": deep[0, 0],
    }


@pytest.mark.parametrize("name", views())
def test_operands_of_any_strides(dynamic, static, asymmetric, name):
    x = views()[name]
    for arguments in (formula(I8), formula(E4M3, granularity="per_tensor")):
        codes, scale = dynamic(x, arguments)
        expected = fxq.quantize.dynamic(x, **arguments)
        assert_equal(scale, expected[1])
        assert_codes(codes, expected[0])
        assert codes.is_contiguous()
    codes, scale = dynamic(x, formula(I8), 16)
    expected = quantize_groups(x, 16, **formula(I8))
    assert_equal(scale, expected[1])
    assert_codes(codes, expected[0])
    scale = torch.rand(x.shape[-1] * 2)[::2]
    assert_codes(static(x, scale, given(I8))[0], fxq.quantize(x, scale, **given(I8)))


def test_offsets_beyond_32_bits(interpreter):
    x = (torch.arange(24).view(3, 8) - 12).half()
    found = call(interpreter, answer_far_apart)
    for actual, source in ((found[:2], x), (found[2:], x.t())):
        for part, expected in zip(actual, fxq.quantize.dynamic(source, **formula(I8)), strict=True):
            assert torch.equal(part, expected)


def test_nothing_beside_the_operand_is_read_into_a_scale(dynamic):
    around = torch.full((40, 160), torch.nan)
    x = around[:17, 5:135]
    x.copy_(torch.randn(17, 130))
    for group in (0, 16):
        codes, scale = dynamic(x, formula(I8), group)
        assert not scale.isnan().any()
        assert_codes(codes, quantize_groups(x, group, **formula(I8))[0])


# --- behind a norm ------------------------------------------------------------------------------------------------


def exact_inputs(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose sum of squares is the same in every order."""
    return torch.randint(-8, 9, (m, k)).to(dtype)


@pytest.mark.parametrize("dtype", [I8, E4M3, FNUZ], ids=str)
@pytest.mark.parametrize("x_dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("group", [0, 16, 128])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
def test_a_norm_then_its_codes(dynamic, dtype, x_dtype, group, added):
    arguments = formula(dtype)
    for m, k in ((1, 1), (1, 37), (5, 128), (5, 130), (300, 9)):
        x = exact_inputs(m, k, x_dtype)
        weight, residual = torch.randn(k).to(x_dtype), exact_inputs(m, k, x_dtype) if added else None
        found = dynamic(x, arguments, group, (weight, 1e-5, residual))
        expected = fxq.rms_norm_quantize.dynamic(x, weight, 1e-5, residual, **arguments, group=group)
        assert len(found) == len(expected) == 2 + added
        assert_codes(found[0], expected[0])
        for actual, wanted in zip(found[1:], expected[1:], strict=True):
            assert_equal(actual, wanted)


@pytest.mark.parametrize("dtype", [I8, E4M3], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
def test_a_norm_then_its_codes_under_a_given_scale(static, dtype, added):
    arguments = given(dtype)
    for m, k in ((1, 1), (5, 130), (300, 9), (2, 3000)):
        x, weight = exact_inputs(m, k, F16), torch.randn(k)
        residual, scale = exact_inputs(m, k, F16) if added else None, torch.rand(m, 1) / 10 + 0.01
        found = static(x, scale, arguments, None, (weight, 1e-5, residual))
        expected = fxq.rms_norm_quantize(x, weight, 1e-5, residual, scale, **arguments)
        assert len(found) == len(expected) == 1 + added
        assert_codes(found[0], expected[0])
        if added:
            assert_equal(found[1], expected[1])


def test_a_norm_sums_in_its_own_order_only(dynamic):
    """Of any values: float32 codes before the cast differ by the rounding of one sum."""
    x, weight, residual = torch.randn(9, 1000), torch.randn(1000), torch.randn(9, 1000)
    found = dynamic(x, formula(I8), 0, (weight, 1e-5, residual))
    expected = fxq.rms_norm_quantize.dynamic(x, weight, 1e-5, residual, **formula(I8))
    assert torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)
    assert (found[0] - expected[0].float()).abs().max() <= 1
    assert (found[0] != expected[0].float()).float().mean() < 1e-3


def test_hostile_rows_of_a_norm_stay_to_themselves(dynamic):
    x = hostile()
    found = dynamic(x, formula(E4M3), 0, (torch.ones(40), 1e-5, None))
    expected = fxq.rms_norm_quantize.dynamic(x, torch.ones(40), 1e-5, None, **formula(E4M3))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(found[0].to(E4M3).isnan(), expected[0].isnan())
    assert_codes(found[0][[0, 7, 8]], expected[0][[0, 7, 8]])


def test_operands_of_a_norm_of_any_strides(dynamic):
    x, residual = torch.randint(-8, 9, (40, 34)).float().t(), torch.randint(-8, 9, (34, 80)).float()[:, ::2]
    weight = torch.randn(120)[::3]
    found = dynamic(x, formula(I8), 0, (weight, 1e-5, residual))
    expected = fxq.rms_norm_quantize.dynamic(x, weight, 1e-5, residual, **formula(I8))
    assert_codes(found[0], expected[0])
    assert_equal(found[2], expected[2])


def test_the_canonical_norm_is_the_formula():
    x, weight, residual = torch.randn(5, 33, dtype=BF16), torch.randn(33, dtype=BF16), torch.randn(5, 33, dtype=BF16)
    codes, scale, total = fxq.rms_norm_quantize.dynamic(x, weight, 1e-6, residual, **formula(I8))
    assert torch.equal(total, x + residual)
    wide = total.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(normed.to(BF16).abs().amax(-1, keepdim=True).float() / 127, scale, rtol=2**-7, atol=0)
    assert torch.equal(codes, fxq.quantize(F_rms_norm(total, weight), scale, **given(I8)))


def F_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own, in float32 and rounded once."""
    return torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), 1e-6).to(x.dtype)


# --- the ops ------------------------------------------------------------------------------------------------------


NORM = (torch.ones(20), 1e-5)
OPS = {
    "static": (fxq.triton_quantize_static.default, (torch.ones(()),), given(I8)),
    "static zero point": (
        fxq.triton_quantize_static.default,
        (torch.ones(()),),
        {**given(U8), "zero_point": torch.tensor(7)},
    ),
    "per token": (fxq.triton_quantize_dynamic.default, (), formula(E4M3)),
    "groups": (fxq.triton_quantize_dynamic.default, (), {**formula(E4M3), "group": 8}),
    "asymmetric": (fxq.triton_quantize_asymmetric.default, (), {"granularity": "per_token"}),
    "norm": (fxq.triton_rms_norm_quantize.default, (*NORM, None, torch.ones(())), given(I8)),
    "norm, groups": (fxq.triton_rms_norm_quantize.dynamic, (*NORM, None), {**formula(I8), "group": 8}),
    "canonical norm": (fxq.rms_norm_quantize.default, (*NORM, None, torch.ones(())), given(I8)),
    "canonical norm, dynamic": (fxq.rms_norm_quantize.dynamic, (*NORM, None), formula(I8)),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(5, 20), (2, 3, 20), (0, 20)], ids=str)
def test_ops_pass_opcheck(monkeypatch, name, shape):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    op, args, kwargs = OPS[name]
    x = torch.randn(shape)
    torch.library.opcheck(op, (x.transpose(0, -1).contiguous().transpose(0, -1), *args), kwargs)
    if "norm" in name:
        torch.library.opcheck(op, (x, *args[:2], torch.randn(shape), *args[3:]), kwargs)


def test_without_a_gpu_the_ops_are_the_canonical_ones(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, scale = torch.randn(5, 20), torch.rand(5, 1)
    assert torch.equal(fxq.triton_quantize_static(x, scale, **given(I8)), fxq.quantize(x, scale, **given(I8)))
    for actual, expected in zip(
        fxq.triton_quantize_dynamic(x, **formula(I8)), fxq.quantize.dynamic(x, **formula(I8)), strict=True
    ):
        assert torch.equal(actual, expected)
    codes, scale, zero_point = fxq.triton_quantize_asymmetric(x.view(5, 2, 10), granularity="per_token")
    assert codes.shape == (5, 2, 10) and scale.shape == zero_point.shape == (5, 2, 1)
    assert_asymmetric(
        [codes.view(10, 10), scale.view(10, 1), zero_point.view(10, 1)], x.view(10, 10), Granularity.PER_TOKEN
    )


def test_no_rows_have_no_codes():
    x = torch.empty(0, 20)
    codes, scale = fxq.triton_quantize_dynamic(x, **formula(I8), group=8)
    assert codes.shape == (0, 20) and scale.shape == (0, 3)
    assert fxq.triton_quantize_asymmetric(x, granularity="per_tensor")[1].shape == ()


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("triton_quantize_dynamic", {"granularity": "per_row"}, "granularity must be one of"),
        ("triton_quantize_dynamic", {"floor_on": "code"}, "floor_on must be one of"),
        ("triton_quantize_dynamic", {"group": -1}, "group must be 0, or the number of neighbours"),
        ("triton_quantize_dynamic", {"group": 8, "granularity": "per_tensor"}, "got 8 with 'per_tensor'"),
        ("triton_quantize_dynamic", {"dtype": torch.int16}, "dtype must be int8, uint8 or a float8"),
    ],
)
def test_what_is_no_formula_is_an_error(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(fxq, op)(torch.randn(5, 20), **{**formula(I8), **arguments})


def test_operands_that_do_not_fit_are_errors():
    x, weight = torch.randn(5, 20), torch.ones(20)
    with pytest.raises(RuntimeError, match="scale must broadcast to x"):
        fxq.triton_quantize_static(x, torch.ones(3), **given(I8))
    with pytest.raises(RuntimeError, match=r"zero_point must be integers of the shape of scale, \[5, 1\]"):
        fxq.triton_quantize_static(x, torch.ones(5, 1), **given(I8), zero_point=torch.tensor(3))
    with pytest.raises(RuntimeError, match=r"weight must be floats of shape \[k\] = \[20\]"):
        fxq.triton_rms_norm_quantize.dynamic(x, weight[:8], 1e-5, None, **formula(I8))
    with pytest.raises(RuntimeError, match="residual must be float32"):
        fxq.triton_rms_norm_quantize.dynamic(x, weight, 1e-5, x.half(), **formula(I8))


@pytest.mark.parametrize(
    ("gpu", "changes", "reason"),
    [
        ("sm90", {}, None),
        ("sm90", {"dtype": FNUZ}, "Triton has no float8_e4m3fnuz on sm90"),
        ("sm80", {"dtype": E4M3}, "Triton has no float8_e4m3fn on sm80"),
        ("sm80", {"dtype": E5M2}, "Triton has no float8_e5m2 on sm80"),
        ("sm89", {"dtype": E4M3}, None),
        ("gfx942", {"dtype": FNUZ}, None),
        ("sm90", {"lo": -127.5}, "lo and hi must be integers, got -127.5 and 127"),
        ("sm90", {"hi": 128.0}, "lo and hi must be codes of int8, got -128 and 128"),
        ("sm90", {"dtype": E4M3, "hi": 480.0}, "lo and hi must be codes of float8_e4m3fn, got -128 and 480"),
        ("sm90", {"divide_dtype": torch.float64}, "must be float32, bfloat16 or float16, got float64 and float32"),
        ("sm90", {"k": 0}, "x must not be empty, got [5, 0]"),
        ("sm90", {"k": LONGEST_ROW + 1, "norm": Norm(torch.ones(1), 0.0)}, "a norm must be of at most 32768 elements"),
        ("sm90", {"group": 24, "norm": Norm(torch.ones(1), 0.0)}, "groups behind a norm must be a power of 2, got 24"),
        ("sm90", {"group": 24}, None),
    ],
    ids=str,
)
def test_what_the_kernels_leave_to_pytorch(gpu, changes, reason):
    x = torch.empty(5, changes.get("k", 20), device="meta")
    asked = {**formula(I8), "lo": -128.0, "hi": 127.0, **{name: v for name, v in changes.items() if name != "k"}}
    found = unfit(x, architecture(gpu), **asked)
    assert found is None if reason is None else (found or "").find(reason) >= 0


@needs_triton
def test_a_row_is_one_launch_and_a_large_tensor_two():
    on, meta = architecture("sm90"), partial(torch.empty, device="meta")
    for k, launches in ((4096, 1), (LONGEST_ROW, 1), (LONGEST_ROW + 1, 2)):
        assert len(plan_dynamic(meta(2, k), **formula(I8), on=on).launches) == launches
    per_tensor = formula(I8, granularity="per_tensor")
    assert len(plan_dynamic(meta(8, 4096), **per_tensor, on=on).launches) == 1
    first, second = plan_dynamic(meta(4096, 4096), **per_tensor, on=on).launches
    assert (first.programs, second.programs) == (256, 2048)


# --- compiled for GPUs that are not here ----------------------------------------------------------------------------

meta = partial(torch.empty, device="meta")


def _float8_token(m: int, dtype: torch.dtype, on: Architecture) -> list[Plan]:
    return [plan_dynamic(meta(m, k, dtype=BF16), **formula(dtype), on=on) for k in (4096, 14336, 28672)]


def _float8_group(m: int, dtype: torch.dtype, on: Architecture) -> list[Plan]:
    return [plan_dynamic(meta(m, 4096, dtype=BF16), **formula(dtype), on=on, group=group) for group in (64, 128)]


def _float8_tensor(m: int, dtype: torch.dtype, on: Architecture) -> list[Plan]:
    return [plan_dynamic(meta(m, 4096, dtype=BF16), **formula(dtype, granularity="per_tensor"), on=on)]


def _float8_static(m: int, dtype: torch.dtype, on: Architecture) -> list[Plan]:
    return [plan_static(meta(m, 4096, dtype=F16), meta(()), **given(dtype, reciprocal=True), on=on)]


def _int8_token(m: int, dtype: torch.dtype, on: Architecture) -> list[Plan]:
    return [plan_dynamic(meta(m, k, dtype=BF16), **formula(I8), on=on) for k in (4096, 14336, 28672)]


def _int8_static(m: int, dtype: torch.dtype, on: Architecture) -> list[Plan]:
    return [plan_static(meta(m, 4096, dtype=F32), meta(()), meta((), dtype=I32), **given(I8), on=on)]


def _int8_asymmetric(m: int, dtype: torch.dtype, on: Architecture) -> list[Plan]:
    kinds = ("per_token", "per_tensor")
    return [plan_asymmetric(meta(m, 14336, dtype=BF16), granularity=kind, on=on) for kind in kinds]


def _norm_token(m: int, dtype: torch.dtype, on: Architecture, group: int = 0) -> list[Plan]:
    return [
        plan_dynamic(
            meta(m, k, dtype=BF16),
            **formula(dtype),
            on=on,
            group=group,
            norm=Norm(meta(k, dtype=BF16), 1e-5, meta(m, k, dtype=BF16)),
        )
        for k in (4096, 8192)
    ]


def _norm_group(m: int, dtype: torch.dtype, on: Architecture) -> list[Plan]:
    return _norm_token(m, dtype, on, 128)


def _norm_static(m: int, dtype: torch.dtype, on: Architecture) -> list[Plan]:
    norm = Norm(meta(8192, dtype=BF16), 1e-5)
    return [plan_static(meta(m, 8192, dtype=BF16), meta(()), **given(dtype, reciprocal=True), on=on, norm=norm)]


RECIPES = {
    f.__name__[1:]: f
    for f in (
        _float8_token,
        _float8_group,
        _float8_tensor,
        _float8_static,
        _int8_token,
        _int8_static,
        _int8_asymmetric,
        _norm_token,
        _norm_group,
        _norm_static,
    )
}


def compiled(recipe: str, m: int, gpu: str, dtype: torch.dtype) -> list[Compiled]:
    on = architecture(gpu)
    return [compile_launch(launch, on) for plan in RECIPES[recipe](m, dtype, on) for launch in plan.launches]


def check_resources(binary: Compiled, gpu: str) -> None:
    assert binary.spilled == 0
    assert binary.shared <= architecture(gpu).shared_bytes


@every_variant
@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize("recipe", RECIPES)
def test_kernels_compile_for_sm90(recipe):
    for m in (1, 4096):
        for binary in compiled(recipe, m, "sm90", E4M3):
            check_resources(binary, "sm90")
            ptx = binary.assembly
            # Rounded as the canonical op rounds: no fused, approximate or flushed operation of float32.
            assert not re.findall(r"fma\.rn\.f32|div\.full|div\.approx|sqrt\.approx|rsqrt|\.ftz\.f32", ptx)
            # What takes NaN for a number, or miscompiles beside stores of bytes, is not there.
            assert not re.findall(r"(?:max|min)\.(?:NaN\.)?f32", ptx)
            # A thread loads and stores 16 bytes at a time, wherever a tile has as many for each.
            assert m == 1 or "ld.global.v4.b32" in ptx


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.startswith("int8")])
def test_float8_is_rounded_by_the_hardware(recipe):
    """To the nearest, ties to even, which the interpreter does not do; the value is clamped before."""
    binary = compiled(recipe, 4096, "sm90", E4M3)[-1]
    assert "cvt.rn.satfinite.e4m3x2.f32" in binary.assembly


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
def test_codes_of_other_float8_are_rounded_by_the_hardware_too():
    for gpu, dtype, instruction in (
        ("sm90", E5M2, "cvt.rn.satfinite.e5m2x2.f32"),
        ("gfx942", FNUZ, "v_cvt_pk_fp8_f32"),
        ("gfx942", FNUZ5, "v_cvt_pk_bf8_f32"),
        ("gfx950", E4M3, "cvt"),
    ):
        assert instruction in compiled("float8_static", 4096, gpu, dtype)[-1].assembly


@every_variant
@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("gpu", "dtype"), [("sm80", None), ("sm100", E4M3), ("gfx942", FNUZ)], ids=str)
def test_kernels_compile_for(recipe, gpu, dtype):
    if dtype is None and not recipe.startswith("int8"):
        pytest.skip("no float8 there")
    for binary in compiled(recipe, 4096, gpu, dtype):
        check_resources(binary, gpu)


# --- on a GPU -----------------------------------------------------------------------------------------------------


def float8_here() -> list[torch.dtype]:
    if not torch.cuda.is_available():
        return []
    if torch.version.hip:
        return [FNUZ, FNUZ5] if "gfx942" in torch.cuda.get_device_properties(0).gcnArchName else [E4M3, E5M2]
    return [E4M3, E5M2] if torch.cuda.get_device_capability() >= (8, 9) else [E5M2]


def on_gpu(op, x: Tensor, *args, **kwargs) -> list[Tensor]:
    moved = [each.cuda() if isinstance(each, Tensor) else each for each in args]
    return [each.cpu() for each in op(x.cuda(), *moved, **kwargs)]


GPU_SHAPES = [(1, 1), (1, 4096), (17, 130), (300, 9), (64, 14336), (3, 40000), (1000, 4096)]


# The canonical op is computed on the CPU: on a GPU, PyTorch divides by a number by multiplying with its reciprocal.
@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [I8, U8, *float8_here()], ids=str)
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("granularity", "group"), [("per_token", 0), ("per_tensor", 0), ("per_token", 128)])
@pytest.mark.parametrize("rounded", [F32, BF16], ids=str)
def test_codes_and_scales_on_the_gpu(dtype, x_dtype, granularity, group, rounded):
    arguments = formula(dtype, granularity=granularity, divide_dtype=rounded)
    for x in (*(inputs(m, k, x_dtype) for m, k in GPU_SHAPES), hostile().to(x_dtype), hostile()[5:].to(x_dtype)):
        codes, scale = on_gpu(fxq.triton_quantize_dynamic, x, **arguments, group=group)
        expected = quantize_groups(x, group, **arguments)
        assert_equal(scale, expected[1])
        hidden = None if group else expected[1]
        assert_codes(codes, expected[0], hidden if scale.isfinite().all() or not group else None)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [I8, *float8_here()], ids=str)
@pytest.mark.parametrize("reciprocal", [False, True], ids=["divided", "reciprocal"])
def test_codes_under_a_given_scale_on_the_gpu(dtype, reciprocal):
    arguments = given(dtype, reciprocal=reciprocal)
    for x, value in itertools.product((hostile(), inputs(300, 4096, BF16)), (1.0, 0.03, 0.0, torch.nan)):
        scale = torch.tensor(value)
        codes = fxq.triton_quantize_static(x.cuda(), scale.cuda(), **arguments).cpu()
        assert_codes(codes, fxq.quantize(x, scale, **arguments), scale)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_zero_points_on_the_gpu(granularity):
    for x in (*(inputs(m, k, BF16) for m, k in GPU_SHAPES), hostile(), hostile()[5:]):
        found = on_gpu(fxq.triton_quantize_asymmetric, x, granularity=granularity)
        assert_asymmetric(found, x, Granularity(granularity))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [I8, *float8_here()], ids=str)
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
def test_a_norm_then_its_codes_on_the_gpu(dtype, group, x_dtype):
    for m, k in ((1, 128), (17, 130), (300, 9), (64, 4096), (9, 8192)):
        x, residual, weight = exact_inputs(m, k, x_dtype), exact_inputs(m, k, x_dtype), torch.randn(k).to(x_dtype)
        found = on_gpu(fxq.triton_rms_norm_quantize.dynamic, x, weight, 1e-5, residual, **formula(dtype), group=group)
        expected = fxq.rms_norm_quantize.dynamic(x, weight, 1e-5, residual, **formula(dtype), group=group)
        assert_codes(found[0], expected[0])
        for actual, wanted in zip(found[1:], expected[1:], strict=True):
            assert_equal(actual, wanted)


@pytest.mark.gpu
@needs_triton
def test_two_launches_give_the_same_each_time():
    x = torch.randn(512, 4096, device="cuda", dtype=BF16)
    first = fxq.triton_quantize_dynamic(x, **formula(I8, granularity="per_tensor"))
    for _ in range(20):
        again = fxq.triton_quantize_dynamic(x, **formula(I8, granularity="per_tensor"))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
