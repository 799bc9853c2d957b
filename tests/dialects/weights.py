"""Weights of the hand-written flows: one float weight, quantized in each way, and the modules that hold the codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

K, N = 256, 384
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def float_weight(n: int = N, k: int = K) -> Tensor:
    """A normal float32 weight ``[n, k]``, always the same."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def float_bias(dtype: torch.dtype, n: int = N) -> Tensor:
    """``[n]``, from -1 to 1."""
    return torch.linspace(-1, 1, n).to(dtype)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes ``[n, k]`` and scales ``[n]``: ``round(w / (amax / 127))``."""
    scale = weight.abs().amax(1, keepdim=True).float() / 127
    return (weight.float() / scale).round().clamp(-128, 127).to(torch.int8), scale.squeeze(1)


def float8_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 codes ``[n, k]`` and one scale ``[]``."""
    scale = weight.abs().max().float() / E4M3_MAX
    return (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def float8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 codes ``[n, k]`` and scales ``[n, 1]``."""
    scale = weight.abs().amax(1, keepdim=True).float() / E4M3_MAX
    return (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def float8_blocks(weight: Tensor, size: int = 128) -> tuple[Tensor, Tensor]:
    """float8 codes ``[n, k]`` and scales ``[n / size, k / size]``; ``size`` divides n and k."""
    n, k = weight.shape
    tiles = weight.view(n // size, size, k // size, size)
    scale = tiles.abs().amax((1, 3), keepdim=True).float() / E4M3_MAX
    codes = (tiles.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).view(n, k)
    return codes, scale.view(n // size, k // size)


def uint4_groups(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15 ``[n, k]`` (uint8), scales ``[n, k / size]`` (float32), zero points ``[n, k / size]`` (uint8)."""
    n, k = weight.shape
    groups = weight.view(n, k // size, size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero_point = (-low / scale).round().clamp(0, 15)
    codes = ((groups / scale).round() + zero_point).clamp(0, 15).to(torch.uint8).view(n, k)
    return codes, scale.squeeze(-1), zero_point.squeeze(-1).to(torch.uint8)


class HandLinear(nn.Module):
    """What the hand-written linears share: a bias ``[n]`` or None, and how it is added.

    Args:
        dtype: of the bias and the activation.
        bias: whether there is one.
        weight: float32 ``[n, k]``; ``float_weight()`` unless given.
    """

    bias: Tensor | None

    def __init__(self, dtype: torch.dtype, bias: bool, weight: Tensor | None = None) -> None:
        super().__init__()
        weight = float_weight() if weight is None else weight
        self.n, self.k = weight.shape
        self.bias = nn.Parameter(float_bias(dtype, self.n), requires_grad=False) if bias else None
        self.hold(weight, dtype)

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Register the codes and scales of ``weight``."""
        raise NotImplementedError(f"{type(self).__name__} must say how it holds its weight")

    def plus_bias(self, y: Tensor) -> Tensor:
        """``y + bias``, or ``y`` without one."""
        return y if self.bias is None else y + self.bias


class Int8Linear(HandLinear):
    """Codes ``weight`` ``[n, k]`` int8 and ``weight_scale`` ``[n]`` float32."""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scale = int8_rows(weight)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)


class Float8TensorLinear(HandLinear):
    """Codes ``weight`` ``[n, k]`` float8 and ``weight_scale`` ``[]``; ``x_scale`` ``[]`` for static activations."""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scale = float8_tensor(weight)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("x_scale", torch.tensor(0.01))


class Float8RowLinear(HandLinear):
    """Codes ``weight`` ``[n, k]`` float8 and ``weight_scale`` ``[n, 1]``."""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scale = float8_rows(weight)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)


class Float8BlockLinear(HandLinear):
    """Codes ``weight`` ``[n, k]`` float8 and ``weight_scale`` ``[n / 128, k / 128]``."""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scale = float8_blocks(weight)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)


class SameInput(nn.Module):
    """Three linears on one input, their results side by side: q, k and v of an attention.

    Args:
        linears: each takes ``x[..., k]``.
    """

    def __init__(self, *linears: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v = linears

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 3 n]``."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)
