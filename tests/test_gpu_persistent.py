"""The persistent form without a GPU: its arithmetic in Triton's interpreter, its code by cross-compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fx_quant.kernels.triton.architectures import architecture, architecture_of
from fx_quant.kernels.triton.launch import Configuration
from fx_quant.kernels.triton.operands import ScaledOperands, scaled_operands
from fx_quant.kernels.triton.persistent import CONFIGURATIONS, plan_scaled_mm, unfit
from fx_quant.kernels.triton.scaled_mm import FORMS
from fx_quant.scheme import Numerics
from tests.cross_compile import compile_launch
from tests.tolerances import assert_within
from tests.triton_interpreter import call, compiler_is_real, every_variant, needs_triton

fxq = torch.ops.fx_quant
F32, BF16, F16, I32, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# Small, because the interpreter is slow.
SMALL = Configuration("persistent", 16, 32, 32, 4, 3)
SPECIALIZED = replace(SMALL, warp_specialized=True)


# --- operands ---------------------------------------------------------------------------------------------------


def codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Codes ``[rows, columns]`` whose rows are a multiple of 16 bytes apart."""
    wide = -(-columns // 16) * 16
    if dtype is I8:
        return torch.randint(-128, 128, (rows, wide), dtype=I8)[:, :columns]
    return torch.randn(rows, wide).to(dtype)[:, :columns]


def operands(a: Tensor, b: Tensor, a_scale=None, b_scale=None, bias=None, out_dtype=F32, **options) -> ScaledOperands:
    return scaled_operands(a, b, a_scale, b_scale, bias, b.shape[1], out_dtype, **options)


def answer(found: Configuration, processors: int, *args: object, **options: object) -> Tensor:
    """The result of a GPU of so few processors that a program has many tiles."""
    on = replace(architecture("sm90"), processors=processors)
    return plan_scaled_mm(operands(*args, **options), found, on).run()


@pytest.fixture
def scaled_mm(interpreter) -> Callable[..., Tensor]:
    def run(*args: object, found: Configuration = SMALL, processors: int = 3, **options: object) -> Tensor:
        return call(interpreter, answer, found, processors, *args, **options)

    return run


def canonical(a, b, a_scale=None, b_scale=None, bias=None, out_dtype=F32, **options) -> Tensor:
    return fxq.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, **options)


def class_of(dtype: torch.dtype) -> Numerics:
    return Numerics.EXACT if dtype is I8 else Numerics.SAME_ACCUM


# --- scaled_mm ---------------------------------------------------------------------------------------------------

# None of which tiles of 16 x 32 x 32 fill, and more tiles than processors.
SIZES = [(0, 70, 9), (1, 1, 1), (1, 70, 130), (17, 1, 9), (17, 70, 1), (40, 70, 65), (5, 0, 16)]


