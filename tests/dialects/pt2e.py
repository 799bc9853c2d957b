"""PyTorch 2 export quantization: ``prepare_pt2e``, calibrate, ``convert_pt2e`` with each library quantizer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.dialects.registry import flow
from tests.dialects.variants import Activation, Variant
from tests.dialects.weights import E4M3, HandLinear, K, N, float8_rows, float8_tensor

NEEDS = ("torchao",)
MakeQuantizer = Callable[[], Any]


def x86(dynamic: bool = False) -> Any:
    """X86InductorQuantizer: static uint8 per-tensor or dynamic activations, int8 per-channel weights."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86_inductor

    quantizer = x86_inductor.X86InductorQuantizer()
    return quantizer.set_global(x86_inductor.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))


def arm() -> Any:
    """ArmInductorQuantizer, static."""
    import torchao.quantization.pt2e.quantizer.arm_inductor_quantizer as arm_inductor

    quantizer = arm_inductor.ArmInductorQuantizer()
    return quantizer.set_global(arm_inductor.get_default_arm_inductor_quantization_config())


def xnnpack(dynamic: bool = False) -> Any:
    """XNNPACKQuantizer, symmetric int8 per-channel weights."""
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic))


def converted(model: nn.Module, x: Tensor, quantizer: Any, *, dynamic_rows: bool) -> nn.Module:
    """``model`` exported, prepared with ``quantizer``, calibrated on ``x`` and converted."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    rows = dict.fromkeys(range(x.dim() - 1), torch.export.Dim.AUTO)
    exported = torch.export.export(model, (x,), dynamic_shapes=(rows,) if dynamic_rows else None).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(x)
    return convert_pt2e(prepared)


class ByRank(nn.Module):
    """An export has one rank, so one converted module for each rank of the activation."""

    def __init__(self, dtype: torch.dtype, bias: bool, make_quantizer: MakeQuantizer) -> None:
        super().__init__()
        for ndim in (2, 3):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype).eval()
            ((x,), _) = Activation()(Variant(dtype, ndim, dynamic=False, bias=bias))
            self.add_module(f"rank_{ndim}", converted(model, x, make_quantizer(), dynamic_rows=True))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n]``."""
        return self.rank_2(x) if x.dim() == 2 else self.rank_3(x)


class Autocast(nn.Module):
    """A float32 conversion that runs under bfloat16 autocast: int8-mixed-bf16.

    Args:
        model: takes a float32 activation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n]`` in bfloat16."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x.float())


def by_rank(make_quantizer: MakeQuantizer, dtype: torch.dtype, bias: bool) -> nn.Module:
    """A linear converted for either rank."""
    return ByRank(dtype, bias, make_quantizer)


_QUANTIZERS: dict[str, tuple[str, MakeQuantizer, str]] = {
    "pt2e_x86_static": ("developers", x86, "X86InductorQuantizer, static uint8 activations"),
    "pt2e_x86_dynamic": ("developers", partial(x86, dynamic=True), "X86InductorQuantizer, dynamic activations"),
    "pt2e_arm_static": ("further", arm, "ArmInductorQuantizer, static"),
    "pt2e_xnnpack_static": ("further", xnnpack, "XNNPACKQuantizer, symmetric, static"),
    "pt2e_xnnpack_dynamic": ("further", partial(xnnpack, dynamic=True), "XNNPACKQuantizer, symmetric, dynamic"),
}
for _name, (_group, _make, _what) in _QUANTIZERS.items():
    flow(_name, group=_group, needs=NEEDS, what=_what)(partial(by_rank, _make))


@flow("pt2e_x86_static_autocast", needs=NEEDS, dtypes=(torch.bfloat16,))
def x86_static_autocast(dtype: torch.dtype, bias: bool) -> nn.Module:
    """X86InductorQuantizer, static, under bfloat16 autocast"""
    return Autocast(ByRank(torch.float32, bias, x86))


class Float8Decoded(HandLinear):
    """torchao's float8 quantize and dequantize ops around a float linear, as its X86 passes look for them

    A static activation for the tensor.
    """

    by_row = False

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        importlib.import_module("torchao.quantization")  # which registers the ops
        codes, scale = (float8_rows if self.by_row else float8_tensor)(weight)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale.reshape(-1, 1))
        self.register_buffer("x_scale", torch.tensor([0.01]))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n]``."""
        ops = torch.ops.torchao
        codes = ops.quantize_affine_float8_non_decomposed(x, self.x_scale, E4M3)
        x = ops.dequantize_affine_float8_non_decomposed(codes, self.x_scale, x.dtype)
        weight = ops.dequantize_affine_float8_non_decomposed(self.weight, self.weight_scale, x.dtype)
        return self.plus_bias(nn.functional.linear(x, weight))


class Float8DecodedRows(Float8Decoded):
    """torchao's float8 quantize and dequantize ops around a float linear, weight scales for each row"""

    by_row = True


flow("pt2e_f8_static", needs=NEEDS)(Float8Decoded)
flow("pt2e_f8_static_row", needs=NEEDS)(Float8DecodedRows)
