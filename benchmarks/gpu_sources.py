"""How models write the recipes in plain PyTorch, which Inductor compiles: no op of fx_quant in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_cases import EPS, GROUP, gated
from torch import Tensor

_LEAST_AMAX = 1e-12
# cuBLASLt's int8 matmul asserts more than 16 rows.
_INT_MM_ROWS = 17


def float8(x: Tensor, dtype: torch.dtype, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """float8 codes, and the scales of what shares one along ``dims``, which keep their dims."""
    limit = torch.finfo(dtype).max
    scale = x.abs().amax(dims, keepdim=True).float().clamp(min=_LEAST_AMAX) / limit
    return (x.float() / scale).clamp(-limit, limit).to(dtype), scale


def linear(recipe: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``(x, codes [n, k], scale) -> [m, n]`` in bfloat16."""
    return {
        "tensor": _tensor,
        "row": _row,
        "block": _block,
        "int8": _int8,
        "int8 asym": _int8_asymmetric,
        "w8a16": _w8a16,
        "w4a16": _w4a16,
    }[recipe]


def _tensor(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    a, a_scale = float8(x, codes.dtype, (0, 1))
    return torch._scaled_mm(a, codes.t(), a_scale.reshape(()), scale.reshape(()), out_dtype=x.dtype)


def _row(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    a, a_scale = float8(x, codes.dtype, -1)
    return torch._scaled_mm(a, codes.t(), a_scale, scale.view(1, -1), out_dtype=x.dtype)


def _block(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    a, a_scale = float8(x.unflatten(1, (-1, GROUP)), codes.dtype, -1)
    # Both scales as cuBLASLt reads them: column by column.
    return torch._scaled_mm(
        a.flatten(1), codes.t(), a_scale.squeeze(-1).t().contiguous().t(), scale.t(), out_dtype=x.dtype
    )


def _int_mm(a: Tensor, codes: Tensor) -> Tensor:
    missing = _INT_MM_ROWS - a.shape[0]
    if missing > 0:
        return torch._int_mm(F.pad(a, (0, 0, 0, missing)), codes.t())[: a.shape[0]]
    return torch._int_mm(a, codes.t())


def _int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    a_scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    a = (x.float() / a_scale).round().clamp(-128, 127).to(torch.int8)
    return (_int_mm(a, codes).float() * a_scale * scale).to(x.dtype)


def _int8_asymmetric(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    low, high = x.float().amin(-1, keepdim=True).clamp(max=0), x.float().amax(-1, keepdim=True).clamp(min=0)
    a_scale = ((high - low) / 255).clamp(min=1e-7)
    zero_point = (-128 - low / a_scale).round().clamp(-128, 127)
    a = ((x.float() / a_scale).round() + zero_point).clamp(-128, 127).to(torch.int8)
    acc = _int_mm(a, codes) - zero_point.int() * codes.sum(1, dtype=torch.int32)
    return (acc.float() * a_scale * scale).to(x.dtype)


def _w8a16(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, (codes.float() * scale[:, None]).to(x.dtype))


def _w4a16(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    nibbles = torch.stack((codes & 0xF, codes >> 4), -1).flatten(1).to(torch.int8) - 8
    weight = nibbles.float().unflatten(1, (-1, GROUP)) * scale[..., None]
    return F.linear(x, weight.flatten(1).to(x.dtype))


def rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """Of the sum, in float32, rounded once."""
    total = (x + residual).float()
    return (total * (total.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.float()).to(x.dtype)


def chain(recipe: str) -> Callable[..., Tensor]:
    """``(x, residual, norm, gate_up, its scale, down, its scale)``: norm, gate_up, ``silu * mul``, down."""
    apply = linear(recipe)

    def forward(x, residual, norm, gate_up, gate_up_scale, down, down_scale) -> Tensor:
        return apply(gated(apply(rms_norm(x, residual, norm), gate_up, gate_up_scale)), down, down_scale)

    return forward


def dense_chain(x, residual, norm, gate_up, down) -> Tensor:
    """The same with float weights."""
    return F.linear(gated(F.linear(rms_norm(x, residual, norm), gate_up)), down)
