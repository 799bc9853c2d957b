"""Canonical ops against an implementation in float64 (or numpy) that shares nothing with theirs."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import fx_quant.ops  # noqa: F401  (registers the ops)
from fx_quant.scheme import Numerics
from tests.models import inputs
from tests.tolerances import assert_within

ops = torch.ops.fx_quant
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RANGES = {torch.int8: (-128.0, 127.0), torch.uint8: (0.0, 255.0), E4M3: (-448.0, 448.0), E5M2: (-57344.0, 57344.0)}


def formula(dtype: torch.dtype = torch.int8, **changes: object) -> dict[str, object]:
    """Arguments of ``quantize.dynamic``: per-token absmax with a floor, unless changed."""
    lo, hi = RANGES[dtype]
    arguments = {
        "dtype": dtype,
        "granularity": "per_token",
        "divisor": hi,
        "divide_dtype": torch.float32,
        "floor": 1e-5,
        "floor_on": "scale",
        "scale_dtype": torch.float32,
        "reciprocal": False,
        "lo": lo,
        "hi": hi,
    }
    return {**arguments, **changes}


# --- the oracle: exact arithmetic -------------------------------------------------------------------------------


def code_values(dtype: torch.dtype) -> Tensor:
    """Every finite value of a code dtype, ascending, float64."""
    if not dtype.is_floating_point:
        lo, hi = RANGES[dtype]
        return torch.arange(lo, hi + 1, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).double()
    return values[values.isfinite()].unique()


def assert_codes_nearest(codes: Tensor, quotient: Tensor, lo: float, hi: float) -> None:
    """Each code is the value of its dtype that is nearest to the exact ``quotient``, cut to ``[lo, hi]``.

    A code may be the second nearest where the quotient lies within two float32 roundings of the middle of both.
    """
    grid = code_values(codes.dtype)
    exact = quotient.clamp(lo, hi)
    above = torch.searchsorted(grid, exact.contiguous()).clamp(1, len(grid) - 1)
    neighbours = torch.stack([grid[above - 1], grid[above]])
    distances = (neighbours - exact).abs()
    distance = (codes.double() - exact).abs()
    slack = 2 * 2.0**-23 * exact.abs()
    wrong = distance > distances.amin(0) + slack
    assert not wrong.any(), f"{int(wrong.sum())} codes are not the nearest, first at {wrong.nonzero()[0].tolist()}"


def scale_in_float64(x: Tensor, granularity: str, divisor: float, floor: float, floor_on: str) -> Tensor:
    magnitude = numpy.abs(x.double().numpy())
    amax = magnitude.max(-1, keepdims=True) if granularity == "per_token" else magnitude.max()
    amax = numpy.maximum(amax, floor) if floor_on == "amax" else amax
    scale = amax / divisor
    return torch.as_tensor(numpy.maximum(scale, floor) if floor_on == "scale" else scale)


# --- quantize ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_gives_the_nearest_codes(dtype, x_dtype):
    x = inputs(x_dtype, 3, 13, k=37)
    scale = torch.tensor(0.0371)
    lo, hi = RANGES[dtype]
    codes = ops.quantize(x, scale, dtype=dtype, reciprocal=False, lo=lo, hi=hi)
    assert_codes_nearest(codes, x.double() / scale.double(), lo, hi)


def test_quantize_rounds_halves_to_even():
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]])
    codes = ops.quantize(x, torch.ones(()), dtype=torch.int8, reciprocal=False, lo=-128.0, hi=127.0)
    assert codes.tolist() == [[-2, -2, 0, 0, 2, 2, 4]]


@pytest.mark.parametrize(("lo", "hi"), [(-128.0, 127.0), (-127.0, 127.0), (0.0, 127.0), (-8.0, 7.0)])
def test_quantize_saturates_at_the_given_range(lo, hi):
    x = torch.tensor([[-1e30, -128.4, -127.6, 127.6, 1e30, -torch.inf, torch.inf]])
    codes = ops.quantize(x, torch.ones(()), dtype=torch.int8, reciprocal=False, lo=lo, hi=hi)
    assert codes.tolist() == [[lo, lo, lo, hi, hi, lo, hi]]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_quantize_saturates_float8_instead_of_overflowing(dtype):
    lo, hi = RANGES[dtype]
    x = torch.tensor([[1e30, -1e30, torch.inf, -torch.inf]])
    codes = ops.quantize(x, torch.ones(()), dtype=dtype, reciprocal=False, lo=lo, hi=hi)
    assert codes.float().tolist() == [[hi, lo, hi, lo]]


def test_reciprocal_is_a_different_rounding():
    """x / s and x * (1 / s) disagree on some codes, so the flag must reach the arithmetic."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (64, 512), generator=generator).float() + 0.5
    scale = torch.rand(64, 1, generator=generator) + 0.5
    x = x * scale
    divided, multiplied = (
        ops.quantize(x, scale, dtype=torch.int8, reciprocal=reciprocal, lo=-128.0, hi=127.0)
        for reciprocal in (False, True)
    )
    expected = numpy.rint(x.numpy() * (numpy.float32(1) / scale.numpy())).clip(-128, 127)
    assert torch.equal(multiplied.float(), torch.from_numpy(expected))
    assert not torch.equal(divided, multiplied)


