"""The bodies of the CPU kernel ops, and on which machines they are chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fx_quant import compat
from fx_quant.kernels.cpu import native
from fx_quant.kernels.cpu.int8_kernels import LEVELS
from fx_quant.kernels.cpu.tiled_kernels import MANY_ROWS
from fx_quant.kernels.eager import _warn_once, eager_selection
from fx_quant.kernels.layouts import pack_weight
from fx_quant.kernels.registry import kernel
from fx_quant.kernels.select import select
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import without_compiler
from fx_quant.scheme import FLOAT8_DTYPES, Granularity, Numerics, OperandSpec, Scheme
from fx_quant.target import named_target
from tests.tolerances import assert_within

fxq = torch.ops.fx_quant
NAMES = (*(level.kernel for level in LEVELS), "cpu_float8_bf16", "cpu_float8_float32")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def codes(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    if dtype is torch.int8:
        return torch.randint(-128, 128, (rows, k), dtype=torch.int8)
    return torch.randn(rows, k).to(dtype)


def call(name: str, a: Tensor, w: Tensor, *epilogue: object) -> Tensor:
    """The kernel op on codes ``a`` and weight ``w [n, k]``."""
    k = kernel(name)
    if k.a_dtype is not None:
        a = a.to(k.a_dtype)
    b = w.t() if k.layout is None else pack_weight(w, k.layout)
    return k.overload()(a, b, *epilogue[:3], w.shape[0], epilogue[3])


def code_dtype(name: str) -> torch.dtype:
    return torch.int8 if "int8" in name else E4M3


@pytest.fixture(params=["native", "unpacked"])
def way(request, monkeypatch):
    """Sums by the native code, and as on a machine without the instruction."""
    if request.param == "unpacked":
        monkeypatch.setattr(native.Dot, "exists_here", lambda _: False)
    return request.param


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_body_is_the_canonical_op(name, bias, out_dtype, way):
    m, n, k = 5, 70, 9
    a, w = codes(m, k, code_dtype(name)), codes(n, k, code_dtype(name))
    epilogue = (torch.rand(m, 1), torch.rand(n), None if bias is None else torch.randn(n, dtype=bias), out_dtype)
    expected = fxq.scaled_mm(a, w.t(), *epilogue)
    assert_within(call(name, a, w, *epilogue), expected, kernel(name).numerics)


def test_a_compiler_that_fails_is_a_warning_and_the_result_the_same(monkeypatch):
    def fail(_):
        raise RuntimeError("no compiler")

    native.compiled.cache_clear()
    monkeypatch.setattr(compat, "load_cpp", fail)
    a, w = codes(3, 40, torch.int8), codes(70, 40, torch.int8)
    try:
        if native.INT8_VNNI.exists_here():
            with pytest.warns(UserWarning, match=r"no compiler.*Install a C\+\+ compiler"):
                out = call("cpu_int8_vnni", a, w, None, None, None, torch.int32)
        else:
            out = call("cpu_int8_vnni", a, w, None, None, None, torch.int32)
    finally:
        native.compiled.cache_clear()
    assert torch.equal(out, (a.long() @ w.t().long()).int())


def test_without_a_compiler_another_kernel_is_chosen():
    target = named_target("x86_vnni")
    bare = replace(target, features=target.features - {"cpp_compiler"})
    selection = select(problem(torch.int8), bare)
    assert selection.kernel.name == "pytorch_int_mm"
    assert any("needs cpp_compiler" in reason for v in selection.verdicts for reason in v.reasons)
    assert selection.without_compiler == ("cpu_int8_vnni",)
    assert select(problem(torch.int8), target).without_compiler == ()


def test_an_eager_call_says_once_what_a_compiler_would_give(recwarn):
    target = named_target("x86_vnni")
    bare = replace(target, features=target.features - {"cpp_compiler"})
    _warn_once.cache_clear()
    try:
        assert eager_selection(problem(torch.int8, n=48), target).kernel.name == "cpu_int8_vnni"
        assert eager_selection(problem(torch.int8, n=48), bare, "pytorch_int_mm")
        assert not recwarn
        for n in (48, 80):
            assert eager_selection(problem(torch.int8, n=n), bare).kernel.name == "pytorch_int_mm"
    finally:
        _warn_once.cache_clear()
    (told,) = [str(each.message) for each in recwarn]
    assert told == f"fx_quant: {without_compiler(['cpu_int8_vnni'])}"
    assert "install g++ or clang++, or set CXX" in told


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(name, strided):
    k = kernel(name)
    a = codes(6, 10, code_dtype(name)).to(k.a_dtype or torch.int8)
    a = a.t().contiguous().t() if strided else a
    w = codes(70, 10, code_dtype(name))
    b = w.t() if k.layout is None else pack_weight(w, k.layout)
    scale = torch.rand(12, 1)[::2] if strided else torch.rand(6, 1)
    for m, arguments in ((6, (a, b, scale, torch.rand(70), torch.randn(70))), (0, (a[:0], b, None, None, None))):
        torch.library.opcheck(k.overload(), (*arguments, 70, torch.bfloat16))
        assert k.overload()(*arguments, 70, torch.bfloat16).shape == (m, 70)


# --- selection ------------------------------------------------------------------------------------------------


def problem(dtype: torch.dtype, **changes: object) -> Problem:
    activation = OperandSpec(dtype, Granularity.PER_TOKEN, dynamic=True)
    arguments = {
        "scheme": Scheme(activation, OperandSpec(dtype, Granularity.PER_CHANNEL)),
        "m": SizeRange(0, None),
        "n": 64,
        "k": 64,
        "out_dtype": torch.bfloat16,
        "bias": torch.bfloat16,
        "constant_weight": True,
    }
    return Problem(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("dtype", "target", "changes", "chosen"),
    [
        (torch.int8, "x86_vnni", {}, "cpu_int8_vnni"),
        (torch.int8, "x86_amx", {}, "cpu_int8_amx"),
        (torch.int8, "x86_avx_vnni", {}, "cpu_int8_avx_vnni"),
        (torch.int8, "x86_avx_vnni", {"constant_weight": False}, "pytorch_int_mm"),
        (torch.int8, "x86_avx512", {}, "cpu_int8_avx512"),
        (torch.int8, "x86", {}, "cpu_int8_avx2"),
        (torch.int8, "x86", {"constant_weight": False}, "cpu_int8_portable"),
        (torch.int8, "arm", {}, "pytorch_int_mm"),
        (torch.int8, "x86_vnni", {"constant_weight": False}, "pytorch_int_mm"),
        (torch.int8, "x86_vnni", {"k": 131071}, "cpu_int8_vnni"),
        (torch.int8, "x86_vnni", {"k": 131072}, "pytorch_int_mm"),
        (torch.int8, "x86_vnni", {"out_dtype": torch.int32, "bias": None}, "cpu_int8_vnni"),
        (torch.int8, "x86_vnni", {"n": 1, "k": 1}, "cpu_int8_vnni"),
        *((dtype, "x86_vnni", {}, "cpu_float8_decoded_bf16") for dtype in sorted(FLOAT8_DTYPES, key=str)),
        (E5M2, "x86", {}, "cpu_float8_float32"),
    ],
)
def test_which_kernel_a_cpu_gets(dtype, target, changes, chosen):
    assert select(problem(dtype, **changes), named_target(target)).kernel.name == chosen


@pytest.mark.parametrize("name", NAMES)
def test_no_gpu_gets_a_cpu_kernel(name):
    unmet = kernel(name).requires.unmet(problem(code_dtype(name)), named_target("sm90"))
    assert any("needs platform cpu" in str(each) for each in unmet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_weights_are_decoded_for_many_rows(dtype, monkeypatch):
    """Both ways of the op equal the canonical one, and the rows at which one takes over are the ones it says."""
    ran = []
    aten = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: ran.append(len(args[0])) or aten(*args))
    b, scale = torch.randint(-128, 128, (48, 64), dtype=torch.int8).t(), torch.rand(48) / 512
    for m in (1, MANY_ROWS - 1, MANY_ROWS, 2 * MANY_ROWS):
        x = torch.randn(m, 64).to(dtype)
        got = fxq.cpu_weight_only_int8(x, b, None, scale, None, 48, dtype)
        assert_within(got, fxq.weight_only_mm(x, b, scale, None, None, dtype), Numerics.REASSOCIATED)
    assert ran == ([1, MANY_ROWS - 1] if dtype is torch.bfloat16 else [])


@pytest.mark.parametrize("name", ["cpu_weight_only_int8", "pytorch_weight_only"])
@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize(("of_x", "of_scale"), [(1e-3, 1000.0), (1.0, 1e-5), (100.0, 1e-7)])
def test_scales_that_float16_does_not_hold_are_scaled_by(name, m, of_x, of_scale):
    """The source scales the sum in float32: neither a scale nor the decoded weight is rounded to float16 before it."""
    b, scale = torch.randint(-128, 128, (48, 64), dtype=torch.int8).t(), (torch.rand(48) + 0.5) * of_scale
    x = (torch.randn(m, 64) * of_x).half()
    got = getattr(fxq, name)(x, b, None, scale, None, 48, torch.float16)
    weight = b.double() * scale.double()
    expected, terms = (x.double() @ weight).half(), x.double().abs() @ weight.abs()
    assert_within(got, expected, Numerics.REASSOCIATED, terms)
