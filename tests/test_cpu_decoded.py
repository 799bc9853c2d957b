"""Matmuls of weights that are decoded in registers: the native code and its template, against float64."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fx_quant.lowerings  # noqa: F401  (registers the lowerings)
from fx_quant import compat
from fx_quant.kernels.cpu import decode, native
from fx_quant.kernels.cpu.tiled_kernels import MANY_ROWS
from fx_quant.kernels.layouts import pack_weight
from fx_quant.kernels.registry import kernel
from fx_quant.kernels.select import select
from fx_quant.ops import dequantize_weight
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import FLOAT8_DTYPES, Scheme
from fx_quant.target import named_target

pytestmark = pytest.mark.usefixtures("uncached")

fxq = torch.ops.fx_quant
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
INT8, UINT8, E4M3, E5M2 = torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2
INT4 = "int4"
OPS = {BF16: fxq.cpu_decoded_bf16.default, F32: fxq.cpu_decoded_float32.default}
INF, NAN = float("inf"), float("nan")

# Ragged in every direction, more rows than a chunk, fewer k than a block, no rows.
SIZES = [(1, 1, 2), (2, 63, 6), (7, 65, 130), (13, 129, 66), (390, 70, 258), (0, 64, 64)]


def has(probe: str) -> bool:
    return getattr(torch.cpu, probe, lambda: False)()


BOTH = [
    pytest.param(BF16, marks=pytest.mark.skipif(not has("_is_avx512_bf16_supported"), reason="needs AVX512-BF16")),
    pytest.param(F32, marks=pytest.mark.skipif(not has("_is_avx512_supported"), reason="needs AVX512")),
]
both = pytest.mark.parametrize("float_dtype", BOTH)


def paired(*values: object) -> list:
    """Each dtype with one of ``values``, which the code treats alike for both."""
    return [pytest.param(*each.values, value, marks=each.marks) for each, value in zip(BOTH, values, strict=True)]


@pytest.fixture(params=["native", "unpacked"])
def way(request, monkeypatch):
    """The native code, and what runs on a machine without the instructions."""
    if request.param == "unpacked":
        monkeypatch.setattr(native.Dot, "exists_here", lambda _: False)
    return request.param


@pytest.fixture(params=["tiles", "registers"])
def tiles(request, monkeypatch):
    """With the tiles of AMX and without."""
    if request.param == "registers":
        monkeypatch.setattr(decode, "AMX_BFLOAT16", replace(decode.AMX_BFLOAT16, features=frozenset({"another"})))
    elif not decode.AMX_BFLOAT16.exists_here():
        pytest.skip("needs AMX")
    return request.param


def weight(n: int, k: int, dtype: torch.dtype | str) -> Tensor:
    """Codes ``[n, k]``, or bytes ``[n, k / 2]`` of int4."""
    if dtype == INT4:
        return torch.randint(0, 256, (n, k // 2), dtype=UINT8)
    if dtype in FLOAT8_DTYPES:
        return torch.randn(n, k).to(dtype)
    return torch.randint(0, 256, (n, k), dtype=UINT8).view(dtype)


def packed(w: Tensor, dtype: torch.dtype | str, float_dtype: torch.dtype) -> Tensor:
    return pack_weight(w, "int4_words" if dtype == INT4 else "pairs" if float_dtype is BF16 else "columns")


def factors(n: int, k: int, block: tuple[int, int] | None) -> tuple[int, ...]:
    return (n,) if block is None else (-(-n // block[0]), -(-k // block[1]))


def assert_is_sum(
    out: Tensor,
    a: Tensor,
    w: Tensor,
    b_scale: Tensor,
    zero_point: Tensor | None,
    block: tuple[int, int] | None,
    a_scale: Tensor | None = None,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """``out`` is within float32 rounding of each step of the sum, which is known in float64."""
    k = a.shape[1]
    exact = a.double()
    if a_scale is not None:
        exact = exact * (a_scale if block is None else a_scale.repeat_interleave(block[1], 1)[:, :k]).double()
    # In float32, as the canonical op has it; a product of float32 is exact in float64.
    decoded = dequantize_weight(w.t(), k, b_scale, zero_point, block).double()
    expected, magnitude = exact @ decoded, exact.abs() @ decoded.abs()
    if zero_point is not None:
        # Zero points beyond the codes are taken off the sum, whose terms are then larger.
        codes = dequantize_weight(w.t(), k, b_scale, None, block).double()
        magnitude = magnitude + exact.abs() @ (codes.abs() + (codes - decoded).abs())
    if offset is not None:
        # As zero points are, it is added to the sum.
        zeros = torch.zeros_like(b_scale, dtype=F32)
        added = dequantize_weight(w.t(), k, zeros, None, block, offset).double()
        expected, magnitude = expected + exact @ added, magnitude + exact.abs() @ added.abs()
    if bias is not None:
        expected, magnitude = expected + bias, magnitude + bias.abs()
    assert out.shape == expected.shape
    assert ((out - expected).abs() <= magnitude * (k + 8) * 2.0**-24).all()


# --- eager --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [INT8, UINT8, INT4, *sorted(FLOAT8_DTYPES, key=str)], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_one_scale_for_each_column(float_dtype, dtype, shape):
    m, n, k = shape
    a, w, scale = torch.randn(m, k).to(float_dtype), weight(n, k, dtype), torch.rand(n)
    out = OPS[float_dtype](a, packed(w, dtype, float_dtype), None, scale, None, n, F32)
    assert_is_sum(out, a, w, scale, None, None)


@both
@pytest.mark.parametrize("dtype", [INT8, INT4, E4M3], ids=str)
@pytest.mark.parametrize("block", [(1, 8), (1, 32), (1, 96), (1, 128), (16, 64), (128, 128), (1, 1000)], ids=str)
@pytest.mark.parametrize("m", [1, 7, 40])
def test_groups_and_blocks(float_dtype, dtype, block, m):
    n, k = 130, 328  # 41 groups of 8: the factors of sixteen groups are read at once
    a, w, scale = torch.randn(m, k).to(float_dtype), weight(n, k, dtype), torch.rand(factors(n, k, block))
    b = packed(w, dtype, float_dtype)
    for given in (scale, scale.t().contiguous().t(), torch.stack((scale, scale), -1)[..., 0]):
        out = OPS[float_dtype](a, b, None, given, None, n, F32, block=block)
        assert_is_sum(out, a, w, scale, None, block)


@both
@pytest.mark.parametrize("scale_dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("block", [(1, 8), (1, 96), (16, 64), (1, 1000)], ids=str)
@pytest.mark.parametrize("panels", [False, True])
def test_scales_of_groups_in_half_precision(float_dtype, scale_dtype, block, panels):
    n, k = 130, 328
    a, w = torch.randn(7, k).to(float_dtype), weight(n, k, INT4)
    scale = (torch.randn(factors(n, k, block)) * 1e-5).to(scale_dtype)  # float16 has no normal numbers there
    b, panels = packed(w, INT4, float_dtype), panels and block[0] == 1
    for given in (
        [in_panels(scale)] if panels else [scale, scale.t().contiguous().t(), torch.stack([scale] * 2, -1)[..., 0]]
    ):
        out = OPS[float_dtype](a, b, None, given, None, n, F32, block=block)
        assert_is_sum(out, a, w, scale, None, block)


def in_panels(factor: Tensor) -> Tensor:
    """``factor [n, groups]`` as ``[ceil(n / 64), groups, 64]``; what pads it must not be read."""
    missing = -factor.shape[0] % 64
    padded = F.pad(factor.double(), (0, 0, 0, missing), value=-100.0).to(factor.dtype)
    return padded.unflatten(0, (-1, 64)).transpose(1, 2).contiguous()


@both
@pytest.mark.parametrize("dtype", [INT8, UINT8, INT4, E4M3], ids=str)
@pytest.mark.parametrize("group", [8, 32, 128, 3000])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_factors_of_groups_in_panels(float_dtype, dtype, group, m, way):
    n, k = 130, 328
    a, w, scale = torch.randn(m, k).to(float_dtype), weight(n, k, dtype), torch.rand(factors(n, k, (1, group)))
    point = None if dtype is E4M3 else torch.randint(-8, 8, scale.shape, dtype=INT8)
    given = {} if point is None else {"b_zero_point": in_panels(point)}
    b = packed(w, dtype, float_dtype)
    out = OPS[float_dtype](a, b, None, in_panels(scale), None, n, F32, block=(1, group), **given)
    assert_is_sum(out, a, w, scale, point, (1, group))


@both
@pytest.mark.parametrize("dtype", [INT8, UINT8, INT4], ids=str)
@pytest.mark.parametrize("point", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("block", [None, (1, 32), (16, 64)], ids=str)
@pytest.mark.parametrize("limit", [8, 100, 30000])
def test_zero_points_of_every_dtype_and_size(float_dtype, dtype, point, block, limit):
    m, n, k = 7, 70, 258
    a, w, scale = torch.randn(m, k).to(float_dtype), weight(n, k, dtype), torch.rand(factors(n, k, block))
    info = torch.iinfo(point)
    zero_point = torch.randint(max(-limit, info.min), min(limit, info.max), scale.shape).to(point)
    out = OPS[float_dtype](
        a, packed(w, dtype, float_dtype), None, scale, None, n, F32, b_zero_point=zero_point, block=block
    )
    assert_is_sum(out, a, w, scale, zero_point, block)


@both
@pytest.mark.parametrize("dtype", [INT8, UINT8, INT4, E4M3], ids=str)
@pytest.mark.parametrize("offset_dtype", [F32, BF16, F16, torch.float64], ids=str)
@pytest.mark.parametrize("block", [None, (1, 8), (1, 96), (16, 64), (1, 1000)], ids=str)
@pytest.mark.parametrize("m", [1, 7, 40])
def test_offsets_of_scaled_codes(float_dtype, dtype, offset_dtype, block, m):
    n, k = 130, 328
    a, w, scale = torch.randn(m, k).to(float_dtype), weight(n, k, dtype), torch.rand(factors(n, k, block))
    offset = (torch.randn(scale.shape) * 9).to(offset_dtype)
    b, groups = packed(w, dtype, float_dtype), block is not None and block[0] == 1
    for given in ((scale, offset), (in_panels(scale), in_panels(offset))) if groups else ((scale, offset),):
        out = OPS[float_dtype](a, b, None, given[0], None, n, F32, b_offset=given[1], block=block)
        assert_is_sum(out, a, w, scale, None, block, offset=offset)


@both
@pytest.mark.parametrize("m", [8, 17, 33, 48, 100])
@pytest.mark.parametrize("group", [None, 8, 32, 64])
def test_offsets_where_a_panel_is_decoded_once_for_many_rows(float_dtype, group, m, tiles):
    n, k = 70, 1096
    block = None if group is None else (1, group)
    a, w, scale = torch.randn(m, k).to(float_dtype), weight(n, k, INT4), torch.rand(factors(n, k, block))
    offset = torch.randn(scale.shape)
    b = packed(w, INT4, float_dtype)
    out = OPS[float_dtype](a, b, None, scale, None, n, F32, b_offset=offset, block=block)
    assert_is_sum(out, a, w, scale, None, block, offset=offset)


@both
def test_a_row_beside_an_offset_is_the_same_whatever_stands_beside_it(float_dtype):
    n, k = 70, 1096
    a, w, scale, offset = torch.randn(100, k).to(float_dtype), weight(n, k, INT4), torch.rand(n, 35), torch.randn(n, 35)
    fixed = getattr(fxq, f"{OPS[float_dtype]._schema.name.split('::')[1]}_fixed").default
    given = (packed(w, INT4, float_dtype), None, scale, None, n, F32)
    out = fixed(a, *given, b_offset=offset, block=(1, 32))
    assert torch.equal(out[3:4], fixed(a[3:4].clone(), *given, b_offset=offset, block=(1, 32)))
    assert_is_sum(out, a, w, scale, None, (1, 32), offset=offset)


@both
@pytest.mark.parametrize("shape", [(), (1,), (1, 70)], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_an_offset_of_every_shape_beside_a_zero_point_and_a_bias(float_dtype, shape, scaled, way):
    a, w = torch.randn(3, 20).to(float_dtype), weight(70, 20, INT8)
    scale, zero_point, offset = torch.rand(shape), torch.randint(-8, 8, shape), torch.randn(shape)
    scale, bias = scale if scaled else torch.ones(shape), torch.randn(70)
    given = {"b_zero_point": zero_point, "b_offset": offset}
    out = OPS[float_dtype](a, packed(w, INT8, float_dtype), None, scale if scaled else None, bias, 70, F32, **given)
    assert_is_sum(out, a, w, scale, zero_point, None, bias=bias, offset=offset)


@both
@pytest.mark.parametrize("shape", [(), (1,), (1, 70)], ids=str)
def test_scales_and_zero_points_of_every_shape(float_dtype, shape):
    a, w = torch.randn(3, 20).to(float_dtype), weight(70, 20, INT8)
    scale, zero_point = torch.rand(shape), torch.randint(-8, 8, shape)
    out = OPS[float_dtype](a, packed(w, INT8, float_dtype), None, scale, None, 70, F32, b_zero_point=zero_point)
    assert_is_sum(out, a, w, scale, zero_point, None)


@both
@pytest.mark.parametrize("block", [(1, 32), (128, 128), (16, 40)], ids=str)
@pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("m", [1, 13])
def test_scales_of_the_activation_too(float_dtype, block, dtype, m):
    n, k = 130, 300
    a = weight(m, k, dtype)
    w, b_scale, a_scale = weight(n, k, dtype), torch.rand(factors(n, k, block)), torch.rand(m, -(-k // block[1]))
    expected = fxq.scaled_mm(a, w.t(), a_scale, b_scale, None, F32, block=block)
    for given in (a_scale, a_scale.t().contiguous().t()):
        out = OPS[float_dtype](
            a.float().to(float_dtype), packed(w, dtype, float_dtype), given, b_scale, None, n, F32, block=block
        )
        assert_is_sum(out, a.float(), w, b_scale, None, block, a_scale)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@both
@pytest.mark.parametrize("dtype", [INT8, UINT8, E4M3, INT4], ids=str)
@pytest.mark.parametrize("group", [None, 8, 32, 64])
def test_a_panel_is_decoded_once_for_many_rows(float_dtype, dtype, group, tiles):
    """One tile of rows and two, full or not, and the last k of no tile; more k than are decoded at once."""
    n, k = 70, 1096
    block = None if group is None else (1, group)
    w = weight(n, k, dtype)
    size = factors(n, k, block)
    scale = torch.rand(size) + 0.5
    point = None if dtype is E4M3 else torch.randint(-8, 8, size, dtype=torch.int32)
    for m in (8, 17, 33, 48, 101, 260):  # of an odd number the activation has no scales
        a = torch.randn(m, k).to(float_dtype)
        a_scale = None if block is None or m % 2 else torch.rand(m, size[1]) + 0.5
        given = (packed(w, dtype, float_dtype), a_scale, scale, None, n, F32)
        out = OPS[float_dtype](a, *given, b_zero_point=point, block=None if block is None else list(block))
        assert_is_sum(out, a, w, scale, point, block, a_scale)


@both
@pytest.mark.parametrize("out_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("bias", [None, F32, BF16], ids=str)
def test_the_epilogue_is_the_canonical_one(float_dtype, out_dtype, bias, way):
    a, w, scale = torch.randn(5, 66).to(float_dtype), weight(70, 66, INT8), torch.rand(70) * 0.01
    bias = None if bias is None else torch.randn(70).to(bias)
    a_scale = torch.rand(5, 1)
    out = OPS[float_dtype](a, packed(w, INT8, float_dtype), a_scale, scale, bias, 70, out_dtype)
    wide = OPS[float_dtype](a, packed(w, INT8, float_dtype), a_scale, scale, bias, 70, F32)
    assert_is_sum(wide, a, w, scale, None, None, a_scale, bias)
    if way == "native":
        assert torch.equal(out, wide.to(out_dtype))
    else:
        torch.testing.assert_close(out.float(), wide, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [INT8, INT4, E4M3], ids=str)
@pytest.mark.parametrize("block", [None, (1, 32), (1, 9)], ids=str)
def test_without_the_instruction_the_weight_is_unpacked(dtype, block, way):
    m, n, k = 5, 70, 66
    a, w, scale = torch.randn(m, k), weight(n, k, dtype), torch.rand(factors(n, k, block))
    out = OPS[F32](a, packed(w, dtype, F32), None, scale, None, n, F32, block=block)
    assert_is_sum(out, a, w, scale, None, block)


@both
@pytest.mark.parametrize("dtype", sorted(FLOAT8_DTYPES, key=str), ids=str)
def test_every_float8_code_is_what_it_is(float_dtype, dtype):
    w = torch.arange(256, dtype=torch.int32).to(UINT8).view(dtype)[:, None]
    one = torch.ones(1, 1, dtype=float_dtype)
    out = OPS[float_dtype](one, packed(w, dtype, float_dtype), None, None, None, 256, F32)
    assert torch.equal(out[0].nan_to_num(nan=-12345.0), w.float().flatten().nan_to_num(nan=-12345.0))


@both
def test_hostile_scales_poison_only_their_columns(float_dtype):
    n, k, block = 70, 64, (1, 32)
    a, w, scale = torch.ones(3, k, dtype=float_dtype), torch.ones(n, k, dtype=INT8), torch.ones(n, 2)
    scale[:5, 1] = torch.tensor([NAN, INF, -INF, 0.0, 1e30])
    out = OPS[float_dtype](a, packed(w, INT8, float_dtype), None, scale, None, n, F32, block=block)
    row = torch.tensor([NAN, INF, -INF, 32.0, 32e30, 64.0, 64.0])
    torch.testing.assert_close(out[:, :7], row.expand(3, 7), equal_nan=True)


@both
def test_a_nan_of_the_activation_stays_in_its_row(float_dtype):
    a, w = torch.ones(9, 40, dtype=float_dtype), torch.ones(70, 40, dtype=INT8)
    a[4, 39] = NAN
    out = OPS[float_dtype](a, packed(w, INT8, float_dtype), None, torch.ones(70), None, 70, F32)
    assert out[4].isnan().all()
    assert (out[[0, 1, 2, 3, 5, 6, 7, 8]] == 40).all()


@both
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("strided", ["rows", "columns", "transposed"])
def test_threads_and_strides_do_not_matter(float_dtype, threads, strided):
    m, n, k = 50, 200, 130
    a, w, scale = torch.randn(m, k).to(float_dtype), weight(n, k, INT8), torch.rand(n)
    given = {
        "rows": torch.cat((a, a), 1)[:, :k],
        "columns": torch.stack((a, a), -1)[..., 0],
        "transposed": a.t().contiguous().t(),
    }[strided]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = OPS[float_dtype](given, packed(w, INT8, float_dtype), None, scale, None, n, F32)
    finally:
        torch.set_num_threads(before)
    assert_is_sum(out, a, w, scale, None, None)


def test_a_compiler_that_fails_is_a_warning_and_the_result_the_same(monkeypatch):
    def fail(_):
        raise RuntimeError("no compiler")

    decode._compiled.cache_clear()
    monkeypatch.setattr(compat, "load_cpp", fail)
    monkeypatch.setattr(native.Dot, "exists_here", lambda _: True)
    a, w, scale = torch.randn(3, 20), weight(70, 20, INT8), torch.rand(70)
    try:
        with pytest.warns(UserWarning, match=r"no compiler.*Install a C\+\+ compiler"):
            out = OPS[F32](a, packed(w, INT8, F32), None, scale, None, 70, F32)
    finally:
        decode._compiled.cache_clear()
    assert_is_sum(out, a, w, scale, None, None)


@both
@pytest.mark.parametrize("dtype", [INT8, INT4], ids=str)
def test_opcheck(float_dtype, dtype):
    a, w, scale = torch.randn(6, 64).to(float_dtype), weight(70, 64, dtype), torch.rand(70, 2)
    arguments = (a, packed(w, dtype, float_dtype), None, scale, torch.randn(70), 70, BF16)
    extras = {"b_zero_point": torch.randint(-8, 8, (70, 2)), "block": [1, 32]}
    torch.library.opcheck(OPS[float_dtype], arguments, extras)


# --- compiled -----------------------------------------------------------------------------------------------------


def linear(w: Tensor, dtype: torch.dtype | str, float_dtype: torch.dtype, **extras: object):
    """``f(a, a_scale, b_scale, bias, out_dtype)``, the weight packed in the graph."""
    layout = "int4_words" if dtype == INT4 else "pairs" if float_dtype is BF16 else "columns"

    def run(a, a_scale, b_scale, bias, out_dtype):
        b = fxq.prepack([w], [layout])[0]
        return OPS[float_dtype](a, b, a_scale, b_scale, bias, w.shape[0], out_dtype, **extras)

    return run


# (codes, block, zero points or, of a float dtype, offsets, scale): all that the template decodes.
KINDS = [
    (INT8, None, None, F32),
    (E4M3, (128, 128), None, BF16),
    (INT4, (1, 32), torch.int8, BF16),
    (INT4, None, None, F16),
    (UINT8, None, torch.int64, F32),
    (INT8, (1, 64), torch.int16, F16),
    (INT8, (1, 9), None, F32),
    (INT4, (1, 32), F32, F32),
    (UINT8, None, BF16, F32),
]


def assert_each_is_its_sum(kinds, float_dtype, all_rows):
    """All ``kinds`` in one graph, which takes less time to compile than one for each.

    Each has another number of columns, so that no kernel has the epilogue of another.
    """
    k, linears, scales, biases, expected = 258, [], [], [], []
    for n, (dtype, block, point, scale_dtype) in enumerate(kinds, 200):
        w, scale = weight(n, k, dtype), torch.rand(factors(n, k, block)).to(scale_dtype)
        extras = {} if block is None else {"block": list(block)}
        is_offset = point is not None and point.is_floating_point
        shift = None if point is None else torch.randint(-8, 8, scale.shape).to(point)
        zero_point, offset = (None, shift) if is_offset else (shift, None)
        linears.append(linear(w, dtype, float_dtype, b_zero_point=zero_point, b_offset=offset, **extras))
        scales.append(scale)
        biases.append(torch.randn(n))
        expected.append((w, scale, zero_point, block, None, biases[-1], offset))

    @functools.partial(torch.compile, dynamic=False)
    def run(a, scales, biases):
        each = zip(linears, scales, biases, strict=True)
        return [linear(a, None, scale, bias, F32) for linear, scale, bias in each]

    for m in all_rows:
        a = torch.randn(m, k).to(float_dtype)
        if m > 1:
            torch._dynamo.mark_dynamic(a, 0)
        for out, given in zip(run(a, scales, biases), expected, strict=True):
            assert_is_sum(out, a, *given)


@both
def test_the_compiled_matmul_is_the_sum_for_any_rows(float_dtype):
    """Codes are decoded otherwise to each dtype, their factors are read alike."""
    kinds = KINDS if float_dtype is BF16 else [*KINDS[:2], *KINDS[3:5], *KINDS[-2:]]
    assert_each_is_its_sum(kinds, float_dtype, (7, 2, 390))


@both
def test_the_compiled_matmul_is_the_sum_for_one_row(float_dtype):
    """Which Dynamo compiles apart. What differs then does not depend on both the kind and the dtype."""
    assert_each_is_its_sum(KINDS[::2] if float_dtype is BF16 else KINDS[1::2], float_dtype, (1,))


@pytest.mark.parametrize(("float_dtype", "transposed"), paired(False, True))
def test_the_compiled_matmul_scales_groups_of_both(float_dtype, transposed):
    n, k, block = 130, 300, (128, 128)
    w = weight(n, k, E4M3)
    run = torch.compile(linear(w, E4M3, float_dtype, block=list(block)))
    b_scale = torch.rand(factors(n, k, block))
    given = b_scale.t().contiguous().t() if transposed else b_scale
    for m in (7, 13):
        a, a_scale = weight(m, k, E4M3).float().to(float_dtype), torch.rand(m, 3)
        torch._dynamo.mark_dynamic(a, 0)
        torch._dynamo.mark_dynamic(a_scale, 0)
        out = run(a, a_scale, given, None, F32)
        assert_is_sum(out, a, w, b_scale, None, block, a_scale)


@both
def test_a_scale_and_a_zero_point_of_one_buffer(float_dtype):
    n, k, block = 70, 64, (1, 32)
    w, both_of = weight(n, k, INT8), torch.randint(0, 8, (n, 4), dtype=torch.int32)
    a = torch.randn(5, k).to(float_dtype)

    def run(a, factors):
        b = fxq.prepack([w], ["pairs" if float_dtype is BF16 else "columns"])[0]
        scale, zero_point = factors[:, 2:].float(), factors[:, :2]
        return OPS[float_dtype](a, b, None, scale, None, n, F32, b_zero_point=zero_point, block=list(block))

    assert_is_sum(torch.compile(run)(a, both_of), a, w, both_of[:, 2:].float(), both_of[:, :2], block)


@pytest.mark.parametrize(("float_dtype", "threads"), paired(1, 3))
def test_what_follows_is_fused(float_dtype, threads):
    n, k = 200, 64
    w, scale = weight(n, k, INT8), torch.rand(n) * 1e-2
    run = linear(w, INT8, float_dtype)

    def block(a, scale, bias, residual):
        return F.gelu(run(a, None, scale, bias, float_dtype)) + residual

    a, bias, residual = (torch.randn(shape).to(float_dtype) for shape in ((7, k), (n,), (7, n)))
    with torch._inductor.config.patch({"cpp.threads": threads}):
        out, (code,) = run_and_get_code(torch.compile(block), a, scale, bias, residual)
    torch.testing.assert_close(out, block(a, scale, bias, residual), rtol=2e-2, atol=1e-2)
    call = code[code.index("def call") :]
    assert call.count("cpp_fused") == 1
    assert "gelu" in call
    assert "torch.ops.fx_quant.cpu_decoded" not in call


# --- selection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "target", "chosen"),
    [
        ("bfloat16 x int8 per_channel", "x86_vnni", "cpu_weight_only_bf16"),
        ("bfloat16 x uint8 per_group(32) asymmetric", "x86_vnni", "cpu_weight_only_bf16"),
        ("bfloat16 x float8_e5m2 per_block(128, 128)", "x86_vnni", "cpu_weight_only_bf16"),
        ("bfloat16 x uint4 per_group(128) asymmetric", "x86_vnni", "cpu_weight_only_int4_bf16"),
        ("float32 x int4 per_channel", "x86_vnni", "cpu_weight_only_int4_float32"),
        ("float16 x int8 per_tensor", "x86_vnni", "cpu_weight_only_float32"),
        ("int8 per_group(64) x int8 per_group(64)", "x86_vnni", "cpu_int8_groups_vnni"),
        ("float8_e4m3fn per_group(128) x float8_e4m3fn per_block(128, 128)", "x86_vnni", "cpu_float8_blocks_bf16"),
        ("bfloat16 x int8 per_channel", "x86", "cpu_weight_only_int8"),
        ("float32 x int8 per_channel", "x86", "pytorch_weight_only"),
    ],
)
def test_which_kernel_a_cpu_gets(scheme, target, chosen):
    parsed = Scheme.parse(scheme)
    out = parsed.activation.dtype if parsed.weight_only else BF16
    asked = Problem(parsed, SizeRange(0, None), 128, 128, out, None, constant_weight=True)
    assert select(asked, named_target(target)).kernel.name == chosen


@pytest.mark.parametrize("rows", [1, MANY_ROWS - 1, MANY_ROWS])
def test_the_matmul_of_aten_is_for_few_rows(rows, monkeypatch):
    aten = kernel("cpu_weight_only_int8").overload()
    called = []
    real = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: called.append(1) or real(*args))
    a, w, scale = torch.randn(rows, 64).to(BF16), weight(32, 64, INT8), torch.rand(32) * 0.01
    out = aten(a, w.t(), None, scale, None, 32, BF16)
    expected = a.double() @ (w.double() * scale.double()[:, None]).t()
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=5e-2)
    assert bool(called) == (rows < MANY_ROWS)
