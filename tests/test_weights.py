"""Checkpoint transforms and quantization of weights: against float64, and on what a checkpoint may throw at them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_quant.errors import FxQuantError
from fx_quant.layers.quantize_weight import QuantizedWeight, quantize_weight
from fx_quant.scheme import CODE_DTYPES, FLOAT8_DTYPES, Granularity, OperandSpec, dtype_name
from fx_quant.weights import (
    WeightError,
    all_close_1d,
    azp_adjoint,
    convert_to_channelwise,
    merge_input_scales,
    normalize_e4m3fn_to_e4m3fnuz,
    pack_int4,
    per_tensor_dequantize,
    repeat_blocks,
    requantize_with_max_scale,
    unpack_int4,
)

FP8, FNUZ, E5M2 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2
NEVER_LOADED = torch.finfo(torch.float32).min
FLOAT8 = sorted(FLOAT8_DTYPES, key=str)
# (bits of significand after the point, exponent of the smallest subnormal): half a step of float8 is either relative or,
# among subnormals, absolute.
FLOAT8_FORMAT = {FP8: (3, -9), FNUZ: (3, -10), E5M2: (2, -16), torch.float8_e5m2fnuz: (2, -17)}


def every_code(dtype):
    """All 256 bit patterns of a one-byte dtype, [1, 256]."""
    return torch.arange(256).to(torch.uint8).view(dtype)[None]


def float8_weight(n, k, dtype=FP8):
    """Codes over the whole range of ``dtype``, [n, k], the largest magnitude among them."""
    largest = torch.finfo(dtype).max
    x = torch.randn(n, k) * largest / 3
    x.view(-1)[:1] = largest
    return x.clamp(-largest, largest).to(dtype)


def bits(x):
    return x.view(torch.uint8)


def half_step(decoded, scale, dtype):
    """The largest error of one rounding to ``dtype`` times ``scale``, with 1e-6 for the float32 steps before it."""
    digits, smallest = FLOAT8_FORMAT[dtype]
    return torch.maximum(decoded.abs() * 2.0 ** -(digits + 1), scale * 2.0 ** (smallest - 1)) * (1 + 1e-6)


# --- fused shards with one scale each -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channelwise_repeats_each_scale_over_its_rows(shape, dtype):
    scale, widths = torch.tensor([0.5, 1e-6, 2.0]).to(dtype), [3, 0, 5]
    out = convert_to_channelwise(scale.reshape(shape), widths)
    expected = [[scale[i].item()] for i, width in enumerate(widths) for _ in range(width)]
    assert out.dtype is torch.float32 and out.tolist() == expected


def test_channelwise_of_one_scale_and_of_no_rows():
    assert convert_to_channelwise(torch.tensor(0.5), [2, 1]).tolist() == [[0.5]] * 3
    assert convert_to_channelwise(torch.tensor([0.5, 0.25]), (0, 0)).shape == (0, 1)
    assert convert_to_channelwise(torch.tensor([]), []).shape == (0, 1)


def test_channelwise_of_a_checkpoint_fused_on_disk_is_its_one_scale():
    out = convert_to_channelwise(torch.tensor([0.5, NEVER_LOADED, NEVER_LOADED]), [2, 3, 1])
    assert out.tolist() == [[0.5]] * 6


@pytest.mark.parametrize("dtype", sorted(CODE_DTYPES, key=str), ids=dtype_name)
@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-6, 1e-30, 0.0])
def test_per_tensor_dequantize_is_one_float32_rounding_of_the_product(dtype, scale):
    codes = every_code(dtype)
    exact = codes.to(torch.float64) * torch.tensor(scale, dtype=torch.float32).double()
    for given_scale in (scale, torch.tensor([scale]), torch.tensor(scale)):
        out = per_tensor_dequantize(codes, given_scale)
        assert out.dtype is torch.float32
        torch.testing.assert_close(out, exact.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT8, ids=dtype_name)
@pytest.mark.parametrize("scales", [(1e-6, 3e-6), (0.02, 0.01, 0.019), (1e-3, 1.0), (1e-38, 7e-39)])
def test_requantize_is_within_half_a_step_of_the_shared_scale(dtype, scales):
    widths = [5 + 2 * i for i in range(len(scales))]
    weight = float8_weight(sum(widths), 33, dtype)
    max_scale, out = requantize_with_max_scale(weight, torch.tensor(scales), widths)
    assert max_scale.shape == () and max_scale == torch.tensor(scales).max() and out.dtype is dtype
    own = torch.tensor(scales).double().repeat_interleave(torch.tensor(widths))[:, None]
    before, after = weight.double() * own, out.double() * max_scale.double()
    error = (after - before).abs()
    assert (error <= half_step(before, max_scale.double(), dtype)).all()
    assert error.max() > 0  # there was something to lose
    # Rounded once: through float16 it would be twice, and some ties would fall on the other side.
    assert torch.equal(bits(out), bits((before / max_scale.double()).float().to(dtype)))
    largest_shard = own[:, 0] == own.max()
    assert torch.equal(bits(out)[largest_shard], bits(weight)[largest_shard])


def test_requantize_keeps_small_scales_that_float16_loses():
    # Small codes, as beside an outlier: the values are near the smallest that float16 has, 6e-8.
    weight, (first, second) = (torch.randn(64, 256) * 0.06).to(FP8), torch.tensor([0.9e-6, 1e-6])
    exact = torch.cat([weight[:32].double() * first.double(), weight[32:].double() * second.double()])

    def relative_error(decoded):
        return ((decoded.double() - exact).norm() / exact.norm()).item()

    half = torch.cat([weight[:32].half() * first, weight[32:].half() * second])
    seed = (half.float() / second).clamp(-448, 448).to(FP8).float() * second
    assert half.dtype is torch.float16 and relative_error(half) > 0.27 and relative_error(seed) > 0.27

    full = torch.cat([per_tensor_dequantize(weight[:32], first), per_tensor_dequantize(weight[32:], second)])
    _, ours = requantize_with_max_scale(weight, torch.stack([first, second]), [32, 32])
    assert relative_error(full) < 1e-7 and relative_error(ours.float() * second) < 0.02


def test_requantize_saturates_and_keeps_nan():
    codes = torch.tensor([[448.0, -448.0, float("nan"), -0.0]]).to(FP8).repeat(2, 1)
    below = math.nextafter(1.0, 0.0)
    _, out = requantize_with_max_scale(codes, torch.tensor([torch.tensor(below).item(), 1.0]), [1, 1])
    assert torch.equal(bits(out), bits(codes))
    _, out = requantize_with_max_scale(codes, torch.tensor([0.999999, 1.0]), [1, 1])
    assert torch.equal(bits(out), bits(codes))
    _, out = requantize_with_max_scale(codes, torch.tensor([1e-30, 1.0]), [1, 1])
    assert out[0, :2].float().tolist() == [0.0, 0.0] and out[0, 2].float().isnan()


def test_requantize_of_zero_scales_makes_no_nan():
    weight = float8_weight(4, 8)
    max_scale, out = requantize_with_max_scale(weight, torch.zeros(2), [2, 2])
    assert max_scale == 0 and torch.equal(bits(out), bits(weight))
    _, out = requantize_with_max_scale(weight, torch.tensor([0.0, 1.0]), [2, 2])
    assert not out.float().isnan().any() and out[:2].float().abs().max() == 0


@pytest.mark.parametrize("never", [NEVER_LOADED, float("-inf")])
@pytest.mark.parametrize("widths", [[2, 3, 1], [2, 4, 0], [6, 0, 0]])
def test_requantize_leaves_a_checkpoint_fused_on_disk_alone(never, widths):
    weight = float8_weight(6, 8)
    max_scale, out = requantize_with_max_scale(weight, torch.tensor([0.5, never, never]), widths)
    assert max_scale == 0.5 and torch.equal(bits(out), bits(weight))


def test_requantize_ignores_shards_without_rows():
    weight = float8_weight(5, 8)
    max_scale, out = requantize_with_max_scale(weight, torch.tensor([0.5, NEVER_LOADED, 0.25, 9.0]), [2, 0, 3, 0])
    assert max_scale == 0.5 and torch.equal(bits(out)[:2], bits(weight)[:2])
    assert not torch.equal(bits(out)[2:], bits(weight)[2:])
    max_scale, out = requantize_with_max_scale(weight[:0], torch.tensor([0.5]), [0])
    assert max_scale == 1 and out.shape == (0, 8)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5])])
def test_requantize_has_nothing_to_do_with_one_scale(scale):
    weight = float8_weight(5, 8)
    max_scale, out = requantize_with_max_scale(weight, scale, [2, 3])
    assert max_scale == 0.5 and torch.equal(bits(out), bits(weight))


def test_requantize_leaves_its_input_alone():
    weight, scale = float8_weight(8, 5).t(), torch.tensor([0.5, 0.7])
    before = weight.clone()
    max_scale, out = requantize_with_max_scale(torch.nn.Parameter(weight), scale, [2, 3])
    assert torch.equal(bits(weight), bits(before)) and scale.tolist() == torch.tensor([0.5, 0.7]).tolist()
    assert max_scale == scale[1] and not torch.equal(bits(out), bits(before))


# --- all_close_1d ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "close"),
    [
        ([], True),
        ([0.0], True),
        ([0.0, 0.0], True),
        ([1.0, 1.0 + 5e-6], True),
        ([1.0, 1.0 + 2e-5], False),
        ([1e-6, 1.01e-6], False),  # torch.allclose says equal
        ([1e-6, 1.000001e-6], True),
        ([1e-30, 1.01e-30], False),
        ([0.0, 1e-12], False),
        ([-1.0, 1.0], False),
        ([float("nan"), 1.0], False),
        ([float("nan")], False),
        ([float("inf"), float("inf")], False),
        ([1.0, float("inf")], False),
    ],
)
def test_all_close_1d_is_relative(values, close):
    for x in itertools.permutations(values):
        assert all_close_1d(torch.tensor(x)) is close


def test_all_close_1d_sees_what_allclose_does_not():
    x = torch.tensor([1e-6, 1.01e-6])
    assert torch.allclose(x[0], x[1]) and not all_close_1d(x) and all_close_1d(x, rtol=0.02)


# --- fnuz -----------------------------------------------------------------------------------------------------


def test_fnuz_decodes_to_the_same_values_for_every_code():
    codes, scale = every_code(FP8), torch.tensor([0.3])
    weight, weight_scale, input_scale = normalize_e4m3fn_to_e4m3fnuz(codes, scale, torch.tensor(0.7))
    assert weight.dtype is FNUZ and weight_scale == scale * 2 and input_scale == torch.tensor(0.7) * 2
    expected, actual = codes.double() * scale.double(), weight.double() * weight_scale.double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().sum() == 2  # else nothing was shown about them
    assert bits(weight)[0, 0x80] == 0 and bits(weight)[0, 0x7F] == bits(weight)[0, 0xFF] == 0x80


def test_fnuz_leaves_its_input_alone():
    codes, scale, activation = every_code(FP8).clone(), torch.tensor([0.3]), torch.tensor([0.7])
    before = codes.clone()
    out, *_ = normalize_e4m3fn_to_e4m3fnuz(codes, scale, activation)
    assert torch.equal(bits(codes), bits(before))
    assert scale == torch.tensor(0.3) and activation == torch.tensor(0.7)
    assert not torch.equal(bits(codes), bits(out))


def test_fnuz_takes_any_layout_and_no_input_scale():
    codes = every_code(FP8).reshape(16, 16)
    out, _, none = normalize_e4m3fn_to_e4m3fnuz(codes.t()[:, ::2], torch.ones(16, 1, requires_grad=True))
    assert none is None and torch.equal(
        bits(out), bits(normalize_e4m3fn_to_e4m3fnuz(codes, torch.ones(1))[0]).t()[:, ::2]
    )
    assert normalize_e4m3fn_to_e4m3fnuz(codes[:0], torch.ones(0, 1))[0].shape == (0, 16)


def test_a_fused_checkpoint_is_still_one_after_fnuz():
    weight, scale, _ = normalize_e4m3fn_to_e4m3fnuz(float8_weight(6, 8), torch.tensor([0.5, NEVER_LOADED]))
    max_scale, out = requantize_with_max_scale(weight, scale, [4, 2])
    assert max_scale == 1.0 and torch.equal(bits(out), bits(weight))


# --- activations' scales and zero points ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("azp", [None, -128, 37, torch.tensor(5), torch.tensor([-7], dtype=torch.int8)])
@pytest.mark.parametrize(("n", "k"), [(5, 33), (1, 1), (3, 0), (0, 4)])
def test_azp_adjoint_is_what_a_zero_point_adds(dtype, azp, n, k):
    info = torch.iinfo(dtype)
    weight = torch.randint(info.min, info.max + 1, (n, k)).to(dtype)
    out = azp_adjoint(weight, azp)
    a = torch.randint(-128, 128, (4, k)).double()
    zero_point = 1 if azp is None else int(azp)
    b = weight.double().t()
    assert out.dtype is torch.int32 and out.shape == (1, n)
    assert torch.equal((a - zero_point) @ b, a @ b - out.double())


def test_azp_adjoint_wraps_as_the_accumulator_does():
    weight = torch.full((1, 2**18), -128, dtype=torch.int8)
    exact = 2**18 * 128 * 128
    assert azp_adjoint(weight, -128).item() == (exact + 2**31) % 2**32 - 2**31 != exact


def reference_merge(scales, azps):
    """rmin, rmax, scale and unrounded azp in Python floats (float64)."""
    high = max([0.0, *(s * (127 - z) for s, z in zip(scales, azps, strict=True))])
    low = min([0.0, *(s * (-128 - z) for s, z in zip(scales, azps, strict=True))])
    scale = (high - low) / 255
    return low, high, scale, -128 - low / scale


def test_merged_azp_is_rounded_where_upstream_truncates():
    generator = torch.Generator().manual_seed(0)
    differ = 0
    for shards in (torch.randint(1, 5, (3000,), generator=generator)).tolist():
        scales = torch.rand(shards, generator=generator) * 10.0 ** torch.randint(-6, 1, (1,), generator=generator)
        azps = torch.randint(-128, 128, (shards,), generator=generator, dtype=torch.int32)
        scale, azp = merge_input_scales(scales, azps)
        low, high, expected, unrounded = reference_merge(scales.tolist(), azps.tolist())
        assert scale.item() == torch.tensor(expected).item()
        assert azp.dtype is torch.int32 and azp.item() == round(unrounded) and -128 <= azp.item() <= 127
        differ += int(unrounded) != azp.item()
        # The merged codes reach every shard's range, up to the half step by which the zero point was rounded.
        reach = expected * (0.5 + 1e-6)
        assert scale.item() * (127 - azp.item()) >= high - reach and scale.item() * (-128 - azp.item()) <= low + reach
    assert differ > 500


@pytest.mark.parametrize("azp", [-128, -1, 0, 37, 127])
def test_one_shard_keeps_its_scale_and_azp(azp):
    for scale in torch.logspace(-6, 2, 50):
        merged, same = merge_input_scales(scale[None], torch.tensor([azp]))
        assert same.item() == azp and merged.item() == pytest.approx(scale.item(), rel=2**-23)


def test_merged_range_holds_zero_even_if_no_shards_does():
    # Both shards hold positive values only: [5, 260] and [10, 265].
    scale, azp = merge_input_scales(torch.tensor([1.0, 1.0]), torch.tensor([-133, -138]))
    assert azp.item() == -128 and scale.item() == pytest.approx(265 / 255)
    scale, azp = merge_input_scales(torch.tensor([1.0]), torch.tensor([200]))
    assert azp.item() == 127 and scale.item() == pytest.approx(328 / 255)


def test_merged_symmetric_scale_is_the_largest():
    scale, azp = merge_input_scales(torch.tensor([0.5, 2.0, 1.0], dtype=torch.bfloat16))
    assert azp is None and scale.item() == 2.0 and scale.shape == () and scale.dtype is torch.float32
    assert merge_input_scales(torch.tensor(0.5))[0].item() == 0.5


@pytest.mark.parametrize("scales", [[0.0, 0.0], [1e-45]])
def test_merged_empty_range_is_finite(scales):
    scale, azp = merge_input_scales(torch.tensor(scales), torch.tensor([3] * len(scales)))
    assert scale.item() > 0 and torch.isfinite(scale) and -128 <= azp.item() <= 127
    assert merge_input_scales(torch.zeros(2))[0].item() == 1.0


def test_merged_input_scales_ignore_those_never_loaded():
    scales, azps = torch.tensor([0.5, NEVER_LOADED, 0.25]), torch.tensor([3, 99, -4])
    assert merge_input_scales(scales)[0].item() == 0.5
    assert merge_input_scales(scales, azps) == merge_input_scales(scales[::2], azps[::2])


# --- blocks ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 9), k=st.integers(0, 9), rows=st.integers(1, 10), columns=st.integers(1, 10))
def test_what_blocks_share_is_repeated_over_them(n, k, rows, columns):
    grid = torch.rand(-(-n // rows), -(-k // columns))
    out = repeat_blocks(grid, (rows, columns), (n, k))
    expected = [[grid[i // rows, j // columns].item() for j in range(k)] for i in range(n)]
    assert out.is_contiguous() and out.shape == (n, k) and out.tolist() == expected


# --- int4 -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 5), half=st.integers(0, 9), signed=st.booleans(), data=st.data())
def test_int4_round_trip(n, half, signed, data):
    low = -8 if signed else 0
    row = st.lists(st.integers(low, low + 15), min_size=2 * half, max_size=2 * half)
    values = data.draw(st.lists(row, min_size=n, max_size=n))
    codes = torch.tensor(values, dtype=torch.int8 if signed else torch.uint8).reshape(n, 2 * half)
    packed = pack_int4(codes)
    assert packed.dtype is torch.uint8
    assert packed.tolist() == [[(r[2 * j] - low) + 16 * (r[2 * j + 1] - low) for j in range(half)] for r in values]
    back = unpack_int4(packed, torch.int4 if signed else torch.uint4)
    assert back.dtype is codes.dtype and torch.equal(back, codes)


def test_every_byte_is_two_codes():
    packed = every_code(torch.uint8)
    for dtype in (torch.int4, torch.uint4):
        assert torch.equal(pack_int4(unpack_int4(packed, dtype)), packed)
    assert unpack_int4(torch.tensor([[0xF0]], dtype=torch.uint8), torch.int4).tolist() == [[-8, 7]]
    assert unpack_int4(torch.tensor([[0xF0]], dtype=torch.uint8), torch.uint4).tolist() == [[0, 15]]


# --- quantize_weight ------------------------------------------------------------------------------------------

PER_TENSOR, PER_CHANNEL = Granularity.PER_TENSOR, Granularity.PER_CHANNEL
GRANULARITIES = [PER_TENSOR, PER_CHANNEL, Granularity.per_group(4), Granularity.per_block(3, 5)]
INTEGER_SPECS = [(torch.int8, True), (torch.int4, True)] + [
    (dtype, False) for dtype in (torch.int8, torch.uint8, torch.int4, torch.uint4)
]
CODE_RANGE = {
    (torch.int8, True): (-127, 127),
    (torch.int4, True): (-7, 7),
    (torch.int8, False): (-128, 127),
    (torch.uint8, False): (0, 255),
    (torch.int4, False): (-8, 7),
    (torch.uint4, False): (0, 15),
}


def regions(granularity, n, k):
    """(index of the scale, rows, columns) of everything that shares a scale, spelled out."""
    if granularity == PER_TENSOR:
        return [((), slice(n), slice(k))]
    rows, columns = granularity.block or (1, max(k, 1))
    across = 1 if granularity == PER_CHANNEL else -(-k // columns)
    return [
        ((i, j), slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        for i in range(-(-n // rows))
        for j in range(across)
    ]


def scale_shape(granularity, n, k):
    return {
        "per_tensor": (),
        "per_channel": (n, 1),
        "per_group": (n, -(-k // 4)),
        "per_block": (-(-n // 3), -(-k // 5)),
    }[granularity.kind]


def check_integer(weight, spec):
    """Codes, scales, zero points and the error bound of ``quantize_weight``, region by region in float64."""
    before = weight.clone()
    q = quantize_weight(weight, spec)
    assert torch.equal(weight, before)
    low, high = CODE_RANGE[spec.dtype, spec.symmetric]
    n, k = weight.shape
    assert q.codes.shape == (n, k) and q.codes.dtype in (torch.int8, torch.uint8)
    assert q.scale.shape == scale_shape(spec.granularity, n, k) and q.scale.dtype is torch.float32
    assert q.scale.isfinite().all() and (q.scale > 0).all()
    assert not q.codes.numel() or (low <= q.codes.min() and q.codes.max() <= high)
    decoded = q.dequantize()
    assert decoded.dtype is torch.float32 and decoded.shape == (n, k)
    for index, rows, columns in regions(spec.granularity, n, k):
        w, scale = weight[rows, columns].double(), q.scale[index].double()
        zero = 0 if q.zero_point is None else int(q.zero_point[index])
        assert low <= zero <= high
        exact = (q.codes[rows, columns].double() - zero) * scale
        torch.testing.assert_close(decoded[rows, columns].double(), exact, rtol=2**-24, atol=1e-45)
        # Half a step; float32 rounds w / scale and the scale, at codes of up to 256, and the range asymmetrically.
        assert ((exact - w).abs() <= scale * (0.5 + 256 * 2**-22)).all()
        if w.abs().max() == 0 if w.numel() else True:
            assert scale == 1 and (exact == 0).all()
        elif scale > torch.finfo(torch.float32).tiny:
            span = 2 * w.abs().max() if spec.symmetric else w.max().clamp(min=0) - w.min().clamp(max=0)
            assert scale.item() == pytest.approx(span.item() / (high - low), rel=1e-6, abs=1e-44)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(("dtype", "symmetric"), INTEGER_SPECS)
@pytest.mark.parametrize(("n", "k"), [(6, 10), (7, 11), (1, 1), (0, 5), (5, 0), (0, 0)])
def test_integer_codes_are_within_half_a_step(granularity, dtype, symmetric, n, k):
    weight = torch.randn(n, k) * 10 ** (torch.rand(n, 1) * 12 - 8)
    weight[: n // 3] = 0
    weight[:, : k // 2] = weight[:, : k // 2].abs()  # groups of one sign
    check_integer(weight, OperandSpec(dtype, granularity, symmetric=symmetric))


@st.composite
def weights(draw):
    n, k = draw(st.integers(1, 7)), draw(st.integers(1, 11))
    value = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1e-45, 1e-38, -1e-6, 0.5, 1.5])
    return torch.tensor(draw(st.lists(value, min_size=n * k, max_size=n * k))).reshape(n, k)


@settings(max_examples=300, deadline=None)
@given(weights(), st.sampled_from(GRANULARITIES), st.sampled_from(INTEGER_SPECS))
def test_integer_error_bound_holds_for_any_weight(weight, granularity, kind):
    check_integer(weight, OperandSpec(kind[0], granularity, symmetric=kind[1]))


@settings(max_examples=200, deadline=None)
@given(weights(), st.sampled_from(GRANULARITIES), st.sampled_from(FLOAT8))
def test_float8_error_bound_holds_for_any_weight(weight, granularity, dtype):
    q = quantize_weight(weight, OperandSpec(dtype, granularity))
    assert q.codes.dtype is dtype and q.zero_point is None and q.codes.float().isfinite().all()
    assert (q.scale > 0).all() and q.scale.shape == scale_shape(granularity, *weight.shape)
    decoded = q.dequantize()
    for index, rows, columns in regions(granularity, *weight.shape):
        w, scale = weight[rows, columns].double(), q.scale[index].double()
        exact = q.codes[rows, columns].double() * scale
        torch.testing.assert_close(decoded[rows, columns].double(), exact, rtol=2**-24, atol=1e-45)
        assert ((exact - w).abs() <= half_step(w, scale, dtype)).all()


@pytest.mark.parametrize("dtype", FLOAT8, ids=dtype_name)
def test_the_largest_weight_has_the_largest_code(dtype):
    weight = torch.randn(5, 9)
    largest = 224.0 if dtype is FNUZ else torch.finfo(dtype).max
    q = quantize_weight(weight, OperandSpec(dtype, PER_CHANNEL))
    assert (q.codes.float().abs().amax(1) == largest).all()


def test_fnuz_codes_are_those_of_a_normalized_e4m3fn_weight():
    weight = torch.randn(9, 17) * 10 ** (torch.rand(9, 17) * 8 - 6)
    fn = quantize_weight(weight, OperandSpec(FP8, PER_CHANNEL))
    fnuz = quantize_weight(weight, OperandSpec(FNUZ, PER_CHANNEL))
    codes, scale, _ = normalize_e4m3fn_to_e4m3fnuz(fn.codes, fn.scale)
    assert torch.equal(bits(fnuz.codes), bits(codes)) and torch.equal(fnuz.scale, scale)
    assert (bits(fn.codes) == 0x80).any()  # a negative zero was among them


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4, FP8], ids=str)
def test_symmetric_codes_of_the_negative_are_the_negative_codes(dtype):
    weight = torch.cat([torch.randn(4, 8), torch.arange(-8.0, 8).reshape(2, 8)])
    spec = OperandSpec(dtype, PER_CHANNEL)
    plus, minus = quantize_weight(weight, spec), quantize_weight(-weight, spec)
    assert torch.equal(plus.codes.float(), -minus.codes.float()) and torch.equal(plus.scale, minus.scale)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int4, torch.uint4], ids=str)
def test_asymmetric_zero_is_exact_and_codes_use_the_whole_range(dtype):
    weight = torch.linspace(-3, 5, 100).reshape(4, 25)
    weight[0, 0], weight[3, 3] = -3.0, 0.0
    q = quantize_weight(weight, OperandSpec(dtype, PER_TENSOR, symmetric=False))
    low, high = CODE_RANGE[dtype, False]
    assert (q.codes.min(), q.codes.max()) == (low, high) and q.dequantize()[3, 3] == 0


def test_a_range_wider_than_float32_has_a_finite_scale():
    weight = torch.tensor([[3e38, -3e38, 0.0]])
    check_integer(weight, OperandSpec(torch.int8, PER_CHANNEL, symmetric=False))


def test_a_tie_at_the_end_of_an_asymmetric_range_saturates():
    # scale 1, zero_point round(-26.5) = -26, and 153.5 rounds to 154: 128 before the clamp.
    weight = torch.tensor([[-101.5, 153.5]])
    q = quantize_weight(weight, OperandSpec(torch.int8, PER_CHANNEL, symmetric=False))
    assert q.codes.tolist() == [[-128, 127]] and q.zero_point.tolist() == [[-26]]
    check_integer(weight, q.spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_half_weights_are_quantized_in_float32(dtype):
    weight = torch.randn(6, 8).to(dtype)
    spec = OperandSpec(torch.int8, PER_CHANNEL)
    half, full = quantize_weight(weight, spec), quantize_weight(weight.float(), spec)
    assert torch.equal(half.codes, full.codes) and torch.equal(half.scale, full.scale)


def test_a_parameter_leaves_no_gradient_behind():
    q = quantize_weight(torch.nn.Parameter(torch.randn(3, 4)), OperandSpec(FP8, PER_CHANNEL))
    assert not q.scale.requires_grad and not q.codes.requires_grad and not q.dequantize().requires_grad


def test_any_layout_of_the_weight_gives_the_same_codes():
    weight = torch.randn(8, 6)
    spec = OperandSpec(torch.int8, Granularity.per_block(3, 5))
    one, other = quantize_weight(weight.t(), spec), quantize_weight(weight.t().contiguous(), spec)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


def test_int4_codes_of_a_quantized_weight_pack():
    for dtype, symmetric in ((torch.int4, True), (torch.int4, False), (torch.uint4, False)):
        q = quantize_weight(torch.randn(5, 8), OperandSpec(dtype, Granularity.per_group(3), symmetric=symmetric))
        assert torch.equal(unpack_int4(pack_int4(q.codes), dtype), q.codes)


def test_blocks_of_a_quantized_weight_decode_as_a_checkpoints():
    q = quantize_weight(torch.randn(7, 11), OperandSpec(FP8, Granularity.per_block(3, 5)))
    assert torch.equal(q.dequantize(), q.codes.float() * repeat_blocks(q.scale, (3, 5), (7, 11)))


def test_a_quantized_weight_is_frozen_and_compares_by_identity():
    q = quantize_weight(torch.ones(1, 1), OperandSpec(torch.int8, PER_TENSOR))
    with pytest.raises(AttributeError):
        q.codes = q.scale  # pyrefly: ignore
    assert q == q and q != QuantizedWeight(q.codes, q.scale, None, q.spec)


# --- errors ---------------------------------------------------------------------------------------------------

F8, I8, ONE = torch.zeros(4, 6).to(FP8), torch.zeros(4, 6, dtype=torch.int8), torch.ones(1)
NAN = float("nan")


def spec(dtype=torch.int8, granularity=PER_CHANNEL, **more):
    return OperandSpec(dtype, granularity, **more)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert_to_channelwise(torch.ones(2), [1, 1, 1]), r"each of the 3 logical_widths, got 2"),
        (lambda: convert_to_channelwise(torch.ones(2), [1, -1]), r"rows of each shard, got \[1, -1\]"),
        (lambda: convert_to_channelwise(torch.tensor([1.0, -2.0]), [1, 1]), r"got 1 of 2 .* \(first: -2\)"),
        (lambda: convert_to_channelwise(torch.tensor([NAN, 1.0]), [1, 1]), r"finite .* \(first: nan\)"),
        (lambda: convert_to_channelwise(torch.tensor([1.0, NAN]), [1, 1]), r"finite .* \(first: nan\)"),
        (lambda: convert_to_channelwise(torch.tensor([NEVER_LOADED, 1.0]), [1, 1]), r"load every shard's scale"),
        (lambda: convert_to_channelwise(torch.ones(1, dtype=torch.int32), [1]), r"float tensor .* got int32"),
        (lambda: convert_to_channelwise(torch.tensor([NEVER_LOADED] * 2), [1, 1]), r"got 0; load the missing"),
        (lambda: per_tensor_dequantize(torch.ones(2, 2), 1.0), r"int8, uint8 or float8, got float32"),
        (lambda: per_tensor_dequantize(F8, torch.ones(2)), r"one element, got \[2\]"),
        (lambda: per_tensor_dequantize(F8, -1.0), r"not negative"),
        (lambda: requantize_with_max_scale(I8, ONE, [4]), r"dtype float8.* got int8"),
        (lambda: requantize_with_max_scale(F8[0], ONE, [6]), r"must be \[n, k\], got \[6\]"),
        (lambda: requantize_with_max_scale(F8, torch.ones(2), [2, 3]), r"sum to the n = 4 of weight, got 5"),
        (lambda: requantize_with_max_scale(F8, torch.tensor([0.5, 0.25, NEVER_LOADED]), [2, 1, 1]), r"fused, got 2"),
        (lambda: requantize_with_max_scale(F8, torch.tensor([NEVER_LOADED, 1.0]), [2, 2]), r"load every shard's"),
        (lambda: requantize_with_max_scale(F8, torch.tensor([1.0, float("inf")]), [2, 2]), r"\(first: inf\)"),
        (lambda: all_close_1d(torch.ones(1, 2)), r"1-D, got \[1, 2\]"),
        (lambda: all_close_1d(torch.ones(2), rtol=-1), r"rtol must not be negative"),
        (lambda: normalize_e4m3fn_to_e4m3fnuz(F8.view(FNUZ), ONE), r"float8_e4m3fn, got float8_e4m3fnuz"),
        (lambda: normalize_e4m3fn_to_e4m3fnuz(F8, ONE.to(torch.float8_e8m0fnu)), r"weight_scale must be a float"),
        (lambda: normalize_e4m3fn_to_e4m3fnuz(F8, ONE, ONE.int()), r"input_scale must be a float tensor"),
        (lambda: azp_adjoint(F8), r"dtype int8, uint8, got float8_e4m3fn"),
        (lambda: azp_adjoint(I8, torch.ones(2, dtype=torch.int32)), r"one element, got \[2\]"),
        (lambda: azp_adjoint(I8, torch.ones(1)), r"integer tensor .* got float32"),
        (lambda: azp_adjoint(I8, 1.5), r"azp must be an integer, got 1.5"),
        (lambda: merge_input_scales(torch.tensor([])), r"a loaded scale, got none of 0"),
        (lambda: merge_input_scales(torch.tensor([NEVER_LOADED])), r"a loaded scale, got none of 1"),
        (lambda: merge_input_scales(torch.tensor([1.0, -1.0])), r"not negative"),
        (lambda: merge_input_scales(torch.tensor([1.0, NAN])), r"\(first: nan\)"),
        (lambda: merge_input_scales(torch.ones(2), torch.ones(2)), r"azps must be an integer tensor"),
        (lambda: merge_input_scales(torch.ones(2), torch.ones(3, dtype=torch.int32)), r"each of the 2 scales, got 3"),
        (lambda: pack_int4(I8[:, :5]), r"even k, got 5"),
        (lambda: pack_int4(I8 - 9), r"-8..7, got 24 outside"),
        (lambda: pack_int4(torch.full((1, 2), 16, dtype=torch.uint8)), r"0..15, got 2 outside"),
        (lambda: pack_int4(torch.ones(1, 2, dtype=torch.int32)), r"dtype int8, uint8, got int32"),
        (lambda: unpack_int4(I8, torch.int4), r"dtype uint8, got int8"),
        (lambda: unpack_int4(I8.view(torch.uint8), torch.int8), r"torch.int4 or torch.uint4, got int8"),
        (
            lambda: quantize_weight(torch.tensor([[1, NAN, float("inf"), -float("inf")]]), spec()),
            r"1 NaN and 2 inf.* 4 v",
        ),
        (lambda: quantize_weight(torch.ones(2, 2).double(), spec()), r"float16, got float64"),
        (lambda: quantize_weight(torch.ones(2), spec()), r"\[n, k\], got \[2\]"),
        (lambda: quantize_weight(F8, spec()), r"dequantize codes"),
        (lambda: quantize_weight(torch.ones(2, 2), spec(torch.int32)), r"spec.dtype must be .* got int32"),
        (lambda: quantize_weight(torch.ones(2, 2), spec(FP8, symmetric=False)), r"asymmetric .* float8_e4m3fn"),
        (lambda: quantize_weight(torch.ones(2, 2), spec(torch.uint8)), r"signed dtype, got uint8"),
        (lambda: quantize_weight(torch.ones(2, 2), spec(torch.uint4)), r"signed dtype, got uint4"),
        (lambda: quantize_weight(torch.ones(2, 2), spec(dynamic=True)), r"dynamic is for activations"),
        (lambda: quantize_weight(torch.ones(2, 2), spec(granularity=Granularity.PER_TOKEN)), r"got per_token"),
        (
            lambda: quantize_weight(torch.ones(2, 2), spec(scale_dtype=torch.float8_e8m0fnu)),
            r"spec.scale_dtype must be float32, bfloat16 or float16, got int8 per_channel float8_e8m0fnu scales",
        ),
        (lambda: quantize_weight(torch.ones(2, 2), spec(granularity=Granularity.UNSCALED)), r"got unscaled"),
        (lambda: quantize_weight(torch.ones(2, 2), spec(granularity=Granularity.ANY_GROUP)), r"got per_group"),
        (lambda: quantize_weight(torch.ones(2, 2), spec(granularity=Granularity.per_group(0))), r"per_group\(0\)"),
    ],
)
def test_an_error_says_what_must_hold_and_what_was_found(call, message):
    with pytest.raises(WeightError, match=message) as caught:
        call()
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FxQuantError)
    assert "\n" not in str(caught.value)


def test_importing_the_transforms_loads_neither_inductor_nor_triton(printed):
    found = printed(
        "import sys, torch; before = set(sys.modules); import fx_quant.layers.quantize_weight;"
        "print([m for m in set(sys.modules) - before if m.startswith(('torch._inductor', 'triton'))])"
    )
    assert found.strip() == "[]"
