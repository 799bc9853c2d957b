"""The swapped form without a GPU: its arithmetic in Triton's interpreter, its code by cross-compilation."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from fx_quant.kernels.triton import semaphores, swapped
from fx_quant.kernels.triton.architectures import Architecture, architecture
from fx_quant.kernels.triton.launch import Configuration, Launch
from fx_quant.kernels.triton.operands import scaled_operands
from fx_quant.kernels.triton.scaled_mm import plan_scaled_mm
from fx_quant.kernels.triton.semaphores import _OF_A_STREAM, _Reserve
from fx_quant.kernels.triton.split import split_by_steps, unfit_split
from fx_quant.kernels.triton.swapped import CONFIGURATIONS, best_split
from fx_quant.scheme import Numerics
from tests.cross_compile import Compiled, compile_launch
from tests.tolerances import assert_within
from tests.triton_interpreter import call, compiler_is_real, every_variant, needs_triton, why_not

fxq = torch.ops.fx_quant
F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
I8, U8 = torch.int8, torch.uint8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FNUZ = torch.float8_e4m3fnuz
SM90 = architecture("sm90")

# Small tiles, because the interpreter is slow.
SMALL = Configuration("swapped", 16, 32, 32, 4, 2)


def swapped_mm(
    a: Tensor, b: Tensor, *arguments: Tensor | None, out_dtype=F32, found=SMALL, on="sm90", times=1, **options
):
    """``scaled_mm`` by the swapped form, launched ``times`` times on the same counters, in this process."""
    arguments += (None,) * (3 - len(arguments))
    operands = scaled_operands(a, b, *arguments, b.shape[1], out_dtype, **options)
    launch = plan_scaled_mm(operands, architecture(on), found)
    for _ in range(times):
        launch.out.fill_(-7)
        out = launch.run()
    semaphore = launch.arguments["semaphore_ptr"]
    return out, 0 if semaphore is None else semaphore.abs().sum().item()


@pytest.fixture
def scaled_mm(interpreter):
    def run(*arguments, **options) -> Tensor:
        out, left = call(interpreter, swapped_mm, *arguments, **options)
        assert left == 0
        return out

    return run


def codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if dtype is I8:
        return torch.randint(-128, 128, (rows, columns), dtype=dtype)
    return torch.randn(rows, columns).to(dtype)


def canonical(a, b, a_scale=None, b_scale=None, bias=None, out_dtype=F32, **options) -> Tensor:
    return fxq.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, **options)


def class_of(dtype: torch.dtype) -> Numerics:
    return Numerics.EXACT if dtype is I8 else Numerics.SAME_ACCUM


# --- scaled_mm ---------------------------------------------------------------------------------------------------

# None of which tiles of 16 x 32 x 32 fill; along k, parts of two steps, of one, and empty.
SIZES = [(0, 70, 9), (1, 1, 1), (1, 40, 70), (5, 1, 9), (17, 40, 1), (17, 40, 130), (33, 40, 96), (3, 5, 0)]


@pytest.mark.parametrize(
    ("dtypes", "split"),
    [((I8, I8), 1), ((I8, I8), 3), ((E4M3, E4M3), 1), ((E4M3, E4M3), 3), ((E5M2, E4M3), 2), ((E5M2, E5M2), 1)],
    ids=str,
)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_scaled_mm_is_the_canonical_op(scaled_mm, dtypes, m, n, k, split):
    a, b = codes(m, k, dtypes[0]), codes(n, k, dtypes[1]).t()
    arguments = (a, b, torch.rand(m, 1), torch.rand(n), torch.randn(n))
    found = replace(SMALL, split_k=split)
    assert_within(scaled_mm(*arguments, found=found), canonical(*arguments), class_of(dtypes[0]))


@pytest.mark.parametrize("dtype", [I8, E4M3])
@pytest.mark.parametrize("on", ["sm80", "sm90"])
def test_weights_by_descriptor_and_by_pointers(scaled_mm, dtype, on):
    """Of 144 codes along k, which descriptors take; sm80 has none."""
    on = on if dtype is I8 or on == "sm90" else "sm89"
    a, b = codes(5, 144, dtype), codes(70, 144, dtype).t()
    launch = swapped_launch(a, b, replace(SMALL, split_k=2), architecture(on))
    assert launch.arguments["DESCRIPTOR"] == (on == "sm90")
    arguments = (a, b, torch.rand(5, 1), torch.rand(70), torch.randn(70))
    actual = scaled_mm(*arguments, found=replace(SMALL, split_k=2), on=on)
    assert_within(actual, canonical(*arguments), class_of(dtype))


def swapped_launch(a: Tensor, b: Tensor, found: Configuration, on: Architecture) -> Launch:
    return plan_scaled_mm(scaled_operands(a, b, None, None, None, b.shape[1], F32), on, found)


@pytest.mark.parametrize("dtype", [I8, E4M3])
@pytest.mark.parametrize("a_shape", [None, (), (1, 1), (17, 1)], ids=str)
@pytest.mark.parametrize("b_shape", [None, (), (1,), (9,), (1, 9)], ids=str)
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
    arguments = (a, b, torch.rand(5, 1) / 100, torch.rand(9), bias)
    # The interpreter truncates to bfloat16, which is within one unit in the last place.
    numerics = Numerics.SAME_ACCUM if out_dtype is BF16 else class_of(dtype)
    actual = scaled_mm(*arguments, out_dtype=out_dtype)
    assert_within(actual, canonical(*arguments, out_dtype), numerics)


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("rows", [(), (17, 1)], ids=str)
def test_an_asymmetric_activation_is_exact(scaled_mm, rows, split):
    a, b = codes(17, 130, I8), codes(9, 130, I8).t()
    zero_point = torch.randint(-128, 128, rows, dtype=I32)
    arguments = (a, b, torch.rand(17, 1), torch.rand(9), torch.randn(9))
    actual = scaled_mm(*arguments, a_zero_point=zero_point, found=replace(SMALL, split_k=split))
    assert torch.equal(actual, canonical(*arguments, a_zero_point=zero_point))


@pytest.mark.parametrize("split", [1, 4])
def test_int32_is_the_accumulator(scaled_mm, split):
    a, b = codes(17, 200, I8), codes(9, 200, I8).t()
    actual = scaled_mm(a, b, out_dtype=I32, found=replace(SMALL, split_k=split))
    assert torch.equal(actual, canonical(a, b, out_dtype=I32))


@pytest.mark.parametrize("dtype", [I8, E4M3])
def test_operands_of_any_strides(scaled_mm, dtype):
    tall, wide = codes(40, 34, dtype), codes(80, 60, dtype)
    for a in (tall[:34, :20], tall.t()[:, ::2], tall[::2, 3:23], tall[:1].expand(5, 34)[:, :20]):
        for b in (wide[:20], wide.t()[7:27], wide[::3, ::2][:20], wide[:20, :1].expand(20, 7)):
            a_scale, b_scale = torch.rand(1, a.shape[0]).t(), torch.rand(b.shape[1] * 3)[::3]
            bias = torch.rand(1).expand(b.shape[1])
            arguments = (a, b, a_scale, b_scale, bias)
            assert_within(scaled_mm(*arguments), canonical(*arguments), class_of(dtype))


def test_nothing_beside_the_operands_is_used(scaled_mm):
    around = torch.full((40, 160), torch.nan).to(E5M2)
    for columns in (slice(5, 135), slice(16, 146)):  # the second by a descriptor
        a, b = around[:17, columns], around.t()[columns, 17:26]
        a.copy_(codes(17, 130, E5M2))
        b.copy_(codes(130, 9, E5M2))
        scales = torch.full((40, 3), torch.nan)
        scales[:17, 1] = torch.rand(17)
        arguments = (a, b, scales[:17, 1:2], torch.rand(9))
        actual = scaled_mm(*arguments, found=replace(SMALL, split_k=2))
        assert_within(actual, canonical(*arguments), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("dtype", [I8, E4M3])
@pytest.mark.parametrize("split", [1, 2])
def test_scales_that_are_zero_or_not_finite(scaled_mm, dtype, split):
    a, b = codes(5, 70, dtype), codes(4, 70, dtype).t()
    a_scale = torch.tensor([0.0, torch.nan, torch.inf, -1.0, 1e-38]).view(5, 1)
    b_scale = torch.tensor([1.0, 0.0, torch.nan, torch.inf])
    actual = scaled_mm(a, b, a_scale, b_scale, found=replace(SMALL, split_k=split))
    assert_within(actual, canonical(a, b, a_scale, b_scale), class_of(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_code_that_is_not_finite_stays_in_its_row(scaled_mm, value):
    # e5m2, because the interpreter takes the NaN of e4m3 for 480.
    a, b = codes(5, 130, E5M2), codes(9, 130, E5M2).t()
    a[3, 129] = value
    actual, expected = scaled_mm(a, b, found=replace(SMALL, split_k=3)), canonical(a, b)
    assert (~expected.isfinite()).sum() == 9
    assert_within(actual, expected, Numerics.SAME_ACCUM)


# --- scales of blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, I8])
@pytest.mark.parametrize("block", [(64, 128), (1, 128), (32, 32), (3, 64), (64, 96), (128, 512)], ids=str)
@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("split", [1, 3])
def test_scales_of_blocks_are_applied_along_k(scaled_mm, dtype, block, m, split):
    n, k = 70, 144
    a, b = codes(m, k, dtype), codes(n, k, dtype).t()
    a_scale = torch.rand(-(-k // block[1]), m).t()  # column-major, as TMA wants it
    b_scale = torch.rand(-(-n // block[0]), -(-k // block[1]))
    arguments = (a, b, a_scale, b_scale, torch.randn(n))
    actual = scaled_mm(*arguments, block=block, found=Configuration("swapped", 16, 64, 64, 4, 2, split_k=split))
    assert_within(actual, canonical(*arguments, block=block), Numerics.SAME_ACCUM)


def test_blocks_without_a_scale_of_the_activation(scaled_mm):
    a, b, b_scale = codes(5, 80, E4M3), codes(9, 80, E4M3).t(), torch.rand(2, 3)
    expected = canonical(a, b, None, b_scale, block=[8, 32])
    assert_within(scaled_mm(a, b, None, b_scale, block=[8, 32]), expected, Numerics.SAME_ACCUM)


def test_a_block_of_nan_stays_in_its_rows_and_columns(scaled_mm):
    a, b = codes(5, 256, E4M3), codes(256, 256, E4M3).t()
    a_scale, b_scale = torch.rand(5, 2), torch.rand(2, 2)
    a_scale[2, 1] = b_scale[1, 0] = torch.nan
    found = Configuration("swapped", 16, 128, 128, 4, 2, split_k=2)
    out = scaled_mm(a, b, a_scale, b_scale, block=[128, 128], found=found)
    assert_within(out, canonical(a, b, a_scale, b_scale, block=[128, 128]), Numerics.SAME_ACCUM)
    assert out.isnan().sum() == 256 + 4 * 128


# --- splitting k -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [I8, E4M3])
@pytest.mark.parametrize("split", [2, 7, 16])
def test_counters_are_left_zero_so_that_a_launch_can_be_repeated(scaled_mm, dtype, split):
    """16 parts of which some are empty, too."""
    a, b = codes(5, 130, dtype), codes(40, 130, dtype).t()
    found = replace(SMALL, split_k=split)
    once, twice = scaled_mm(a, b, found=found), scaled_mm(a, b, found=found, times=2)
    assert torch.equal(once, twice)
    assert_within(twice, canonical(a, b), class_of(dtype))


@pytest.mark.parametrize(
    ("n", "k", "expected"),
    [(1024, 8192, 7), (4096, 4096, 2), (6144, 4096, 1), (28672, 4096, 1), (4096, 14336, 2), (4096, 256, 1)],
)
def test_k_is_split_where_processors_would_wait(n, k, expected):
    assert split_by_steps(n, k, 64, 256, 132) == expected


@pytest.mark.parametrize("n", [1, 64, 1000, 4096, 57344])
@pytest.mark.parametrize("k", [0, 1, 255, 256, 4096, 28672])
def test_no_part_of_a_split_is_empty(n, k):
    split, steps = split_by_steps(n, k, 64, 256, 132), -(-k // 256)
    assert 1 <= split <= 16
    assert (split - 1) * -(-steps // split) < max(1, steps)


# --- counters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def reserve(monkeypatch) -> _Reserve:
    def fill(self: _Reserve, device: torch.device) -> None:
        self._counters = torch.zeros(3 * _OF_A_STREAM, dtype=I32)

    monkeypatch.setattr(_Reserve, "_fill", fill)
    monkeypatch.setattr(semaphores, "_RESERVED", 3 * _OF_A_STREAM)
    return _Reserve(torch.device("cpu"))


def test_launches_on_one_stream_share_counters_and_no_others_do(reserve):
    first, again, other = (reserve.of_stream(stream, 100) for stream in (1, 1, 2))
    captured = [reserve.of_launch(100) for _ in range(3)]
    starts = [x.storage_offset() for x in (first, again, other, *captured)]
    assert starts == [0, 0, _OF_A_STREAM, *(2 * _OF_A_STREAM + 100 * i for i in range(3))]
    assert all(len(x) == 100 for x in (first, again, other, *captured))


def test_counters_that_are_not_reserved_are_none(reserve):
    assert reserve.of_stream(1, _OF_A_STREAM + 1) is None
    assert reserve.of_launch(3 * _OF_A_STREAM + 1) is None
    assert reserve.of_launch(3 * _OF_A_STREAM - 1) is not None
    assert reserve.of_stream(1, 1) is None
    assert not semaphores.semaphores(7, torch.device("cpu")).any()


# --- configurations ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_says_why():
    def reason(dtype, on, **options) -> str | None:
        a, b = codes(5, 96, dtype), codes(9, 96, dtype).t()
        operands = scaled_operands(a, b, None, options.pop("b_scale", None), None, 9, F32, **options)
        return swapped.unfit(operands, SMALL, architecture(on))

    assert reason(I8, "sm80") is reason(E4M3, "sm90") is reason(FNUZ, "gfx942") is reason(E4M3, "gfx950") is None
    assert reason(E4M3, "sm80") == "swapped: sm80 has no products of float8; use int8 codes"
    assert reason(FNUZ, "sm90") == "swapped: sm90 has no fnuz kinds of float8, got float8_e4m3fnuz"
    assert reason(E4M3, "gfx942") == "swapped: gfx942 has only the fnuz kinds of float8, got float8_e4m3fn"
    assert unfit_split(2, architecture("gfx942")) == (
        "cannot split k on gfx942, whose barrier does not wait for stores; use split_k = 1"
    )
    assert best_split(CONFIGURATIONS["int8"]["gfx942"][0], 4096, 4096, architecture("gfx942")) == 1
    assert reason(E4M3, "sm90", b_scale=torch.rand(9, 4), block=(1, 24)) == (
        "swapped: needs groups of a multiple of 32 codes along k, got 24"
    )


# --- compiled for GPUs that are not here -------------------------------------------------------------------------

meta = partial(torch.empty, device="meta")
N = K = 4096


def example(recipe: str, found: Configuration, on: Architecture, split: int) -> Launch:
    """Codes that the architecture has, and all that an epilogue can have."""
    m, dtype = found.block_m, I8 if recipe == "int8" else FNUZ if on.name == "gfx942" else E4M3
    a, b = meta(m, K, dtype=dtype), meta(N, K, dtype=dtype).t()
    found = replace(found, split_k=split if on.platform == "cuda" else 1)
    bias = meta(N, dtype=BF16)
    if recipe == "block":
        operands = scaled_operands(a, b, meta(m, 32), meta(32, 32), bias, N, BF16, block=(128, 128))
    else:
        zero_point = {"a_zero_point": meta(m, 1, dtype=I32), "b_sum": meta(N, dtype=I32)} if recipe == "int8" else {}
        operands = scaled_operands(a, b, meta(m, 1), meta(N), bias, N, BF16, **zero_point)
    return plan_scaled_mm(operands, on, found)


# Architecture -> the matrix instruction of float8 and of int8: no other may stand in the machine code.
INSTRUCTIONS = {
    "sm80": ("none", "IMMA"),
    "sm89": ("QMMA", "IMMA"),
    "sm90": ("QGMMA", "IGMMA"),
    "sm100": ("UTCQMMA", "UTCIMMA"),
    "sm120": ("QMMA", "IMMA"),
    "gfx942": ("fp8_fp8", "i8"),
    "gfx950": ("f8f6f4", "i8"),
}
if why_not() is None and Version(importlib.metadata.version("triton")) < Version("3.9"):
    # Found in 3.6; which version ends it is not known.
    INSTRUCTIONS["sm100"] = ("UTCQMMA", "IMMA")


def check_code(launch: Launch, recipe: str, on: Architecture) -> Compiled:
    """The gates of a shipped configuration."""
    code = compile_launch(launch, on)
    matrix = re.compile(r"^(?:\w*MMA|v_s?mfma\w*)$")
    found = {name for name in code.instructions if matrix.match(name)}
    expected = INSTRUCTIONS[on.name][recipe == "int8"]
    assert found
    assert all(name == expected or name.endswith(f"_{expected}") for name in found), found
    assert code.spilled == 0
    assert code.shared <= on.shared_bytes
    assert code.warps == launch.options["num_warps"]
    assert (code.instructions["UTMALDG"] > 0) == (on.name in ("sm90", "sm100"))
    return code


SHIPPED = [(recipe, on, found) for recipe, by in CONFIGURATIONS.items() for on, some in by.items() for found in some]


@every_variant
@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize(("recipe", "on", "found"), SHIPPED, ids=str)
def test_every_configuration_compiles_well(recipe, on, found):
    check_code(example(recipe, found, architecture(on), split=4), recipe, architecture(on))


@every_variant
@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize("recipe", CONFIGURATIONS)
@pytest.mark.parametrize("split", [1, 16])
def test_any_split_compiles_well(recipe, split):
    """One without partial sums, and the one with the most of them to add."""
    for found in CONFIGURATIONS[recipe]["sm90"][:: 4 if recipe != "block" else 3]:
        code = check_code(example(recipe, found, SM90, split), recipe, SM90)
        assert ("atom." in code.assembly) == (split > 1)


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
def test_partial_sums_are_handed_over_in_order():
    """Stores, then a barrier, then the release; after it, loads that no cache of this processor answers."""
    code = compile_launch(example("float8", CONFIGURATIONS["float8"]["sm90"][0], SM90, 4), SM90)
    steps = re.findall(r"atom\.\S*acq_rel\S*|st\.global\S*|bar\.sync|ld\.global\S*", code.assembly)
    at = next(i for i, step in enumerate(steps) if step.startswith("atom"))
    stores = [i for i, step in enumerate(steps[:at]) if step.startswith("st.global")]
    assert stores
    assert "gpu" in steps[at]
    assert "bar.sync" in steps[stores[-1] : at]
    assert any(".cg" in step for step in steps[at:] if step.startswith("ld"))
    assert not any(".nc" in step for step in steps)


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
def test_float8_sums_leave_the_tensor_cores_every_128_products():
    """The tensor cores of sm90 keep about 14 bits of a sum; ours is added in float32."""
    a, b = meta(16, K, dtype=E4M3), meta(N, K, dtype=E4M3).t()
    found = Configuration("swapped", 16, 64, 256, 4, 4)
    code = compile_launch(plan_scaled_mm(scaled_operands(a, b, None, None, None, N, BF16), SM90, found), SM90)
    # Two additions for each of a thread's 16 * 64 / 128 results: nothing else adds without a bias.
    assert len(re.findall(r"add\.(?:rn\.)?f32", code.assembly)) == 16


# --- on a GPU ----------------------------------------------------------------------------------------------------


def on_gpu(recipe: str, m: int, n: int, k: int):
    from fx_quant.kernels.triton.architectures import architecture_of

    on = architecture_of(torch.device("cuda"))
    if on.platform == "rocm":
        pytest.skip("k is not split there")
    found = next((each for each in CONFIGURATIONS[recipe].get(on.name, ()) if m <= each.block_m), None)
    if found is None:
        pytest.skip(f"{on.name} has no {recipe} here")
    return on, replace(found, split_k=best_split(found, n, k, on))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("m", [1, 17, 64])
@pytest.mark.parametrize("split", [1, 3, 16])
def test_int8_is_exact_on_the_gpu(m, split):
    n, k = 1000, 4112
    on, found = on_gpu("int8", m, n, k)
    a, b = codes(m, k, I8).cuda(), codes(n, k, I8).cuda().t()
    zero_point = torch.randint(-128, 128, (m, 1), dtype=I32, device="cuda")
    arguments = (a, b, torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda"), torch.randn(n, device="cuda"))
    operands = scaled_operands(*arguments, n, BF16, a_zero_point=zero_point)
    expected = fxq.scaled_mm(*arguments, BF16, a_zero_point=zero_point)
    for _ in range(20):
        launch = plan_scaled_mm(operands, on, replace(found, split_k=split))
        assert torch.equal(launch.run(), expected)
        assert split == 1 or not launch.arguments["semaphore_ptr"].any()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("recipe", ["float8", "block"])
@pytest.mark.parametrize("m", [1, 17, 64])
def test_float8_is_deterministic_on_the_gpu(recipe, m):
    n, k = 1024, 4096
    on, found = on_gpu(recipe, m, n, k)
    # Without cancellation: the tensor cores keep about 14 bits of the terms, not of the result.
    dtype = FNUZ if on.name == "gfx942" else E4M3
    a, b = torch.rand(m, k).to(dtype).cuda(), torch.rand(n, k).to(dtype).cuda().t()
    scales, options = (torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda"), None), {}
    if recipe == "block":
        scales = (torch.rand(m, 32, device="cuda"), torch.rand(8, 32, device="cuda"), None)
        options = {"block": (128, 128)}
    operands = scaled_operands(a, b, *scales, n, BF16, **options)
    first, *others = (plan_scaled_mm(operands, on, replace(found, split_k=4)).run() for _ in range(10))
    assert all(torch.equal(first, other) for other in others)
    assert_within(first, fxq.scaled_mm(a, b, *scales, BF16, **options), Numerics.SAME_ACCUM)


@pytest.mark.gpu
@needs_triton
def test_streams_and_graphs_do_not_share_counters():
    m, n, k = 4, 1024, 8192
    on, found = on_gpu("int8", m, n, k)
    a, b = codes(m, k, I8).cuda(), codes(n, k, I8).cuda().t()
    expected = fxq.scaled_mm(a, b, None, None, None, I32)
    operands = scaled_operands(a, b, None, None, None, n, I32)

    def run() -> Tensor:
        return plan_scaled_mm(operands, on, replace(found, split_k=8)).run()

    run()
    torch.cuda.synchronize()
    graphs = []
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = [run() for _ in range(20)]
        graphs.append((graph, out))
    streams = [torch.cuda.Stream() for _ in range(6)]
    for _ in range(10):
        outs = []
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if index < 3:
                    graphs[index][0].replay()
                else:
                    outs += [run() for _ in range(20)]
        torch.cuda.synchronize()
        for result in [*outs, *(out for _, found in graphs for out in found)]:
            assert torch.equal(result, expected)
