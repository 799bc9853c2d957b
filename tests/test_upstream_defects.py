"""Defects of vLLM's layer that we do not have, one test each: what happens there, and that it does not here."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_quant.linear_kernels as lk
from fx_quant.compat import row_scales_on_cpu
from fx_quant.errors import NoKernelError
from fx_quant.kernels.context import EAGER, GRAPH
from fx_quant.kernels.eager import eager_selection, run_kernel
from fx_quant.kernels.padding import Padding, plan_padding
from fx_quant.kernels.registry import kernel
from fx_quant.kernels.select import Selection, select
from fx_quant.layers.activation import quantize_activation
from fx_quant.layers.linear import QuantizedLinear, linear_problem
from fx_quant.linear_kernels.fp8_linear import Fp8LinearOp
from fx_quant.scheme import Granularity, Numerics, OperandSpec, Scheme
from fx_quant.target import Target, named_target
from fx_quant.weights import (
    all_close_1d,
    merge_input_scales,
    normalize_e4m3fn_to_e4m3fnuz,
    requantize_with_max_scale,
)
from tests.tolerances import assert_within

fxq = torch.ops.fx_quant
E4M3 = torch.float8_e4m3fn
M, N, K = 5, 30, 50


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run_as(name: str, target: str, scheme: str, out_dtype: torch.dtype, *operands: Tensor | None, **extras) -> Tensor:
    """The kernel called ``name`` as an eager call on ``target`` plans it; its body runs on this machine."""
    weight = operands[1]
    assert weight is not None
    n, k = weight.shape
    problem = linear_problem(Scheme.parse(scheme), (n, k), out_dtype, out_dtype, operands[4])
    machine = named_target(target)
    assert not kernel(name).requires.unmet(problem, machine)
    chosen = eager_selection(problem, machine, name)
    return run_kernel(chosen, *operands, **extras)


def codes_of(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype is torch.int8:
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("target", ["sm89", "sm90", "sm100"])
def test_a_per_tensor_activation_beside_a_per_channel_weight(target, shape):
    """There ``torch.narrow(As, 0, 0, num_tokens)`` raises for the one scale of a static activation."""
    a, b = codes_of(E4M3, M, K), codes_of(E4M3, N, K)
    a_scale, b_scale, bias = torch.full(shape, 0.1), torch.rand(N) + 0.1, torch.randn(N)
    scheme = "float8_e4m3fn per_tensor (static) x float8_e4m3fn per_channel"
    out = run_as("pytorch_channelwise", target, scheme, torch.float32, a, b, a_scale, b_scale, bias)
    assert_within(out, fxq.scaled_mm(a, b.t(), a_scale, b_scale, bias, torch.float32), Numerics.SAME_ACCUM)


@pytest.mark.parametrize("target", ["x86", "x86_vnni", "arm", "sm89", "sm90", "gfx942", "gfx950"])
def test_every_machine_has_a_kernel_for_that_mix(target):
    """There it reached the path above on ROCm and on CPUs without AMX."""
    dtype = "float8_e4m3fnuz" if target == "gfx942" else "float8_e4m3fn"
    scheme = Scheme.parse(f"{dtype} per_tensor (static) x {dtype} per_channel")
    selection = select(linear_problem(scheme, (N, K), torch.bfloat16, torch.bfloat16, None), named_target(target))
    assert selection.kernel.name


@pytest.mark.parametrize("m", [1, 5, 16])
def test_padded_codes_have_padded_row_scales(m):
    """There ``[17, k]`` codes meet ``[m, 1]`` scales, which the row-wise ``torch._scaled_mm`` refuses."""
    if not isinstance(row_scales_on_cpu(), contextlib.nullcontext):
        pytest.skip("torch._scaled_mm has no scales per row on a CPU before torch 2.12")
    a, b = codes_of(E4M3, m, K), codes_of(E4M3, N, K)
    a_scale, b_scale = torch.rand(m, 1) + 0.1, torch.rand(N) + 0.1
    scheme = "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel"
    out = run_as("pytorch_scaled_mm_rowwise", "sm90", scheme, torch.bfloat16, a, b, a_scale, b_scale, None)
    assert_within(out, fxq.scaled_mm(a, b.t(), a_scale, b_scale, None, torch.bfloat16), Numerics.SAME_ACCUM)
    rows, columns = F.pad(a.float(), (0, 14, 0, 17 - m)).to(E4M3), F.pad(b.float(), (0, 14, 0, 2)).to(E4M3).t()
    if m > 1:
        with pytest.raises((RuntimeError, ValueError), match="(?i)scaling"):
            torch._scaled_mm(rows, columns, a_scale, F.pad(b_scale, (0, 2), value=1.0)[None], out_dtype=torch.bfloat16)


@pytest.mark.parametrize("per_token", [True, False])
def test_n_that_is_no_multiple_of_16_with_a_zero_point(per_token):
    """There ``cutlass_scaled_mm_azp`` asserts at run time: its class claims to implement every shape."""
    a, b = codes_of(torch.int8, M, K), codes_of(torch.int8, N, K)
    shape = (M, 1) if per_token else ()
    a_scale, b_scale = torch.rand(shape) + 0.1, torch.rand(N) + 0.1
    azp = torch.randint(-128, 128, shape, dtype=torch.int32)
    scheme = f"int8 {'per_token' if per_token else 'per_tensor'} asymmetric (dynamic) x int8 per_channel"
    out = run_as("pytorch_int_mm_cuda", "sm90", scheme, torch.float32, a, b, a_scale, b_scale, None, a_zero_point=azp)
    expected = fxq.scaled_mm(a, b.t(), a_scale, b_scale, None, torch.float32, a_zero_point=azp)
    assert_within(out, expected, Numerics.EXACT)


def test_every_int8_kernel_that_aligns_pads_for_a_zero_point():
    """What cannot be called here, CUTLASS among it, is planned so that its assertion holds."""
    target = Target("cuda", "sm90", frozenset({"float8", "tma"}), {"torch": "2.13", "vllm": "0.33", "triton": "3.6"})
    scheme = Scheme.parse("int8 per_token asymmetric (dynamic) x int8 per_channel")
    selection = select(linear_problem(scheme, (N, K), torch.bfloat16, torch.bfloat16, None), target, context=EAGER)
    align = selection.kernel.requires.align
    assert selection.padding.n % align == selection.padding.k % align == 0
    config = lk.Int8ScaledMMLinearLayerConfig(True, False, False, torch.bfloat16, (N, K))
    chosen = lk.choose_scaled_mm_linear_kernel(config, lk.possible_kernels(lk.Int8ScaledMMLinearKernel), target)
    assert selection.kernel.name in chosen.KERNELS, "the classes and the graph choose one kernel"


def test_a_merged_zero_point_is_rounded():
    """There it is truncated, and off by one in half of all cases."""
    generator, off = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        scales = torch.rand(3, generator=generator) / 10 + 1e-3
        azps = torch.randint(-128, 128, (3,), dtype=torch.int32, generator=generator)
        high = (scales.double() * (127 - azps)).max().clamp(min=0)
        low = (scales.double() * (-128 - azps)).min().clamp(max=0)
        exact = -128 - low * 255 / (high - low)
        _, azp = merge_input_scales(scales, azps)
        assert abs(azp.item() - exact.item()) <= 0.5 + 1e-9
        off += int(exact.trunc().item() != azp.item())
    assert off > 100, "these cases would not show it"


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-8])
def test_requantizing_small_scales_does_not_underflow(scale):
    """There codes are decoded in float16, which rounds 1e-6 to a subnormal: 27 % off."""
    weight = torch.randn(8, 64).clamp(-4, 4).to(E4M3)
    scales = torch.tensor([scale, 2 * scale])
    found, codes = requantize_with_max_scale(weight, scales, [4, 4])
    decoded = weight.double() * scales.double().repeat_interleave(4)[:, None]
    error = (codes.double() * found.double() - decoded).abs()
    # Half a unit of three bits of significand, or half the least code.
    assert (error <= decoded.abs() * 2**-4 * (1 + 1e-6) + found.double() * 2**-10).all()
    half = (weight.half() * scales.half().repeat_interleave(4)[:, None]).double()
    if scale <= 1e-6:
        assert ((half - decoded).abs() > decoded.abs() * 2**-4 + found.double() * 2**-10).any()


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0, 1e-30])
@pytest.mark.parametrize("granularity", [Granularity.PER_TOKEN, Granularity.PER_TENSOR], ids=str)
def test_constant_rows_have_a_finite_scale(granularity, value):
    """There ``scale = (max - min) / 255`` is 0 for a constant row, and its codes infinity or NaN."""
    spec = OperandSpec(torch.int8, granularity, dynamic=True, symmetric=False)
    x = torch.full((M, K), value)
    codes, scale, azp = quantize_activation(x, spec)
    assert scale.isfinite().all() and (scale > 0).all()
    torch.testing.assert_close((codes.double() - azp) * scale.double(), x.double(), rtol=1e-6, atol=0)


SCHEMES = [
    "int8 per_token (dynamic) x int8 per_channel",
    "int8 per_tensor (dynamic) x int8 per_channel",
    "int8 per_token asymmetric (dynamic) x int8 per_channel",
    "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel",
    "float8_e4m3fn per_tensor (dynamic) x float8_e4m3fn per_tensor",
    "float8_e4m3fn per_group(10) (dynamic) x float8_e4m3fn per_block(10, 10)",
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_give_the_bias(scheme):
    """There the dynamic per-tensor float8 kernel has no least scale: zeros give 0 * inf."""
    layer = QuantizedLinear.from_float(nn.Linear(K, N), scheme)
    assert torch.equal(layer(torch.zeros(M, K)), layer.bias.expand(M, N))
    assert torch.equal(layer(torch.zeros(0, K)), layer.bias.expand(0, N))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_rank_of_the_input_is_kept(scheme):
    """There FlashInfer's and AITER's classes return 2-D for 3-D."""
    layer, x = QuantizedLinear.from_float(nn.Linear(K, N), scheme), torch.randn(2, 3, K)
    assert layer(x).shape == (2, 3, N) and layer(x[0, 0]).shape == (N,)


def test_a_zero_point_is_corrected_before_the_result_is_rounded():
    """There the Triton path subtracts it from a bfloat16 result: what is left of a large sum is rounding error."""
    linear = nn.Linear(256, N, bias=False)
    layer = QuantizedLinear.from_float(linear, "int8 per_token asymmetric (dynamic) x int8 per_channel")
    x = torch.rand(M, 256).bfloat16()
    x[:, 0] = 100  # so that most codes are near the zero point, and the sums cancel
    codes, scale, azp = quantize_activation(x, layer.scheme.activation)
    exact = ((codes.double() - azp) @ layer.weight.double().t()) * scale.double() * layer.weight_scale.double().t()
    factors = scale.double() * layer.weight_scale.double().t()
    sums = (codes.double() @ layer.weight.double().t()) * factors
    there = (sums.bfloat16() - (azp * layer.weight.double().sum(1)) * factors).bfloat16()
    assert_within(layer(x), exact.bfloat16(), Numerics.SAME_ACCUM)
    with pytest.raises(AssertionError):
        assert_within(there, exact.bfloat16(), Numerics.SAME_ACCUM)


def test_a_bias_is_added_before_the_result_is_rounded():
    """There FlashInfer's class adds it to a bfloat16 result."""
    layer = QuantizedLinear.from_float(nn.Linear(K, N), SCHEMES[0])
    x = torch.randn(M, K).bfloat16()
    product = layer(x.float()) - layer.bias
    layer.bias.copy_(-product[0] * 1.001)
    assert_within(layer(x), layer(x.float()).bfloat16(), Numerics.EXACT)
    assert not torch.equal(product.bfloat16() + layer.bias.bfloat16(), layer(x)), "this case would not show it"