def test_quantize_takes_a_scale_per_column():
    x = inputs(torch.float32, 2, 5, k=7)
    scale = torch.linspace(0.01, 0.2, 7)
    codes = ops.quantize(x, scale, dtype=torch.int8, reciprocal=False, lo=-128.0, hi=127.0)
    assert_codes_nearest(codes, x.double() / scale.double(), -128.0, 127.0)


@pytest.mark.parametrize("dtype", RANGES)
def test_quantize_keeps_an_empty_batch_empty(dtype):
    codes, scale = ops.quantize.dynamic(torch.empty(0, 16), **formula(dtype))
    assert (codes.shape, codes.dtype, scale.shape) == ((0, 16), dtype, (0, 1))


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.int8, E4M3, E5M2])
@pytest.mark.parametrize(("floor_on", "floor"), [("none", 0.0), ("amax", 0.5), ("scale", 0.004)])
def test_dynamic_scale_is_the_largest_magnitude_over_the_divisor(granularity, dtype, floor_on, floor):
    x = inputs(torch.bfloat16, 3, 13, k=37)
    arguments = formula(dtype, granularity=granularity, floor_on=floor_on, floor=floor)
    _, scale = ops.quantize.dynamic(x, **arguments)
    expected = scale_in_float64(x, granularity, arguments["divisor"], floor, floor_on)
    assert torch.equal(scale, expected.float())


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.int8, E4M3, E5M2])
def test_dynamic_codes_are_nearest_under_their_scale(granularity, dtype):
    x = inputs(torch.float32, 3, 13, k=37)
    codes, scale = ops.quantize.dynamic(x, **formula(dtype, granularity=granularity))
    assert_codes_nearest(codes, x.double() / scale.double(), *RANGES[dtype])


def test_divide_dtype_rounds_the_scale_before_the_floor():
    x = torch.tensor([[1.0], [3.0], [1e-6]])
    _, scale = ops.quantize.dynamic(x, **formula(divide_dtype=torch.bfloat16, floor=1e-5))
    quotient = torch.tensor([[1 / 127], [3 / 127]]).to(torch.bfloat16).float()
    assert torch.equal(scale, torch.cat([quotient, torch.tensor([[1e-5]])]))


def test_scale_dtype_rounds_the_scale_after_the_floor():
    x = torch.tensor([[1.0], [1e-6]])
    _, scale = ops.quantize.dynamic(x, **formula(scale_dtype=torch.bfloat16, floor=1e-5))
    assert torch.equal(scale, torch.tensor([[1 / 127], [1e-5]]).to(torch.bfloat16).float())


