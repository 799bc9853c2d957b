"""The gated matmul: its canonical op, the arithmetic of its kernels in Triton's interpreter, and their machine code."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_within
from torch import Tensor
from triton_interpreter import call, compiler_is_real, every_variant, needs_triton

import fx_quant.kernels.triton_gated  # noqa: F401  (registers the ops)
from fx_quant.gpu.architectures import Architecture, architecture
from fx_quant.gpu.cross_compile import compile_launch
from fx_quant.gpu.gated import (
    CONFIGURATIONS,
    GROUP,
    ResultCodes,
    configuration,
    family,
    gated_operands,
    plan_gated_mm,
    unfit,
)
from fx_quant.gpu.launch import Configuration
from fx_quant.scheme import Numerics

fxq = torch.ops.fx_quant
F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
E4M3, E5M2, FNUZ = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz
SM90 = architecture("sm90")


def codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if dtype is I8:
        return torch.randint(-128, 128, (rows, columns), dtype=I8)
    return torch.randn(rows, columns).to(dtype)


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales whose gates are of the size where ``silu`` bends."""
    size = 1 / max(k, 1) ** 0.5 / (5000.0 if dtype is I8 else 1.0)
    return codes(m, k, dtype), codes(2 * n, k, dtype).t(), torch.rand(m, 1) * size, torch.rand(2 * n) * 3


def formula(dtype: torch.dtype = E4M3, **changes: object) -> dict[str, object]:
    hi = 127.0 if dtype is I8 else torch.finfo(dtype).max
    given = {"dtype": dtype, "granularity": "per_token", "divisor": hi, "divide_dtype": F32, "floor": 1e-10}
    return {**given, "floor_on": "scale", "scale_dtype": F32, "reciprocal": False, "lo": -hi, "hi": hi, **changes}


# --- the canonical op -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [I8, E4M3])
@pytest.mark.parametrize("out_dtype", [F32, BF16, F16])
def test_the_canonical_op_is_two_linears_and_silu(dtype, out_dtype):
    a, b, a_scale, b_scale = operands(5, 9, 20, dtype)
    y = (a.double() @ b.double() * a_scale * b_scale).to(out_dtype)
    expected = (F.silu(y[:, :9].double()) * y[:, 9:].double()).to(out_dtype)
    assert_within(fxq.gated_mm(a, b, a_scale, b_scale, out_dtype), expected, Numerics.SAME_ACCUM)


def test_its_overloads_quantize_it():
    arguments = (*operands(5, 150, 20, E4M3), BF16)
    y, scale = fxq.gated_mm(*arguments), torch.tensor(0.01)
    static = {"dtype": E4M3, "reciprocal": True, "lo": -448.0, "hi": 448.0}
    assert torch.equal(
        fxq.gated_mm.static(*arguments, scale, **static).view(I8), fxq.quantize(y, scale, **static).view(I8)
    )
    found, scales = fxq.gated_mm.dynamic(*arguments, 128, **formula())
    assert scales.shape == (5, 2) and scales.stride() == (1, 5)
    for start in (0, 128):
        expected, scale = fxq.quantize.dynamic(y[:, start : start + 128], **formula())
        assert torch.equal(found[:, start : start + 128].view(I8), expected.view(I8))
        assert torch.equal(scales[:, start // 128, None], scale)


@pytest.mark.parametrize("prefix", ["", "triton_"])
@pytest.mark.parametrize("m", [0, 5])
def test_ops_pass_opcheck(monkeypatch, prefix, m):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    op, arguments = getattr(fxq, f"{prefix}gated_mm"), (*operands(m, 9, 20, I8), BF16)
    static = {"dtype": E4M3, "reciprocal": True, "lo": -448.0, "hi": 448.0}
    torch.library.opcheck(op.default, arguments)
    torch.library.opcheck(op.static, (*arguments, torch.ones(())), static)
    torch.library.opcheck(op.dynamic, (*arguments, 4), formula())


def test_what_does_not_fit_is_an_error():
    a, b, a_scale, b_scale = operands(5, 9, 20, I8)
    with pytest.raises(RuntimeError, match=r"a and b must be \[m, k\] and \[k, 2n\], got \[5, 20\] and \[20, 17\]"):
        fxq.gated_mm(a, b[:, :17], a_scale, b_scale, BF16)
    with pytest.raises(RuntimeError, match="out_dtype must be a float dtype, got int32"):
        fxq.gated_mm(a, b, None, None, torch.int32)
    with pytest.raises(RuntimeError, match="group must be the number of neighbours"):
        fxq.gated_mm.dynamic(a, b, a_scale, b_scale, BF16, 0, **formula())


# --- the interpreter --------------------------------------------------------------------------------------------


def interpreted(found: Configuration, arguments: tuple, how: ResultCodes | None = None) -> tuple[Tensor, Tensor | None]:
    launch, scale = plan_gated_mm(gated_operands(*arguments, how), found, SM90)
    return launch.run(), scale


FORMS = {
    "tile": Configuration("tile", 16, 32, 32, 4, 1),
    "swapped": Configuration("swapped", 16, 32, 32, 4, 1),
    "persistent": Configuration("persistent", 16, 32, 32, 4, 1),
    "specialized": Configuration("persistent", 16, 32, 32, 4, 1, warp_specialized=True),
}
ANY_STRIDES = ("tile", "swapped")


def of_groups(found: Configuration) -> Configuration:
    return Configuration(found.form, 16, GROUP, 32, 4, 1, warp_specialized=found.warp_specialized)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [I8, E4M3, E5M2])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 9, 16), (1, 1, 16), (17, 70, 80), (33, 33, 32)])
