"""``quantize_activation`` against its formulas in float64, at the edges of every range."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fx_quant.layers.activation import float8_max, quantize_activation
from fx_quant.scheme import FLOAT8_DTYPES, Granularity, OperandSpec

TENSOR, TOKEN, GROUP = Granularity.PER_TENSOR, Granularity.PER_TOKEN, Granularity.per_group(16)
E4M3, E5M2, FNUZ = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8S = sorted(FLOAT8_DTYPES, key=str)
TINY = 2.0**-126
# A float32 quotient or product is one rounding from the exact one.
ULP = 2.0**-23
NAN, INF = float("nan"), float("inf")


def dynamic(dtype=torch.int8, granularity=TOKEN, *, symmetric=True) -> OperandSpec:
    return OperandSpec(dtype, granularity, dynamic=True, symmetric=symmetric)


def static(dtype=torch.int8, *, symmetric=True) -> OperandSpec:
    return OperandSpec(dtype, TENSOR, symmetric=symmetric)


def over(x: Tensor, granularity: Granularity, reduce) -> Tensor:
    """``reduce`` of what shares a scale, in the shape of the scale."""
    if granularity == TENSOR:
        return reduce(x.flatten(), -1)
    if granularity == TOKEN:
        return reduce(x, -1).unsqueeze(-1)
    return torch.stack([reduce(part, -1) for part in x.split(granularity.columns, 1)], 1)


def spread(scale: Tensor, granularity: Granularity, k: int) -> Tensor:
    """The scale of each code."""
    return scale.repeat_interleave(granularity.columns, 1)[:, :k] if granularity.block else scale


def amax(x: Tensor, dim: int) -> Tensor:
    return x.abs().amax(dim)


INPUTS = {
    "normal": lambda: torch.randn(7, 40),
    "one row": lambda: torch.randn(1, 40),
    "one column": lambda: torch.randn(7, 1),
    "zeros": lambda: torch.zeros(3, 40),
    "a zero row": lambda: torch.cat([torch.zeros(1, 40), torch.randn(2, 40)]),
    "constant rows": lambda: torch.tensor([[3.0], [-5.0], [1e-3]]).expand(3, 40).clone(),
    "positive": lambda: torch.rand(5, 40) + 3,
    "negative": lambda: -torch.rand(5, 40) - 3,
    "outlier": lambda: torch.randn(5, 40).index_fill(1, torch.tensor([3]), 6e4),
    "small": lambda: torch.randn(5, 40) * 1e-7,
    "strided": lambda: torch.randn(40, 7).t(),
}


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("granularity", [TENSOR, TOKEN], ids=str)
def test_int8_symmetric(granularity, name, x_dtype):
    x = INPUTS[name]().to(x_dtype)
    codes, scale, zero_point = quantize_activation(x, dynamic(granularity=granularity))
    exact = over(x.double(), granularity, amax) / 127
    assert zero_point is None and scale.dtype is torch.float32 and codes.dtype is torch.int8
    torch.testing.assert_close(scale.double(), exact.clamp(min=TINY), rtol=ULP, atol=0)
    # Half a step, and the rounding of a quotient of up to 127.
    assert ((codes.double() * scale.double() - x.double()).abs() <= scale.double() * (0.5 + 127 * ULP)).all()
    assert codes.abs().max() <= 127


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("granularity", [TENSOR, TOKEN], ids=str)
def test_int8_asymmetric(granularity, name, x_dtype):
    x = INPUTS[name]().to(x_dtype)
    codes, scale, zero_point = quantize_activation(x, dynamic(granularity=granularity, symmetric=False))
    low = over(x.double(), granularity, torch.amin).clamp(max=0)
    high = over(x.double(), granularity, torch.amax).clamp(min=0)
    exact = torch.where(high == low, 1.0, ((high - low) / 255).clamp(min=TINY))
    assert zero_point.dtype is torch.int32 and zero_point.shape == scale.shape
    # Two quotients and their difference.
    torch.testing.assert_close(scale.double(), exact, rtol=3 * ULP, atol=0)
    assert ((zero_point >= -128) & (zero_point <= 127)).all(), "0 has a code"
    # The zero point is half a step off at most, and so is the code.
    error = ((codes.double() - zero_point) * scale.double() - x.double()).abs()
    assert (error <= scale.double() * (1 + 255 * 4 * ULP)).all()
    assert ((codes == zero_point) | (x != 0)).all(), "0 is exact"


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("granularity", [TENSOR, TOKEN, GROUP], ids=str)
@pytest.mark.parametrize("dtype", FLOAT8S, ids=str)
def test_float8(dtype, granularity, name, x_dtype):
    x = INPUTS[name]().to(x_dtype)
    codes, scale, _ = quantize_activation(x, dynamic(dtype, granularity))
    largest = float8_max(dtype)
    exact = (over(x.double(), granularity, amax) / largest).clamp(min=1 / (largest * 512))
    torch.testing.assert_close(scale.double(), exact, rtol=ULP, atol=0)
    assert codes.shape == x.shape and codes.is_contiguous()
    each = spread(scale, granularity, x.shape[1])
    expected = (x.float() * each.reciprocal()).clamp(-largest, largest).to(dtype)
    assert torch.equal(codes.float(), expected.float())
    # Half a unit of the significand, or half the least subnormal.
    info = torch.finfo(dtype)
    step = (codes.double().abs() * info.eps).clamp(min=info.tiny * info.eps) / 2
    assert ((codes.double() * each.double() - x.double()).abs() <= step * each.double() * (1 + 8 * info.eps)).all()


def test_a_ragged_last_group_has_a_scale_of_its_own():
    x = torch.ones(2, 40)
    x[:, 32:] = 64.0
    _, scale, _ = quantize_activation(x, dynamic(E4M3, GROUP))
    assert torch.equal(scale, torch.tensor([[1 / 448, 1 / 448, 64 / 448]]).expand(2, 3))


@pytest.mark.parametrize("dtype", [torch.int8, E4M3], ids=str)
def test_it_is_what_the_canonical_op_says(dtype):
    x = torch.randn(6, 33)
    codes, scale, _ = quantize_activation(x, dynamic(dtype))
    largest = 127.0 if dtype is torch.int8 else 448.0
    same = torch.ops.fx_quant.quantize(x, scale, dtype=dtype, reciprocal=dtype is E4M3, lo=-largest, hi=largest)
    assert torch.equal(codes.float(), same.float())


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=12))
def test_zero_always_has_an_exact_asymmetric_code(values):
    x = torch.tensor([[0.0, *values]])
    for granularity in (TENSOR, TOKEN):
        codes, scale, zero_point = quantize_activation(x, dynamic(granularity=granularity, symmetric=False))
        assert codes[0, 0] == zero_point and scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("value", [2.5, -2.5, 0.0, 1e-30, -3e38])
def test_a_constant_row_is_finite_and_near(value):
    x = torch.full((2, 8), value)
    codes, scale, zero_point = quantize_activation(x, dynamic(symmetric=False))
    decoded = (codes.double() - zero_point) * scale.double()
    assert scale.isfinite().all() and (scale > 0).all()
    torch.testing.assert_close(decoded, x.double(), rtol=1e-6, atol=0)


# --- NaN, infinity, saturation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [TENSOR, TOKEN, GROUP], ids=str)
def test_nan_propagates_to_float8_codes(granularity):
    x = torch.randn(3, 40)
    x[1, 3] = NAN
    codes, scale, _ = quantize_activation(x, dynamic(E4M3, granularity))
    assert codes.float()[1, 3].isnan()
    assert scale.isnan().sum() == 1
    given, _, _ = quantize_activation(x, static(E4M3), torch.tensor(0.5))
    assert torch.equal(given.float().isnan(), x.isnan())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [TENSOR, TOKEN], ids=str)
def test_nan_makes_a_dynamic_int8_scale_nan(granularity, symmetric):
    x = torch.randn(3, 40)
    x[1, 3] = NAN
    _, scale, _ = quantize_activation(x, dynamic(granularity=granularity, symmetric=symmetric))
    assert scale.isnan().sum() == 1
    assert scale.isnan().flatten()[min(1, scale.numel() - 1)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_infinity_makes_a_dynamic_scale_infinite(symmetric):
    x = torch.randn(3, 40)
    x[1, 3], x[2, 0] = INF, -INF
    _, scale, _ = quantize_activation(x, dynamic(symmetric=symmetric))
    assert scale.flatten().isfinite().tolist() == [True, False, False]


def test_values_beyond_a_static_range_saturate():
    x = torch.tensor([[INF, -INF, 1e38, -1e38, 200.0, -200.0, 0.4]])
    one, shift = torch.tensor(1.0), torch.tensor(3)
    assert quantize_activation(x, static(), one)[0].tolist() == [[127, -128, 127, -128, 127, -128, 0]]
    shifted = quantize_activation(x, static(symmetric=False), one, shift)
    assert shifted[0].tolist() == [[127, -128, 127, -128, 127, -128, 3]]
    float8 = quantize_activation(x, static(E4M3), one)[0]
    assert float8.float().tolist()[0][:6] == [448.0, -448.0, 448.0, -448.0, 192.0, -192.0]
    assert quantize_activation(x, static(FNUZ), one)[0].float().abs().max() == 224


@pytest.mark.parametrize("dtype", [torch.int8, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_floats_have_finite_scales(dtype, symmetric):
    if not symmetric and dtype is not torch.int8:
        return
    x = torch.tensor([[3.4e38, -3.4e38, 1.0]])
    codes, scale, zero_point = quantize_activation(x, dynamic(dtype, symmetric=symmetric))
    decoded = (codes.double() - (0 if zero_point is None else zero_point)) * scale.double()
    assert scale.isfinite().all()
    torch.testing.assert_close(decoded, x.double(), rtol=1e-2, atol=2e36)


# --- static scales and bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_a_static_scale_is_used_as_it_is(x_dtype, shape):
    x = (torch.randn(5, 9) * 20).to(x_dtype)
    scale, shift = torch.full(shape, 0.25), torch.full(shape, -7)
    exact = (x.double() / 0.25).round()
    codes, found, none = quantize_activation(x, static(), scale)
    assert torch.equal(codes.double(), exact.clamp(-128, 127))
    assert found.shape == () and found == 0.25 and none is None
    codes, _, zero_point = quantize_activation(x, static(symmetric=False), scale, shift)
    assert torch.equal(codes.double(), (exact - 7).clamp(-128, 127))
    assert zero_point.shape == () and zero_point == -7 and zero_point.dtype is torch.int32
    codes, _, _ = quantize_activation(x, static(E4M3), scale)
    assert torch.equal(codes.float(), (x.float() * 4).clamp(-448, 448).to(E4M3).float())


@pytest.mark.parametrize("bound", [0.5, 1e-9, 100.0])
def test_scale_ub_bounds_amax(bound):
    x = torch.randn(4, 32) * torch.tensor([[0.01], [1.0], [10.0], [0.0]])
    codes, scale, _ = quantize_activation(x, dynamic(E4M3), scale_ub=torch.tensor([bound]))
    exact = (x.double().abs().amax(-1, keepdim=True).clamp(max=bound) / 448).clamp(min=1 / (448 * 512))
    torch.testing.assert_close(scale.double(), exact, rtol=ULP, atol=0)
    assert torch.equal(codes.float(), (x * scale.reciprocal()).clamp(-448, 448).to(E4M3).float())
    if bound == 100.0:
        assert torch.equal(scale, quantize_activation(x, dynamic(E4M3))[1])


# --- no rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (dynamic(), (0, 1)),
        (dynamic(symmetric=False), (0, 1)),
        (dynamic(granularity=TENSOR), ()),
        (dynamic(granularity=TENSOR, symmetric=False), ()),
        (dynamic(E4M3, TENSOR), ()),
        (dynamic(E4M3, GROUP), (0, 3)),
    ],
    ids=str,
)
def test_no_rows(spec, shape):
    codes, scale, zero_point = quantize_activation(torch.empty(0, 40), spec)
    assert codes.shape == (0, 40) and codes.dtype is spec.dtype and scale.shape == shape
    assert (zero_point is None) == spec.symmetric
    assert scale.isfinite().all()


# --- errors -------------------------------------------------------------------------------------------------------

X, ONE, ZERO = torch.randn(2, 32), torch.tensor(1.0), torch.tensor(0)


@pytest.mark.parametrize(
    ("x", "spec", "given", "message"),
    [
        (X[0], dynamic(), {}, r"x must be \[m, k\] of float32.* got float32 \[32\]"),
        (X.double(), dynamic(), {}, r"got float64 \[2, 32\]"),
        (X.to(E4M3), dynamic(), {}, r"got float8_e4m3fn"),
        (X[:, :0], dynamic(), {}, r"k > 0, got float32 \[2, 0\]"),
        (X, static(), {}, "needs an input scale of one float, got none"),
        (X, static(), {"scale": torch.ones(2)}, r"one float, got float32 \[2\]"),
        (X, static(), {"scale": torch.tensor(1)}, r"one float, got int64 \[\]"),
        (X, dynamic(), {"scale": ONE}, r"computes its scale, got one of shape \[\]"),
        (X, dynamic(symmetric=False), {"zero_point": ZERO}, "dynamic int8 per_token asymmetric takes no zero point"),
        (X, static(), {"scale": ONE, "zero_point": ZERO}, "static int8 per_tensor takes no zero point"),
        (X, static(symmetric=False), {"scale": ONE}, "needs a zero point of one integer, got none"),
        (X, static(symmetric=False), {"scale": ONE, "zero_point": ONE}, r"one integer, got float32 \[\]"),
        (X, static(symmetric=False), {"scale": ONE, "zero_point": torch.zeros(2).int()}, r"got int32 \[2\]"),
        (X, dynamic(), {"scale_ub": ONE}, "scale_ub bounds dynamic per_token float8 scales.* dynamic int8 per_token"),
        (X, dynamic(E4M3, TENSOR), {"scale_ub": ONE}, "got it with dynamic float8_e4m3fn per_tensor"),
        (X, static(E4M3), {"scale": ONE, "scale_ub": ONE}, "got it with static"),
        (X, dynamic(E4M3), {"scale_ub": torch.ones(2)}, r"scale_ub must be one float, got float32 \[2\]"),
        (X, dynamic(torch.uint8), {}, "must be quantized to int8 or float8, got uint8 per_token"),
        (X, OperandSpec(torch.float32), {}, "must be quantized to int8 or float8, got float32"),
        (X, dynamic(E4M3, symmetric=False), {}, "an asymmetric activation must be int8"),
        (X, dynamic(granularity=GROUP), {}, r"must be float8 per_group\(g\)"),
        (X, dynamic(E4M3, Granularity.ANY_GROUP), {}, r"must be float8 per_group\(g\)"),
        (X, replace(dynamic(E4M3, GROUP), scale_dtype=torch.float8_e8m0fnu), {}, r"must have float32 scales, got"),
        (X, dynamic(granularity=Granularity.PER_CHANNEL), {}, "must be per_tensor, per_token or per_group"),
        (X, OperandSpec(torch.int8, TOKEN), {"scale": ONE}, "a static activation must be per_tensor, got int8 per_tok"),
    ],
)
def test_bad_input_is_one_clear_error(x, spec, given, message):
    with pytest.raises(ValueError, match=message):
        quantize_activation(x, spec, **given)


@pytest.mark.parametrize("spec", [dynamic(), dynamic(symmetric=False), dynamic(E4M3, GROUP)], ids=str)
def test_padding_rows_of_zeros_change_no_other_row(spec):
    x = torch.randn(3, 40)
    codes, scale, _ = quantize_activation(x, spec)
    more, wide, _ = quantize_activation(F.pad(x, (0, 0, 0, 2)), spec)
    assert torch.equal(more[:3].float(), codes.float()) and torch.equal(wide[:3], scale)