def test_scales_that_differ_by_a_percent_are_not_equal():
    """There ``allclose`` has an absolute 1e-8, which is all of a small scale."""
    assert not all_close_1d(torch.tensor([1e-6, 1.01e-6]))
    assert torch.allclose(torch.tensor(1e-6), torch.tensor(1.01e-6))


def test_normalizing_to_fnuz_changes_no_value_and_not_its_input():
    """There the codes are changed in place, and NaN becomes 240."""
    weight = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(E4M3).reshape(16, 16)
    before = weight.view(torch.uint8).clone()
    codes, scale, _ = normalize_e4m3fn_to_e4m3fnuz(weight, torch.tensor(0.5))
    assert torch.equal(weight.view(torch.uint8), before)
    torch.testing.assert_close(codes.float() * scale, weight.float() * 0.5, rtol=0, atol=0, equal_nan=True)


def test_a_capability_of_none_asks_for_this_machine():
    """There FlashInfer's class is supported on every CUDA device when it is not told which."""
    if torch.cuda.is_available():
        pytest.skip("shows that a machine without a GPU has no FlashInfer")
    supported, reason = lk.FlashInferFP8ScaledMMLinearKernel.is_supported(None)
    assert not supported and "needs platform cuda" in reason


def test_a_forced_kernel_that_cannot_run_is_an_error():
    """There a warning is logged and another kernel runs."""
    config = lk.FP8ScaledMMLinearLayerConfig(
        OperandSpec(E4M3, Granularity.PER_CHANNEL),
        OperandSpec(E4M3, Granularity.PER_TOKEN, dynamic=True),
        torch.bfloat16,
    )
    classes = lk.possible_kernels(lk.FP8ScaledMMLinearKernel)
    with pytest.raises(NoKernelError, match="forced kernel cannot run"):
        lk.choose_scaled_mm_linear_kernel(config, classes, 90, lk.PerTensorTorchFP8ScaledMMLinearKernel)


