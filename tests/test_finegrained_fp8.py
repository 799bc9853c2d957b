"""``FP8Linear`` of transformers, whose own kernel runs on GPUs only: ``prepare_`` swaps it, or says why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fx_quant
from fx_quant.layers.linear import QuantizedLinear
from fx_quant.loading.prepare import needs_prepare

finegrained_fp8 = pytest.importorskip(
    "transformers.integrations.finegrained_fp8", reason="transformers is not installed"
)
BLOCKS = (128, 128)
FLOAT8 = torch.float8_e4m3fn


def linear(n: int, k: int, block_size: tuple[int, int] | None, *, bias: bool = False, **how: str) -> nn.Module:
    torch.manual_seed(0)
    module = finegrained_fp8.FP8Linear(k, n, block_size, has_bias=bias, **how).requires_grad_(False).eval()
    module.weight.copy_(torch.randn(n, k))
    scale = module.weight_scale_inv
    scale.copy_(torch.rand(scale.shape) * 0.01 + 0.001)
    if bias:
        module.bias = nn.Parameter(torch.randn(n, dtype=torch.bfloat16), requires_grad=False)
    return module


def spread(scale: Tensor, n: int, k: int) -> Tensor:
    if scale.dim() < 2:
        return scale.double()
    return scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]


def reference(module: nn.Module, x: Tensor) -> Tensor:
    """DeepSeek's formula in float64: the activation in codes of ``amax / 448`` for each 128 of k, or for each row."""
    n, k = module.weight.shape
    width = k if module.block_size is None else 128
    parts = []
    for part in x.float().split(width, -1):  # codes jump, so their quotients are float32's
        scale = part.abs().amax(-1, keepdim=True) / 448
        scale = torch.full_like(scale, module.activation_scale.item()) if module.activation_scale is not None else scale
        parts.append((part / scale).clamp(-448, 448).to(FLOAT8).double() * scale.double())
    weight = module.weight.double() * spread(module.weight_scale_inv, n, k)
    out = torch.cat(parts, -1) @ weight.t()
    return out if module.bias is None else out + module.bias.double()


CASES = {
    "blocks": (
        lambda: linear(256, 384, BLOCKS),
        "float8_e4m3fn per_group(128) (dynamic) x float8_e4m3fn per_block(128, 128)",
    ),
    "ragged blocks with a bias": (
        lambda: linear(200, 320, BLOCKS, bias=True),
        "float8_e4m3fn per_group(128) (dynamic) x float8_e4m3fn per_block(128, 128)",
    ),
    "scales that are powers of two": (
        lambda: linear(128, 256, BLOCKS, scale_fmt="ue8m0"),
        "float8_e4m3fn per_group(128) (dynamic) x float8_e4m3fn per_block(128, 128)",
    ),
    "one scale": (
        lambda: linear(96, 64, None, bias=True),
        "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_tensor",
    ),
    "one scale and a calibrated one": (
        lambda: calibrated(linear(96, 64, None, activation_scheme="static")),
        "float8_e4m3fn per_tensor (static) x float8_e4m3fn per_tensor",
    ),
}


def calibrated(module: nn.Module) -> nn.Module:
    module.activation_scale.fill_(0.01)
    return module


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_kept_and_the_result_is_that_of_deepseeks_formula(case):
    with torch.no_grad():
        build, scheme = CASES[case]
        module = build()
        model = nn.Sequential(module)
        assert str(needs_prepare(model)).startswith(
            "1 module of transformers multiply in a kernel of the Hugging Face hub"
        )
        x = torch.randn(2, 5, module.in_features, dtype=torch.bfloat16)
        expected = reference(module, x)
        (swapped,) = fx_quant.prepare_(model).swapped
        assert (swapped.scheme, swapped.numerics, swapped.library) == (scheme, "approximate", "transformers")
        assert isinstance(model[0], QuantizedLinear)
        assert torch.equal(model[0].weight.view(torch.uint8), module.weight.view(torch.uint8))
        assert (model(x).double() - expected).abs().max() <= 2**-8 * expected.abs().max()
        assert not fx_quant.explain(model, x).misses


def left(model: nn.Module) -> str:
    report = fx_quant.prepare_(model)
    assert not report.swapped, str(report)
    return report.left[0].reason


def test_what_is_no_linear_of_float8_is_left_with_the_reason():
    with torch.no_grad():
        fp4 = linear(64, 64, None)
        fp4.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
        assert left(nn.Sequential(fp4)).startswith("its weight must be float8_e4m3fn codes, got torch.int8")
        static = linear(128, 128, BLOCKS, activation_scheme="static")
        assert left(nn.Sequential(static)).startswith("a weight in blocks must have activations that are quantized in")
        hooked = linear(128, 128, BLOCKS)
        hooked.register_forward_hook(lambda *_: None)
        assert left(nn.Sequential(hooked)).startswith("it must have no hooks")
        other = linear(128, 128, BLOCKS)
        other.forward = lambda x: x
        assert left(nn.Sequential(other)).startswith("its forward must be its class's")
        short = linear(256, 256, BLOCKS)
        short.weight_scale_inv = nn.Parameter(torch.ones(1, 2), requires_grad=False)
        assert left(nn.Sequential(short))


def test_a_module_that_was_decoded_as_it_was_loaded_is_a_float_linear():
    with torch.no_grad():
        module = linear(64, 64, None)
        module.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        assert fx_quant.prepare_(nn.Sequential(module)).left == ()
        report = fx_quant.explain(nn.Sequential(module), torch.randn(2, 64))
        assert [row.module for row in report.floats] == ["0"] and not report.unseen
