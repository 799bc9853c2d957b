"""Packed weights on GPUs: their layouts, the kernel's arithmetic in Triton's interpreter, and its machine code."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import fx_quant.kernels.triton.weight_only_kernels  # noqa: F401  (registers the ops)
from fx_quant.kernels.layouts import pack_weight
from fx_quant.kernels.registry import kernel
from fx_quant.kernels.triton.architectures import architecture
from fx_quant.kernels.triton.launch import Configuration
from fx_quant.kernels.triton.packed_codes import PACKED_CODES, PackedCodes
from fx_quant.kernels.triton.split import split_by_blocks
from fx_quant.kernels.triton.weight_only import (
    CONFIGURATIONS,
    configuration,
    family,
    packed_operands,
    plan_weight_only_mm,
    unfit,
)
from fx_quant.scheme import Numerics
from tests.cross_compile import compile_launch
from tests.tolerances import assert_within
from tests.triton_interpreter import call, compiler_is_real, every_variant, needs_triton

fxq = torch.ops.fx_quant
F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
E4M3, E5M2, FNUZ = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz
SM90 = architecture("sm90")
NAMES = tuple(PACKED_CODES)
LOW = {"int4": -8, "int8": -128, "uint8": 0}


def weight(name: str, n: int, k: int, float8: torch.dtype = E4M3) -> Tensor:
    """A weight ``[n, k]``, or ``[n, k / 2]`` of two int4 codes to a byte."""
    if name == "float8":
        return torch.randn(n, k).to(float8)
    dtype = torch.int8 if name == "int8" else torch.uint8
    return torch.randint(0, 256, (n, k // PACKED_CODES[name].per_byte), dtype=torch.uint8).view(dtype)


def factors(name: str, n: int, k: int, block: tuple[int, int] | None, asymmetric: bool) -> tuple[Tensor, Tensor | None]:
    """A scale and a zero point."""
    shape = (n,) if block is None else (-(-n // block[0]), -(-k // block[1]))
    low = LOW.get(name, 0)
    return torch.rand(shape), torch.randint(low, -low or 256, shape, dtype=I32) if asymmetric else None


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), [(1, 2), (5, 20), (70, 130), (3, 256), (16, 128)])
def test_a_packed_weight_is_the_weight(name, n, k):
    codes, given = PACKED_CODES[name], weight(name, n, k)
    for each in (given, given.t().contiguous().t(), given[:, :1].expand(n, given.shape[1])):
        packed = codes.pack(each)
        assert tuple(packed.shape) == codes.shape(n, each.shape[1]) and packed.is_contiguous()
        assert packed.dtype == (codes.dtype or given.dtype)
        unpacked = codes.unpack(packed, n, each.shape[1])
        assert unpacked.dtype == given.dtype
        assert torch.equal(unpacked.view(torch.uint8), each.contiguous().view(torch.uint8))
        assert torch.equal(pack_weight(each, f"triton_{name}").view(torch.uint8), packed.view(torch.uint8))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_codes_that_add_themselves_to_a_number_are_exact(dtype):
    """What the kernel computes of the bits, for every code: the interpreter does not know bfloat16."""
    one, bits = (128.0, 0x4300) if dtype is BF16 else (1024.0, 0x6400)

    def number(code: Tensor) -> Tensor:
        return (code | bits).to(torch.int16).view(dtype)

    nibbles, bytes_ = torch.arange(16), torch.arange(256)
    assert torch.equal((number(nibbles) - (one + 8)).int(), torch.arange(-8, 8, dtype=I32))
    signed = number(bytes_ & 0x7F) - number(bytes_ & 0x80)
    assert torch.equal(signed.to(torch.int8), bytes_.to(torch.uint8).view(torch.int8))
    # uint8 codes are packed with their first bit flipped.
    unsigned = number((bytes_ ^ 0x80) & 0x7F) - number((bytes_ ^ 0x80) & 0x80) + 128.0
    assert torch.equal(unsigned.int(), bytes_.int())
    # Every zero point of the codes' range leaves them exact.
    for zero_point in (-128, -1, 127):
        assert torch.equal((signed - zero_point).int(), signed.int() - zero_point)


@pytest.mark.parametrize("dtype", [E4M3, E5M2, FNUZ, torch.float8_e5m2fnuz])
def test_every_float8_code_is_exact_in_float16(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    torch.testing.assert_close(values.half().float(), values.float(), rtol=0, atol=0, equal_nan=True)


# --- the interpreter ---------------------------------------------------------------------------------------------


def interpreted(found: Configuration, name: str, x: Tensor, given: Tensor, scale: Tensor, bias, out_dtype, **options):
    codes = PACKED_CODES[name]
    operands = packed_operands(x, codes.pack(given), codes, scale, bias, given.shape[0], out_dtype, **options)
    return plan_weight_only_mm(operands, found, SM90).run()


def small(name: str, **changes: int) -> Configuration:
    return replace(Configuration("weight_only", 16, 32, PACKED_CODES[name].block, 4, 1), **changes)


def canonical(x, given: Tensor, scale, zero_point=None, bias=None, out_dtype=F32, block=None) -> Tensor:
    return fxq.weight_only_mm(x, given.t(), scale, zero_point, bias, out_dtype, block=block)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [None, (1, 32), (1, 64), (1, 128), (16, 128), (1, 256)], ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_kernels_are_the_canonical_op(interpreter, name, block, asymmetric):
    if name == "float8" and (asymmetric or block == (1, 32)):
        return
    m, n, k = 9, 40, 270
    x, given, bias = torch.randn(m, k).half(), weight(name, n, k), torch.randn(n)
    scale, zero_point = factors(name, n, k, block, asymmetric)
    split = 3 if block in (None, (1, 128)) else 1
    options = {"zero_point": zero_point, "block": block}
    out = call(interpreter, interpreted, small(name, split_k=split), name, x, given, scale, bias, F32, **options)
    assert_within(out, canonical(x, given, scale, zero_point, bias, F32, block), Numerics.REASSOCIATED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 9, 10), (1, 1, 2), (17, 70, 2), (33, 33, 64), (3, 5, 0)])
def test_every_size(interpreter, name, m, n, k):
    x, given, scale = torch.randn(m, k).half(), weight(name, n, k), torch.rand(n)
    out = call(interpreter, interpreted, small(name), name, x, given, scale, None, F32)
    assert_within(out, canonical(x, given, scale), Numerics.REASSOCIATED)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("split", [1, 2, 5, 16])
def test_parts_of_a_sum_are_added_in_order(interpreter, name, split):
    """Also where there are more parts than blocks; twice, as what the first launch left could change the second."""
    x, given, scale = torch.randn(5, 514).half(), weight(name, 40, 514), torch.rand(40, 5)
    found, options = small(name, split_k=split), {"block": (1, 128)}
    first = call(interpreter, interpreted, found, name, x, given, scale, None, F32, **options)
    assert_within(first, canonical(x, given, scale, block=(1, 128)), Numerics.REASSOCIATED)
    assert torch.equal(first, call(interpreter, interpreted, found, name, x, given, scale, None, F32, **options))


@pytest.mark.parametrize("shape", [(), (1,), (1, 9)], ids=str)
def test_scales_of_every_shape(interpreter, shape):
    x, given = torch.randn(5, 20).half(), weight("int8", 9, 20)
    scale, zero_point = torch.rand(shape), torch.randint(-128, 128, shape, dtype=torch.int8)
    out = call(interpreter, interpreted, small("int8"), "int8", x, given, scale, None, F32, zero_point=zero_point)
    assert_within(out, canonical(x, given, scale, zero_point), Numerics.REASSOCIATED)


@pytest.mark.parametrize("bias", [None, F32, F16])
@pytest.mark.parametrize("out_dtype", [F32, F16])
def test_every_bias_and_result(interpreter, bias, out_dtype):
    x, given, scale = torch.randn(5, 40).half(), weight("int4", 9, 40), torch.rand(9) / 10
    bias = None if bias is None else torch.randn(9).to(bias)
    out = call(interpreter, interpreted, small("int4"), "int4", x, given, scale, bias, out_dtype)
    assert_within(out, canonical(x, given, scale, None, bias, out_dtype), Numerics.REASSOCIATED)


def test_operands_of_any_strides(interpreter):
    tall, scale = torch.randn(40, 270).half(), torch.rand(3, 9).t()
    given = weight("int4", 9, 270)
    for x in (tall[:34], tall.expand(2, 40, 270)[1], tall.t().contiguous().t()[::2], tall[:1].expand(5, 270)):
        out = call(interpreter, interpreted, small("int4"), "int4", x, given, scale, None, F32, block=(1, 128))
        assert_within(out, canonical(x, given, scale, block=(1, 128)), Numerics.REASSOCIATED)


def test_scales_that_are_zero_or_nan_stay_in_their_rows(interpreter):
    x, given, scale = torch.randn(5, 256).half(), weight("int4", 9, 256), torch.rand(9, 8)
    scale[3, 1], scale[4, 0] = torch.nan, 0.0
    out = call(interpreter, interpreted, small("int4"), "int4", x, given, scale, None, F32, block=(1, 32))
    assert_within(out, canonical(x, given, scale, block=(1, 32)), Numerics.REASSOCIATED)
    assert out.isnan().sum() == 5


def test_an_activation_that_is_not_finite_stays_in_its_row(interpreter):
    x, given, scale = torch.randn(5, 70).half(), weight("int8", 9, 70), torch.rand(9)
    x[2, 69] = torch.nan
    out = call(interpreter, interpreted, small("int8"), "int8", x, given, scale, None, F32)
    assert_within(out, canonical(x, given, scale), Numerics.REASSOCIATED)
    assert out.isnan().sum() == 9


def launched(name: str, x: Tensor, packed: Tensor, scale: Tensor, n: int) -> Tensor:
    op = getattr(fxq, f"triton_weight_only_{name}_packed")
    return op(x, packed, None, scale, None, n, F32, block=[1, 128])


@pytest.mark.parametrize("name", NAMES)
def test_the_op_chooses_a_configuration(interpreter, name):
    codes, (m, n, k) = PACKED_CODES[name], (3, 20, 1540)
    x, given, (scale, _) = torch.randn(m, k).half(), weight(name, n, k), factors(name, n, k, (1, 128), False)
    out = call(interpreter, launched, name, x, codes.pack(given), scale, n)
    assert_within(out, canonical(x, given, scale, block=(1, 128)), Numerics.REASSOCIATED)


# --- the ops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_the_ops_are_the_canonical_ones(monkeypatch, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    codes, (m, n, k) = PACKED_CODES[name], (5, 9, 140)
    x, given = torch.randn(m, k).to(BF16), weight(name, n, k)
    scale, zero_point = factors(name, n, k, (1, 64), name != "float8")
    op = getattr(fxq, f"triton_weight_only_{name}_packed")
    arguments = (x, codes.pack(given), None, scale, None, n, BF16)
    options = {"b_zero_point": zero_point, "block": [1, 64]}
    assert torch.equal(op(*arguments, **options), canonical(x, given, scale, zero_point, None, BF16, (1, 64)))
    if name != "float8":  # opcheck multiplies every operand by a number, which torch does not do for float8
        torch.library.opcheck(op.default, arguments, options)
        torch.library.opcheck(op.default, (x[:0], *arguments[1:]), options)


def test_what_does_not_fit_is_an_error():
    x, packed, scale = torch.randn(5, 140).half(), PACKED_CODES["int8"].pack(weight("int8", 9, 140)), torch.rand(9)
    op = fxq.triton_weight_only_int8_packed
    with pytest.raises(
        RuntimeError, match=r"b must be a weight \[9, 140\] packed as \[3, 9, 16\], got int32 \[2, 9, 1"
    ):
        op(x, packed[:2], None, scale, None, 9, F16)
    with pytest.raises(RuntimeError, match=r"x must be \[m, k\] of bfloat16 or float16, got float32"):
        op(x.float(), packed, None, scale, None, 9, F16)
    with pytest.raises(RuntimeError, match="a float activation has no scale and no zero point"):
        op(x, packed, scale, scale, None, 9, F16)
    with pytest.raises(RuntimeError, match="b_scale must have one element or shape"):
        op(x, packed, None, scale[:8], None, 9, F16)


# --- what fits, and which configuration is chosen ----------------------------------------------------------------

meta = partial(torch.empty, device="meta")


def planned(
    name: str,
    m: int,
    block: tuple[int, int] | None = None,
    asymmetric: bool = False,
    dtype: torch.dtype = BF16,
    float8: torch.dtype = E4M3,
    n: int = 4096,
    k: int = 4096,
):
    codes: PackedCodes = PACKED_CODES[name]
    packed = meta(*codes.shape(n, k // codes.per_byte), dtype=codes.dtype or float8)
    shape = (n,) if block is None else (-(-n // block[0]), -(-k // block[1]))
    zero_point = meta(shape, dtype=torch.int8) if asymmetric else None
    given = (meta(m, k, dtype=dtype), packed, codes, meta(shape), None, n, dtype)
    return packed_operands(*given, zero_point=zero_point, block=block)


@needs_triton
def test_groups_that_blocks_do_not_hold_are_declined():
    found = small("int4")
    for group in (32, 64, 128, 256, 384):
        assert unfit(planned("int4", 16, (1, group)), found, SM90) is None
    assert unfit(planned("int4", 16, (1, 16)), found, SM90) == (
        "groups along k must divide 128 or be multiples of it, and hold 32 codes or more, got 16"
    )
    assert unfit(planned("int4", 16, (1, 96)), found, SM90) is not None
    assert unfit(planned("float8", 16, (1, 32)), found, SM90) is not None
    assert unfit(planned("float8", 16), found, architecture("sm80")) == (
        "float8 codes are decoded from sm89 on, the architecture is sm80"
    )
    with pytest.raises(RuntimeError, match="triton_weight_only_int4_packed: groups along k must divide 128"):
        plan_weight_only_mm(planned("int4", 16, (1, 96)), found, SM90)


@pytest.mark.parametrize("name", [f"triton_weight_only_{each}_packed" for each in (*NAMES, "float8_fnuz")])
def test_what_kernels_require_is_what_fits(name):
    requires, codes = kernel(name).requires, PACKED_CODES[kernel(name).layout.removeprefix("triton_")]
    for _, granularity in requires.granularities:
        assert unfit(planned(codes.name, 16, granularity.block), small(codes.name), SM90) is None


def test_a_sum_is_split_where_tiles_are_few():
    # 4096 rows of the weight are 64 tiles; 2 programs on each of 132 processors.
    assert split_by_blocks(64, 32, 132) == 5
    assert split_by_blocks(448, 32, 132) == 1
    assert split_by_blocks(16, 112, 132) == 16
    # Too few blocks to share, and nothing to compute.
    assert split_by_blocks(1, 5, 132) == 1
    assert split_by_blocks(0, 32, 132) == 5


def test_the_configuration_follows_the_rows():
    found = [configuration(planned("int4", m), SM90) for m in (0, 1, 16, 17, 64, 65, 4096)]
    assert [each.block_m for each in found] == [16, 16, 16, 32, 64, 128, 128]
    assert [each.split_k for each in found] == [5, 5, 5, 5, 5, 5, 1]
    assert [family(architecture(name)) for name in ("sm80", "sm89", "sm90", "sm100", "sm120", "gfx942")] == [
        "sm80",
        "sm80",
        "sm90",
        "sm90",
        "sm80",
        "rocm",
    ]


# --- compiled for GPUs that are not here -------------------------------------------------------------------------

# Architecture -> its matrix instructions of half precision.
INSTRUCTION = {"sm80": "HMMA", "sm89": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "sm120": "HMMA", "gfx942": "_bf16"}


def shipped() -> list:
    """Every configuration: all codes on sm90, some on the others of its family."""
    cases = []
    for name in INSTRUCTION:
        table = CONFIGURATIONS[family(architecture(name))]
        for codes in ("int4", "int8", "uint8", "float8"):
            if (name == "sm80" and codes == "float8") or (name != "sm90" and codes == "uint8"):
                continue
            found = table[PACKED_CODES[codes].block]
            # Between the smallest and the largest there is nothing that int4 does not show.
            some = found if name in ("sm90", "sm80") and codes == "int4" else (found[0], found[-1])
            cases += [pytest.param(name, codes, each, id=f"{name} {codes} {each}") for each in some]
    return cases


@every_variant
@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize(("name", "codes", "found"), shipped())
def test_every_configuration_compiles(name, codes, found):
    on = architecture(name)
    # The most that can be asked of it: groups and zero points, and a split sum for few rows.
    given = planned(codes, found.block_m, (1, 128), codes != "float8", float8=FNUZ if name == "gfx942" else E4M3)
    found = replace(found, split_k=4 if found.block_m <= 64 else 1)
    binary = compile_launch(plan_weight_only_mm(given, found, on), on)
    used = {each for each in binary.instructions if "MMA" in each or "mfma" in each}
    assert used and all(each.endswith(INSTRUCTION[name]) for each in used), used
    assert binary.spilled == 0
    assert binary.shared <= on.shared_bytes


@pytest.mark.cross_compile
@needs_triton
@compiler_is_real
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("codes", "block"), [("int4", None), ("int4", (1, 32)), ("int8", None), ("int8", (1, 128))])
def test_two_codes_are_decoded_by_one_instruction(dtype, codes, block):
    """No byte permutations, no conversions, and a subtraction or two of pairs: the registers are what words were."""
    launch = plan_weight_only_mm(planned(codes, 16, block, dtype=dtype), configuration(planned(codes, 16), SM90), SM90)
    found = compile_launch(launch, SM90).instructions
    pairs = 64 * PACKED_CODES[codes].block // 128 // 2
    assert found["HADD2"] == pairs
    assert found.get("PRMT", 0) == found.get("F2F", 0) == 0


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [None, (1, 64), (1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 70, 64), (1, 70, 130), (17, 256, 4096), (70, 200, 514), (300, 384, 1024)]
)
def test_on_the_gpu(dtype, name, block, m, n, k):
    if name == "float8" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8 of the GPU")
    codes, given = PACKED_CODES[name], weight(name, n, k).cuda()
    x = torch.randn(m, k).to(dtype).cuda()
    scale, zero_point = (each if each is None else each.cuda() for each in factors(name, n, k, block, name != "float8"))
    op = getattr(fxq, f"triton_weight_only_{name}_packed")
    options = {"b_zero_point": zero_point, "block": block}
    out = op(x, codes.pack(given), None, scale, None, n, dtype, **options)
    assert_within(out, canonical(x, given, scale, zero_point, None, dtype, block), Numerics.REASSOCIATED)
    # A split sum is added in the same order each time.
    assert torch.equal(out, op(x, codes.pack(given), None, scale, None, n, dtype, **options))
