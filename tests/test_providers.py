"""Kernels of other libraries, without the libraries and the GPUs that they need.

Each library is stood in for by a recorder with its signature: it asserts what the real op asserts, reads operands and
scales as raw memory where the real op does, and computes what that op computes.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fx_quant.backend import RewritePass, static_input_indices
from fx_quant.config import Options
from fx_quant.diagnose.capture import run_captured, run_eagerly
from fx_quant.errors import FxQuantError
from fx_quant.kernels import registry, rocm
from fx_quant.kernels.aiter import shuffle, unshuffle
from fx_quant.kernels.context import EAGER, GRAPH
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.flashinfer import rows_in_fours
from fx_quant.kernels.layouts import pack_weight
from fx_quant.kernels.machine import detect_target, installed_packages
from fx_quant.kernels.packed_weights import clear_packed_weights
from fx_quant.kernels.registry import Kernel, kernel, kernels, register_kernel
from fx_quant.kernels.select import DISABLED_VARIABLE, select
from fx_quant.passes.pipeline import rewrite_graph
from fx_quant.problem import Problem, SizeRange
from fx_quant.reasons import Kind, Unmet
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.target import Target, named_target
from tests.tolerances import assert_within

fxq = torch.ops.fx_quant
F32, BF16, F16, I8, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32
E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
TENSOR, TOKEN, CHANNEL = Granularity.PER_TENSOR, Granularity.PER_TOKEN, Granularity.PER_CHANNEL
GROUP, BLOCK = Granularity.per_group(128), Granularity.per_block(128, 128)

PROVIDERS = ("aiter", "cutlass", "flashinfer", "rocm")
MINE = {candidate.name: candidate for candidate in kernels() if candidate.provider in PROVIDERS}
ALL = MappingProxyType({"vllm": "0.33.0", "flashinfer-python": "0.7.2", "amd-aiter": "0.1.20"})


# --- the libraries ----------------------------------------------------------------------------------------------------


def exact_sum(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of codes: int32 modulo 2**32, or float32 rounded once."""
    product = a.double() @ b.double()
    return product.float() if a.is_floating_point() else product.to(torch.int64).to(I32)