def test_kernels_are_the_canonical_op(interpreter, form, dtype, m, n, k):
    arguments = (*operands(m, n, k, dtype), F32)
    out, _ = call(interpreter, interpreted, FORMS[form], arguments)
    assert_within(out, fxq.gated_mm(*arguments), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("form", ANY_STRIDES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (17, 33, 35), (3, 5, 0)])
def test_sizes_that_no_descriptor_takes(interpreter, form, m, n, k):
    arguments = (*operands(m, n, k, I8)[:2], torch.rand(m, 1), torch.rand(2 * n), F32)
    out, _ = call(interpreter, interpreted, FORMS[form], arguments)
    assert_within(out, fxq.gated_mm(*arguments), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("form", ANY_STRIDES)
def test_operands_of_any_strides(interpreter, form):
    tall, wide = codes(40, 34, I8), codes(80, 60, I8)
    for a, b in itertools.product((tall[:34, :20], tall.t()[:, ::2]), (wide[:20], wide.t()[7:27], wide[::3, ::2][:20])):
        arguments = (a, b, torch.rand(1, a.shape[0]).t() / 5000, torch.rand(3 * b.shape[1])[::3], F32)
        out, _ = call(interpreter, interpreted, FORMS[form], arguments)
        assert_within(out, fxq.gated_mm(*arguments), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("a_shape", [None, (), (1, 1)], ids=str)
@pytest.mark.parametrize("b_shape", [None, (1,), (1, 18)], ids=str)
def test_scales_of_every_shape(interpreter, form, a_shape, b_shape):
    a, b, _, _ = operands(5, 9, 16, E4M3)
    scales = (None if shape is None else torch.rand(shape) + 0.5 for shape in (a_shape, b_shape))
    arguments = (a, b, *scales, F32)
    out, _ = call(interpreter, interpreted, FORMS[form], arguments)
    assert_within(out, fxq.gated_mm(*arguments), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("form", FORMS)
def test_gate_and_up_are_rounded_before_silu(interpreter, form):
    # float16, because the interpreter truncates to bfloat16.
    arguments = (*operands(17, 33, 80, I8), F16)
    out, _ = call(interpreter, interpreted, FORMS[form], arguments)
    y = fxq.scaled_mm(*arguments[:4], None, F32)
    unrounded = (F.silu(y[:, :33]) * y[:, 33:]).half()
    expected = fxq.gated_mm(*arguments)
    assert (expected != unrounded).float().mean() > 0.1
    # Of the last bit of float32 before it is rounded, few results depend.
    assert (out != expected).float().mean() < 0.01
    assert_within(out, expected, Numerics.SAME_ACCUM)


@pytest.mark.parametrize("form", FORMS)
def test_gates_and_scales_that_are_extreme(interpreter, form):
    a, b, _, _ = operands(7, 9, 16, I8)
    a_scale = torch.tensor([0.0, torch.nan, torch.inf, 1e30, -1e30, 1e-38, 1.0]).view(7, 1)
    arguments = (a, b, a_scale, torch.ones(18), F32)
    out, _ = call(interpreter, interpreted, FORMS[form], arguments)
    expected = fxq.gated_mm(*arguments)
    # What cancels in the largest rows says nothing of the others.
    for row in range(7):
        assert_within(out[row], expected[row], Numerics.SAME_ACCUM)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reciprocal", [False, True])
def test_static_codes(interpreter, form, reciprocal):
    arguments, scale = (*operands(17, 70, 80, E4M3), F16), torch.tensor([0.01])
    # Before the cast to float8, which the interpreter gets wrong.
    how = ResultCodes(F32, reciprocal, -40.0, 40.0, scale)
    out, _ = call(interpreter, interpreted, FORMS[form], arguments, how)
    y = fxq.gated_mm(*arguments).float()
    expected = (y * scale.reciprocal() if reciprocal else y / scale).clamp(-40, 40)
    assert (expected.abs() == 40).any()
    assert_within(out.half(), expected.half(), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("form", FORMS)
def test_static_int8_codes_are_rounded(interpreter, form):
    arguments, scale = (*operands(17, 70, 80, I8), F16), torch.tensor(0.003)
    out, _ = call(interpreter, interpreted, FORMS[form], arguments, ResultCodes(I8, False, -127.0, 127.0, scale))
    expected = fxq.quantize(fxq.gated_mm(*arguments), scale, dtype=I8, reciprocal=False, lo=-127.0, hi=127.0)
    off = (out.int() - expected).abs()
    assert off.max() <= 1 and (off != 0).float().mean() < 0.01 and expected.unique().numel() > 50


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("floor_on", ["scale", "amax", "none"])
def test_codes_of_groups(interpreter, form, floor_on):
    arguments = (*operands(17, 150, 48, E4M3), F16)
    # Some groups lie below the floor, and one holds a NaN.
    arguments[2][3:6] *= 1e-3
    arguments[3][130] = torch.nan
    how = ResultCodes(F32, False, -448.0, 448.0, None, 448.0, 1e-3 if floor_on == "amax" else 1e-6, floor_on)
    out, scale = call(interpreter, interpreted, of_groups(FORMS[form]), arguments, how)
    args = formula(floor=how.floor, floor_on=floor_on)
    _, expected = fxq.gated_mm.dynamic(*arguments, 128, **args)
    assert scale.shape == expected.shape and scale.stride() == expected.stride()
    assert expected[:, 1].isnan().all() and not expected[:, 0].isnan().any()
    assert_within(scale[:, :1], expected[:, :1], Numerics.SAME_ACCUM)
    torch.testing.assert_close(scale, expected, rtol=2**-10, atol=0, equal_nan=True)
    y = fxq.gated_mm(*arguments).float()
    quotient = (y[:, :128] / scale[:, :1]).clamp(-448, 448)
    torch.testing.assert_close(out[:, :128], quotient, rtol=2**-9, atol=1e-3)
    assert out[:, 128:].isnan().all()


# --- what fits, and which configuration is chosen ----------------------------------------------------------------

meta = partial(torch.empty, device="meta")


def planned(m: int, n: int, k: int, dtype: torch.dtype, mode: str, out_dtype: torch.dtype = BF16):
    how = None
    if mode != "plain":
        result = FNUZ if dtype is FNUZ else E4M3
        how = ResultCodes(result, False, -448.0, 448.0, meta(1) if mode == "static" else None, 448.0, 1e-10, "scale")
    arguments = (meta(m, k, dtype=dtype), meta(2 * n, k, dtype=dtype).t(), meta(m, 1), meta(2 * n), out_dtype)
    return gated_operands(*arguments, how)


@pytest.mark.parametrize("name", ["sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
@pytest.mark.parametrize("mode", ["plain", "static", "groups"])
def test_a_configuration_fits_every_problem(name, mode):
    on = architecture(name)
    for m, k in itertools.product((0, 1, 16, 17, 64, 65, 4096), (0, 30, 4096)):
        given = planned(m, 70, k, I8, mode)
        found = configuration(given, on)
        assert unfit(given, found, on) is None
        assert m <= found.block_m or found.block_m >= (32 if family(on) == "sm80" else 64)


def test_many_rows_are_persistent_where_descriptors_take_them():
    assert str(configuration(planned(4096, 70, 4096, E4M3, "groups"), SM90)) == "persistent 128x128x128 w4 s4 WS"
    assert configuration(planned(4096, 70, 30, E4M3, "plain"), SM90).form == "tile"
    assert configuration(planned(1, 70, 4096, E4M3, "plain"), SM90).form == "swapped"


def test_reasons_say_what_to_do():
    persistent = FORMS["persistent"]
    given = planned(5, 9, 30, I8, "plain")
    assert unfit(given, persistent, SM90) == (
        "needs a with k contiguous and rows a multiple of 16 bytes apart, got strides [30, 1]; pad k"
    )
    assert unfit(given, persistent, architecture("gfx942")) == (
        "needs tensor descriptors (TMA), which gfx942 does not have; use the tile form"
    )
    assert unfit(planned(5, 9, 32, I8, "groups"), persistent, SM90) == (
        "needs tiles of 128 columns where each group has a scale, got 32"
    )


@needs_triton
@pytest.mark.parametrize("form", FORMS)
def test_an_empty_result_launches_nothing(form):
    launch, _ = plan_gated_mm(gated_operands(*operands(0, 9, 16, I8), BF16), FORMS[form], SM90)
    assert launch.programs == 0
    assert launch.run().shape == (0, 9)


# --- compiled for GPUs that are not here -------------------------------------------------------------------------


def shipped() -> list:
    """Every configuration on an architecture of its family, for codes that it has, in a mode that it fits."""
    cases = []
    for name, dtypes in (
        ("sm90", (E4M3, I8)),
        ("sm80", (I8,)),
        ("sm89", (E4M3,)),
        ("sm100", (E4M3,)),
        ("sm120", (E4M3,)),
        ("gfx942", (FNUZ,)),
    ):
        for found, dtype in itertools.product(CONFIGURATIONS[family(architecture(name))], dtypes):
            if name == "sm90" and found.form == "persistent":
                modes = ("plain", "static", "groups")
            else:
                # Triton does not convert to e4m3 below sm89.
                modes = ("groups",) if found.block_n == GROUP and name != "sm80" else ("plain",)
            cases += [pytest.param(name, found, dtype, mode, id=f"{name} {found} {dtype} {mode}") for mode in modes]
    return cases


def matrix_instruction(name: str, dtype: torch.dtype) -> str:
    return {
        "sm80": "IMMA",
        "sm89": "QMMA",
        "sm90": "IGMMA" if dtype is I8 else "QGMMA",
        "sm100": "UTCQMMA",
        "sm120": "QMMA",
        "gfx942": "fp8_fp8",
    }[name]


@every_variant
@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize(("name", "found", "dtype", "mode"), shipped())
def test_every_configuration_compiles(name, found, dtype, mode):
    on: Architecture = architecture(name)
    launch, _ = plan_gated_mm(planned(max(found.block_m, 16), 14336, 4096, dtype, mode), found, on)
    binary = compile_launch(launch, on)
    used = {each for each in binary.instructions if "MMA" in each or "mfma" in each}
    assert used and all(matrix_instruction(name, dtype) in each for each in used), used
    assert binary.spilled == 0
    assert binary.shared <= on.shared_bytes
    assert (binary.instructions.get("USETMAXREG", 0) > 0) == found.warp_specialized
    assert (binary.instructions.get("UTMALDG", 0) > 0) == (found.form == "persistent")


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [I8, E4M3])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 70, 64), (1, 70, 130), (17, 256, 512), (70, 200, 512), (300, 384, 1024)])
def test_on_the_gpu(dtype, m, n, k):
    if dtype is E4M3 and (torch.version.hip or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("needs float8_e4m3fn of the GPU")
    arguments = (*(x.cuda() for x in operands(m, n, k, dtype)), BF16)
    y = fxq.gated_mm(*arguments)
    assert_within(fxq.triton_gated_mm(*arguments), y, Numerics.REASSOCIATED)
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 9):
        return
    scale = torch.tensor(0.01, device="cuda")
    static = {"dtype": E4M3, "reciprocal": False, "lo": -448.0, "hi": 448.0}
    found = fxq.triton_gated_mm.static(*arguments, scale, **static).float() * scale
    torch.testing.assert_close(found, y.float().clamp(-4.48, 4.48), rtol=0.07, atol=0.02)
    found, scales = fxq.triton_gated_mm.dynamic(*arguments, 128, **formula())
    spread = scales.repeat_interleave(128, 1)[:, :n]
    torch.testing.assert_close(found.float() * spread, y.float(), rtol=0.07, atol=0.02)