def test_a_zero_row_has_the_floor_as_scale_and_zero_codes():
    x = inputs(torch.float32, 2, 4)
    x[1] = 0
    codes, scale = ops.quantize.dynamic(x, **formula())
    assert scale[1].item() == pytest.approx(1e-5)
    assert not codes[1].any()


def test_a_zero_row_without_a_floor_has_scale_zero():
    x = inputs(torch.float32, 2, 4)
    x[1] = 0
    _, scale = ops.quantize.dynamic(x, **formula(floor_on="none"))
    assert scale[1].item() == 0.0


@pytest.mark.parametrize("hostile", [torch.nan, torch.inf, -torch.inf, 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, E4M3, E5M2])
def test_a_hostile_row_leaves_the_other_rows_alone(hostile, dtype):
    x = inputs(torch.float32, 2, 6)
    clean_codes, clean_scale = ops.quantize.dynamic(x, **formula(dtype))
    x[3, 5] = hostile
    codes, scale = ops.quantize.dynamic(x, **formula(dtype))
    others = [0, 1, 2, 4, 5]
    assert torch.equal(scale[others], clean_scale[others])
    assert torch.equal(codes[others].view(torch.uint8), clean_codes[others].view(torch.uint8))


def test_nan_reaches_the_scale_of_its_row():
    x = inputs(torch.float32, 2, 3)
    x[1, 0] = torch.nan
    _, scale = ops.quantize.dynamic(x, **formula())
    assert scale.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int32), torch.int8, "quantize: x must be a float tensor .*, got int32"),
        (torch.zeros(2, 4).to(E4M3), torch.int8, "quantize: x must be a float tensor .*, got float8_e4m3fn"),
        (torch.zeros(2, 4), torch.int16, "quantize: dtype must be int8, uint8 or a float8, got int16"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantize_names_the_dtype_it_cannot_take(x, dtype, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.quantize(x.to(device), torch.ones((), device=device), dtype=dtype, reciprocal=False, lo=-1.0, hi=1.0)


@pytest.mark.parametrize("shape", [(5, 1), (1, 1, 4), (3,), (2, 3)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantize_does_not_let_the_scale_broadcast_x(shape, device):
    x, scale = torch.zeros(1, 4, device=device), torch.ones(shape, device=device)
    with pytest.raises(RuntimeError, match=r"quantize: scale must broadcast to x of shape \[1, 4\], got \["):
        ops.quantize(x, scale, dtype=torch.int8, reciprocal=False, lo=-128.0, hi=127.0)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"granularity": "per_row"}, "granularity must be one of .*'per_token', 'per_tensor'.*, got 'per_row'"),
        ({"floor_on": "amin"}, "floor_on must be one of .*'none', 'amax', 'scale'.*, got 'amin'"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantize_dynamic_names_the_word_it_does_not_know(argument, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.quantize.dynamic(torch.zeros(2, 4, device=device), **formula(**argument))


# --- scaled_mm --------------------------------------------------------------------------------------------------


def int8_operands(m: int = 13, k: int = 37, n: int = 11, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * k * n)
    info = torch.iinfo(dtype)
    a = torch.randint(info.min, info.max + 1, (m, k), generator=generator).to(dtype)
    return a, torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8).t()


def float8_operands(a_dtype: torch.dtype = E4M3, b_dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(13, 37, generator=generator) * 50).to(a_dtype)
    return a, (torch.randn(11, 37, generator=generator) * 50).to(b_dtype).t()


A_SCALES = {"none": None, "0-d": torch.tensor(0.031), "[1]": torch.tensor([0.031]), "[m, 1]": torch.rand(13, 1) + 0.01}
B_SCALES = {
    "none": None,
    "0-d": torch.tensor(0.007),
    "[n]": torch.rand(11) + 0.01,
    "[1, n]": torch.rand(1, 11) + 0.01,
}


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b_scale", B_SCALES)
@pytest.mark.parametrize("a_scale", A_SCALES)
def test_scaled_mm_of_int8_is_bit_equal_to_numpy(a_scale, b_scale, bias, out_dtype):
    a, b = int8_operands()
    a_scale, b_scale = A_SCALES[a_scale], B_SCALES[b_scale]
    bias = None if bias is None else torch.linspace(-3, 3, 11).to(bias)
    y = (a.numpy().astype(numpy.int64) @ b.numpy().astype(numpy.int64)).astype(numpy.float32)
    for factor in (a_scale, b_scale):
        y = y if factor is None else y * factor.numpy()
    y = y if bias is None else y + bias.float().numpy()
    actual = ops.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    assert_within(actual, torch.from_numpy(y).to(out_dtype), Numerics.EXACT)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2)])