def sum_of_blocks(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """``a_scale [m, j]`` and ``b_scale [n / 128, j]`` applied to the sum of each block, float32."""
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=F32)
    for j in range(-(-a.shape[1] // 128)):
        along = slice(128 * j, 128 * (j + 1))
        of_columns = b_scale[:, j].repeat_interleave(128)[: b.shape[1]]
        out += exact_sum(a[:, along], b[along]) * (a_scale[:, j : j + 1] * of_columns)
    return out


def is_dense(x: Tensor) -> bool:
    """Rows without gaps at an aligned address, also where a dimension has one element."""
    return x.stride() == (x.shape[1], 1) and x.data_ptr() % 16 == 0


def assert_scale(scale: Tensor, *numels: int) -> None:
    assert scale.dtype is F32 and scale.is_contiguous() and scale.numel() in numels


def assert_bias(bias: Tensor | None, n: int, out_dtype: torch.dtype) -> None:
    assert bias is None or (bias.dtype is out_dtype and bias.shape == (n,) and bias.is_contiguous())


class Calls(list):
    """What a library was called with: ``(op, arguments)``."""

    def ops(self) -> list[str]:
        return [op for op, _ in self]


class Vllm:
    """The ops of vLLM 0.33 on CUDA and on ROCm, and the ``torch._scaled_mm`` of a ROCm build."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    @staticmethod
    def _check(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        m, n, k = a.shape[0], b.shape[1], a.shape[1]
        assert m > 0 and out.shape == (m, n) and b.shape[0] == k
        assert n % 16 == 0 and k % 16 == 0
        assert is_dense(a) and is_dense(b.t()) and is_dense(out)
        assert out.dtype in (BF16, F16)
        assert a.dtype is b.dtype and a.dtype in (E4M3, I8)
        assert_bias(bias, n, out.dtype)

    def cutlass_scaled_mm(self, out, a, b, a_scales, b_scales, bias):
        self.calls.append(("cutlass_scaled_mm", (out, a, b, a_scales, b_scales, bias)))
        self._check(out, a, b, bias)
        (m, k), n = a.shape, b.shape[1]
        assert a_scales.dtype is F32 and b_scales.dtype is F32
        if a_scales.numel() in (1, m) and b_scales.numel() in (1, n):
            assert_scale(a_scales, 1, m)
            assert_scale(b_scales, 1, n)
            y = a_scales.reshape(-1, 1) * (b_scales.reshape(1, -1) * exact_sum(a, b).float())
            y = y if bias is None else y + bias
        else:
            j, i = -(-k // 128), -(-n // 128)
            assert k % 128 == 0 and bias is None and a.dtype is E4M3
            assert a_scales.shape == (m, j) and b_scales.shape == (j, i)
            # The kernel asks for no strides: it reads columns of the one and rows of the other.
            y = sum_of_blocks(a, b, a_scales.as_strided((m, j), (1, m)), b_scales.as_strided((i, j), (j, 1)))
        out.copy_(y)

    def cutlass_scaled_mm_azp(self, out, a, b, a_scales, b_scales, azp_adj, azp, bias):
        self.calls.append(("cutlass_scaled_mm_azp", (out, a, b, a_scales, b_scales, azp_adj, azp, bias)))
        self._check(out, a, b, bias)
        m, n = out.shape
        assert a.dtype is I8
        assert_scale(a_scales, 1, m)
        assert_scale(b_scales, 1, n)
        assert azp_adj.dtype is I32 and azp_adj.numel() == n and azp_adj.is_contiguous()
        assert azp is None or (azp.dtype is I32 and azp.numel() == m and azp.is_contiguous())
        adjusted = exact_sum(a, b) - (azp_adj if azp is None else azp.reshape(-1, 1) * azp_adj.reshape(1, -1))
        y = a_scales.reshape(-1, 1) * (b_scales.reshape(1, -1) * adjusted.float())
        out.copy_(y if bias is None else y + bias)

    def wvSplitKQ(self, in_a, in_b, in_bias, out_c, scale_a, scale_b, CuCount):
        self.calls.append(("wvSplitKQ", (in_a, in_b, in_bias, out_c, scale_a, scale_b, CuCount)))
        (n, k), m = in_a.shape, in_b.shape[0]
        assert 1 <= m <= 4 and k % 16 == 0 and in_b.shape[1] == k and out_c.shape == (m, n)
        assert in_a.dtype is in_b.dtype and in_a.dtype in (E4M3, FNUZ)
        assert is_dense(in_a) and is_dense(in_b) and is_dense(out_c)
        assert out_c.dtype in (BF16, F16) and CuCount == 304
        assert_bias(in_bias, n, out_c.dtype)
        assert_scale(scale_a, 1)
        assert_scale(scale_b, 1)
        y = exact_sum(in_b, in_a.t()) * scale_a * scale_b
        out_c.copy_(y if in_bias is None else y + in_bias)

    def scaled_mm(self, a, b, *, scale_a, scale_b, bias, out_dtype):
        self.calls.append(("_scaled_mm", (a, b, scale_a, scale_b, bias, out_dtype)))
        (m, k), n = a.shape, b.shape[1]
        assert m > 0 and b.shape == (k, n) and n % 16 == 0 and k % 16 == 0
        assert a.is_contiguous() and b.stride(0) == 1 and a.dtype is b.dtype and a.dtype in (E4M3, FNUZ)
        assert out_dtype in (BF16, F16) and (bias is None or (bias.dtype is out_dtype and bias.shape == (n,)))
        assert_scale(scale_a, 1)
        assert_scale(scale_b, 1)
        y = exact_sum(a, b) * scale_a * scale_b
        return (y if bias is None else y + bias).to(out_dtype)


SCHEMAS = {
    "_C": (
        "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()",
        "cutlass_scaled_mm_azp(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor azp_adj, "
        "Tensor? azp, Tensor? bias) -> ()",
    ),
    "_rocm_C": (
        "wvSplitKQ(Tensor in_a, Tensor in_b, Tensor? in_bias, Tensor! out_c, Tensor scale_a, Tensor scale_b, "
        "int CuCount) -> ()",
    ),
}


def flashinfer_module(calls: Calls) -> Any:
    """FlashInfer 0.7.2."""

    def bmm_fp8(A, B, A_scale, B_scale, dtype, out=None, backend="cublas"):
        calls.append(("bmm_fp8", (A, B, A_scale, B_scale, dtype, out, backend)))
        (batch, m, k), n = A.shape, B.shape[2]
        assert batch == 1 and m > 0 and B.shape == (1, k, n) and n % 16 == 0 and k % 16 == 0
        assert is_dense(A[0]) and is_dense(B[0].t()) and A.dtype is B.dtype is E4M3
        assert dtype in (BF16, F16) and out is None and backend in ("cudnn", "cublas", "cutlass", "auto")
        assert_scale(A_scale, 1)
        assert_scale(B_scale, 1)
        return (exact_sum(A[0], B[0]) * (A_scale * B_scale)).to(dtype).unsqueeze(0)

    def fp8_blockscale_gemm_sm90(input, weight, input_scale=None, weight_scale=None, out=None, out_dtype=None):
        calls.append(("fp8_blockscale_gemm_sm90", (input, weight, input_scale, weight_scale, out, out_dtype)))
        (m, k), n = input.shape, weight.shape[0]
        i, j = -(-n // 128), k // 128
        assert input_scale is not None and weight_scale is not None
        assert m > 0 and weight.shape == (n, k) and k % 128 == 0 and n % 64 == 0
        assert is_dense(input) and is_dense(weight) and input.dtype is weight.dtype is E4M3
        assert input_scale.dtype is F32 and input_scale.shape == (m, j)
        assert weight_scale.dtype is F32 and weight_scale.shape == (i, j)
        # The Python function lets float16 through, and the kernel writes bfloat16 to it.
        assert out is None and out_dtype is BF16
        scale_a = input_scale.as_strided((m, j), (1, -(-m // 4) * 4))
        # The tensor map covers whole rows of four, so that much memory must be there.
        input_scale.as_strided((-(-m // 4) * 4, j), (1, -(-m // 4) * 4))
        return sum_of_blocks(input, weight.t(), scale_a, weight_scale.as_strided((i, j), (j, 1))).to(BF16)

    module: Any = types.ModuleType("flashinfer")
    gemm: Any = types.ModuleType("flashinfer.gemm")
    module.bmm_fp8 = bmm_fp8
    module.gemm = gemm
    gemm.fp8_blockscale_gemm_sm90 = fp8_blockscale_gemm_sm90
    return module


def aiter_module(calls: Calls) -> Any:
    """AITER 0.1.20."""

    def rows(XQ, WQ, weight, x_scale, w_scale, bias, dtype):
        (m, k), n = XQ.shape, WQ.shape[0]
        assert m > 0 and WQ.shape == (n, k) and is_dense(XQ) and is_dense(WQ) and XQ.dtype is WQ.dtype
        assert dtype in (BF16, F16)
        assert_scale(x_scale, m)
        assert_scale(w_scale, n)
        assert_bias(bias, n, dtype)
        y = exact_sum(XQ, weight.t()).float() * w_scale.reshape(1, -1) * x_scale.reshape(-1, 1)
        return (y if bias is None else y + bias).to(dtype)

    def gemm_a8w8(XQ, WQ, x_scale, w_scale, bias=None, dtype=BF16, splitK=None):
        calls.append(("gemm_a8w8", (XQ, WQ, x_scale, w_scale, bias, dtype, splitK)))
        assert XQ.dtype in (I8, E4M3, FNUZ) and XQ.shape[1] % 16 == 0 and WQ.shape[0] % 8 == 0
        return rows(XQ, WQ, WQ, x_scale, w_scale, bias, dtype)

    def gemm_a8w8_bpreshuffle(XQ, WQ, x_scale, w_scale, bias=None, dtype=BF16, check=False):
        calls.append(("gemm_a8w8_bpreshuffle", (XQ, WQ, x_scale, w_scale, bias, dtype, check)))
        n, k = WQ.shape
        assert bias is None and WQ.dtype in (E4M3, FNUZ)
        # What the kernels for shapes that were not tuned take.
        assert k >= 192 and k % (128 if k >= 512 else 64) == 0 and n % 16 == 0
        # Where the kernel finds the code of row r and column c.
        r, c = torch.arange(n).reshape(-1, 1), torch.arange(k).reshape(1, -1)
        at = (((r // 16 * (k // 32) + c // 32) * 2 + c % 32 // 16) * 16 + r % 16) * 16 + c % 16
        weight = WQ.view(torch.uint8).flatten()[at].view(WQ.dtype)
        return rows(XQ, WQ, weight, x_scale, w_scale, None, dtype)

    def gemm_a8w8_blockscale(XQ, WQ, x_scale, w_scale, dtype=BF16, isBpreshuffled=False):
        calls.append(("gemm_a8w8_blockscale", (XQ, WQ, x_scale, w_scale, dtype, isBpreshuffled)))
        (m, k), n = XQ.shape, WQ.shape[0]
        i, j = -(-n // 128), k // 128
        assert m > 0 and k % 128 == 0 and n % 16 == 0 and WQ.shape == (n, k) and not isBpreshuffled
        assert XQ.dtype is WQ.dtype and is_dense(XQ) and is_dense(WQ) and dtype in (BF16, F16)
        assert x_scale.shape == (m, j) and w_scale.shape == (i, j) and x_scale.dtype is w_scale.dtype is F32
        scales = x_scale.as_strided((m, j), (j, 1)), w_scale.as_strided((i, j), (j, 1))
        return sum_of_blocks(XQ, WQ.t(), *scales).to(dtype)

    module: Any = types.ModuleType("aiter")
    module.gemm_a8w8 = gemm_a8w8
    module.gemm_a8w8_bpreshuffle = gemm_a8w8_bpreshuffle
    module.gemm_a8w8_blockscale = gemm_a8w8_blockscale
    return module


@pytest.fixture
def calls(monkeypatch) -> Iterator[Calls]:
    """Every library installed, each call recorded."""
    recorded, libraries = Calls(), []
    vllm = Vllm(recorded)
    for namespace, schemas in SCHEMAS.items():
        library = torch.library.Library(namespace, "FRAGMENT")
        libraries.append(library)
        for schema in schemas:
            name = schema.split("(", maxsplit=1)[0]
            library.define(schema)
            library.impl(name, getattr(vllm, name), "CPU")
    flashinfer = flashinfer_module(recorded)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setitem(sys.modules, "flashinfer.gemm", flashinfer.gemm)
    monkeypatch.setitem(sys.modules, "aiter", aiter_module(recorded))
    monkeypatch.setattr(rocm, "compute_units", lambda device: 304)
    monkeypatch.setattr(torch, "_scaled_mm", vllm.scaled_mm)
    yield recorded
    for library in libraries:
        library._destroy()


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv(DISABLED_VARIABLE, raising=False)
    clear_packed_weights()


# --- problems ---------------------------------------------------------------------------------------------------------


def codes(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Codes over the whole range of ``dtype``, its ends among them."""
    if dtype is I8:
        made = torch.randint(-128, 128, shape, dtype=I8)
        made.view(-1)[:2] = torch.tensor([-128, 127], dtype=I8)
        return made
    top = torch.finfo(dtype).max
    made = (torch.randn(shape) * top / 4).clamp(-top, top)
    made.view(-1)[:2] = torch.tensor([-top, top])
    return made.to(dtype)


def operands(
    pair: tuple[Granularity, Granularity],
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    out: torch.dtype = BF16,
    bias: bool = True,
) -> dict[str, Any]:
    """Arguments of ``fx_quant::scaled_mm``: a weight ``[n, k]``, transposed, and results of about one."""
    step = 1 / (k * torch.iinfo(I8).max ** 2 if dtype is I8 else k**0.5 * torch.finfo(dtype).max ** 2 / 16)
    blocks = -(-k // 128)
    a_scale = {TENSOR: (), TOKEN: (m, 1), GROUP: (m, blocks)}[pair[0]]
    b_scale = {TENSOR: (), CHANNEL: (n,), BLOCK: (-(-n // 128), blocks)}[pair[1]]
    made = {
        "a": codes((m, k), dtype) if m else torch.empty((0, k), dtype=dtype),
        "b": codes((n, k), dtype).t(),
        "a_scale": torch.rand(a_scale) + 0.5,
        "b_scale": (torch.rand(b_scale) + 0.5) * step,
        "bias": torch.randn(n).to(out) if bias else None,
        "out_dtype": out,
    }
    if pair[1] == BLOCK:
        made["block"] = [128, 128]
    return made


def expected(given: Mapping[str, Any]) -> Tensor:
    return fxq.scaled_mm.default(**given)


def run(name: str, given: Mapping[str, Any]) -> Tensor:
    """The kernel's op on operands that need no padding."""
    given, chosen = dict(given), kernel(name)
    if chosen.layout is not None:
        given["b"] = pack_weight(given["b"].t(), chosen.layout)
    if given.get("a_zero_point") is not None:
        given["b_sum"] = given["b"].sum(0, dtype=I32)
    n = dict(given).pop("n", None) or (given["b"].shape[0] if chosen.layout else given["b"].shape[1])
    return chosen.overload()(**given, n=n)


def assert_same(name: str, given: Mapping[str, Any]) -> None:
    numerics = kernel(name).numerics if given["bias"] is not None else Numerics.SAME_ACCUM
    assert_within(run(name, given), expected(given), numerics)


def pairs_of(chosen: Kernel) -> list[tuple[Granularity, Granularity]]:
    return sorted(chosen.requires.granularities, key=str)


def dtype_of(chosen: Kernel) -> torch.dtype:
    ((dtype, _),) = chosen.requires.codes
    return dtype


def takes_bias(chosen: Kernel) -> bool:
    some = OperandSpec(E4M3)
    biased = Problem(Scheme(some, some), SizeRange(1, 1), 16, 16, BF16, BF16, True)
    return all(unmet.kind is not Kind.BIAS for unmet in chosen.requires.unmet_by_problem(biased))


ROWS = (1, 2, 3, 4, 5, 33)
EACH = [(name, pair) for name, chosen in MINE.items() for pair in pairs_of(chosen)]


# Selection lets a bias through to these.
EACH_WITH_BIAS = [(name, pair, bias) for name, pair in EACH for bias in (False, True) if takes_bias(MINE[name]) >= bias]


def spelled(value: object) -> str:
    """A test id."""
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def sizes_of(chosen: Kernel) -> tuple[int, int]:
    """``n`` and ``k`` of several tiles that need no padding."""
    align = 128 if chosen.requires.granularities == {(GROUP, BLOCK)} else max(chosen.requires.align, 16)
    return (3 * align, 5 * align) if align < 128 else (2 * align, 3 * align)


# --- the ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pair", "with_bias"), EACH_WITH_BIAS, ids=spelled)
def test_an_op_equals_the_canonical_one(calls, name, pair, with_bias):
    chosen = MINE[name]
    n, k = sizes_of(chosen)
    for m in ROWS:
        for out in chosen.requires.out_dtypes:
            assert_same(name, operands(pair, dtype_of(chosen), m, n, k, out, with_bias))
    assert len(calls) == len(ROWS) * len(chosen.requires.out_dtypes)


@pytest.mark.parametrize(("name", "pair"), EACH, ids=spelled)
def test_strides_and_addresses_do_not_matter(calls, name, pair):
    chosen = MINE[name]
    n, k = sizes_of(chosen)
    for m in ROWS:
        given = operands(
            pair, dtype_of(chosen), m, n, k, sorted(chosen.requires.out_dtypes, key=str)[0], takes_bias(chosen)
        )
        hostile = dict(given)
        # Columns of a wider tensor that begin at an odd address; a row-major b; every second element of the bias.
        wide = torch.empty((m, k + 3), dtype=given["a"].dtype)
        wide[:, 1 : k + 1] = given["a"]
        hostile["a"] = wide[:, 1 : k + 1]
        hostile["b"] = given["b"].contiguous()
        for scale in ("a_scale", "b_scale"):
            if given[scale].dim() == 2:
                hostile[scale] = given[scale].t().contiguous().t()
        if given["bias"] is not None:
            hostile["bias"] = given["bias"].repeat_interleave(2)[::2]
        assert torch.equal(run(name, hostile), run(name, given))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(
    "name", [name for name, chosen in MINE.items() if (TENSOR, TENSOR) in chosen.requires.granularities]
)
def test_a_scale_of_one_element_may_have_any_rank(calls, name, shape):
    n, k = sizes_of(MINE[name])
    given = operands((TENSOR, TENSOR), dtype_of(MINE[name]), 3, n, k, bias=False)
    for scale in ("a_scale", "b_scale"):
        given[scale] = given[scale].reshape(shape)
    assert_same(name, given)


@pytest.mark.parametrize(("name", "pair"), EACH, ids=spelled)
def test_a_missing_scale_is_one(calls, name, pair):
    chosen = MINE[name]
    n, k = sizes_of(chosen)
    given = operands(pair, dtype_of(chosen), 3, n, k, bias=False)
    assert_same(name, {**given, "a_scale": None})
    if pair[1] != BLOCK:
        # The sum itself would be too large for float16.
        assert_same(name, {**given, "b_scale": None, "out_dtype": BF16})


@pytest.mark.parametrize(("name", "pair"), EACH, ids=spelled)
def test_zero_and_tiny_scales_and_not_a_number(calls, name, pair):
    chosen = MINE[name]
    n, k = sizes_of(chosen)
    given = operands(pair, dtype_of(chosen), 4, n, k, bias=False)
    assert not run(name, {**given, "a_scale": torch.zeros_like(given["a_scale"])}).any()
    assert_same(name, {**given, "b_scale": given["b_scale"] * 1e-30})
    if dtype_of(chosen) is not I8:
        given["a"][2, 1] = torch.nan
        assert run(name, given)[2].isnan().all()
        assert_same(name, given)


@pytest.mark.parametrize(("name", "pair"), EACH, ids=spelled)
def test_no_rows_reach_no_library(calls, name, pair):
    chosen = MINE[name]
    n, k = sizes_of(chosen)
    out = sorted(chosen.requires.out_dtypes, key=str)[0]
    got = run(name, operands(pair, dtype_of(chosen), 0, n, k, out, takes_bias(chosen)))
    assert got.shape == (0, n) and got.dtype is out
    assert not calls


@pytest.mark.parametrize(("name", "pair"), EACH, ids=spelled)
def test_opcheck(calls, name, pair):
    chosen = MINE[name]
    n, k = sizes_of(chosen)
    given = operands(pair, dtype_of(chosen), 3, n, k, bias=takes_bias(chosen))
    if chosen.layout is not None:
        given["b"] = pack_weight(given["b"].t(), chosen.layout)
    arguments = (*(given[argument] for argument in ("a", "b", "a_scale", "b_scale", "bias")), n, given["out_dtype"])
    extras = {"block": given["block"]} if "block" in given else {}
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # test_schema multiplies the inputs, which torch cannot do in float8; what it asks is asked below.
    checks += ["test_schema"] if dtype_of(chosen) is I8 else []
    torch.library.opcheck(chosen.overload(), arguments, extras, test_utils=checks)
    inputs = [x for x in arguments if isinstance(x, Tensor)]
    before = [x.clone() for x in inputs]
    got = chosen.overload()(*arguments, **extras)
    assert all(torch.equal(x.float(), was.float()) for x, was in zip(inputs, before, strict=True))
    assert all(got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for x in inputs)
    assert got.shape == (3, n) and got.is_contiguous()


# --- few rows and many ---


@pytest.mark.parametrize(("target", "dtype"), [("gfx950", E4M3), ("gfx942", FNUZ)])
def test_rocm_asks_for_the_rows_when_it_runs(calls, target, dtype):
    """The kernel is chosen without them, eagerly and in a graph of any m."""
    asked = replace(FP8 if dtype is E4M3 else FNUZ_TENSOR, m=SizeRange(0, None), n=32, k=48)
    selections = [select(asked, named_target(target, packages=ALL), context=context) for context in (EAGER, GRAPH)]
    assert {each.kernel.op for each in selections} == {"rocm_float8"}
    for m in (0, 1, 4, 5, 64):
        given = operands((TENSOR, TENSOR), dtype, m, 32, 48, bias=False)
        weight, scales = given["b"].t(), (given["a_scale"], given["b_scale"])
        got = run_kernel(selections[0], given["a"], weight, *scales, None)
        assert_within(got, expected(given), Numerics.SAME_ACCUM)
    assert calls.ops() == ["wvSplitKQ", "wvSplitKQ", "_scaled_mm", "_scaled_mm"]


def test_a_dynamic_graph_of_rocm_has_one_op_and_no_guard_on_the_rows(calls):
    given, graphs = operands((TENSOR, TENSOR), E4M3, 3, 32, 48), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    weight, scales = given["b"], (given["a_scale"], given["b_scale"], given["bias"])
    compiled = torch.compile(lambda a: fxq.rocm_float8(a, weight, *scales, 32, BF16), backend=backend, dynamic=True)
    for m in (3, 4, 5, 33):
        part = operands((TENSOR, TENSOR), E4M3, m, 32, 48)["a"]
        assert_within(compiled(part), expected({**given, "a": part}), Numerics.SAME_ACCUM)
    assert len(graphs) == 1
    assert calls.ops() == ["wvSplitKQ", "wvSplitKQ", "_scaled_mm", "_scaled_mm"]


# --- zero points ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", pairs_of(MINE["cutlass_int8"]), ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("m", [1, 7])
def test_zero_points_go_into_the_epilogue(calls, pair, with_bias, m):
    given = operands(pair, I8, m, 48, 80, bias=with_bias)
    one = torch.tensor(-77, dtype=I32)
    for zero_point in (one, one.reshape(1), one.reshape(1, 1), torch.randint(-128, 128, (m, 1), dtype=I32)):
        assert_same("cutlass_int8", {**given, "a_zero_point": zero_point})
    assert calls.ops() == ["cutlass_scaled_mm_azp"] * 4


def test_one_zero_point_is_folded_into_the_sums_and_one_a_row_is_not(calls):
    given = operands((TOKEN, CHANNEL), I8, 3, 32, 16)
    sums = given["b"].sum(0, dtype=I32)
    run("cutlass_int8", {**given, "a_zero_point": torch.tensor(5, dtype=I32)})
    run("cutlass_int8", {**given, "a_zero_point": torch.tensor([[5], [-6], [7]], dtype=I32)})
    (_, folded), (_, by_row) = calls
    assert torch.equal(folded[5], 5 * sums) and folded[6] is None
    assert torch.equal(by_row[5], sums) and by_row[6].tolist() == [5, -6, 7]


def test_sums_are_computed_where_they_are_not_given(calls):
    given = {**operands((TOKEN, CHANNEL), I8, 3, 32, 16), "a_zero_point": torch.full((3, 1), 9, dtype=I32)}
    got = fxq.cutlass_int8(**given, n=32)
    assert_within(got, expected(given), Numerics.SAME_ACCUM)


def test_an_extreme_sum_does_not_overflow(calls):
    k = 131056
    a, b = torch.full((2, k), -128, dtype=I8), torch.full((k, 16), -128, dtype=I8)
    scale = torch.tensor(1e-9)
    given = {"a": a, "b": b, "a_scale": scale, "b_scale": None, "bias": None, "out_dtype": BF16}
    assert_same("cutlass_int8", given)
    deepest = MINE["cutlass_int8"].requires.max_k
    assert deepest is not None and k <= deepest < 2**31 / 128**2


# --- scales of blocks -------------------------------------------------------------------------------------------------

BLOCK_KERNELS = [name for name, chosen in MINE.items() if (GROUP, BLOCK) in chosen.requires.granularities]


@pytest.mark.parametrize("name", BLOCK_KERNELS)
@pytest.mark.parametrize(("n", "k"), [(128, 128), (128, 256), (384, 128), (640, 384)])
def test_blocks_of_every_number(calls, name, n, k):
    """One block along k and n has scales of one element each, which libraries may take for those of a tensor."""
    for m in (1, 2, 3, 4, 5, 8):
        assert_same(name, operands((GROUP, BLOCK), dtype_of(MINE[name]), m, n, k))


@pytest.mark.parametrize("name", [name for name in BLOCK_KERNELS if MINE[name].requires.align < 128])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (144, 272), (576, 400)])
def test_a_block_may_be_cut_off(calls, name, n, k):
    assert_same(name, operands((GROUP, BLOCK), dtype_of(MINE[name]), 5, n, k))


@pytest.mark.parametrize("m", [1, 3, 4, 6])
def test_flashinfer_reads_scales_in_columns_of_whole_fours(m):
    scale = torch.rand(m, 5)
    made = rows_in_fours(scale)
    assert torch.equal(made, scale)
    assert made.stride() == (1, -(-m // 4) * 4)
    assert made.untyped_storage().nbytes() == 4 * 5 * -(-m // 4) * 4


# --- the shuffled weight ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, FNUZ])
def test_shuffling_orders_codes_as_aiter_does(dtype):
    weight = torch.arange(32 * 64).remainder(251).to(torch.uint8).reshape(32, 64).view(dtype)
    flat, read = shuffle(weight).view(torch.uint8).flatten(), weight.view(torch.uint8)
    # Row 0 gives 16 codes, then row 1 its first 16, ...; after 16 rows come the second 16 codes of row 0.
    assert torch.equal(flat[:16], read[0, :16])
    assert torch.equal(flat[16:32], read[1, :16])
    assert torch.equal(flat[256:272], read[0, 16:32])
    assert torch.equal(flat[512:528], read[0, 32:48])
    assert torch.equal(flat[16 * 64 : 16 * 64 + 16], read[16, :16])


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 32), (17, 33), (48, 96)])
def test_shuffling_loses_nothing_and_pads_with_zeros(n, k):
    weight = codes((n, k), E4M3) if n * k > 1 else torch.ones(1, 1).to(E4M3)
    packed = shuffle(weight)
    assert packed.shape == (-(-n // 16) * 16, -(-k // 32) * 32)
    assert torch.equal(unshuffle(packed, n, k).float(), weight.float())
    assert packed.view(torch.uint8).count_nonzero() == weight.view(torch.uint8).count_nonzero()


# --- selection --------------------------------------------------------------------------------------------------------

ANY_ROWS = SizeRange(1, None)


def problem(
    activation: OperandSpec,
    weight: OperandSpec,
    out: torch.dtype = BF16,
    bias: torch.dtype | None = None,
    m: SizeRange = ANY_ROWS,
    n: int = 4096,
    k: int = 4096,
    constant_weight: bool = True,
) -> Problem:
    return Problem(Scheme(activation, weight), m, n, k, out, bias, constant_weight)


def of(dtype: torch.dtype, a: Granularity, b: Granularity, symmetric: bool = True) -> tuple[OperandSpec, OperandSpec]:
    return OperandSpec(dtype, a, dynamic=True, symmetric=symmetric), OperandSpec(dtype, b)


INT8 = problem(*of(I8, TOKEN, CHANNEL))
FP8 = problem(*of(E4M3, TENSOR, TENSOR))
FP8_ROW = problem(*of(E4M3, TOKEN, CHANNEL))
FP8_BLOCK = problem(*of(E4M3, GROUP, BLOCK))
FNUZ_TENSOR = problem(*of(FNUZ, TENSOR, TENSOR))
FNUZ_ROW = problem(*of(FNUZ, TOKEN, CHANNEL))
FNUZ_BLOCK = problem(*of(FNUZ, GROUP, BLOCK))
ONE, FOUR = SizeRange.exactly(1), SizeRange(0, 4)

PROBLEMS = {
    "int8": INT8,
    "int8, bias": replace(INT8, bias=BF16),
    "int8, tensors": problem(*of(I8, TENSOR, TENSOR)),
    "int8, zero points": problem(*of(I8, TOKEN, CHANNEL, symmetric=False)),
    "int8, float32 result": replace(INT8, out_dtype=F32),
    "int8, other bias": replace(INT8, bias=F32),
    "int8, deep": replace(INT8, k=200_000),
    "int8, ragged": replace(INT8, n=36, k=72),
    "fp8 tensor": FP8,
    "fp8 tensor, bias": replace(FP8, bias=BF16),
    "fp8 tensor, ragged": replace(FP8, n=36, k=72),
    "fp8 tensor, one row": replace(FP8, m=ONE, bias=BF16),
    "fp8 tensor, up to four rows": replace(FP8, m=FOUR),
    "fp8 row": FP8_ROW,
    "fp8 row, bias": replace(FP8_ROW, bias=BF16),
    "fp8 row, ragged": replace(FP8_ROW, n=36, k=72),
    "fp8 row, computed weight": replace(FP8_ROW, constant_weight=False),
    "fp8 row, float32 result": replace(FP8_ROW, out_dtype=F32),
    "fp8 block": FP8_BLOCK,
    "fp8 block, bias": replace(FP8_BLOCK, bias=BF16),
    "fp8 block, float16": replace(FP8_BLOCK, out_dtype=F16),
    "fp8 block, ragged": replace(FP8_BLOCK, n=576, k=400),
    "fp8 block of 64": problem(*of(E4M3, Granularity.per_group(64), Granularity.per_block(64, 64))),
    "fnuz tensor": FNUZ_TENSOR,
    "fnuz tensor, one row": replace(FNUZ_TENSOR, m=ONE),
    "fnuz row": FNUZ_ROW,
    "fnuz row, bias": replace(FNUZ_ROW, bias=BF16),
    "fnuz block": FNUZ_BLOCK,
}

# target -> problem -> the kernel with every library installed; what is not here gets none of these providers'.
CHOICES: dict[str, dict[str, str]] = {
    "sm80": dict.fromkeys(["int8", "int8, bias", "int8, tensors", "int8, zero points", "int8, ragged"], "cutlass_int8"),
    "sm89": {
        **dict.fromkeys(["int8", "int8, bias", "int8, tensors", "int8, zero points", "int8, ragged"], "cutlass_int8"),
        **dict.fromkeys(
            [
                "fp8 tensor",
                "fp8 tensor, bias",
                "fp8 tensor, ragged",
                "fp8 tensor, one row",
                "fp8 tensor, up to four rows",
                "fp8 row",
                "fp8 row, bias",
                "fp8 row, ragged",
                "fp8 row, computed weight",
            ],
            "cutlass_float8",
        ),
    },
}
CHOICES["sm90"] = {
    **CHOICES["sm89"],
    "fp8 block": "flashinfer_float8_block_sm90",
    "fp8 block, bias": "flashinfer_float8_block_sm90",
    "fp8 block, ragged": "flashinfer_float8_block_sm90",
    "fp8 block, float16": "cutlass_float8_block",
}
CHOICES["sm100"] = CHOICES["sm120"] = {
    **{name: chosen for name, chosen in CHOICES["sm89"].items() if chosen != "cutlass_int8"},
    "fp8 tensor": "flashinfer_float8",
    "fp8 tensor, ragged": "flashinfer_float8",
    "fp8 tensor, up to four rows": "flashinfer_float8",
    **dict.fromkeys(
        ["fp8 block", "fp8 block, bias", "fp8 block, float16", "fp8 block, ragged"], "cutlass_float8_block"
    ),
}
AITER_INT8 = dict.fromkeys(["int8", "int8, bias", "int8, tensors", "int8, deep", "int8, ragged"], "aiter_int8")
CHOICES["gfx950"] = {
    **AITER_INT8,
    **dict.fromkeys(
        ["fp8 tensor", "fp8 tensor, bias", "fp8 tensor, ragged", "fp8 tensor, one row", "fp8 tensor, up to four rows"],
        "rocm_float8",
    ),
    "fp8 row": "aiter_float8_preshuffled",
    "fp8 row, bias": "aiter_float8_rowwise",
    "fp8 row, ragged": "aiter_float8_rowwise",
    "fp8 row, computed weight": "aiter_float8_rowwise",
    **dict.fromkeys(["fp8 block", "fp8 block, bias", "fp8 block, float16", "fp8 block, ragged"], "aiter_float8_block"),
}
CHOICES["gfx942"] = {
    **AITER_INT8,
    "fnuz tensor": "rocm_float8_fnuz",
    "fnuz tensor, one row": "rocm_float8_fnuz",
    "fnuz row": "aiter_float8_preshuffled_fnuz",
    "fnuz row, bias": "aiter_float8_rowwise_fnuz",
    "fnuz block": "aiter_float8_block_fnuz",
}
CHOICES["x86_vnni"] = {}


def chosen_of_mine(asked: Problem, target: Target) -> str | None:
    """The kernel that is chosen, or None where it is none of these providers'."""
    verdicts = {candidate.name: candidate.requires.unmet(asked, target) for candidate in kernels()}
    if all(verdicts.values()):
        return None
    chosen = select(asked, target).kernel
    return chosen.name if chosen.provider in PROVIDERS else None


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_with_every_library(name):
    target = named_target(name, packages=ALL)
    chosen = {asked: chosen_of_mine(PROBLEMS[asked], target) for asked in PROBLEMS}
    assert {asked: found for asked, found in chosen.items() if found} == CHOICES[name]


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_without_a_library(name):
    target = named_target(name)
    assert {asked: found for asked in PROBLEMS if (found := chosen_of_mine(PROBLEMS[asked], target))} == {}


def test_every_kernel_is_chosen_somewhere():
    assert {chosen for table in CHOICES.values() for chosen in table.values()} == set(MINE)


@pytest.mark.parametrize(
    ("packages", "chosen"),
    [
        (["vllm", "flashinfer-python"], "flashinfer_float8"),
        (["vllm"], "cutlass_float8"),
        ([], None),
    ],
)
def test_flashinfer_before_cutlass_before_pytorch(packages, chosen):
    target = named_target("sm100", packages={package: ALL[package] for package in packages})
    assert chosen_of_mine(FP8, target) == chosen


@pytest.mark.parametrize("name", MINE)
def test_a_missing_or_old_library_is_the_only_reason(name):
    requires = MINE[name].requires
    ((package, least),) = requires.packages.items()
    target = next(
        named_target(each, packages=ALL)
        for each in CHOICES
        if not requires.unmet_by_target(named_target(each, packages=ALL))
    )
    missing = replace(target, packages={k: v for k, v in ALL.items() if k != package})
    lacks = f"needs {package}>={least}, which is not installed"
    assert requires.unmet_by_target(missing) == [Unmet(Kind.PACKAGE, lacks, package)]
    old = replace(target, packages={**ALL, package: "0.0.9"})
    assert requires.unmet_by_target(old) == [Unmet(Kind.PACKAGE, f"needs {package}>={least}, found 0.0.9", package)]
    assert not requires.unmet_by_target(replace(target, packages={**ALL, package: least}))


@pytest.mark.parametrize(
    ("name", "target", "asked", "reasons"),
    [
        ("cutlass_int8", "sm100", "int8", ["needs sm99 or older, target is sm100"]),
        ("cutlass_int8", "sm90", "int8, deep", ["needs k <= 131071, got k=200000"]),
        ("cutlass_int8", "sm90", "int8, other bias", ["adds a bias of bfloat16 or float16, got float32"]),
        ("cutlass_int8", "sm90", "int8, float32 result", ["returns bfloat16 or float16, asked for float32"]),
        ("cutlass_float8", "sm80", "fp8 row", ["needs sm89 or newer, target is sm80"]),
        ("cutlass_float8", "sm90", "fp8 block", ["has no per_group(128) x per_block(128, 128) scales"]),
        ("cutlass_float8", "sm90", "fnuz row", ["has no float8_e4m3fnuz x float8_e4m3fnuz matmul"]),
        ("cutlass_float8_block", "sm89", "fp8 block", ["needs sm90 or newer, target is sm89"]),
        ("cutlass_float8_block", "sm90", "fp8 block of 64", ["has no per_group(64) x per_block(64, 64) scales"]),
        ("flashinfer_float8", "sm90", "fp8 tensor", ["needs sm100 or newer, target is sm90"]),
        ("flashinfer_float8", "sm100", "fp8 tensor, bias", ["adds no bias"]),
        ("flashinfer_float8", "sm100", "fp8 row", ["has no per_token x per_channel scales"]),
        ("flashinfer_float8_block_sm90", "sm100", "fp8 block", ["needs sm90 or older, target is sm100"]),
        ("flashinfer_float8_block_sm90", "sm90", "fp8 block, float16", ["returns bfloat16, asked for float16"]),
        ("rocm_float8", "gfx950", "fp8 row", ["has no per_token x per_channel scales"]),
        ("rocm_float8", "gfx942", "fp8 tensor", ["needs float8, which gfx942 has not"]),
        ("rocm_float8_fnuz", "gfx950", "fnuz tensor", ["needs float8_fnuz, which gfx950 has not"]),
        ("rocm_float8", "sm90", "fp8 tensor", ["needs platform rocm, target is cuda"]),
        ("aiter_float8_preshuffled", "gfx950", "fp8 row, bias", ["adds no bias"]),
        (
            "aiter_float8_preshuffled",
            "gfx950",
            "fp8 row, ragged",
            ["needs n and k in multiples of 256, got n=36 k=72"],
        ),
        (
            "aiter_float8_preshuffled",
            "gfx950",
            "fp8 row, computed weight",
            ["packs its weight once, so the weight must be a parameter, buffer or constant"],
        ),
        ("aiter_float8_rowwise", "gfx950", "fp8 tensor", ["has no per_tensor x per_tensor scales"]),
        ("aiter_int8", "gfx950", "int8, zero points", ["has no zero point of the activation"]),
    ],
)
def test_a_requirement_that_is_not_met_is_named(name, target, asked, reasons):
    unmet = MINE[name].requires.unmet(PROBLEMS[asked], named_target(target, packages=ALL))
    assert list(map(str, unmet)) == reasons


# --- through the passes -----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """``fx_quant::scaled_mm`` of codes and a weight that is a buffer."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.register_buffer("weight", given["b"].t())
        self.register_buffer("weight_scale", given["b_scale"])
        self.register_buffer("bias", given["bias"])
        self.out_dtype, self.block = given["out_dtype"], given.get("block")

    def forward(self, a: Tensor, a_scale: Tensor, a_zero_point: Tensor | None = None) -> Tensor:
        extras = {"a_zero_point": a_zero_point} if self.block is None else {"block": self.block}
        return fxq.scaled_mm(a, self.weight.t(), a_scale, self.weight_scale, self.bias, self.out_dtype, **extras)


def compiled(given: Mapping[str, Any], target: Target) -> tuple[Tensor, str]:
    """The result of the rewritten graph, op by op, and the kernel that was chosen."""
    reports = []

    def on_graph(graph) -> None:
        reports.append(rewrite_graph(graph, target, Options(strict=True), static_input_indices(graph)))

    inputs = [given["a"], given["a_scale"], given.get("a_zero_point")]
    inputs = [x for x in inputs if x is not None]
    got = run_captured(Linear(given), inputs, {}, on_graph=on_graph, inner_compile=run_eagerly).output
    ((site,),) = [report.sites for report in reports]
    return got, site.kernel


@pytest.mark.parametrize(
    ("target", "pair", "dtype", "out", "with_bias", "sizes", "kernel_name"),
    [
        ("sm90", (TOKEN, CHANNEL), E4M3, F16, True, (5, 36, 72), "cutlass_float8"),
        ("sm90", (TENSOR, TENSOR), E4M3, BF16, False, (1, 1, 1), "cutlass_float8"),
        ("sm90", (TENSOR, CHANNEL), E4M3, BF16, True, (3, 17, 15), "cutlass_float8"),
        ("sm80", (TOKEN, CHANNEL), I8, BF16, True, (5, 36, 72), "cutlass_int8"),
        ("sm80", (TOKEN, TENSOR), I8, F16, False, (2, 33, 1), "cutlass_int8"),
        ("sm100", (TENSOR, TENSOR), E4M3, BF16, False, (5, 36, 72), "flashinfer_float8"),
        ("sm100", (GROUP, BLOCK), E4M3, BF16, True, (5, 200, 300), "cutlass_float8_block"),
        ("sm90", (GROUP, BLOCK), E4M3, BF16, True, (5, 200, 300), "flashinfer_float8_block_sm90"),
        ("sm90", (GROUP, BLOCK), E4M3, BF16, False, (2, 1, 1), "flashinfer_float8_block_sm90"),
        ("gfx950", (TENSOR, TENSOR), E4M3, BF16, True, (1, 36, 72), "rocm_float8"),
        ("gfx942", (TENSOR, TENSOR), FNUZ, F16, False, (4, 15, 17), "rocm_float8_fnuz"),
        ("gfx950", (TENSOR, TENSOR), E4M3, BF16, True, (5, 36, 72), "rocm_float8"),
        ("gfx950", (TOKEN, CHANNEL), E4M3, BF16, False, (5, 256, 512), "aiter_float8_preshuffled"),
        ("gfx942", (TOKEN, TENSOR), FNUZ, F16, False, (3, 512, 256), "aiter_float8_preshuffled_fnuz"),
        ("gfx950", (TOKEN, CHANNEL), E4M3, BF16, True, (5, 36, 72), "aiter_float8_rowwise"),
        ("gfx942", (GROUP, BLOCK), FNUZ, BF16, True, (5, 200, 300), "aiter_float8_block_fnuz"),
        ("gfx942", (TENSOR, TENSOR), I8, BF16, True, (5, 36, 72), "aiter_int8"),
    ],
)
def test_a_rewritten_graph_calls_the_library_with_operands_that_it_takes(
    calls, target, pair, dtype, out, with_bias, sizes, kernel_name
):
    m, n, k = sizes
    given = operands(pair, dtype, m, n, k, out, with_bias) if n * k > 1 else smallest(pair, dtype, m, out)
    got, chosen = compiled(given, named_target(target, packages=ALL))
    assert chosen == kernel_name and len(calls) == 1
    assert_within(got, expected(given), kernel(kernel_name).numerics)


def smallest(pair: tuple[Granularity, Granularity], dtype: torch.dtype, m: int, out: torch.dtype) -> dict[str, Any]:
    """A weight of one code."""
    given = operands(pair, dtype, m, 2, 2, out, bias=False)
    given["a"], given["b"] = given["a"][:, :1], given["b"][:1, :1]
    return given


@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_a_rewritten_graph_corrects_zero_points_over_padded_columns(calls, shape):
    given = operands((TOKEN, CHANNEL), I8, 6, 36, 72)
    given["a_zero_point"] = torch.randint(-128, 128, shape, dtype=I32)
    got, chosen = compiled(given, named_target("sm90", packages=ALL))
    assert chosen == "cutlass_int8" and calls.ops() == ["cutlass_scaled_mm_azp"]
    assert_within(got, expected(given), Numerics.SAME_ACCUM)


# --- discovery --------------------------------------------------------------------------------------------------------


def test_no_library_is_imported_before_a_matmul_runs(tmp_path, printed):
    for name in ("vllm", "flashinfer", "aiter"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')\n")
    found = printed(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fx_quant; from fx_quant.kernels.registry import kernels; "
        "from fx_quant.kernels.machine import detect_target; kernels(); detect_target('cpu'); "
        "print([m for m in ('vllm', 'flashinfer', 'aiter') if m in sys.modules])"
    )
    assert found.strip() == "[]"


def test_libraries_are_found_by_the_names_of_their_distributions(monkeypatch):
    """``aiter`` on PyPI is not AMD's."""

    def version(name: str) -> str:
        found = {**ALL, "aiter": "0.13.20191203"}
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert {package: found for package, found in installed_packages().items() if package in ALL} == dict(ALL)
    assert "aiter" not in installed_packages()
    assert {package for chosen in MINE.values() for package in chosen.requires.packages} == set(ALL)


def test_a_provider_may_require_any_library_that_is_installed(monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    monkeypatch.setattr(registry, "_PRIORITY", dict(registry._PRIORITY))
    like, asked = kernel("pytorch_int_mm"), replace(PROBLEMS["int8"], out_dtype=F32)
    for name, packages in (("their_int8", {"pytest": "1"}), ("their_lost_int8", {"no-such-library": "1"})):
        requires = replace(like.requires, packages=packages)
        register_kernel(replace(like, name=name, provider="their", requires=requires), priority=99)
    selection = select(asked, detect_target("cpu"))
    assert selection.kernel.name == "their_int8"
    reasons = {verdict.kernel: verdict.reasons for verdict in selection.verdicts}
    assert reasons["their_lost_int8"] == ("needs no-such-library>=1, which is not installed",)
    assert installed_packages()["pytest"] == importlib.metadata.version("pytest")
    found, key = importlib.metadata.version, RewritePass(Options()).uuid()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == "pytest" else found(name))
    assert RewritePass(Options()).uuid() != key


def test_vllm_is_imported_for_its_ops(calls):
    """The library registers its ops when ``vllm._custom_ops`` is imported; the second matmul imports nothing."""
    imported, ops = [], types.SimpleNamespace()
    real = torch.ops._C.cutlass_scaled_mm

    def import_module(name: str) -> None:
        imported.append(name)
        ops.cutlass_scaled_mm = real

    given = operands((TENSOR, TENSOR), E4M3, 2, 16, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "_C", ops)
        patch.setattr("importlib.import_module", import_module)
        for _ in range(2):
            assert_same("cutlass_float8", given)
    assert imported == ["vllm._custom_ops"]


def test_a_vllm_without_the_op_is_an_error_that_says_so(monkeypatch):
    def import_module(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr("importlib.import_module", import_module)
    with pytest.raises(FxQuantError, match="vLLM's op library must have _C::cutlass_scaled_mm") as error:
        run("cutlass_float8", operands((TENSOR, TENSOR), E4M3, 2, 16, 16))
    assert isinstance(error.value.__cause__, ImportError)