@pytest.mark.parametrize("dtypes", [(I8, I8), (E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_it_is_the_canonical_op(scaled_mm, dtypes, m, n, k):
    a, b = codes(m, k, dtypes[0]), codes(n, k, dtypes[1]).t()
    arguments = (a, b, torch.rand(m, 1), torch.rand(n), torch.randn(n))
    assert_within(scaled_mm(*arguments), canonical(*arguments), class_of(dtypes[0]))


@pytest.mark.parametrize("found", [SPECIALIZED, replace(SMALL, flattened=True), replace(SMALL, block_k=64)], ids=str)
@pytest.mark.parametrize("dtype", [I8, E4M3])
def test_every_variant_is_the_canonical_op(scaled_mm, found, dtype):
    a, b = codes(20, 70, dtype), codes(70, 70, dtype).t()
    arguments = (a, b, torch.rand(20, 1), torch.rand(70), torch.randn(70))
    actual = scaled_mm(*arguments, found=found)
    assert_within(actual, canonical(*arguments), class_of(dtype))


@pytest.mark.parametrize("processors", [1, 7, 400])
def test_every_tile_is_computed_once_whatever_the_number_of_processors(scaled_mm, processors):
    # 9 x 2 tiles, of which 8 x 2 share the cache.
    a, b = codes(140, 20, I8), codes(40, 20, I8).t()
    actual = scaled_mm(a, b, out_dtype=I32, processors=processors)
    assert torch.equal(actual, canonical(a, b, out_dtype=I32))


@pytest.mark.parametrize("a_shape", [None, (), (1, 1), (17, 1)], ids=str)
@pytest.mark.parametrize("b_shape", [None, (1,), (40,), (1, 40)], ids=str)
def test_scales_of_every_shape(scaled_mm, a_shape, b_shape):
    a, b = codes(17, 20, E4M3), codes(40, 20, E4M3).t()
    scales = (None if shape is None else torch.rand(shape) + 0.5 for shape in (a_shape, b_shape))
    arguments = (a, b, *scales)
    assert_within(scaled_mm(*arguments), canonical(*arguments), Numerics.SAME_ACCUM)


def test_strided_and_expanded_scales(scaled_mm):
    a, b = codes(17, 20, I8), codes(40, 20, I8).t()
    for a_scale in (torch.rand(17, 3)[:, 1:2], torch.rand(1, 1).expand(17, 1)):
        for b_scale in (torch.rand(120)[::3], torch.rand(1).expand(40)):
            arguments = (a, b, a_scale, b_scale, torch.rand(80)[::2])
            assert torch.equal(scaled_mm(*arguments), canonical(*arguments))


@pytest.mark.parametrize("bias", [None, F32, BF16, F16])
@pytest.mark.parametrize("out_dtype", [F32, BF16, F16])
def test_every_bias_and_result(scaled_mm, bias, out_dtype):
    a, b = codes(5, 33, I8), codes(9, 33, I8).t()
    bias = None if bias is None else torch.randn(9).to(bias)
    arguments = (a, b, torch.rand(5, 1) / 100, torch.rand(9), bias, out_dtype)
    # The interpreter truncates to bfloat16, which is within one unit in the last place.
    numerics = Numerics.SAME_ACCUM if out_dtype is BF16 else Numerics.EXACT
    assert_within(scaled_mm(*arguments), canonical(*arguments), numerics)


def test_product_and_bias_are_rounded_one_after_the_other(scaled_mm):
    # 3 * (1 + 2**-23) = 3 + 1.5 * 2**-22 is rounded to 3 + 2**-21 before the bias; fused with it, it would not be.
    a, b = torch.zeros((1, 16), dtype=I8), torch.zeros((1, 16), dtype=I8).t()
    a[0, 0], b[0, 0] = 3, 1
    arguments = (a, b, torch.tensor([[1 + 2**-23]]), None, torch.tensor([-3.0]))
    assert scaled_mm(*arguments).item() == canonical(*arguments).item() == 2**-21


def test_int32_is_the_accumulator(scaled_mm):
    # Sums beyond 2**24, which float32 would round.
    a, b = torch.full((5, 1536), -127, dtype=I8), torch.randint(100, 128, (9, 1536), dtype=I8).t()
    expected = canonical(a, b, out_dtype=I32)
    assert expected.max() < -(2**24)
    assert torch.equal(scaled_mm(a, b, out_dtype=I32, found=replace(SMALL, block_k=128)), expected)


@pytest.mark.parametrize("found", [SMALL, SPECIALIZED], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (17, 1)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["sums given", "sums computed"])
def test_an_asymmetric_activation_is_exact(scaled_mm, found, shape, given):
    a, b = codes(17, 70, I8), codes(40, 70, I8).t()
    zero_point = torch.randint(-128, 128, shape, dtype=I32)
    arguments = (a, b, torch.rand(17, 1), torch.rand(40), torch.randn(40))
    sums = b.sum(0, dtype=I32) if given else None
    actual = scaled_mm(*arguments, a_zero_point=zero_point, b_sum=sums, found=found)
    assert torch.equal(actual, canonical(*arguments, a_zero_point=zero_point))


def test_the_sum_is_the_exact_one_up_to_float32(scaled_mm):
    a, b = codes(20, 512, E4M3), codes(40, 512, E4M3).t()
    actual, exact = scaled_mm(a, b, found=replace(SMALL, block_k=128)), a.double() @ b.double()
    assert ((actual - exact).abs() <= 512 * 2**-24 * (a.double().abs() @ b.double().abs())).all()


def test_nothing_beside_the_operands_is_used(scaled_mm):
    around = torch.full((40, 160), torch.nan).to(E5M2)
    a, b = around[:17, :130], torch.full((20, 144), torch.nan).to(E5M2)[:9, :130].t()
    a.copy_(codes(17, 130, E5M2))
    b.copy_(codes(9, 130, E5M2).t())
    scales = torch.full((40, 3), torch.nan)
    scales[:17, 1] = torch.rand(17)
    arguments = (a, b, scales[:17, 1:2], torch.rand(9))
    for found in (SMALL, SPECIALIZED):
        assert_within(scaled_mm(*arguments, found=found), canonical(*arguments), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("dtype", [I8, E4M3])
def test_scales_that_are_zero_or_not_finite(scaled_mm, dtype):
    a, b = codes(5, 20, dtype), codes(4, 20, dtype).t()
    a_scale = torch.tensor([0.0, torch.nan, torch.inf, -1.0, 1e-38]).view(5, 1)
    b_scale = torch.tensor([1.0, 0.0, torch.nan, torch.inf])
    assert_within(scaled_mm(a, b, a_scale, b_scale), canonical(a, b, a_scale, b_scale), class_of(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_code_that_is_not_finite_stays_in_its_row(scaled_mm, value):
    # e5m2, because the interpreter takes the NaN of e4m3 for 480.
    a, b = codes(5, 130, E5M2), codes(9, 130, E5M2).t()
    a[3, 129] = value
    expected = canonical(a, b)
    assert (~expected.isfinite()).sum() == 9
    assert_within(scaled_mm(a, b), expected, Numerics.SAME_ACCUM)


# --- scales of blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [SMALL, SPECIALIZED], ids=str)
@pytest.mark.parametrize("block", [(64, 64), (32, 32), (1, 64), (48, 32)], ids=str)
@pytest.mark.parametrize("m", [1, 17])
def test_scales_of_blocks_are_applied_along_k(scaled_mm, found, block, m):
    n, k = 70, 135
    a, b = codes(m, k, E4M3), codes(n, k, E4M3).t()
    a_scale = torch.rand(-(-k // block[1]), m).t()  # column-major, as cuBLASLt wants it
    b_scale = torch.rand(-(-n // block[0]), -(-k // block[1]))
    arguments = (a, b, a_scale, b_scale, torch.randn(n))
    actual = scaled_mm(*arguments, block=block, found=found)
    assert_within(actual, canonical(*arguments, block=block), Numerics.SAME_ACCUM)


def test_scales_of_blocks_of_any_strides(scaled_mm):
    a, b = codes(17, 96, E4M3), codes(40, 96, E4M3).t()
    for a_scale in (None, torch.rand(17, 3), torch.rand(34, 6)[::2, ::2], torch.rand(1, 3).expand(17, 3)):
        for b_scale in (torch.rand(2, 3), torch.rand(3, 2).t(), torch.rand(1, 1).expand(2, 3)):
            arguments = (a, b, a_scale, b_scale)
            expected = canonical(*arguments, block=[32, 32])
            assert_within(scaled_mm(*arguments, block=[32, 32]), expected, Numerics.SAME_ACCUM)


@pytest.mark.parametrize("rows", [32, 1])
def test_a_block_of_nan_stays_in_its_rows_and_columns(scaled_mm, rows):
    a, b = codes(5, 64, E4M3), codes(64, 64, E4M3).t()
    a_scale, b_scale = torch.rand(5, 2), torch.rand(64 // rows, 2)
    a_scale[2, 1] = b_scale[1, 0] = torch.nan
    arguments = (a, b, a_scale, b_scale)
    out = scaled_mm(*arguments, block=[rows, 32])
    assert_within(out, canonical(*arguments, block=[rows, 32]), Numerics.SAME_ACCUM)
    assert out.isnan().sum() == 64 + 4 * rows


# --- what does not fit -------------------------------------------------------------------------------------------


def given(a: Tensor | None = None, b: Tensor | None = None, **options) -> ScaledOperands:
    a = torch.zeros(17, 64).to(E4M3) if a is None else a
    return operands(a, torch.zeros(32, a.shape[1]).to(a.dtype).t() if b is None else b, **options)


BLOCKS = {"a_scale": torch.ones(17, 1), "b_scale": torch.ones(1, 1)}


@pytest.mark.parametrize(
    ("asked", "on", "reason"),
    [
        (given(), "sm89", "needs tensor descriptors (TMA), which sm89 does not have; use the tile form"),
        (given(), "gfx942", "needs tensor descriptors (TMA), which gfx942 does not have; use the tile form"),
        (
            given(torch.zeros(17, 64).to(torch.float8_e4m3fnuz)),
            "sm90",
            "needs int8, float8_e4m3fn or float8_e5m2, got torch.float8_e4m3fnuz and torch.float8_e4m3fnuz",
        ),
        (given(torch.zeros(17, 0).to(E4M3)), "sm90", "needs k >= 1, got 0; use the tile form"),
        (
            given(torch.zeros(17, 20).to(E4M3)),
            "sm90",
            "needs a with k contiguous and rows a multiple of 16 bytes apart, got strides [20, 1]; pad k",
        ),
        (
            given(torch.zeros(1, 64).to(E4M3).expand(17, 64)),
            "sm90",
            "needs a with k contiguous and rows a multiple of 16 bytes apart, got strides [0, 1]; pad k",
        ),
        (
            given(b=torch.zeros(64, 32).to(E4M3)),
            "sm90",
            "needs the weight with k contiguous and rows a multiple of 16 bytes apart, got strides [1, 32]; pad k",
        ),
        (
            given(block=[32, 64], **BLOCKS),
            "sm90",
            "needs float8 and blocks of a multiple of 128 along k, got torch.float8_e4m3fn and 64",
        ),
        (
            given(torch.zeros(17, 128, dtype=I8), block=[32, 128], **BLOCKS),
            "sm90",
            "needs float8 and blocks of a multiple of 128 along k, got torch.int8 and 128",
        ),
        (
            given(out_dtype=F32),
            "sm90",
            "needs a tile of the result of at most 65536 bytes, got 131072; use a smaller one",
        ),
        (given(out_dtype=BF16), "sm90", None),
        (given(out_dtype=BF16), "sm120", None),
    ],
)
def test_it_says_what_it_cannot_compute(asked, on, reason):
    assert unfit(asked, CONFIGURATIONS["sm90"]["int8"][0], architecture(on)) == reason


def test_it_says_when_codes_are_not_aligned():
    a = torch.zeros(2000, dtype=I8)[1 : 1 + 17 * 64].view(17, 64)
    reason = unfit(given(a), SMALL, architecture("sm90"))
    assert reason is not None
    assert reason.startswith("needs a aligned to 16 bytes, got 0x")


@needs_triton
def test_planning_what_does_not_fit_is_an_error():
    with pytest.raises(RuntimeError, match=r"triton_scaled_mm: the persistent form needs k >= 1, got 0"):
        plan_scaled_mm(given(torch.zeros(17, 0).to(E4M3)), SMALL, architecture("sm90"))


def test_it_is_a_form():
    assert FORMS["persistent"].plan is plan_scaled_mm


# --- cross-compilation -------------------------------------------------------------------------------------------

M, N, K = 4096, 4096, 4096


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def shapes_of(name: str, out_dtype: torch.dtype) -> ScaledOperands:
    """Operands of a recipe, with all that the epilogue may have to hold."""
    dtype = I8 if name == "int8" else E4M3
    a, b, bias = meta(M, K, dtype=dtype), meta(N, K, dtype=dtype).t(), meta(N, dtype=BF16)
    if out_dtype is I32:
        return operands(a, b, out_dtype=I32)
    if name in ("float8_block", "float8_group"):
        rows = 128 if name == "float8_block" else 1
        return operands(a, b, meta(32, M).t(), meta(N // rows, 32), bias, out_dtype, block=[rows, 128])
    sums = {"a_zero_point": meta(M, 1, dtype=I32), "b_sum": meta(N, dtype=I32)} if dtype is I8 else {}
    return operands(a, b, meta(M, 1), meta(N), bias, out_dtype, **sums)


# What a wgmma, tcgen05 or mma of these codes is called in machine code; tcgen05 has no name of its own there.
INSTRUCTIONS = {
    ("sm90", "float8"): "QGMMA",
    ("sm90", "int8"): "IGMMA",
    ("sm120", "float8"): "QMMA",
    ("sm120", "int8"): "IMMA",
}
MATRIX_INSTRUCTIONS = {"QGMMA", "IGMMA", "HGMMA", "QMMA", "IMMA", "HMMA"}
SHIPPED = [
    (name, recipe_name, found)
    for name, recipes in CONFIGURATIONS.items()
    for recipe_name, configurations in recipes.items()
    for found in configurations
]


@every_variant
@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize(("name", "recipe_name", "found"), SHIPPED, ids=str)
def test_what_is_shipped_compiles_well(name, recipe_name, found):
    on = architecture(name)
    for dtype in [BF16, F32, I32] if name == "sm90" else [BF16]:
        if dtype is I32 and recipe_name != "int8":
            continue
        asked = shapes_of(recipe_name, dtype)
        if dtype is not BF16 and unfit(asked, found, on) is not None:
            continue
        assert asked.recipe == recipe_name
        binary = compile_launch(plan_scaled_mm(asked, found, on), on)
        counts = binary.instructions
        # `spilled` is no measure on sm120, where Triton 3.6 keeps 8 bytes of stack that it never reads.
        assert not counts["LDL"], f"{dtype} spills {binary.spilled} bytes"
        assert name == "sm120" or not binary.spilled, f"{dtype} spills {binary.spilled} bytes"
        assert binary.shared <= on.shared_bytes, f"{dtype}"
        assert counts["UTMALDG"], "no tile is loaded by a descriptor"
        used = {instruction for instruction in MATRIX_INSTRUCTIONS if counts[instruction]}
        if name == "sm100":
            assert "tcgen05.mma" in binary.assembly or (recipe_name == "int8" and used == {"IMMA"})
        else:
            assert used == {INSTRUCTIONS[name, recipe_name.split("_")[0]]}
        assert binary.warps == (12 if found.warp_specialized else found.warps)
        assert bool(counts["USETMAXREG"]) == found.warp_specialized


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
def test_float8_sums_leave_the_tensor_cores_every_128_products():
    """The tensor cores of sm90 keep about 14 bits of a sum; ours is added in float32."""
    a, b = meta(M, K, dtype=E4M3), meta(N, K, dtype=E4M3).t()
    found, on = CONFIGURATIONS["sm90"]["float8"][0], architecture("sm90")
    binary = compile_launch(plan_scaled_mm(operands(a, b, out_dtype=BF16), found, on), on)
    # Two groups of 128 threads add 64 results each; nothing else adds without a bias.
    assert binary.instructions["FADD"] == 128


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize("dtypes", [(E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2)], ids=str)
def test_float8_of_either_kind_is_not_widened(dtypes):
    a, b = meta(M, K, dtype=dtypes[0]), meta(N, K, dtype=dtypes[1]).t()
    found, on = CONFIGURATIONS["sm90"]["float8"][0], architecture("sm90")
    binary = compile_launch(plan_scaled_mm(operands(a, b, out_dtype=BF16), found, on), on)
    assert binary.instructions["QGMMA"]
    assert not binary.instructions["HGMMA"]


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize("n", [4090, 4088])
def test_sizes_that_fill_no_tile_compile_to_what_others_do(n):
    a, b = meta(1000, 1040, dtype=E4M3)[:, :1030], meta(n, 1040, dtype=E4M3)[:, :1030].t()
    found, on = CONFIGURATIONS["sm90"]["float8"][0], architecture("sm90")
    binary = compile_launch(plan_scaled_mm(operands(a, b, meta(1000, 1), meta(n), out_dtype=BF16), found, on), on)
    assert not binary.spilled
    assert binary.instructions["QGMMA"] == 8


# --- on a GPU ----------------------------------------------------------------------------------------------------

ON_GPU = [
    (recipe_name, found) for recipe_name, configurations in CONFIGURATIONS["sm90"].items() for found in configurations
]


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("m", "n", "k"), [(65, 200, 528), (1000, 1032, 1040), (4096, 4090, 4096)])
@pytest.mark.parametrize(("recipe_name", "found"), ON_GPU, ids=str)
def test_it_is_the_canonical_op_on_the_gpu(recipe_name, found, m, n, k):
    on = architecture_of(torch.device("cuda"))
    if on.name not in CONFIGURATIONS or found not in CONFIGURATIONS[on.name][recipe_name]:
        pytest.skip(f"not for {on.name}")
    dtype = I8 if recipe_name == "int8" else E4M3
    # Without cancellation where the tensor cores keep about 14 bits of the terms, not of the result.
    a, b = (codes(rows, k, I8) if dtype is I8 else torch.rand(rows, k).to(E4M3) for rows in (m, n))
    along = -(-k // 128)
    scales = (torch.rand(m, along), torch.rand(-(-n // 128), along))
    scales = scales if recipe_name == "float8_block" else (torch.rand(m, 1), torch.rand(n))
    options = {"block": [128, 128]} if recipe_name == "float8_block" else {}
    if dtype is I8:
        options["a_zero_point"] = torch.randint(-128, 128, (m, 1), dtype=I32).cuda()
    arguments = (a.cuda(), b.cuda().t(), *(scale.cuda() for scale in scales), torch.randn(n).cuda(), BF16)
    actual = plan_scaled_mm(operands(*arguments, **options), found, on).run()
    assert_within(actual, canonical(*arguments, **options), Numerics.EXACT if dtype is I8 else Numerics.SAME_ACCUM)


@pytest.mark.gpu
@needs_triton
def test_the_callers_allocator_is_kept():
    import triton  # pyrefly: ignore[missing-import]

    on = architecture_of(torch.device("cuda"))
    if not on.tma:
        pytest.skip("needs tensor descriptors")

    def forbidden(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError("the allocator of somebody else was asked")

    triton.set_allocator(forbidden)
    a, b = codes(200, 256, I8).cuda(), codes(200, 256, I8).cuda().t()
    found = CONFIGURATIONS["sm90"]["int8"][0]
    plan_scaled_mm(operands(a, b, out_dtype=I32), found, on).run()
    from triton.runtime._allocation import _allocator  # pyrefly: ignore[missing-import]

    assert _allocator.get() is forbidden