def test_scaled_mm_of_float8_is_float64_up_to_the_sum(a_dtype, b_dtype, out_dtype):
    a, b = float8_operands(a_dtype, b_dtype)
    a_scale, b_scale, bias = A_SCALES["[m, 1]"] * 1e-3, B_SCALES["[n]"], torch.linspace(-3, 3, 11)
    expected = (a.double() @ b.double()) * a_scale.double() * b_scale.double() + bias.double()
    actual = ops.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    assert_within(actual, expected.to(out_dtype), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_raw_accumulator_is_exact_where_float32_is_not(dtype):
    k = 4099
    a, b = int8_operands(3, k, 5, dtype)
    a[0], b[:, 0] = torch.iinfo(dtype).max, 127
    expected = a.numpy().astype(numpy.int64) @ b.numpy().astype(numpy.int64)
    actual = ops.scaled_mm(a, b, None, None, None, torch.int32)
    assert actual.dtype is torch.int32
    assert torch.equal(actual.to(torch.int64), torch.from_numpy(expected))


def test_accumulator_wraps_as_int32_does():
    a = torch.full((1, 2**17), -128, dtype=torch.int8)
    assert ops.scaled_mm(a, a.t(), None, None, None, torch.int32).item() == -(2**31)


@pytest.mark.parametrize("operands", [int8_operands, float8_operands])
@pytest.mark.parametrize("which", ["a_scale", "b_scale"])
def test_a_zero_scale_gives_zeros(operands, which):
    a, b = operands()
    scales = {"a_scale": torch.ones(()), "b_scale": torch.ones(()), which: torch.zeros(())}
    assert not ops.scaled_mm(a, b, scales["a_scale"], scales["b_scale"], None, torch.float32).any()


@pytest.mark.parametrize("operands", [int8_operands, float8_operands])
def test_a_nan_scale_stays_in_its_row(operands):
    a, b = operands()
    a_scale = torch.ones(13, 1)
    a_scale[4] = torch.nan
    rows = ops.scaled_mm(a, b, a_scale, None, None, torch.float32).isnan()
    assert rows.all(1).tolist() == rows.any(1).tolist() == [i == 4 for i in range(13)]


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.int32])
def test_scaled_mm_of_no_rows_is_empty(out_dtype):
    a, b = int8_operands(0)
    out = ops.scaled_mm(a, b, None, None, None, out_dtype)
    assert (out.shape, out.dtype) == ((0, 11), out_dtype)


def test_scaled_mm_of_no_rows_takes_their_scale():
    a, b = int8_operands(0)
    assert ops.scaled_mm(a, b, torch.ones(0, 1), torch.ones(11), None, torch.bfloat16).shape == (0, 11)


