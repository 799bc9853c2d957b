"""Scales of groups in 16 bits: read by kernels as they are, quantized to, kept by layers, and packed from graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fx_quant
from fx_quant import QuantizedLinear, Scheme
from fx_quant.errors import FxQuantError
from fx_quant.kernels.layouts import FACTOR_PANELS, group_sums, pack_weight
from fx_quant.kernels.registry import kernels
from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.scheme import Numerics
from fx_quant.weights import pack_int4
from tests.graphs import calls, capture, run
from tests.tolerances import assert_within

HALVES = (torch.bfloat16, torch.float16)
N, GROUP = 70, 32
kernels()  # registers the ops


def runs_here(op: str) -> bool:
    """Whether a kernel of ``op`` has what it needs of this CPU."""
    target = fx_quant.detect_target()
    return any(kernel.op == op and not kernel.requires.unmet_by_target(target) for kernel in kernels())


def scales(dtype: torch.dtype, groups: int) -> Tensor:
    """``[N, groups]``: of any size, the smallest and the largest, subnormal ones, none, infinite and NaN."""
    made = (torch.rand(N, groups) * 10.0 ** torch.randint(-4, 3, (N, groups))).to(dtype)
    info = torch.finfo(dtype)
    made[0, 0], made[1, 0], made[2, 0] = info.tiny, info.tiny / 4, 0.0
    made[3, 0], made[4, 0], made[5, 0], made[6, 0] = info.max, torch.inf, torch.nan, -1.5
    return made


def assert_bits_of_wide_scales(
    op: str, a: Tensor, weight: Tensor, a_scale: Tensor | None, half: Tensor, more: dict[str, Tensor]
) -> Tensor:
    """That kernel ``op`` gives of scales ``half [N, groups]`` what it gives of them in float32; the result."""
    got, expected = (
        getattr(torch.ops.fx_quant, op)(
            a, weight, a_scale, pack_weight(scale, FACTOR_PANELS), None, N, torch.float32, block=[1, GROUP], **more
        )
        for scale in (half, half.float())
    )
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    return got


# Each is compiled: scales are read alike by 512 bits and by 256, of two codes to a byte and of one.
PRODUCTS = (
    *(("vnni", True, dtype) for dtype in HALVES),
    *(("avx2", True, dtype) for dtype in HALVES),
    ("vnni", False, torch.float16),
)


@pytest.mark.parametrize("rows", [1, 2, 5, 50])
@pytest.mark.parametrize(("level", "packed", "dtype"), PRODUCTS)
def test_int8_products_have_the_bits_of_wide_scales(level, packed, rows, dtype) -> None:
    op = f"cpu_int8_groups_{level}"
    if not runs_here(op):
        pytest.skip(f"this CPU does not run {op}")
    torch.manual_seed(rows)
    k = 200  # of six groups and a part of one
    codes = torch.randint(-8, 8, (N, k), dtype=torch.int8)
    unpacked = pack_int4(codes) if packed else codes
    weight, a_scale = pack_weight(unpacked, "vnni_int4" if packed else "vnni"), torch.rand(rows, 1)
    a = torch.randint(-128, 128, (rows, k), dtype=torch.int8)
    half = scales(dtype, -(-k // GROUP))
    points = torch.randint(-8, 8, half.shape, dtype=torch.int8)
    shifted = {
        "a_zero_point": torch.randint(-5, 5, (rows, 1), dtype=torch.int32),
        "b_sum": pack_weight(unpacked, group_sums(GROUP, packed)),
    }
    for more in ({}, shifted, {"b_zero_point": pack_weight(points, FACTOR_PANELS)}):
        got = assert_bits_of_wide_scales(op, a, weight, a_scale, half, more)
        assert got[:, 7:].isfinite().all() and not got[:, 5].isfinite().any()


DECODED = (*(("cpu_decoded_bf16", dtype) for dtype in HALVES), ("cpu_decoded_float32", torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 3, 60])
@pytest.mark.parametrize(("op", "dtype"), DECODED)
def test_decoded_weights_have_the_bits_of_wide_scales(op, rows, dtype) -> None:
    if not runs_here(op):
        pytest.skip(f"this CPU does not run {op}")
    torch.manual_seed(rows)
    k = 200
    weight = pack_weight(pack_int4(torch.randint(-8, 8, (N, k), dtype=torch.int8)), "int4_words")
    x = torch.randn(rows, k, dtype=torch.float32 if op.endswith("float32") else torch.bfloat16)
    half = scales(dtype, -(-k // GROUP))
    points = pack_weight(torch.randint(-8, 8, half.shape, dtype=torch.int8), FACTOR_PANELS)
    offsets = pack_weight(torch.randn(half.shape), FACTOR_PANELS)
    for more in ({}, {"b_zero_point": points}, {"b_offset": offsets}):
        assert_bits_of_wide_scales(op, x, weight, None, half, more)


# --- quantized to --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "weight", ["int4 per_group(32)", "uint8 per_group(32) asymmetric", "float8_e4m3fn per_channel"]
)
def test_no_code_is_further_than_half_a_step(weight, dtype) -> None:
    torch.manual_seed(0)
    spec = Scheme.parse(f"float32 x {weight} {fx_quant.scheme.dtype_name(dtype)} scales").weight
    w = torch.randn(64, 96) * 10.0 ** torch.randint(-6, 3, (64, 1))
    w[3] = 0.0
    quantized = quantize_weight(w, spec)
    assert quantized.scale.dtype is dtype and (quantized.scale > 0).all() and quantized.scale.isfinite().all()
    if spec.dtype.is_floating_point:
        return
    step = quantized.scale.double().repeat_interleave(32, 1)
    assert ((w.double() - quantized.dequantize().double()).abs() <= step * 0.5001).all()


def test_a_scale_that_is_infinite_in_16_bits_is_an_error() -> None:
    spec = Scheme.parse("float32 x int4 per_group(32) float16 scales").weight
    with pytest.raises(FxQuantError, match=r"scales must be finite in float16, got .*; say bfloat16 scales"):
        quantize_weight(torch.full((4, 32), 1e7), spec)


# --- kept and read -------------------------------------------------------------------------------------------------

SCHEMES = ("int8 per_token (dynamic) x int4 per_group(32)", "bfloat16 x uint4 per_group(32) asymmetric")


def layer(scheme: str, dtype: torch.dtype, k: int = 96) -> QuantizedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(k, N).bfloat16()
    return QuantizedLinear.from_float(linear, f"{scheme} {fx_quant.scheme.dtype_name(dtype)} scales").eval()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_keeps_them_and_is_that_of_wide_scales(scheme, dtype) -> None:
    model = nn.Sequential(layer(scheme, dtype))
    held, x = model[0], torch.randn(5, 96).bfloat16()
    assert held.weight_scale.dtype is dtype and held.half().weight_scale.dtype is dtype
    wide = QuantizedLinear(
        Scheme.parse(scheme),
        held.weight.clone(),
        held.weight_scale.float(),
        weight_zero_point=held.weight_zero_point,
        bias=held.bias,
    )
    assert torch.equal(model(x), wide(x))
    (captured,) = capture(model, x)
    (prepack,) = calls(captured.state.graph, torch.ops.fx_quant.prepack.default)
    assert dtype in {value.dtype for value in prepack.meta["val"]}
    assert torch.equal(run(captured.state.graph, *captured.inputs)[0][0], wide(x))


def test_loading_wide_scales_makes_them_wide() -> None:
    narrow, wide = layer(SCHEMES[0], torch.bfloat16), layer(SCHEMES[0], torch.float32)
    plain = QuantizedLinear(Scheme.parse(SCHEMES[0]), narrow.weight.clone(), narrow.weight_scale, bias=narrow.bias)
    assert plain.weight_scale.dtype is torch.bfloat16
    plain.load_state_dict(wide.state_dict())
    assert plain.weight_scale.dtype is torch.float32 and torch.equal(plain.weight_scale, wide.weight_scale)
    x = torch.randn(2, 96).bfloat16()
    assert torch.equal(plain(x), wide(x))


class Decoded(nn.Module):
    """A weight that a library decodes: 16-bit scales, widened by ``how``."""

    def __init__(self, how) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-128, 128, (N, 96), dtype=torch.int8))
        self.register_buffer("scale", (torch.rand(N, 3) + 0.5).half())
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        weight = self.codes.float().view(N, 3, 32) * self.how(self.scale)[..., None]
        return x @ weight.view(N, 96).t()


WIDENED = {
    "as it is": (lambda s: s.float(), torch.float16),
    "of other dims": (lambda s: s.view(N * 3).float().view(N, 3), torch.float16),
    "by way of fewer bits": (lambda s: s.bfloat16().float(), torch.bfloat16),
    "times a number": (lambda s: s.float() * 1.001, torch.float32),
    "once more": (lambda s: s.float() * s.float(), torch.float32),
}


@pytest.mark.parametrize("name", WIDENED)
def test_what_a_graph_widens_is_packed_as_it_was(name) -> None:
    how, dtype = WIDENED[name]
    torch.manual_seed(0)
    model, x = Decoded(how), torch.randn(5, 96)
    (captured,) = capture(model, x)
    graph = captured.state.graph
    (kernel,) = [node for node in graph.nodes if "cpu_decoded" in str(node.target)]
    scale = kernel.args[3].meta["val"]
    assert scale.dtype is dtype and scale.dim() == 3

    def expected() -> Tensor:
        decoded = model.codes.double().view(N, 3, 32) * how(model.scale).double()[..., None]
        return x.double() @ decoded.view(N, 96).t()

    assert_within(run(graph, *captured.inputs)[0][0], expected().float(), Numerics.REASSOCIATED)
    # And when the scales change.
    for given in captured.inputs:
        if given.dtype is torch.float16:
            given.mul_(2)
            model.scale.copy_(given)
    assert_within(run(graph, *captured.inputs)[0][0], expected().float(), Numerics.REASSOCIATED)
