"""vLLM's Machete without vLLM and without a GPU.

Both ops are stood in for by recorders with their signatures: they assert what the real ops assert, and round where the
real kernel rounds. The order of codes within a block of the packed weight is the ops' own business, so any stands in.
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
from fx_quant.kernels.context import EAGER
from fx_quant.kernels.eager import run_kernel
from fx_quant.kernels.layouts import pack_weight
from fx_quant.kernels.packed_weights import clear_packed_weights
from fx_quant.kernels.registry import kernel
from fx_quant.kernels.select import DISABLED_VARIABLE, select
from fx_quant.linear_kernels import MacheteLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from fx_quant.passes.pipeline import rewrite_graph
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.target import Target, named_target
from fx_quant.weights import pack_int4
from tests.tolerances import assert_within

fxq = torch.ops.fx_quant
F32, BF16, F16, I8, U8, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32
INT4: Any = torch.int4  # pyrefly: ignore [missing-attribute]

# Ids of vLLM's scalar types: exponent, mantissa, sign, bias, "finite only" and how NaN is written, from the lowest bit.
TYPES = {
    0 | 4 << 8 | 0 << 16 | 8 << 17 | 0 << 49 | 1 << 50: (4, 8),
    0 | 8 << 8 | 0 << 16 | 128 << 17 | 0 << 49 | 1 << 50: (8, 128),
}
SCHEMAS = (
    "machete_prepack_B(Tensor B, ScalarType a_type, int b_type, ScalarType? group_scales_type) -> Tensor",
    "machete_mm(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales, Tensor? group_zeros, "
    "int? group_size, Tensor? channel_scales, Tensor? token_scales, str? schedule) -> Tensor",
)


# --- the library ------------------------------------------------------------------------------------------------------


def fields(words: Tensor, bits: int) -> Tensor:
    """The unsigned fields of int32 words, the lowest first, along a new last dimension."""
    return words.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, bits) & (1 << bits) - 1


def words_of(codes: Tensor, bits: int) -> Tensor:
    """The inverse of ``fields``."""
    words = (codes << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(I32)


class Calls(list):
    """``(op, group_size)`` of each call."""

    def machete_prepack_B(self, B, a_type, b_type, group_scales_type):
        self.append(("prepack", None))
        bits, _ = TYPES[b_type]
        (words, n), codes = B.shape, 32 // bits
        assert B.dtype is I32 and B.stride() == (1, words) and B.data_ptr() % 16 == 0
        assert a_type in (BF16, F16) and group_scales_type is a_type
        assert words * codes % 64 == 0 and n % 128 == 0
        unpacked = fields(B.t(), bits).reshape(n // 128, 128, words * codes // 64, 64)
        # Blocks along n first, then along k; here the codes of a block lie along n.
        return words_of(unpacked.permute(2, 0, 3, 1).reshape(-1, codes), bits).reshape(words, n)

    def machete_mm(
        self, A, B, b_type, out_type, group_scales, group_zeros, group_size, channel_scales, token_scales, schedule
    ):
        self.append(("mm", group_size))
        bits, bias = TYPES[b_type]
        (m, k), n = A.shape, B.shape[1]
        assert m > 0 and A.dtype in (BF16, F16) and A.stride() == (k, 1) and A.data_ptr() % 16 == 0
        assert B.dtype is I32 and B.shape == (k * bits // 32, n) and B.is_contiguous()
        assert k % 64 == 0 and n % 128 == 0
        assert out_type in (None, A.dtype) and schedule is None
        assert group_zeros is None and channel_scales is None and token_scales is None
        assert group_size in (-1, 64, 128)
        step = k if group_size == -1 else group_size
        assert group_scales.dtype is A.dtype and group_scales.shape == (-(-k // step), n)
        assert group_scales.stride() == (n, 1) and group_scales.data_ptr() % 16 == 0
        codes = fields(B.reshape(-1), bits).reshape(k // 64, n // 128, 64, 128).permute(0, 2, 1, 3).reshape(k, n)
        weight = (codes - bias).to(A.dtype) * group_scales.repeat_interleave(step, 0)[:k]
        return (A.double() @ weight.double()).to(A.dtype)


@pytest.fixture
def calls() -> Iterator[Calls]:
    recorded, library = Calls(), torch.library.Library("_C", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
        name = schema.split("(", maxsplit=1)[0]
        library.impl(name, getattr(recorded, name), "CPU")
    yield recorded
    library._destroy()


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv(DISABLED_VARIABLE, raising=False)
    clear_packed_weights()
    torch.manual_seed(0)


# --- the ops ----------------------------------------------------------------------------------------------------------


def operands(bits, m, n, k, group=None, dtype=BF16, *, per_tensor=False) -> dict[str, Any]:
    """Arguments of ``fx_quant::weight_only_mm``: ``group`` codes along k share a scale, None for whole rows.

    The scales are ones that ``dtype`` holds.
    """
    shape = () if per_tensor else (n,) if group is None else (n, -(-k // group))
    stored = torch.randint(0, 256, (n, k // 2), dtype=U8) if bits == 4 else torch.randint(-128, 128, (n, k), dtype=I8)
    return {
        "x": torch.randn(m, k).to(dtype),
        "b": stored.t(),
        "b_scale": ((torch.rand(shape) + 0.5) / (1 << bits - 1) / k**0.5).to(dtype).float(),
        "b_zero_point": None,
        "bias": torch.randn(n).to(dtype),
        "out_dtype": dtype,
        "block": None if group is None else [1, group],
    }


def run(given: dict[str, Any]) -> Tensor:
    chosen = kernel("machete_int4" if given["b"].dtype is U8 else "machete_int8")
    packed, extras = pack_weight(given["b"].t(), chosen.name), {"block": given["block"]} if given["block"] else {}
    arguments = (given["x"], packed, None, given["b_scale"], given["bias"], given["b"].shape[1], given["out_dtype"])
    return chosen.overload()(*arguments, **extras)


def in_float64(given: dict[str, Any]) -> Tensor:
    """The matmul without its bias, of codes decoded here."""
    stored = given["b"].t()
    codes = torch.stack((stored & 0xF, stored >> 4), -1).flatten(1).double() - 8 if stored.dtype is U8 else stored
    scale, k = given["b_scale"].double(), codes.shape[1]
    scale = scale.repeat_interleave(given["block"][1], 1)[:, :k] if given["block"] else scale.reshape(-1, 1)
    return given["x"].double() @ (codes.double() * scale).t()


SIZES = [(1, 128, 64), (17, 128, 128), (5, 384, 640), (130, 256, 256)]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_an_op_is_the_matmul_in_float64(calls, bits, group, dtype, m, n, k):
    if group == 128 and k % 128:
        group = 64
    given = operands(bits, m, n, k, group, dtype)
    plain = {**given, "bias": None}
    got, exact = run(plain), in_float64(given)
    assert got.is_contiguous() and got.shape == (m, n) and got.dtype is dtype
    assert_within(got, exact.to(dtype), Numerics.REASSOCIATED)
    assert_within(got, fxq.weight_only_mm.default(**plain), Numerics.REASSOCIATED)
    # The bias meets a rounded sum.
    assert torch.equal(run(given), (got.float() + given["bias"]).to(dtype))
    assert calls == [("prepack", None), ("mm", group or -1)] * 2


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_and_scale_is_found(calls, bits, group, dtype):
    """Rows of the identity give the weight back, exact where the scales are powers of two."""
    given = operands(bits, 256, 256, 256, group, dtype)
    given["x"], given["bias"] = torch.eye(256, dtype=dtype), None
    given["b_scale"] = 2.0 ** torch.randint(-4, 4, given["b_scale"].shape)
    assert torch.equal(run(given), in_float64(given).to(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_of_one_element_may_have_any_rank(calls, bits, shape):
    given = {**operands(bits, 3, 128, 64, per_tensor=True), "bias": None}
    given["b_scale"] = given["b_scale"].reshape(shape)
    assert_within(run(given), in_float64(given).to(BF16), Numerics.REASSOCIATED)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_rounded_to_the_dtype_of_the_activation(calls, bits, dtype):
    given = operands(bits, 3, 128, 128, 64, dtype)
    given["b_scale"] *= 1 + torch.rand(given["b_scale"].shape) * 2**-13
    assert torch.equal(run(given), run({**given, "b_scale": given["b_scale"].to(dtype).float()}))


@pytest.mark.parametrize("bits", [4, 8])
def test_strides_and_addresses_do_not_matter(calls, bits):
    given = operands(bits, 5, 128, 128, 64)
    wide, columns = torch.empty(5, 131, dtype=BF16), given["b"].shape[0]
    wide[:, 1:129] = given["x"]
    codes = torch.empty(128, columns + 3, dtype=given["b"].dtype)
    codes[:, 1 : columns + 1] = given["b"].t()
    hostile = {**given, "x": wide[:, 1:129], "b_scale": given["b_scale"].t().contiguous().t()}
    hostile["bias"] = given["bias"].repeat_interleave(2)[::2]
    for weight in (given["b"].contiguous(), codes[:, 1 : columns + 1].t()):
        assert torch.equal(run({**hostile, "b": weight}), run(given))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_may_have_another_dtype(calls, bits):
    given = operands(bits, 3, 128, 64)
    wide = {**given, "bias": given["bias"].float() * (1 + 2**-12)}
    assert torch.equal(run(wide), (run({**given, "bias": None}).float() + wide["bias"]).to(BF16))


@pytest.mark.parametrize("bits", [4, 8])
def test_no_rows_call_no_matmul(calls, bits):
    assert run(operands(bits, 0, 128, 64)).shape == (0, 128)
    assert calls == [("prepack", None)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 64])
def test_an_op_may_be_traced(calls, bits, group):
    given, chosen = operands(bits, 3, 128, 128, group), kernel(f"machete_int{bits}")
    packed, extras = pack_weight(given["b"].t(), chosen.name), {"block": [1, group]} if group else {}
    arguments = (given["x"], packed, None, given["b_scale"], given["bias"], 128, BF16)
    torch.library.opcheck(chosen.overload(), arguments, extras)
    torch.library.opcheck(fxq.prepack.default, ([given["b"].t()], [chosen.name]))


def test_a_vllm_without_the_op_is_an_error_that_says_so(monkeypatch):
    def import_module(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr("importlib.import_module", import_module)
    with pytest.raises(FxQuantError, match="vLLM's op library must have _C::machete_prepack_B"):
        run(operands(8, 1, 128, 64))


# --- selection --------------------------------------------------------------------------------------------------------

PACKAGES = {"torch": "2.13", "triton": "3.6", "vllm": "0.33"}
HOPPER = named_target("sm90", packages=PACKAGES)
CHANNEL, GROUP = Granularity.PER_CHANNEL, Granularity.per_group(128)


def problem(dtype: torch.dtype = INT4, granularity: Granularity = GROUP, *, symmetric: bool = True) -> Problem:
    scheme = Scheme(OperandSpec(BF16), OperandSpec(dtype, granularity, symmetric=symmetric))
    return Problem(scheme, SizeRange(0, None), 4096, 4096, BF16, None, True)


@pytest.mark.parametrize("granularity", [CHANNEL, Granularity.per_group(64), GROUP], ids=str)
@pytest.mark.parametrize(("dtype", "name"), [(INT4, "int4"), (I8, "int8")])
@pytest.mark.parametrize("bias", [None, BF16, F32])
def test_it_is_chosen_on_hopper_alone(dtype, name, granularity, bias):
    asked = replace(problem(dtype, granularity), bias=bias)
    assert select(asked, HOPPER).kernel.name == f"machete_{name}"
    for other in ("sm80", "sm89", "sm100", "sm120"):
        assert select(asked, named_target(other, packages=PACKAGES)).kernel.provider in ("marlin", "triton")
    assert select(asked, named_target("sm90")).kernel.provider != "machete"


@pytest.mark.parametrize(
    ("name", "asked", "target", "reasons"),
    [
        ("machete_int4", problem(), "sm100", ["needs sm90 or older, target is sm100"]),
        ("machete_int4", problem(), "sm89", ["needs sm90 or newer, target is sm89"]),
        ("machete_int4", problem(), "gfx942", ["needs platform cuda, target is rocm"]),
        ("machete_int4", problem(symmetric=False), "sm90", ["has no zero point of the weight"]),
        ("machete_int8", problem(I8, symmetric=False), "sm90", ["has no zero point of the weight"]),
        ("machete_int8", problem(U8), "sm90", ["has no bfloat16 x uint8 matmul"]),
        (
            "machete_int4",
            problem(granularity=Granularity.per_group(32)),
            "sm90",
            ["has no unscaled x per_group(32) scales"],
        ),
        (
            "machete_int4",
            replace(problem(), n=4160, k=4128),
            "sm90",
            [
                "needs n and k in multiples of 64, got n=4160 k=4128",
                "needs n in multiples of 128, got n=4160",
                "needs k in whole groups of 128, got k=4128",
            ],
        ),
        ("machete_int4", replace(problem(), k=4160), "sm90", ["needs k in whole groups of 128, got k=4160"]),
        (
            "machete_int4",
            replace(problem(), out_dtype=F32),
            "sm90",
            ["returns the activation's bfloat16, asked for float32"],
        ),
        (
            "machete_int4",
            replace(problem(), constant_weight=False),
            "sm90",
            ["packs its weight once, so the weight must be a parameter, buffer or constant"],
        ),
    ],
    ids=str,
)
def test_what_it_has_not_is_declined(name, asked, target, reasons):
    unmet = kernel(name).requires.unmet(asked, named_target(target, packages=PACKAGES))
    assert list(map(str, unmet)) == reasons


@pytest.mark.parametrize(
    "asked",
    [
        replace(problem(), n=70, k=130),
        replace(problem(), n=4160),
        problem(symmetric=False),
        problem(granularity=Granularity.per_group(32)),
    ],
    ids=str,
)
def test_marlin_runs_what_it_declines(asked):
    assert select(asked, HOPPER).kernel.name == "marlin_int4"


def test_an_older_vllm_is_declined():
    old = named_target("sm90", packages={**PACKAGES, "vllm": "0.13"})
    (unmet,) = kernel("machete_int4").requires.unmet_by_target(old)
    assert str(unmet) == "needs vllm>=0.33, found 0.13"


def test_it_has_the_class_that_vllm_gives_it():
    config = MPLinearLayerConfig((4096, 4096), (4096, 4096), INT4, BF16, 128, False)
    assert choose_mp_linear_kernel(config, HOPPER) is MacheteLinearKernel


# --- eagerly, and through the passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 128])
def test_an_eager_call_packs_once(calls, bits, group):
    given = operands(bits, 3, 256, 384, group)
    granularity = CHANNEL if group is None else GROUP
    asked = replace(problem(INT4 if bits == 4 else I8, granularity), n=256, k=384, bias=BF16)
    selection = select(asked, HOPPER, context=EAGER)
    weight = given["b"].t()
    for m in (3, 1, 0):
        got = run_kernel(selection, given["x"][:m], weight, None, given["b_scale"], given["bias"])
        wanted = in_float64({**given, "x": given["x"][:m]}) + given["bias"].double()
        assert_within(got, wanted.to(BF16), Numerics.REASSOCIATED, given["bias"].abs().max().item())
    assert calls == [("prepack", None), ("mm", group or -1), ("mm", group or -1)]


def test_what_pack_int4_gives_is_what_it_reads(calls):
    codes = torch.randint(-8, 8, (128, 64), dtype=I8)
    scale = torch.ones(128)
    chosen = kernel("machete_int4")
    packed = pack_weight(pack_int4(codes), "machete_int4")
    got = chosen.overload()(torch.eye(64, dtype=BF16), packed, None, scale, None, 128, BF16)
    assert torch.equal(got, codes.t().to(BF16))


class Linear(nn.Module):
    """``fx_quant::weight_only_mm`` of a weight that is a buffer."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.register_buffer("weight", given["b"].t())
        for name in ("b_scale", "bias"):
            self.register_buffer(name, given[name])
        self.out_dtype, self.block = given["out_dtype"], given["block"]

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x, self.weight.t(), self.b_scale, None, self.bias, self.out_dtype)
        return fxq.weight_only_mm(*arguments, block=self.block)


def compiled(given: dict[str, Any], target: Target) -> tuple[Tensor, str]:
    reports = []

    def on_graph(graph) -> None:
        reports.append(rewrite_graph(graph, target, Options(strict=True), static_input_indices(graph)))

    got = run_captured(Linear(given), [given["x"]], {}, on_graph=on_graph, inner_compile=run_eagerly).output
    ((site,),) = [report.sites for report in reports]
    return got, site.kernel


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, None), (8, None), (8, 64)])
def test_a_rewritten_graph_calls_the_library(calls, bits, group):
    given = operands(bits, 5, 256, 384, group)
    got, chosen = compiled(given, HOPPER)
    assert chosen == f"machete_int{bits}" and [op for op, _ in calls] == ["prepack", "mm"]
    assert torch.equal(got, run(given))