def _call(**changes: object):
    a, b = int8_operands()
    arguments = {"a": a, "b": b, "a_scale": None, "b_scale": None, "bias": None, "out_dtype": torch.float32}
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(13, 36, dtype=torch.int8)}, r"must be \[m, k\] and \[k, n\], got \[13, 36\] and \[37, 11\]"),
        ({"a": torch.zeros(37, dtype=torch.int8)}, r"must be \[m, k\] and \[k, n\], got \[37\] and \[37, 11\]"),
        ({"a": torch.zeros(13, 37)}, "must both be int8 or both float8, got float32 and int8"),
        ({"a": torch.zeros(13, 37).to(E4M3)}, "must both be int8 or both float8, got float8_e4m3fn and int8"),
        ({"a_scale": torch.ones(13)}, r"a_scale must have one element or shape \[m, 1\] = \[13, 1\], got \[13\]"),
        ({"a_scale": torch.ones(12, 1)}, r"a_scale must .* = \[13, 1\], got \[12, 1\]"),
        ({"a_scale": torch.ones(13, 37)}, r"a_scale must .* = \[13, 1\], got \[13, 37\]"),
        ({"a_scale": torch.ones(1, 11)}, r"a_scale must .* = \[13, 1\], got \[1, 11\]"),
        ({"b_scale": torch.ones(10)}, r"b_scale must have one element or shape \[n\] = \[11\], got \[10\]"),
        ({"b_scale": torch.ones(11, 1)}, r"b_scale must .* = \[11\], got \[11, 1\]"),
        ({"b_scale": torch.ones(13, 11)}, r"b_scale must .* = \[11\], got \[13, 11\]"),
        ({"b_scale": torch.ones(2, 1, 11)}, r"b_scale must .* = \[11\], got \[2, 1, 11\]"),
        ({"b_scale": torch.ones(1, 1, 1)}, r"b_scale must .* = \[11\], got \[1, 1, 1\]"),
        ({"bias": torch.ones(1, 11)}, r"bias must have shape \[n\] = \[11\], got \[1, 11\]"),
        ({"bias": torch.ones(1)}, r"bias must have shape \[n\] = \[11\], got \[1\]"),
        ({"out_dtype": torch.int32, "a_scale": torch.ones(())}, "int32 is the raw accumulator"),
        ({"out_dtype": torch.int32, "bias": torch.ones(11)}, "int32 is the raw accumulator"),
        ({"out_dtype": torch.int8}, "out_dtype must be float32, bfloat16, float16 or int32, got int8"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scaled_mm_names_the_operand_that_does_not_fit(changes, message, device):
    arguments = [v.to(device) if isinstance(v, Tensor) else v for v in _call(**changes).values()]
    with pytest.raises(RuntimeError, match=message):
        ops.scaled_mm(*arguments)


# --- as ops: schema, fake functions, symbolic shapes ------------------------------------------------------------


def _strided(x: Tensor) -> Tensor:
    """``x`` with its last two dims swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _op_cases():
    x = inputs(torch.bfloat16, 3, 5, k=8)
    a, b = int8_operands()
    fa, fb = float8_operands()
    static = {"dtype": torch.int8, "reciprocal": False, "lo": -128.0, "hi": 127.0}
    scales = (torch.rand(13, 1), torch.rand(11), torch.rand(11))
    yield "quantize", ops.quantize.default, (x, torch.tensor(0.1)), static
    yield "quantize strided", ops.quantize.default, (_strided(x), torch.rand(5, 1)), static
    yield "quantize sliced", ops.quantize.default, (x[..., ::2], torch.tensor(0.1)), static
    for granularity in ("per_token", "per_tensor"):
        for label, value in (
            ("strided", _strided(x)),
            ("permuted", x.transpose(0, 1)),
            ("one row", x[:1, :1]),
            ("empty", x[:0]),
            ("vector", x[0, 0]),
        ):
            if granularity == "per_token" or value.numel():
                arguments = formula(E4M3, granularity=granularity)
                yield f"quantize.dynamic {granularity} {label}", ops.quantize.dynamic, (value,), arguments
    yield "scaled_mm", ops.scaled_mm.default, (a, b, *scales, torch.bfloat16), {}
    yield "scaled_mm strided", ops.scaled_mm.default, (_strided(a), b.contiguous(), *scales, torch.bfloat16), {}
    yield "scaled_mm float8", ops.scaled_mm.default, (_strided(fa), fb, None, None, None, torch.float32), {}
    yield "scaled_mm raw", ops.scaled_mm.default, (a[::2], b, None, None, None, torch.int32), {}
    yield "scaled_mm one row", ops.scaled_mm.default, (a[:1], b, None, *scales[1:], torch.float16), {}
    yield "scaled_mm one column", ops.scaled_mm.default, (a, b[:, :1], scales[0], None, None, torch.float16), {}


@pytest.mark.parametrize(("op", "args", "kwargs"), [pytest.param(*case, id=name) for name, *case in _op_cases()])
def test_op_passes_opcheck(op, args, kwargs):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if args[0].dtype is E4M3:
        checks.remove("test_schema")  # it multiplies the inputs, which torch cannot do in float8
    torch.library.opcheck(op, args, kwargs, test_utils=checks)


@pytest.mark.parametrize(("op", "args", "kwargs"), [pytest.param(*case, id=name) for name, *case in _op_cases()])
def test_fake_function_predicts_shape_dtype_and_strides(op, args, kwargs):
    real = op(*args, **kwargs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), **kwargs)
    for r, f in zip(*((o if isinstance(o, tuple) else (o,)) for o in (real, fake)), strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


def _linear(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
    codes, scale = ops.quantize.dynamic(x, **formula())
    return ops.scaled_mm(codes, b, scale, b_scale, bias, torch.bfloat16)


def _linear_per_tensor(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
    codes, scale = ops.quantize.dynamic(x, **formula(granularity="per_tensor"))
    return ops.scaled_mm(codes, b, scale, b_scale, bias, torch.bfloat16)


def _linear_scale_of_shape_1_1(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
    codes, scale = ops.quantize.dynamic(x, **formula(granularity="per_tensor"))
    return ops.scaled_mm(codes, b, scale.reshape(1, 1), b_scale, bias, torch.bfloat16)


def _linear_given_scale(x: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    codes = ops.quantize(x, scale, dtype=torch.int8, reciprocal=False, lo=-128.0, hi=127.0)
    return ops.scaled_mm(codes, b, scale, b_scale, bias, torch.bfloat16)


LINEARS = [_linear, _linear_given_scale, _linear_per_tensor, _linear_scale_of_shape_1_1]


def _linear_arguments(rows: int) -> tuple[Tensor, ...]:
    _, b = int8_operands()
    return inputs(torch.bfloat16, 2, rows, k=37), b, torch.rand(11), torch.rand(11)


@pytest.mark.parametrize("linear", LINEARS)
def test_symbolic_rows_stay_symbolic(linear):
    graph = make_fx(linear, tracing_mode="symbolic")(*_linear_arguments(13))
    (output,) = (n.args[0] for n in graph.graph.nodes if n.op == "output")
    rows = output.meta["val"].shape[0]
    assert isinstance(rows, torch.SymInt)
    assert rows.node.maybe_as_int() is None


@pytest.mark.parametrize("linear", LINEARS)
def test_one_graph_serves_every_number_of_rows(linear):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(linear, backend=counter, dynamic=True, fullgraph=True)
    for rows in (13, 2, 64):
        arguments = _linear_arguments(rows)
        assert torch.equal(compiled(*arguments), linear(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("linear", LINEARS)
def test_no_guard_on_rows_of_unknown_size(linear):
    """Rows that are unbacked (``nonzero``, ragged batches) have no value to guard on."""
    torch._dynamo.reset()
    arguments = _linear_arguments(13)
    torch._dynamo.decorators.mark_unbacked(arguments[0], 0)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), linear(*arguments))
