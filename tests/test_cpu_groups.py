"""int8 products with scales along k, at every instruction set that this machine has: native code and template."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fx_quant.lowerings  # noqa: F401  (registers the lowerings)
from fx_quant.kernels.cpu import decode, native
from fx_quant.kernels.cpu.groups_kernels import GROUP_LEVELS
from fx_quant.kernels.layouts import FACTOR_PANELS, group_sums, pack_weight, packed_layout
from fx_quant.kernels.select import select
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.ops import unpack_codes
from fx_quant.problem import Problem, SizeRange
from fx_quant.scheme import Scheme
from fx_quant.target import named_target

fxq = torch.ops.fx_quant
BF16, F32, INT8, UINT8 = torch.bfloat16, torch.float32, torch.int8, torch.uint8
HERE = [level for level in GROUP_LEVELS if level.dot.exists_here()]
every_level = pytest.mark.parametrize("op", [level.kernel for level in HERE])
both_widths = pytest.mark.parametrize("bits", [8, 4])

# Rows of a tile, of two and of more than a chunk; ragged columns; k of part of a step, one group and several.
SIZES = [
    (0, 64, 64),
    (1, 1, 2),
    (1, 64, 32),
    (2, 130, 96),
    (3, 63, 70),
    (6, 65, 1100),
    (15, 70, 258),
    (17, 200, 128),
    (33, 65, 1024),
    (390, 5, 40),
]


@pytest.fixture(autouse=True)
def seed():
    torch.default_generator.manual_seed(0)


def weight_of(n: int, k: int, bits: int) -> Tensor:
    """Codes ``[n, k]``, or bytes ``[n, k / 2]`` of int4."""
    return torch.randint(0, 256, (n, k * bits // 8), dtype=UINT8).view(UINT8 if bits == 4 else INT8)


def packed(w: Tensor) -> Tensor:
    return pack_weight(w, "vnni_int4" if w.dtype is UINT8 else "vnni")


class Case:
    """The operands of a matmul, and its result in float64 with the sum of the magnitudes of its terms."""

    def __init__(self, m: int, n: int, k: int, bits: int, group: int | None = 32, shifts: str = "") -> None:
        groups = 1 if group is None else -(-k // group)
        self.n, self.group, self.k = n, group, k
        self.a, self.w = torch.randint(-128, 128, (m, k), dtype=INT8), weight_of(n, k, bits)
        self.a_scale, self.scale, self.bias = torch.rand(m, 1), torch.rand(n, groups), torch.randn(n)
        self.a_zero_point = torch.randint(-128, 128, (m, 1), dtype=torch.int32) if "a" in shifts else None
        self.zero_point = torch.randint(-8, 8, (n, groups), dtype=INT8) if "b" in shifts else None

    def arguments(self) -> tuple[tuple, dict]:
        """Of a kernel op."""
        per_row = self.group is None
        scale, zero_point = (x if x is None or not per_row else x.flatten() for x in (self.scale, self.zero_point))
        extras = {"a_zero_point": self.a_zero_point, "b_zero_point": zero_point}
        if self.a_zero_point is not None:
            extras["b_sum"] = pack_weight(self.w, group_sums(self.group or self.k, self.w.dtype is UINT8))
        extras["block"] = None if per_row else [1, self.group]
        return (self.a, packed(self.w), self.a_scale, scale, self.bias, self.n, F32), extras

    def run(self, op: str, **changed: object) -> Tensor:
        arguments, extras = self.arguments()
        return getattr(fxq, op)(*arguments, **extras | changed)

    def check(self, out: Tensor) -> None:
        """``out`` is within float32 rounding of each step; the sums of integers add none."""

        def along_k(x: Tensor) -> Tensor:
            return x.double().repeat_interleave(self.group or self.k, 1)[:, : self.k]

        a, w = self.a.double(), unpack_codes(self.w.t(), self.k).t().double()
        a = a if self.a_zero_point is None else a - self.a_zero_point
        w = (w if self.zero_point is None else w - along_k(self.zero_point)) * along_k(self.scale)
        expected = (a @ w.t()) * self.a_scale.double() + self.bias.double()
        magnitude = (a.abs() @ w.abs().t()) * self.a_scale.double() + self.bias.abs().double()
        assert out.shape == expected.shape
        groups = -(-self.k // min(self.group or self.k, 512))
        assert ((out - expected).abs() <= magnitude * (groups + 4) * 2.0**-24).all()


@every_level
@both_widths
@pytest.mark.parametrize("group", [32, 64, 640, None], ids=str)
def test_the_sum_of_each_group_is_exact(op, bits, group):
    for m, n, k in SIZES:
        for shifts in ("", "a", "b", "ab") if m == 6 else ("", "ab") if m < 6 else ("ab",):
            case = Case(m, n, k, bits, group, shifts)
            case.check(case.run(op))


@every_level
@both_widths
@pytest.mark.parametrize("of_a", [-128, 127, 0])
def test_the_largest_products_do_not_saturate(op, bits, of_a):
    for byte in (0x80, 0x7F) if bits == 8 else (0x00, 0xFF):  # int4: -8 and 7
        case = Case(9, 70, 1024, bits, 128)
        case.a.fill_(of_a)
        case.w.view(UINT8).fill_(byte)
        case.check(case.run(op))


@every_level
@both_widths
def test_a_row_is_the_same_whatever_stands_beside_it(op, bits):
    case = Case(400, 130, 1100, bits, 96, "ab")
    whole = case.run(op)
    a, a_scale, points = case.a, case.a_scale, case.a_zero_point
    for rows in (slice(0, 1), slice(7, 9), slice(0, 5), slice(11, 27), slice(100, 391)):
        case.a, case.a_scale, case.a_zero_point = a[rows], a_scale[rows], points[rows]
        assert torch.equal(case.run(op), whole[rows])


@pytest.mark.skipif(not decode.AMX_GROUPS.exists_here(), reason="needs AMX")
@both_widths
@pytest.mark.parametrize("shifts", ["", "a", "ab"])
@pytest.mark.parametrize("group", [32, 64, 96, 1024, None])
def test_tiles_give_the_bits_of_registers(bits, group, shifts, monkeypatch):
    """One tile of rows and two, full or not; the last k of no tile; rows that begin 1024 bytes apart, and that do not."""
    for m, k in ((12, 1024), (16, 1064), (17, 1024), (33, 1098), (100, 96)):
        case = Case(m, 70, k, bits, group, shifts)
        out = case.run("cpu_int8_groups_vnni")
        with monkeypatch.context() as patch:
            patch.setattr(decode, "AMX_GROUPS", replace(decode.AMX_GROUPS, features=frozenset({"another"})))
            torch.testing.assert_close(out, case.run("cpu_int8_groups_vnni"), rtol=0, atol=0)
        case.check(out)


@every_level
@both_widths
def test_factors_strides_and_threads_do_not_matter(op, bits):
    case = Case(40, 130, 328, bits, 32, "ab")
    expected = case.run(op)
    (_, b, a_scale, scale, bias, n, out), extras = case.arguments()
    call, point = getattr(fxq, op), extras.pop("b_zero_point")
    in_panels = {"b_zero_point": pack_weight(point, FACTOR_PANELS)}
    wide = torch.cat((case.a, case.a), 1)[:, :328]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for a, given, more in (
            (case.a, pack_weight(scale, FACTOR_PANELS), in_panels),
            (wide, scale.t().contiguous().t(), {"b_zero_point": point.long()}),
            (case.a.t().contiguous().t(), scale, {"b_zero_point": point.int()}),
        ):
            assert torch.equal(call(a, b, a_scale, given, bias, n, out, **extras, **more), expected)
    finally:
        torch.set_num_threads(before)


@every_level
@both_widths
def test_scales_of_groups_of_the_activation(op, bits):
    case = Case(13, 70, 300, bits, 64)
    a_scale = torch.rand(13, 5)
    block = [16, 64]
    arguments, _ = case.arguments()
    scale = torch.rand(5, 5)
    expected = fxq.scaled_mm(case.a, case.w.t(), a_scale, scale, case.bias, F32, block=block)
    out = getattr(fxq, op)(*arguments[:2], a_scale, scale, *arguments[4:], block=block)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@both_widths
def test_scales_in_half_precision_are_read_as_they_are(bits):
    for level in HERE:
        for dtype in (BF16, torch.float16):
            case = Case(3, 70, 128, bits, 32)
            given = (case.scale * 1e-5).to(dtype)  # float16 has no normal numbers there
            case.scale = given.float()
            arguments, extras = case.arguments()
            out = getattr(fxq, level.kernel)(*arguments[:3], given, *arguments[4:], **extras)
            assert torch.equal(out, case.run(level.kernel))


@both_widths
@pytest.mark.parametrize("shifts", ["", "ab"])
def test_without_the_instructions_the_result_is_the_canonical_one(bits, shifts, monkeypatch):
    monkeypatch.setattr(native.Dot, "exists_here", lambda _: False)
    for group in (32, None):
        case = Case(5, 70, 130, bits, group, shifts)
        if bits == 4 or group is not None:
            case.check(case.run("cpu_int8_groups_avx2"))


@every_level
@both_widths
def test_hostile_scales_poison_only_their_columns(op, bits):
    case = Case(3, 70, 64, bits, 32)
    case.a.fill_(1)
    case.w.view(UINT8).fill_(0x99 if bits == 4 else 1)  # codes of 1
    case.scale.fill_(1.0)
    case.scale[:4, 1] = torch.tensor([float("nan"), float("inf"), 0.0, 1e30])
    case.a_scale.fill_(1.0)
    case.bias.zero_()
    row = torch.tensor([float("nan"), float("inf"), 32.0, 32e30, 64.0, 64.0])
    torch.testing.assert_close(case.run(op)[:, :6], row.expand(3, 6), equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1), (64, 4), (70, 37), (130, 64)], ids=str)
def test_int4_is_what_was_packed(shape):
    n, pairs = shape
    w, layout = weight_of(n, 2 * pairs, 4), packed_layout("vnni_int4")
    assert layout.unpack is not None
    b = layout.pack(w)
    assert b.shape == layout.shape(n, pairs)
    assert torch.equal(layout.unpack(b, n, pairs), w)


@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(8, 256, torch.int16), (8, 288, torch.int32), (4, 4096, torch.int16)]
)
def test_sums_of_groups_fit_their_dtype(bits, group, dtype):
    w = weight_of(3, 2 * group - 32, bits)
    w.view(UINT8).fill_(0x80 if bits == 8 else 0)
    sums = pack_weight(w, group_sums(group, bits == 4))
    least = -128 if bits == 8 else -8
    assert sums.dtype is dtype
    assert sums.transpose(1, 2)[0, :3].tolist() == [[least * group, least * (group - 32)]] * 3


@both_widths
def test_opcheck(bits):
    arguments, extras = Case(6, 70, 64, bits, 32, "ab").arguments()
    torch.library.opcheck(getattr(fxq, HERE[0].kernel), arguments, extras)


# --- layers and graphs ----------------------------------------------------------------------------------------------

SCHEMES = (
    "int8 per_token (dynamic) x int4 per_group(32)",
    "int8 per_token asymmetric (dynamic) x uint4 per_group(64) asymmetric",
    "int8 per_token asymmetric (dynamic) x int8 per_group(64)",
    "int8 per_token asymmetric (dynamic) x int4 per_channel",
)


@pytest.mark.slow
def test_a_compiled_linear_is_the_eager_one_and_what_follows_is_fused():
    """Both in one graph, which takes less time to compile than one for each: groups and whole rows."""
    schemes = SCHEMES[1], SCHEMES[3]
    linears = [
        QuantizedLinear.from_float(torch.nn.Linear(128, n, dtype=BF16), scheme) for n, scheme in enumerate(schemes, 66)
    ]

    def run(x: Tensor) -> list[Tensor]:
        return [F.relu(linear(x)) for linear in linears]

    compiled = torch.compile(run, backend="fx_quant", dynamic=True)
    for m in (7, 40):
        x = torch.randn(m, 128, dtype=BF16)
        outs, code = run_and_get_code(compiled, x)
        for out, expected in zip(outs, run(x), strict=True):
            assert torch.equal(out, expected)
        if m == 7:
            text = "".join(code)
            assert text.count("fxq_panel<Dot, Decode>(") == len(schemes)
            assert "torch.ops.fx_quant.cpu_int8_groups" not in text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_is_close_to_the_float_one(scheme):
    linear = torch.nn.Linear(128, 70)
    layer, x = QuantizedLinear.from_float(linear, scheme), torch.randn(5, 128)
    expected = linear(x)
    allowed = 0.02 if "x int8" in scheme else 0.2  # the noise of 8 and of 4 bits
    assert (layer(x) - expected).norm() < allowed * expected.norm()
    assert torch.equal(layer(x[:1]), layer(x)[:1])


@pytest.mark.parametrize(
    ("scheme", "target", "chosen"),
    [
        ("int8 per_token x int4 per_group(32)", "x86_vnni", "cpu_int8_int4_vnni"),
        ("int8 per_token x int4 per_channel", "x86_amx", "cpu_int8_int4_vnni"),
        ("int8 per_token asymmetric x uint4 per_group(128) asymmetric", "x86_avx_vnni", "cpu_int8_int4_avx_vnni"),
        ("int8 per_token asymmetric x int8 per_group(64)", "x86_avx512", "cpu_int8_groups_avx512"),
        ("int8 per_tensor x int8 per_group(64)", "x86", "cpu_int8_groups_avx2"),
        ("int8 per_group(64) x int8 per_group(64)", "x86_vnni", "cpu_int8_groups_vnni"),
        ("int8 per_token x int8 per_group(48)", "x86_vnni", "pytorch_dequantized_groups"),
        ("int8 per_token x int8 per_channel", "x86_vnni", "cpu_int8_vnni"),
        ("int8 per_token x int4 per_group(32)", "arm", "pytorch_dequantized_int4_groups"),
    ],
)
def test_which_kernel_a_cpu_gets(scheme, target, chosen):
    asked = Problem(Scheme.parse(scheme), SizeRange(0, None), 128, 1536, BF16, None, constant_weight=True)
    assert select(asked, named_target(target)).kernel.name == chosen