def test_no_global_configuration_is_needed_and_each_call_decides_on_padding():
    """There the constructor reads the engine's configuration, and padding is a property of the process."""
    op = Fp8LinearOp()
    problem = linear_problem(Scheme.parse(SCHEMES[4]), (N, K), torch.bfloat16, torch.bfloat16, None)
    assert plan_padding(problem, kernel("pytorch_scaled_mm"), EAGER).rows == 17
    assert plan_padding(problem, kernel("pytorch_scaled_mm"), GRAPH).rows == 0
    assert op.apply(torch.randn(M, K), codes_of(E4M3, N, K).t(), torch.tensor(0.1)).shape == (M, N)


def test_padding_never_reaches_the_result():
    """There the padding rows are whatever was in memory, their scales too."""
    a, b = codes_of(E4M3, M, K), codes_of(E4M3, N, K)
    one = torch.ones(())
    problem = linear_problem(Scheme.parse(SCHEMES[4]), (N, K), torch.bfloat16, torch.bfloat16, None)
    chosen = replace(kernel("pytorch_scaled_mm"), requires=kernel("pytorch_scaled_mm").requires)
    selection = Selection(problem, named_target("sm90"), chosen, Padding(32, 64, 17), ())
    out = run_kernel(selection, a, b, one, one, None)
    assert out.shape == (M, N)
    assert_within(out, fxq.scaled_mm(a, b.t(), one, one, None, torch.bfloat16), Numerics.SAME_ACCUM)
