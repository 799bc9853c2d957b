"""The Triton kernels without a GPU: their arithmetic in Triton's interpreter, their code by cross-compilation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fx_quant.kernels.triton.scaled_mm_kernels  # noqa: F401  (registers the ops)
from fx_quant.errors import NoKernelError
from fx_quant.kernels.registry import kernel, kernels
from fx_quant.kernels.select import select
from fx_quant.kernels.triton.architectures import Architecture, architecture
from fx_quant.kernels.triton.launch import Launch
from fx_quant.kernels.triton.operands import scaled_operands
from fx_quant.kernels.triton.scaled_mm import plan_scaled_mm
from fx_quant.kernels.triton.tile import configuration, plan_weight_only_mm
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.target import named_target
from tests.cross_compile import Compiled, compile_launch
from tests.tolerances import TOLERANCES, assert_within
from tests.triton_interpreter import ask, compiler_is_real, from_bytes, needs_triton, to_bytes

fxq = torch.ops.fx_quant
F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
I8, U8 = torch.int8, torch.uint8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FNUZ = torch.float8_e4m3fnuz

# --- the interpreter, in a process of its own -------------------------------------------------------------------


def far_apart(first: int) -> Tensor:
    """Three vectors of eight codes whose offsets from each other reach 2**31, in memory that is hardly touched."""
    vectors = torch.empty(2**31 + 8, dtype=I8).as_strided((3, 8), (2**30, 1))
    return vectors.copy_(torch.arange(first, first + 24, dtype=I8).view(3, 8))


def answer_far_apart() -> bytes:
    """Operands that are far apart along m and n, then along k."""
    a, b = far_apart(-12), far_apart(3)
    return to_bytes(
        (
            fxq.triton_scaled_mm(a, b.t(), None, None, None, 3, I32),
            fxq.triton_scaled_mm(a.t(), b, None, None, None, 8, I32),
        )
    )


@pytest.fixture
def scaled_mm(interpreter) -> Callable[..., Tensor]:
    def call(a, b, a_scale=None, b_scale=None, bias=None, out_dtype=F32, **options):
        return ask(interpreter, "triton_scaled_mm", a, b, a_scale, b_scale, bias, b.shape[1], out_dtype, **options)

    return call


@pytest.fixture
def weight_only(interpreter) -> Callable[..., Tensor]:
    def call(x, b, b_scale, b_zero_point=None, bias=None, out_dtype=F32, **options):
        arguments = (x, b, None, b_scale, bias, b.shape[1], out_dtype)
        return ask(interpreter, "triton_weight_only_mm", *arguments, b_zero_point=b_zero_point, **options)

    return call


# --- operands ---------------------------------------------------------------------------------------------------


def codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if dtype in (I8, U8):
        low = torch.iinfo(dtype).min
        return torch.randint(low, low + 256, (rows, columns), dtype=dtype)
    return torch.randn(rows, columns).to(dtype)


def canonical(a, b, a_scale=None, b_scale=None, bias=None, out_dtype=F32, **options) -> Tensor:
    return fxq.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, **options)


def canonical_weight_only(x, b, b_scale, b_zero_point=None, bias=None, out_dtype=F32, **options) -> Tensor:
    return fxq.weight_only_mm(x, b, b_scale, b_zero_point, bias, out_dtype, **options)


def class_of(dtype: torch.dtype) -> Numerics:
    return kernel("triton_int8" if dtype is I8 else "triton_float8").numerics


# The three configurations (m <= 16, <= 64, more), none of whose tiles these sizes fill, and empty sums.
SIZES = [(0, 70, 9), (1, 1, 1), (1, 70, 130), (17, 1, 9), (17, 70, 1), (17, 70, 130), (70, 140, 9), (3, 5, 0)]


# --- scaled_mm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(I8, I8), (E4M3, E4M3), (E5M2, E4M3), (E5M2, E5M2)], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_scaled_mm_is_the_canonical_op(scaled_mm, dtypes, m, n, k):
    a, b = codes(m, k, dtypes[0]), codes(n, k, dtypes[1]).t()
    arguments = (a, b, torch.rand(m, 1), torch.rand(n), torch.randn(n))
    assert_within(scaled_mm(*arguments), canonical(*arguments), class_of(dtypes[0]))


@pytest.mark.parametrize("dtype", [I8, E4M3])
@pytest.mark.parametrize("a_shape", [None, (), (1,), (1, 1), (17, 1)], ids=str)
@pytest.mark.parametrize("b_shape", [None, (), (1,), (1, 1), (9,), (1, 9)], ids=str)
def test_scales_of_every_shape(scaled_mm, dtype, a_shape, b_shape):
    a, b = codes(17, 20, dtype), codes(9, 20, dtype).t()
    scales = (None if shape is None else torch.rand(shape) + 0.5 for shape in (a_shape, b_shape))
    arguments = (a, b, *scales)
    assert_within(scaled_mm(*arguments), canonical(*arguments), class_of(dtype))


@pytest.mark.parametrize("dtype", [I8, E4M3])
@pytest.mark.parametrize("bias", [None, F32, BF16, F16])
@pytest.mark.parametrize("out_dtype", [F32, BF16, F16])
def test_every_bias_and_result(scaled_mm, dtype, bias, out_dtype):
    a, b = codes(5, 33, dtype), codes(9, 33, dtype).t()
    bias = None if bias is None else torch.randn(9).to(bias)
    arguments = (a, b, torch.rand(5, 1) / 100, torch.rand(9), bias, out_dtype)
    # The interpreter truncates to bfloat16, which is within one unit in the last place.
    numerics = Numerics.SAME_ACCUM if out_dtype is BF16 else class_of(dtype)
    assert_within(scaled_mm(*arguments), canonical(*arguments), numerics)


def test_int32_is_the_accumulator(scaled_mm):
    a, b = codes(17, 200, I8), codes(9, 200, I8).t()
    assert torch.equal(scaled_mm(a, b, out_dtype=I32), canonical(a, b, out_dtype=I32))


def test_the_deepest_sum_of_the_largest_codes_is_exact(scaled_mm):
    k = kernel("triton_int8").requires.max_k
    a, b = torch.full((1, k), -128, dtype=I8), torch.full((k, 1), -128, dtype=I8)
    assert scaled_mm(a, b, out_dtype=I32).item() == 2**14 * k < 2**31 <= 2**14 * (k + 1)


@pytest.mark.parametrize("rows", [(), (1,), (17, 1)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["sums given", "sums computed"])
def test_an_asymmetric_activation_is_exact(scaled_mm, rows, given):
    a, b = codes(17, 300, I8), codes(9, 300, I8).t()
    zero_point = torch.randint(-128, 128, rows, dtype=I32)
    arguments = (a, b, torch.rand(17, 1), torch.rand(9), torch.randn(9))
    sums = b.sum(0, dtype=I32) if given else None
    actual = scaled_mm(*arguments, a_zero_point=zero_point, b_sum=sums)
    assert torch.equal(actual, canonical(*arguments, a_zero_point=zero_point))


@pytest.mark.parametrize("dtype", [I8, E4M3])
def test_operands_of_any_strides(scaled_mm, dtype):
    tall, wide = codes(40, 34, dtype), codes(80, 60, dtype)
    for a in (tall[:34, :20], tall.t()[:, ::2], tall[::2, 3:23], tall[:1].expand(5, 34)[:, :20]):
        for b in (wide[:20], wide.t()[7:27], wide[::3, ::2][:20], wide[:20, :1].expand(20, 7)):
            a_scale, b_scale = torch.rand(1, a.shape[0]).t(), torch.rand(b.shape[1] * 3)[::3]
            bias = torch.rand(1).expand(b.shape[1])
            arguments = (a, b, a_scale, b_scale, bias)
            assert_within(scaled_mm(*arguments), canonical(*arguments), class_of(dtype))


def test_offsets_beyond_32_bits(interpreter):
    a, b = torch.arange(-12, 12).view(3, 8).int(), torch.arange(3, 27).view(3, 8).int()
    along_m_and_n, along_k = from_bytes(interpreter.submit(answer_far_apart).result(timeout=120))
    assert torch.equal(along_m_and_n, a @ b.t())
    assert torch.equal(along_k, a.t() @ b)


def test_nothing_beside_the_operands_is_used(scaled_mm):
    around = torch.full((40, 160), torch.nan).to(E5M2)
    a, b = around[:17, 5:135], around.t()[7:137, 17:26]
    a.copy_(codes(17, 130, E5M2))
    b.copy_(codes(130, 9, E5M2))
    scales = torch.full((40, 3), torch.nan)
    scales[:17, 1] = torch.rand(17)
    arguments = (a, b, scales[:17, 1:2], torch.rand(9))
    assert not canonical(*arguments).isnan().any()
    assert_within(scaled_mm(*arguments), canonical(*arguments), Numerics.SAME_ACCUM)


def test_more_tiles_than_share_the_cache(scaled_mm):
    a, b = codes(1100, 9, I8), codes(200, 9, I8).t()
    scale = torch.rand(1100, 1)
    assert torch.equal(scaled_mm(a, b, scale), canonical(a, b, scale))


@pytest.mark.parametrize("dtype", [I8, E4M3])
def test_scales_that_are_zero_or_not_finite(scaled_mm, dtype):
    a, b = codes(5, 20, dtype), codes(4, 20, dtype).t()
    a_scale = torch.tensor([0.0, torch.nan, torch.inf, -1.0, 1e-38]).view(5, 1)
    b_scale = torch.tensor([1.0, 0.0, torch.nan, torch.inf])
    assert_within(scaled_mm(a, b, a_scale, b_scale), canonical(a, b, a_scale, b_scale), class_of(dtype))


@pytest.mark.parametrize(("dtype", "value"), [(E4M3, 448.0), (E4M3, -448.0), (E4M3, 2**-9), (E5M2, 57344.0)], ids=str)
def test_extreme_float8_codes(scaled_mm, dtype, value):
    a, b = torch.full((5, 300), value).to(dtype), torch.full((300, 4), torch.finfo(dtype).max).to(dtype)
    a[1:] = codes(4, 300, dtype)
    assert_within(scaled_mm(a, b), canonical(a, b), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_code_that_is_not_finite_stays_in_its_row(scaled_mm, value):
    # e5m2, because the interpreter takes the NaN of e4m3 for 480.
    a, b = codes(5, 130, E5M2), codes(9, 130, E5M2).t()
    a[3, 129] = value
    expected = canonical(a, b)
    assert (~expected.isfinite()).sum() == 9
    assert_within(scaled_mm(a, b), expected, Numerics.SAME_ACCUM)


# --- block scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, I8])
@pytest.mark.parametrize("block", [(128, 128), (1, 128), (1, 16), (3, 7), (64, 100), (128, 300)], ids=str)
@pytest.mark.parametrize("m", [1, 17])
def test_scales_of_blocks_are_applied_along_k(scaled_mm, dtype, block, m):
    n, k = 140, 270
    a, b = codes(m, k, dtype), codes(n, k, dtype).t()
    a_scale = torch.rand(-(-k // block[1]), m).t()  # column-major, as TMA wants it
    b_scale = torch.rand(-(-n // block[0]), -(-k // block[1]))
    arguments = (a, b, a_scale, b_scale, torch.randn(n))
    assert_within(scaled_mm(*arguments, block=block), canonical(*arguments, block=block), Numerics.SAME_ACCUM)


def test_blocks_without_a_scale_of_the_activation(scaled_mm):
    a, b, b_scale = codes(5, 40, E4M3), codes(9, 40, E4M3).t(), torch.rand(2, 3)
    expected = canonical(a, b, None, b_scale, block=[8, 16])
    assert_within(scaled_mm(a, b, None, b_scale, block=[8, 16]), expected, Numerics.SAME_ACCUM)


def test_a_block_of_nan_stays_in_its_rows_and_columns(scaled_mm):
    a, b = codes(5, 256, E4M3), codes(256, 256, E4M3).t()
    a_scale, b_scale = torch.rand(5, 2), torch.rand(2, 2)
    a_scale[2, 1] = b_scale[1, 0] = torch.nan
    out = scaled_mm(a, b, a_scale, b_scale, block=[128, 128])
    assert_within(out, canonical(a, b, a_scale, b_scale, block=[128, 128]), Numerics.SAME_ACCUM)
    assert out.isnan().sum() == 256 + 4 * 128


# --- weight-only -------------------------------------------------------------------------------------------------


def packed(k: int, n: int) -> Tensor:
    """Every byte is two int4 codes."""
    return codes(n, k // 2, U8).t()


@pytest.mark.parametrize("x_dtype", [F16, F32])
@pytest.mark.parametrize(
    ("weight", "asymmetric"),
    [*itertools.product((I8, U8, "int4"), (False, True)), (E4M3, False), (E5M2, False)],  # float8 has no zero point
    ids=str,
)
@pytest.mark.parametrize("block", [None, (1, 32), (1, 16), (1, 9), (16, 100), (1, 300)], ids=str)
def test_weight_only_is_the_canonical_op(weight_only, x_dtype, weight, block, asymmetric):
    m, n, k = 17, 70, 130
    x, b = torch.randn(m, k).to(x_dtype), packed(k, n) if weight == "int4" else codes(n, k, weight).t()
    shape = (n,) if block is None else (-(-n // block[0]), -(-k // block[1]))
    low, high = (0, 256) if weight is U8 else (-8, 8) if weight == "int4" else (-128, 128)
    zero_point = torch.randint(low, high, shape, dtype=I32) if asymmetric else None
    arguments = (x, b, torch.rand(shape), zero_point, torch.randn(n).to(x_dtype))
    expected = canonical_weight_only(*arguments, block=block)
    assert_within(weight_only(*arguments, block=block), expected, Numerics.REASSOCIATED)


@pytest.mark.parametrize("weight", [I8, "int4"], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 70, 10), (1, 1, 2), (1, 70, 130), (17, 1, 10), (70, 140, 6), (3, 5, 0)])
def test_weight_only_of_any_size(weight_only, weight, m, n, k):
    x, b = torch.randn(m, k, dtype=F16), packed(k, n) if weight == "int4" else codes(n, k, I8).t()
    arguments = (x, b, torch.rand(n), None, torch.randn(n))
    assert_within(weight_only(*arguments), canonical_weight_only(*arguments), Numerics.REASSOCIATED)


@pytest.mark.parametrize("shape", [(), (1,), (1, 9)], ids=str)
def test_weight_only_scales_of_every_shape(weight_only, shape):
    x, b = torch.randn(5, 20, dtype=F16), codes(9, 20, I8).t()
    arguments = (x, b, torch.rand(shape), torch.randint(-128, 128, shape, dtype=I8))
    assert_within(weight_only(*arguments), canonical_weight_only(*arguments), Numerics.REASSOCIATED)


def test_weight_only_operands_of_any_strides(weight_only):
    tall, bytes_ = torch.randn(40, 34, dtype=F16), codes(40, 40, U8)
    scale = torch.rand(2, 15)[:, ::2].t()
    for x in (tall[:34, :20], tall.t()[:, ::2], tall[::2, 3:23]):
        for b in (bytes_[:10, :8], bytes_.t()[7:17, :8], bytes_[::3, ::2][:10, :8]):
            expected = canonical_weight_only(x, b, scale, block=[1, 10])
            assert_within(weight_only(x, b, scale, block=[1, 10]), expected, Numerics.REASSOCIATED)


def test_every_packed_byte_is_two_codes_the_even_k_in_the_low_nibble(weight_only):
    b = torch.arange(256, dtype=U8).view(1, 256)
    out = weight_only(torch.eye(2, dtype=F16), b, torch.ones(()))
    assert torch.equal(out, torch.stack([b[0] % 16, b[0] // 16]).float() - 8)


def test_a_weight_only_scale_that_is_not_finite_stays_in_its_column(weight_only):
    x, b, scale = torch.randn(5, 64, dtype=F16), packed(64, 9), torch.rand(9, 2)
    scale[3, 1], scale[4, 0] = torch.nan, 0.0
    out = weight_only(x, b, scale, block=[1, 32])
    assert_within(out, canonical_weight_only(x, b, scale, block=[1, 32]), Numerics.REASSOCIATED)
    assert out.isnan().sum() == 5


# --- the ops -----------------------------------------------------------------------------------------------------


def test_nothing_of_triton_is_imported_before_a_matmul_runs(printed):
    def loads_triton(module: str) -> str:
        return printed(f"import sys, {module}; print('triton' in sys.modules)")

    # torch itself is the baseline: a build of torch that loads Triton is not our doing.
    assert loads_triton("fx_quant.kernels.triton.scaled_mm_kernels") == loads_triton("torch")


def test_without_a_gpu_the_ops_are_the_canonical_ones(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    a, b, zero_point = codes(5, 20, I8), codes(9, 20, I8).t(), torch.tensor(3, dtype=I32)
    scale = torch.rand(9)
    out = fxq.triton_scaled_mm(a, b, None, scale, None, 9, BF16, a_zero_point=zero_point)
    assert torch.equal(out, fxq.scaled_mm(a, b, None, scale, None, BF16, a_zero_point=zero_point))
    x = torch.randn(5, 20)
    out = fxq.triton_weight_only_mm(x, b, None, scale, None, 9, F16)
    assert torch.equal(out, fxq.weight_only_mm(x, b, scale, None, None, F16))


@pytest.mark.parametrize("m", [0, 5])
def test_ops_pass_opcheck(monkeypatch, m):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    b, scale = codes(9, 20, I8).t(), torch.rand(9)
    torch.library.opcheck(fxq.triton_scaled_mm.default, (codes(20, m, I8).t(), b, None, scale, None, 9, BF16))
    arguments = (torch.randn(20, m).t(), packed(20, 9), None, torch.rand(9, 2), None, 9, BF16)
    torch.library.opcheck(fxq.triton_weight_only_mm.default, arguments, {"block": [1, 10]})


def test_operands_that_no_kernel_takes_are_errors():
    a, b, x = codes(5, 20, I8), codes(9, 20, I8).t(), torch.randn(5, 20)
    one = torch.ones(())
    with pytest.raises(RuntimeError, match="the weight can have no zero point"):
        fxq.triton_scaled_mm(a, b, None, one, None, 9, F32, b_zero_point=torch.zeros((), dtype=I32))
    with pytest.raises(RuntimeError, match="a float activation has no scale and no zero point"):
        fxq.triton_weight_only_mm(x, b, one, one, None, 9, F32)


@needs_triton
def test_operands_that_do_not_fit_are_errors_before_a_launch():
    a, b, x = codes(5, 20, I8), codes(9, 20, I8).t(), torch.randn(5, 20)
    with pytest.raises(RuntimeError, match="must both be int8 or both float8"):
        scaled_operands(a.view(U8), b, None, None, None, 9, F32)
    with pytest.raises(RuntimeError, match=r"got torch.int8 \[5, 20\] and torch.int8 \[20, 9\] for n=8"):
        scaled_operands(a, b, None, None, None, 8, F32)
    zero_point = torch.zeros(5, 1, dtype=I32)
    with pytest.raises(RuntimeError, match="block scales take no a_zero_point"):
        scaled_operands(a, b, None, torch.rand(9, 2), None, 9, F32, block=[1, 10], a_zero_point=zero_point)
    with pytest.raises(RuntimeError, match="b must have n = 9 columns"):
        plan_weight_only_mm(x, b[:, :8], torch.rand(9), None, 9, F32, architecture=architecture("sm90"))


@needs_triton
@pytest.mark.parametrize(("m", "n"), [(0, 9), (5, 0)])
def test_an_empty_result_launches_nothing(m, n):
    operands = scaled_operands(codes(m, 20, I8), codes(20, n, I8), None, None, None, n, BF16)
    plan = plan_scaled_mm(operands, architecture("sm90"))
    assert plan.programs == 0
    assert plan.run().shape == (m, n)


@pytest.mark.parametrize("kind", ["codes", "weight_only"])
def test_the_configuration_follows_the_rows(kind):
    assert [configuration(kind, m).block_m for m in (1, 16, 17, 64, 65, 10**6)] == [16, 16, 64, 64, 128, 128]


# --- compiled for GPUs that are not here -------------------------------------------------------------------------

meta = partial(torch.empty, device="meta")
N = K = 4096


def _float8(m: int, dtype: torch.dtype, on: Architecture) -> Launch:
    a, b = meta(m, K, dtype=dtype), meta(N, K, dtype=dtype).t()
    return plan_scaled_mm(
        scaled_operands(a, b, meta(m, 1), meta(N), meta(N, dtype=BF16), N, BF16), on, configuration("codes", m)
    )


def _float8_block(m: int, dtype: torch.dtype, on: Architecture) -> Launch:
    a, b = meta(m, K, dtype=dtype), meta(N, K, dtype=dtype).t()
    return plan_scaled_mm(
        scaled_operands(a, b, meta(m, 32), meta(32, 32), None, N, BF16, block=[128, 128]), on, configuration("codes", m)
    )


def _int8(m: int, dtype: torch.dtype, on: Architecture) -> Launch:
    a, b = meta(m, K, dtype=I8), meta(N, K, dtype=I8).t()
    zero_point = {"a_zero_point": meta(m, 1, dtype=I32), "b_sum": meta(N, dtype=I32)}
    return plan_scaled_mm(
        scaled_operands(a, b, meta(m, 1), meta(N), meta(N), N, BF16, **zero_point), on, configuration("codes", m)
    )


def _weight_int8(m: int, dtype: torch.dtype, on: Architecture) -> Launch:
    x, b, zero_point = meta(m, K, dtype=BF16), meta(N, K, dtype=I8).t(), meta(N, dtype=I8)
    return plan_weight_only_mm(x, b, meta(N), None, N, BF16, b_zero_point=zero_point, architecture=on)


def _weight_float8(m: int, dtype: torch.dtype, on: Architecture) -> Launch:
    x, b = meta(m, K, dtype=F16), meta(N, K, dtype=dtype).t()
    return plan_weight_only_mm(x, b, meta(32, 32), None, N, F16, block=[128, 128], architecture=on)


def _weight_int4(m: int, dtype: torch.dtype, on: Architecture) -> Launch:
    x, b, zero_point = meta(m, K, dtype=BF16), meta(N, K // 2, dtype=U8).t(), meta(N, 32, dtype=I8)
    options = {"b_zero_point": zero_point, "block": [1, 128]}
    return plan_weight_only_mm(x, b, meta(N, 32), None, N, BF16, **options, architecture=on)


VARIANTS = {f.__name__[1:]: f for f in (_float8, _float8_block, _int8, _weight_int8, _weight_float8, _weight_int4)}


def compiled(launch: Launch, name: str) -> Compiled:
    return compile_launch(launch, architecture(name))


def instructions(assembly: str) -> set[str]:
    """The matrix instructions in PTX or AMD assembly."""
    return set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|v_mfma)[\w.]*", assembly))


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize(
    ("variant", "m", "instruction"),
    [
        ("float8", 4096, r"wgmma.*e4m3\.e4m3"),
        ("float8_block", 4096, r"wgmma.*e4m3\.e4m3"),
        ("int8", 4096, r"wgmma.*s32\.s8\.s8"),
        ("weight_int8", 4096, r"wgmma.*bf16\.bf16"),
        ("weight_float8", 4096, r"wgmma.*f16\.f16"),
        ("weight_int4", 4096, r"wgmma.*bf16\.bf16"),
        # 16 rows are too few for wgmma; float8 is then widened, exactly.
        ("float8", 16, r"mma\.sync.*f32\.f16\.f16"),
        ("int8", 16, r"mma\.sync.*s32\.s8\.s8"),
        ("weight_int4", 16, r"mma\.sync.*f32\.bf16\.bf16"),
    ],
)
def test_kernels_compile_for_sm90(variant, m, instruction):
    binary = compiled(VARIANTS[variant](m, E4M3, architecture("sm90")), "sm90")
    found = instructions(binary.assembly)
    assert found
    assert all(re.match(instruction, name) for name in found), found
    # What a program may have on sm89 and sm120, which run the same configurations.
    assert binary.shared <= 99 * 1024


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_compile_for_gfx942(variant):
    binary = compiled(VARIANTS[variant](4096, FNUZ, architecture("gfx942")), "gfx942")
    expected = {"float8": "fp8_fp8", "float8_block": "fp8_fp8", "int8": "i8", "weight_float8": "f16"}
    found = instructions(binary.assembly)
    assert found
    assert all(name.endswith(expected.get(variant, "bf16")) for name in found), found
    assert binary.shared <= 64 * 1024


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
def test_float8_sums_leave_the_tensor_cores_every_128_products():
    """The tensor cores of sm90 keep about 14 bits of a sum; ours is added in float32."""
    a, b = meta(4096, K, dtype=E4M3), meta(N, K, dtype=E4M3).t()
    operands = scaled_operands(a, b, None, None, None, N, BF16)
    launch = plan_scaled_mm(operands, architecture("sm90"), configuration("codes", 4096))
    binary = compiled(launch, "sm90")
    # One addition for each of a thread's 128 * 128 / 256 results: nothing else adds without a bias.
    assert len(re.findall(r"add\.(?:rn\.)?f32", binary.assembly)) == 64


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize("variant", ["int8", "weight_int8", "weight_int4"])
def test_kernels_without_float8_compile_for_sm80(variant):
    binary = compiled(VARIANTS[variant](64, E4M3, architecture("sm80")), "sm80")
    assert all(name.startswith("mma.sync") for name in instructions(binary.assembly))


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("m", "n", "k"), [(0, 70, 9), (1, 70, 130), (17, 70, 130), (70, 200, 515)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int8_is_exact_on_the_gpu(m, n, k, asymmetric):
    zero_point = torch.randint(-128, 128, (m, 1), dtype=I32, device="cuda") if asymmetric else None
    a, b = codes(m, k, I8).cuda(), codes(n, k, I8).cuda().t()
    scales = (torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda"), torch.randn(n, device="cuda"))
    actual = fxq.triton_scaled_mm(a, b, *scales, n, BF16, a_zero_point=zero_point)
    assert torch.equal(actual, fxq.scaled_mm(a, b, *scales, BF16, a_zero_point=zero_point))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 130), (17, 70, 130), (70, 200, 515)])
@pytest.mark.parametrize("block", [None, (128, 128)], ids=str)
def test_float8_on_the_gpu(m, n, k, block):
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8 of the GPU")
    # Without cancellation: the tensor cores keep about 14 bits of the terms, not of the result.
    a, b = torch.rand(m, k).to(E4M3).cuda(), torch.rand(n, k).to(E4M3).cuda().t()
    along = 1 if block is None else -(-k // 128)
    b_shape = (n,) if block is None else (-(-n // 128), along)
    scales = (torch.rand(m, along, device="cuda"), torch.rand(b_shape, device="cuda"), None)
    actual = fxq.triton_scaled_mm(a, b, *scales, n, BF16, block=block)
    assert_within(actual, fxq.scaled_mm(a, b, *scales, BF16, block=block), Numerics.SAME_ACCUM)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("x_dtype", [BF16, F16])
@pytest.mark.parametrize("weight", [I8, U8, "int4"], ids=str)
@pytest.mark.parametrize("block", [None, (1, 32)], ids=str)
@pytest.mark.parametrize("m", [1, 17, 70])
def test_weight_only_on_the_gpu(x_dtype, weight, block, m):
    n, k = 70, 130
    x = torch.randn(m, k).to(x_dtype).cuda()
    b = (packed(k, n) if weight == "int4" else codes(n, k, weight).t()).cuda()
    shape = (n,) if block is None else (n, -(-k // block[1]))
    scale, zero_point = torch.rand(shape, device="cuda"), torch.randint(0, 8, shape, device="cuda")
    actual = fxq.triton_weight_only_mm(x, b, None, scale, None, n, x_dtype, b_zero_point=zero_point, block=block)
    expected = fxq.weight_only_mm(x, b, scale, zero_point, None, x_dtype, block=block)
    assert_within(actual, expected, Numerics.REASSOCIATED)


# --- which kernel is chosen where --------------------------------------------------------------------------------

TENSOR, TOKEN, CHANNEL = Granularity.PER_TENSOR, Granularity.PER_TOKEN, Granularity.PER_CHANNEL
GROUP, BLOCK = Granularity.per_group(128), Granularity.per_block(128, 128)


def problem(activation: OperandSpec, weight: OperandSpec, **changes) -> Problem:
    given = {"m": SizeRange(1, None), "n": 4096, "k": 4096, "out_dtype": BF16, "bias": None, "constant_weight": True}
    return Problem(Scheme(activation, weight), **(given | changes))


def codes_problem(dtype: torch.dtype, granularities: tuple[Granularity, Granularity], **changes) -> Problem:
    return problem(OperandSpec(dtype, granularities[0], True), OperandSpec(dtype, granularities[1]), **changes)


def chosen(asked: Problem, target: str, triton: str | None = "3.6.0", **options) -> str:
    packages = {} if triton is None else {"triton": triton}
    try:
        return select(asked, named_target(target, packages), **options).kernel.name
    except NoKernelError:
        return "none"


ROW = (TOKEN, CHANNEL)
ASKED = {
    "int8": codes_problem(I8, ROW),
    "float8 row, float16, float32 bias": codes_problem(E4M3, ROW, out_dtype=F16, bias=F32),
    "float8 tensor": codes_problem(E4M3, (TENSOR, TENSOR)),
    "float8 block": codes_problem(E4M3, (GROUP, BLOCK)),
    "fnuz row, float16": codes_problem(FNUZ, ROW, out_dtype=F16),
    "fnuz block": codes_problem(FNUZ, (GROUP, BLOCK)),
    "e5m2 x e5m2": codes_problem(E5M2, ROW),
    "w8": problem(OperandSpec(BF16), OperandSpec(I8, CHANNEL)),
    "w8 float8": problem(OperandSpec(F16), OperandSpec(E4M3, BLOCK)),
    "w4": problem(OperandSpec(BF16), OperandSpec(torch.int4, GROUP, symmetric=False)),
}


@pytest.mark.parametrize(
    ("asked", "sm80", "sm90", "gfx942", "gfx950"),
    [
        ("int8", *["triton_int8"] * 4),
        ("float8 row, float16, float32 bias", "none", "triton_float8", "none", "triton_float8"),
        ("float8 tensor", "none", "triton_float8", "none", "triton_float8"),
        ("float8 block", "none", "triton_float8_block", "none", "triton_float8_block"),
        ("fnuz row, float16", "none", "none", "triton_float8_fnuz", "none"),
        ("fnuz block", "none", "none", "triton_float8_block_fnuz", "none"),
        ("e5m2 x e5m2", "none", "triton_float8", "none", "triton_float8"),
        ("w8", *["triton_weight_only_int8_packed"] * 4),
        ("w8 float8", "none", *["triton_weight_only_float8_packed"] * 3),
        ("w4", *["triton_weight_only_int4_packed"] * 4),
    ],
)
def test_what_triton_runs_where(asked, sm80, sm90, gfx942, gfx950):
    others = {k.provider for k in kernels()} - {"triton"}
    found = {target: chosen(ASKED[asked], target, disabled=others) for target in ("sm80", "sm90", "gfx942", "gfx950")}
    assert found == {"sm80": sm80, "sm90": sm90, "gfx942": gfx942, "gfx950": gfx950}


@pytest.mark.parametrize(
    ("asked", "target", "expected"),
    [
        # Unmeasured, it does not go before cuBLASLt's.
        ("int8", "sm80", "pytorch_int_mm_cuda"),
        ("int8", "sm90", "pytorch_int_mm_cuda"),
        ("int8", "gfx942", "triton_int8"),
        ("float8 tensor", "sm90", "pytorch_scaled_mm"),
        ("float8 row, float16, float32 bias", "sm90", "pytorch_channelwise"),
        ("fnuz row, float16", "gfx942", "pytorch_channelwise_rocm_fnuz"),
        ("w8", "sm90", "triton_weight_only_int8_packed"),
        ("w4", "gfx942", "triton_weight_only_int4_packed"),
    ],
)
def test_what_is_chosen_beside_pytorch(asked, target, expected):
    assert chosen(ASKED[asked], target) == expected


@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942", "gfx950", "x86_vnni"])
@pytest.mark.parametrize("triton", [None, "3.5.1"])
@pytest.mark.parametrize("asked", ASKED)
def test_without_a_new_enough_triton_its_kernels_are_not_chosen(asked, triton, target):
    assert not chosen(ASKED[asked], target, triton).startswith("triton")
    (unmet,) = kernel("triton_int8").requires.unmet_by_target(named_target("sm90", {"triton": "3.5.1"}))
    assert str(unmet) == "needs triton>=3.6, found 3.5.1"


def test_an_int8_sum_that_could_saturate_is_declined():
    (unmet,) = kernel("triton_int8").requires.unmet_by_problem(codes_problem(I8, ROW, k=131072))
    assert str(unmet) == "needs k <= 131071, got k=131072"


def test_zero_points_are_taken_where_codes_stay_exact():
    asymmetric = problem(OperandSpec(I8, TOKEN, True, symmetric=False), OperandSpec(I8, CHANNEL))
    assert kernel("triton_int8").requires.unmet_by_problem(asymmetric) == []
    asymmetric = problem(OperandSpec(BF16), OperandSpec(E4M3, CHANNEL, symmetric=False))
    (unmet,) = kernel("triton_weight_only_float8").requires.unmet_by_problem(asymmetric)
    assert str(unmet) == "has no zero point of the weight"


@pytest.mark.parametrize("name", ["triton_int8", "triton_float8", "triton_weight_only", "triton_weight_only_int4"])
def test_every_result_has_a_tolerance(name):
    requires, numerics = kernel(name).requires, kernel(name).numerics
    assert requires.out_dtypes - {I32} <= {dtype for known, dtype in TOLERANCES if known is numerics}
