"""vLLM's Marlin without vLLM and without a GPU.

The op is stood in for by a recorder with its signature: it asserts what the real op asserts, finds each code, scale,
zero point and bias where the real kernel does, and rounds where that kernel rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fx_quant.backend import static_input_indices
from fx_quant.config import Options
from fx_quant.diagnose.capture import run_captured, run_eagerly
from fx_quant.errors import FxQuantError
from fx_quant.kernels import marlin
from fx_quant.kernels.layouts import pack_weight, packed_layout
from fx_quant.kernels.packed_weights import clear_packed_weights
from fx_quant.kernels.registry import kernel
from fx_quant.kernels.select import DISABLED_VARIABLE, select
from fx_quant.passes.pipeline import rewrite_graph
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.target import named_target
from tests.tolerances import assert_within

fxq = torch.ops.fx_quant
F32, BF16, F16, I8, U8, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32
INT4: Any = torch.int4  # pyrefly: ignore [missing-attribute]
MULTIPROCESSORS = 132

# Ids of vLLM's scalar types: (bits, what a code stands for is less by).
TYPES = {
    0 | 4 << 8 | 0 << 16 | 8 << 17 | 0 << 49 | 1 << 50: (4, 8),
    0 | 4 << 8 | 0 << 16 | 0 << 17 | 0 << 49 | 1 << 50: (4, None),
    0 | 8 << 8 | 0 << 16 | 128 << 17 | 0 << 49 | 1 << 50: (8, 128),
}
SCHEMA = (
    "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales, "
    "Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor workspace, int b_type_id, "
    "SymInt size_m, SymInt size_n, SymInt size_k, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor"
)


# --- the library ------------------------------------------------------------------------------------------------------


def fields(words: Tensor, bits: int) -> Tensor:
    """The unsigned fields of int32 words, the lowest first, along a new last dimension."""
    shifts = torch.arange(0, 32, bits)
    return words.to(torch.int64).unsqueeze(-1) >> shifts & (1 << bits) - 1


def read_weight(words: Tensor, bits: int, n: int, k: int) -> Tensor:
    """Codes ``[k, n]`` of a repacked weight, as ``gptq_marlin_repack_kernel`` writes its words."""
    found, codes = torch.full((k, n), -1), fields(words, bits)
    rows, columns = 16 * torch.arange(k // 16).reshape(-1, 1), 64 * torch.arange(n // 64).reshape(1, -1)
    offsets = (0, 1, 8, 9)
    for thread in range(32):
        for warp in range(4):
            row, column = thread % 4 * 2, warp * 16 + thread // 4
            values = [(row + offset, column) for offset in offsets] + [(row + offset, column + 8) for offset in offsets]
            if bits == 4:
                order = {thread * 4 + warp: [values[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]}
            else:
                order = {thread * 8 + warp * 2 + half: [values[4 * half + i] for i in (0, 2, 1, 3)] for half in (0, 1)}
            for word, places in order.items():
                for field, (at_row, at_column) in enumerate(places):
                    found[rows + at_row, columns + at_column] = codes[:, word :: 16 * bits * 2, field]
    assert (found >= 0).all()
    return found


def read_columns(x: Tensor) -> Tensor:
    """``[..., n]`` of scales of columns, or of a bias: where the epilogue finds column ``c``."""
    c = torch.arange(x.shape[-1])
    return x[..., c // 32 * 32 + c % 8 // 2 * 8 + c % 32 // 8 * 2 + c % 2]


def read_fragments(x: Tensor) -> Tensor:
    """``[groups, n]`` of scales of groups: where the main loop finds column ``c``."""
    c = torch.arange(x.shape[-1])
    return x[..., c // 64 * 64 + c % 8 * 8 + c % 64 // 8]


def read_zero_points(words: Tensor) -> Tensor:
    """``[groups, n]`` of int32 words of eight: permuted as scales of groups, then even before odd."""
    within = fields(words, 4)[..., [0, 4, 1, 5, 2, 6, 3, 7]]
    return read_fragments(within.flatten(-2))


class Calls(list):
    """The keyword arguments of each call of ``marlin_gemm``."""

    def marlin_gemm(
        self,
        a,
        c_or_none,
        b_q_weight,
        b_bias_or_none,
        b_scales,
        a_scales,
        global_scale,
        b_zeros_or_none,
        workspace,
        b_type_id,
        size_m,
        size_n,
        size_k,
        use_atomic_add,
        use_fp32_reduce,
        is_zp_float,
    ):
        self.append(
            {"scales": b_scales, "zeros": b_zeros_or_none, "type": b_type_id, "sizes": (size_m, size_n, size_k)}
        )
        bits, bias = TYPES[b_type_id]
        assert c_or_none is None and a_scales is None and global_scale is None
        assert not use_atomic_add and use_fp32_reduce and not is_zp_float
        assert size_m > 0 and a.shape == (size_m, size_k) and a.dtype in (BF16, F16)
        assert a.stride(1) == 1 and a.stride(0) % 8 == 0 and a.data_ptr() % 16 == 0
        assert (size_n % 64 == 0 and size_k % 128 == 0) or (size_n % 128 == 0 and size_k % 64 == 0)
        assert b_q_weight.dtype is I32 and b_q_weight.is_contiguous()
        assert b_q_weight.shape == (size_k // 16, size_n * 16 // (32 // bits))
        groups = b_scales.shape[0]
        assert b_scales.dtype is a.dtype and b_scales.is_contiguous() and b_scales.shape == (groups, size_n)
        assert groups == 1 or (size_k % groups == 0 and size_k // groups in (32, 64, 128))
        assert workspace.dtype is I32 and workspace.numel() >= MULTIPROCESSORS and not workspace.any()
        codes = read_weight(b_q_weight, bits, size_n, size_k)
        if bias is None:
            assert b_zeros_or_none.dtype is I32 and b_zeros_or_none.is_contiguous()
            assert b_zeros_or_none.shape == (groups, size_n // 8)
            codes -= read_zero_points(b_zeros_or_none).repeat_interleave(size_k // groups, 0)
        else:
            assert b_zeros_or_none is None
            codes -= bias
        if groups > 1:
            scales = read_fragments(b_scales).repeat_interleave(size_k // groups, 0)
            out = (a.double() @ (codes.to(a.dtype) * scales).double()).to(a.dtype)
        elif bits == 4:
            out = (a.double() @ codes.double()).to(a.dtype) * read_columns(b_scales)
        else:
            out = ((a.double() @ codes.double()).float() * read_columns(b_scales).float()).to(a.dtype)
        if b_bias_or_none is not None:
            assert b_bias_or_none.dtype is a.dtype and b_bias_or_none.is_contiguous()
            assert b_bias_or_none.shape == (size_n,)
            out = out + read_columns(b_bias_or_none)
        return out


@pytest.fixture
def calls(monkeypatch) -> Iterator[Calls]:
    recorded, library = Calls(), torch.library.Library("_C", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("marlin_gemm", recorded.marlin_gemm, "CPU")
    monkeypatch.setattr(marlin, "multiprocessors", lambda device: MULTIPROCESSORS)
    yield recorded
    library._destroy()


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv(DISABLED_VARIABLE, raising=False)
    clear_packed_weights()
    torch.manual_seed(0)


# --- the ops ----------------------------------------------------------------------------------------------------------


def weight(bits: int, n: int, k: int) -> Tensor:
    """Codes over their whole range: int8 ``[n, k]``, or two int4 codes to a byte, uint8 ``[n, k / 2]``."""
    return torch.randint(0, 256, (n, k // 2), dtype=U8) if bits == 4 else torch.randint(-128, 128, (n, k), dtype=I8)


def operands(bits, m, n, k, group=None, dtype=BF16, *, per_tensor=False, zero_point=False) -> dict[str, Any]:
    """Arguments of ``fx_quant::weight_only_mm``: ``group`` codes along k share a scale, None for whole rows.

    The scales are ones that ``dtype`` holds.
    """
    shape = () if per_tensor else (n,) if group is None else (n, -(-k // group))
    return {
        "x": torch.randn(m, k).to(dtype),
        "b": weight(bits, n, k).t(),
        "b_scale": ((torch.rand(shape) + 0.5) / (1 << bits - 1) / k**0.5).to(dtype).float(),
        "b_zero_point": torch.randint(-8, 8, shape, dtype=I32) if zero_point else None,
        "bias": torch.randn(n).to(dtype),
        "out_dtype": dtype,
        "block": None if group is None else [1, group],
    }


def run(given: dict[str, Any]) -> Tensor:
    name = "marlin_int4" if given["b"].dtype is U8 else "marlin_int8"
    packed = pack_weight(given["b"].t(), name)
    extras = {key: given[key] for key in ("b_zero_point", "block") if given[key] is not None}
    arguments = (given["x"], packed, None, given["b_scale"], given["bias"], given["b"].shape[1], given["out_dtype"])
    return kernel(name).overload()(*arguments, **extras)


def assert_same(given: dict[str, Any]) -> None:
    plain = {**given, "bias": None}
    got = run(plain)
    assert got.is_contiguous()
    assert_within(got, fxq.weight_only_mm.default(**plain), Numerics.REASSOCIATED)
    # The bias meets a rounded sum, of which it may leave less than the rounding.
    assert torch.equal(run(given), got + given["bias"])


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize(("bits", "zero_point"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (70, 130)])
def test_every_code_scale_and_zero_point_is_found(calls, bits, zero_point, group, dtype, n, k):
    """Rows of the identity give the weight back, exact where the scales are powers of two."""
    given = operands(bits, k, n, k, group, dtype, zero_point=zero_point)
    given["x"] = torch.eye(k, dtype=dtype)
    given["b_scale"] = 2.0 ** torch.randint(-4, 4, given["b_scale"].shape)
    given["bias"] = None
    assert torch.equal(run(given), fxq.weight_only_mm.default(**given))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_bias_is_found(calls, bits):
    given = operands(bits, 2, 200, 128)
    given["x"].zero_()
    assert torch.equal(run(given), given["bias"].expand(2, 200))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_rounded_to_the_dtype_of_the_activation(calls, bits, dtype):
    given = operands(bits, 3, 70, 130, 32, dtype)
    given["b_scale"] *= 1 + torch.rand(given["b_scale"].shape) * 2**-13
    assert torch.equal(run(given), run({**given, "b_scale": given["b_scale"].to(dtype).float()}))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize(("bits", "zero_point"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize(("m", "n", "k"), [(17, 64, 128), (1, 128, 640)])
def test_an_op_equals_the_canonical_one(calls, bits, zero_point, group, dtype, m, n, k):
    assert_same(operands(bits, m, n, k, group, dtype, zero_point=zero_point))
    assert {each["sizes"] for each in calls} == {(m, n, k)}


@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize(("bits", "zero_point"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 2), (5, 7, 30), (3, 65, 130), (2, 130, 258), (4, 100, 400)])
def test_ragged_sizes_are_padded_to_whole_tiles(calls, bits, zero_point, group, m, n, k):
    assert_same(operands(bits, m, n, k, group, zero_point=zero_point))
    assert calls[0]["sizes"] == (m, -(-n // 64) * 64, -(-k // 128) * 128)


def test_int8_of_an_odd_depth(calls):
    assert_same(operands(8, 3, 5, 7))
    assert_same(operands(8, 3, 5, 199, 64))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(("bits", "zero_point"), [(4, True), (8, False)])
def test_a_scale_of_one_element_may_have_any_rank(calls, bits, zero_point, shape):
    given = operands(bits, 3, 70, 130, per_tensor=True, zero_point=zero_point)
    given["b_scale"] = given["b_scale"].reshape(shape)
    given["b_zero_point"] = given["b_zero_point"].reshape(shape).to(I8) if zero_point else None
    assert_same(given)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_rows_call_no_library(bits):
    assert run(operands(bits, 0, 70, 130)).shape == (0, 70)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (70, 130)])
def test_strides_and_addresses_do_not_matter(calls, bits, n, k):
    given = operands(bits, 5, n, k, 64, zero_point=bits == 4)
    wide = torch.empty(5, k + 3, dtype=BF16)
    wide[:, 1 : k + 1] = given["x"]
    hostile = {**given, "x": wide[:, 1 : k + 1], "b": given["b"].contiguous()}
    hostile["b_scale"] = given["b_scale"].t().contiguous().t()
    hostile["bias"] = given["bias"].repeat_interleave(2)[::2]
    if bits == 4:
        hostile["b_zero_point"] = given["b_zero_point"].t().contiguous().t()
    assert torch.equal(run(hostile), run(given))


def test_a_sum_beyond_float16_that_its_scale_brings_back(calls):
    """Int4 codes with one scale to a row: it is given as several groups, as the sum would be rounded before it."""
    given = operands(4, 2, 64, 1024, None, F16)
    given["x"] = torch.full((2, 1024), 60.0, dtype=F16)
    given["b"] = torch.full((512, 64), 0xFF, dtype=U8)
    assert run(given).isfinite().all()
    assert_same(given)


@pytest.mark.parametrize("value", [-9, 8, 100, -128])
def test_a_zero_point_that_no_nibble_holds_is_an_error(calls, value):
    given = operands(4, 2, 64, 128, zero_point=True)
    given["b_zero_point"] = torch.full((64,), value, dtype=I8)
    with pytest.raises(RuntimeError, match=r"must be in -8\.\.7"):
        run(given)


def test_an_op_may_be_traced(calls):
    given = operands(4, 3, 70, 130, 64, zero_point=True)
    packed = pack_weight(given["b"].t(), "marlin_int4")
    arguments = (given["x"], packed, None, given["b_scale"], given["bias"], 70, BF16)
    extras = {"b_zero_point": given["b_zero_point"], "block": [1, 64]}
    torch.library.opcheck(fxq.marlin_int4.default, arguments, extras)


def test_a_vllm_without_the_op_is_an_error_that_says_so(monkeypatch):
    def import_module(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr("importlib.import_module", import_module)
    monkeypatch.setattr(marlin, "multiprocessors", lambda device: MULTIPROCESSORS)
    with pytest.raises(FxQuantError, match="vLLM's op library must have _C::marlin_gemm"):
        run(operands(8, 1, 64, 128))


# --- the layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (7, 30), (64, 128), (65, 130), (200, 400)])
def test_unpacking_gives_the_weight_back(bits, n, k):
    w, layout = weight(bits, n, k), packed_layout(f"marlin_int{bits}")
    packed = pack_weight(w, layout.name)
    assert packed.shape == layout.shape(*w.shape) and packed.dtype is layout.dtype and packed.is_contiguous()
    assert layout.unpack is not None and torch.equal(layout.unpack(packed, *w.shape), w)


def test_the_ids_of_scalar_types():
    assert [marlin.scalar_type(4, 8), marlin.scalar_type(4, 0), marlin.scalar_type(8, 128)] == list(TYPES)


# --- selection --------------------------------------------------------------------------------------------------------

PACKAGES = {"torch": "2.13", "triton": "3.6", "vllm": "0.33"}
GROUP = Granularity.per_group(128)


def problem(dtype: torch.dtype = INT4, granularity: Granularity = GROUP, *, symmetric: bool = True) -> Problem:
    scheme = Scheme(OperandSpec(BF16), OperandSpec(dtype, granularity, symmetric=symmetric))
    return Problem(scheme, SizeRange(1, None), 4096, 4096, BF16, None, True)


@pytest.mark.parametrize("target", ["sm80", "sm89", "sm90", "sm100", "sm120"])
@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (problem(), "marlin_int4"),
        (problem(symmetric=False), "marlin_int4"),
        (problem(granularity=Granularity.PER_CHANNEL), "marlin_int4"),
        (replace(problem(), n=70, k=130, bias=BF16), "marlin_int4"),
        (problem(I8), "marlin_int8"),
        (problem(I8, Granularity.PER_CHANNEL), "marlin_int8"),
        (problem(I8, Granularity.per_group(32)), "marlin_int8"),
    ],
    ids=str,
)
def test_it_is_chosen_before_triton(target, asked, chosen):
    # Machete comes before it on sm90.
    assert select(asked, named_target(target, packages=PACKAGES), disabled=["machete"]).kernel.name == chosen
    without = {name: version for name, version in PACKAGES.items() if name != "vllm"}
    assert select(asked, named_target(target, packages=without)).kernel.provider == "triton"


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("marlin_int8", problem(I8, symmetric=False), "has no zero point of the weight"),
        ("marlin_int8", problem(U8), "has no bfloat16 x uint8 matmul"),
        ("marlin_int4", problem(granularity=Granularity.per_group(16)), "has no unscaled x per_group(16) scales"),
        ("marlin_int4", replace(problem(), out_dtype=F32), "returns the activation's bfloat16, asked for float32"),
        (
            "marlin_int4",
            replace(problem(), bias=F32),
            "adds a bias of the result's dtype, got float32 for bfloat16",
        ),
        (
            "marlin_int4",
            replace(problem(), constant_weight=False),
            "packs its weight once, so the weight must be a parameter, buffer or constant",
        ),
    ],
)
def test_what_it_has_not_is_declined(name, asked, reason):
    (unmet,) = kernel(name).requires.unmet(asked, named_target("sm90", packages=PACKAGES))
    assert str(unmet) == reason


@pytest.mark.parametrize("name", ["marlin_int4", "marlin_int8"])
def test_a_vllm_that_calls_the_op_otherwise_is_declined(name):
    old = named_target("sm90", packages={**PACKAGES, "vllm": "0.13"})
    (unmet,) = kernel(name).requires.unmet_by_target(old)
    assert str(unmet) == "needs vllm>=0.33, found 0.13"
    (unmet,) = kernel(name).requires.unmet_by_target(named_target("gfx942", packages=PACKAGES))
    assert str(unmet) == "needs platform cuda, target is rocm"


# --- through the passes -----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """``fx_quant::weight_only_mm`` of a weight that is a buffer."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.register_buffer("weight", given["b"].t())
        for name in ("b_scale", "b_zero_point", "bias"):
            self.register_buffer(name, given[name])
        self.out_dtype, self.block = given["out_dtype"], given["block"]

    def forward(self, x: Tensor) -> Tensor:
        scales = (self.b_scale, self.b_zero_point, self.bias)
        return fxq.weight_only_mm(x, self.weight.t(), *scales, self.out_dtype, block=self.block)


@pytest.mark.parametrize(
    ("bits", "group", "zero_point", "m", "n", "k"),
    [(4, 128, True, 5, 70, 400), (4, None, False, 1, 64, 128), (8, None, False, 3, 33, 7), (8, 32, False, 2, 9, 64)],
)
def test_a_rewritten_graph_calls_the_library(calls, bits, group, zero_point, m, n, k):
    given, reports = operands(bits, m, n, k, group, zero_point=zero_point), []

    def on_graph(graph) -> None:
        target = named_target("sm90", packages=PACKAGES)
        reports.append(rewrite_graph(graph, target, Options(strict=True), static_input_indices(graph)))

    got = run_captured(Linear(given), [given["x"]], {}, on_graph=on_graph, inner_compile=run_eagerly).output
    ((site,),) = [report.sites for report in reports]
    assert site.kernel == f"marlin_int{bits}" and len(calls) == 1
    assert torch.equal(got, run(given))
