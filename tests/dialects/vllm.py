"""float8 linears as vLLM writes them in plain torch: ``QuantFP8.forward_native`` and ``w8a8_utils``' torch paths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.dialects.registry import flow
from tests.dialects.weights import E4M3, E4M3_MAX, Float8RowLinear, Float8TensorLinear, SameInput

_SMALLEST_SCALE = 1.0 / (E4M3_MAX * 512.0)


def group_broadcast(scale: Tensor, shape: torch.Size) -> Tensor:
    """``scale`` repeated along each dimension that it divides but does not broadcast to, as in ``quant_utils``."""
    for i, size in enumerate(shape):
        own = scale.shape[i] if i < scale.ndim else 1
        if own not in (size, 1):
            repeated = (*scale.shape[: i + 1], size // own, *scale.shape[i + 1 :])
            scale = scale.unsqueeze(i + 1).expand(*repeated).flatten(i, i + 1)
    return scale


def quant_fp8(x: Tensor, scale: Tensor | None = None, *, per_token: bool = False) -> tuple[Tensor, Tensor]:
    """float8 codes and float32 scales of at least 1 / (448 * 512): multiply by the reciprocal, clamp, cast."""
    if scale is None:
        amax = x.abs().amax(dim=-1).unsqueeze(-1) if per_token else x.abs().max().unsqueeze(-1)
        scale = (amax.to(torch.float32) / E4M3_MAX).clamp(min=_SMALLEST_SCALE)
    y = x.to(torch.float32) * group_broadcast(scale.to(torch.float32), x.shape[-2:]).reciprocal()
    return y.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


@flow("vllm_torch_per_tensor_static", group="developers")
class StaticPerTensor(Float8TensorLinear):
    """static, torch_per_tensor_w8a8_scaled_mm: scales viewed as [1], narrow, view"""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        codes, scale = quant_fp8(rows, self.x_scale)
        y = torch._scaled_mm(
            codes,
            self.weight.t(),
            out_dtype=x.dtype,
            scale_a=scale.view(1),
            scale_b=self.weight_scale.view(1),
            bias=self.bias,
        )
        return torch.narrow(y, 0, 0, rows.shape[0]).view(*x.shape[:-1], self.n)


@flow("vllm_torch_per_tensor_dyn", group="developers")
class PerTensor(Float8TensorLinear):
    """dynamic, torch_per_tensor_w8a8_scaled_mm"""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        codes, scale = quant_fp8(rows)
        y = torch._scaled_mm(
            codes,
            self.weight.t(),
            out_dtype=x.dtype,
            scale_a=scale,
            scale_b=self.weight_scale.view(1),
            bias=self.bias,
        )
        return torch.narrow(y, 0, 0, rows.shape[0]).view(*x.shape[:-1], self.n)


@flow("vllm_torch_per_token")
class PerToken(Float8RowLinear):
    """dynamic, torch_per_token_w8a8_scaled_mm: row-wise"""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        codes, scale = quant_fp8(rows, per_token=True)
        y = torch._scaled_mm(
            codes,
            self.weight.t(),
            out_dtype=x.dtype,
            scale_a=scale,
            scale_b=self.weight_scale.t(),
            bias=self.bias,
        )
        return torch.narrow(y, 0, 0, rows.shape[0]).view(*x.shape[:-1], self.n)


class IdentityScaled(Float8RowLinear):
    """And ``identity`` ``[1]``, a one: what a channelwise product hands to ``_scaled_mm``."""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().hold(weight, dtype)
        self.register_buffer("identity", torch.ones(1))


@flow("vllm_torch_channelwise", group="developers")
class Channelwise(IdentityScaled):
    """dynamic, torch_channelwise_w8a8_scaled_mm: identity scales, float32 out, narrow, then both scales and the bias"""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        codes, scale = quant_fp8(rows, per_token=True)
        y = torch._scaled_mm(
            codes, self.weight.t(), scale_a=self.identity, scale_b=self.identity, out_dtype=torch.float32
        )
        y = torch.narrow(y, 0, 0, rows.shape[0])
        scale = torch.narrow(scale, 0, 0, rows.shape[0])
        y = y * scale * self.weight_scale.t()
        return self.plus_bias(y).to(x.dtype).view(*x.shape[:-1], self.n)


@flow("vllm_torch_channelwise_new")
class ChannelwiseOnesInside(Float8RowLinear):
    """dynamic, ChannelWiseTorchFP8ScaledMMLinearKernel of vLLM 0.33: torch.ones(1) made in the forward"""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        codes, scale = quant_fp8(rows, per_token=True)
        one = torch.ones(1, dtype=torch.float32, device=codes.device)
        y = torch._scaled_mm(codes, self.weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
        m = math.prod(x.shape[:-1])
        y = torch.narrow(y, 0, 0, m)
        scale = torch.narrow(scale, 0, 0, m)
        y = y * scale * self.weight_scale.t()
        return self.plus_bias(y).to(x.dtype).view(*x.shape[:-1], self.n)


@flow("vllm_torch_channelwise_static")
class ChannelwiseStatic(IdentityScaled):
    """static per-tensor activation, channelwise product: identity scales, float32 out, then both scales and the bias"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().hold(weight, dtype)
        self.register_buffer("x_scale", torch.tensor([[0.01]]))

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quant_fp8(x.view(-1, x.shape[-1]), self.x_scale)
        y = torch._scaled_mm(
            codes, self.weight.t(), scale_a=self.identity, scale_b=self.identity, out_dtype=torch.float32
        )
        y = y * scale * self.weight_scale.t()
        return self.plus_bias(y).to(x.dtype).view(*x.shape[:-1], self.n)


@flow("qkv3_vllm_torch_channelwise", matmuls=3)
def channelwise_qkv(dtype: torch.dtype, bias: bool) -> SameInput:
    """three vllm_torch_channelwise on one input"""
    return SameInput(*(Channelwise(dtype, bias) for _ in range(3)))
