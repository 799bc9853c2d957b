"""float8 linears as people write them by hand: scaled_mm in its spellings, block scales, weight-only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.dialects.hand import NOT_FASTER
from tests.dialects.registry import flow
from tests.dialects.weights import E4M3, E4M3_MAX, Float8BlockLinear, Float8RowLinear, Float8TensorLinear, SameInput


def quantize_per_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 codes and one scale ``[]``: ``amax.clamp(1e-12) / 448`` in float32, divide, clamp, cast."""
    scale = x.abs().max().float().clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 codes ``[..., k]`` and scales ``[..., 1]``, as ``quantize_per_tensor``."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def quantize_per_group(
    x: Tensor, size: int = 128, *, powers_of_two: bool = False, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """float8 codes ``[..., k]`` and scales ``[..., k / size]``, as vLLM's ``QuantFP8`` writes it natively."""
    groups = -(-x.shape[-1] // size)
    grouped = x.view(-1, groups, size)
    amax = grouped.abs().max(dim=-1, keepdim=True)[0].float()
    scale = (amax / E4M3_MAX).clamp(min=1.0 / (E4M3_MAX * 512.0))
    if powers_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes = (grouped / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).view(-1, groups * size).view(x.shape)
    scale = scale.squeeze(-1).reshape(*x.shape[:-1], groups)
    if column_major:
        scale = scale.transpose(-2, -1).contiguous().transpose(-1, -2)
    return codes, scale


@flow("hand_fp8_static_tt", group="developers")
class StaticPerTensor(Float8TensorLinear):
    """static per-tensor x per-tensor, torch._scaled_mm with the bias inside"""

    def forward(self, x: Tensor) -> Tensor:
        codes = (x.view(-1, x.shape[-1]) / self.x_scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        y = torch._scaled_mm(codes, self.weight.t(), self.x_scale, self.weight_scale, bias=self.bias, out_dtype=x.dtype)
        return y.view(*x.shape[:-1], -1)


@flow("hand_fp8_dyn_tt", group="developers")
class PerTensor(Float8TensorLinear):
    """dynamic per-tensor x per-tensor, torch._scaled_mm"""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_tensor(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(codes, self.weight.t(), scale, self.weight_scale, bias=self.bias, out_dtype=x.dtype)
        return y.reshape(*x.shape[:-1], -1)


@flow("hand_fp8_dyn_tt_F")
class PerTensorFunctional(Float8TensorLinear):
    """dynamic per-tensor x per-tensor, F.scaled_mm TensorWise"""

    def forward(self, x: Tensor) -> Tensor:
        kind = F.ScalingType.TensorWise
        codes, scale = quantize_per_tensor(x.reshape(-1, x.shape[-1]))
        y = F.scaled_mm(
            codes, self.weight.t(), scale, kind, self.weight_scale, kind, bias=self.bias, output_dtype=x.dtype
        )
        return y.reshape(*x.shape[:-1], -1)


@flow("hand_fp8_row", group="developers")
class PerToken(Float8RowLinear):
    """per-token x per-channel, torch._scaled_mm row-wise"""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_token(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(codes, self.weight.t(), scale, self.weight_scale.t(), bias=self.bias, out_dtype=x.dtype)
        return y.reshape(*x.shape[:-1], -1)


@flow("hand_fp8_row_F", group="developers")
class PerTokenFunctional(Float8RowLinear):
    """per-token x per-channel, F.scaled_mm RowWise"""

    def forward(self, x: Tensor) -> Tensor:
        kind = F.ScalingType.RowWise
        codes, scale = quantize_per_token(x.reshape(-1, x.shape[-1]))
        y = F.scaled_mm(
            codes, self.weight.t(), scale, kind, self.weight_scale.t(), kind, bias=self.bias, output_dtype=x.dtype
        )
        return y.reshape(*x.shape[:-1], -1)


@flow("hand_fp8_block_smm", gpu_only=True)
class BlockScaledMm(Float8BlockLinear):
    """DeepSeek's 1x128 by 128x128, torch._scaled_mm with column-major scales; runs on sm90 only"""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_group(x.reshape(-1, x.shape[-1]), column_major=True)
        y = torch._scaled_mm(codes, self.weight.t(), scale_a=scale, scale_b=self.weight_scale.t(), out_dtype=x.dtype)
        return self.plus_bias(y).reshape(*x.shape[:-1], -1)


@flow("hand_fp8_block_dq", group="developers")
class BlockDequantized(Float8BlockLinear):
    """1x128 by 128x128, both operands dequantized, then F.linear in the activation's dtype"""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_group(x)
        decoded = (codes.float().unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)).flatten(-2).to(x.dtype)
        tiled = self.weight_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return F.linear(decoded, (self.weight.float() * tiled).to(x.dtype), self.bias)


@flow(
    "hand_fp8_block_loop",
    expected="unsupported",
    why="one matmul for each 128x128 tile in a Python loop, summed one by one",
    matmuls=6,
)
class BlockLoop(Float8BlockLinear):
    """vLLM's native_w8a8_block_matmul: a Python loop over tiles, C += (A_i @ B_ji.t()) * scales"""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_group(x.reshape(-1, x.shape[-1]))
        a, b = codes.float(), self.weight.float()
        columns = []
        for j in range(self.n // 128):
            column: Tensor | int = 0
            for i in range(self.k // 128):
                along_k = slice(i * 128, (i + 1) * 128)
                tile = a[:, along_k] @ b[j * 128 : (j + 1) * 128, along_k].t()
                column = column + tile * (scale[:, i : i + 1] * self.weight_scale[j, i])
            columns.append(column)
        return self.plus_bias(torch.cat(columns, 1).to(x.dtype)).reshape(*x.shape[:-1], -1)


@flow("hand_fp8_block_w8a16", expected="recognised", why=NOT_FASTER)
class BlockWeightOnly(Float8BlockLinear):
    """DeepSeek's weight_dequant: 128x128 weight-only, decoded in float32, then F.linear"""

    def forward(self, x: Tensor) -> Tensor:
        tiles = self.weight.view(self.n // 128, 128, self.k // 128, 128).to(torch.float32)
        weight = (tiles * self.weight_scale[:, None, :, None]).view(self.n, self.k).to(x.dtype)
        return F.linear(x, weight, self.bias)


@flow("hand_fp8_w8a16", group="developers", expected="recognised", why=NOT_FASTER)
class WeightOnlyDecoded(Float8RowLinear):
    """weight-only, the weight decoded in the activation's dtype before F.linear"""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale.to(x.dtype), self.bias)


@flow("hand_fp8_w8a16_post", expected="recognised", why=NOT_FASTER)
class WeightOnlyScaledAfter(Float8RowLinear):
    """weight-only, F.linear(x, weight.to(x.dtype)) * scales"""

    def forward(self, x: Tensor) -> Tensor:
        return self.plus_bias(F.linear(x, self.weight.to(x.dtype)) * self.weight_scale.t().to(x.dtype))


@flow("hand_fp8_qdq")
class FakeQuant(Float8RowLinear):
    """per-token x per-channel, both operands quantized and dequantized, then F.linear"""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_token(x)
        decoded = codes.to(x.dtype) * scale.to(x.dtype)
        return F.linear(decoded, self.weight.to(x.dtype) * self.weight_scale.to(x.dtype), self.bias)


@flow("qkv3_hand_fp8_row", matmuls=3)
def per_token_qkv(dtype: torch.dtype, bias: bool) -> SameInput:
    """three hand_fp8_row on one input"""
    return SameInput(*(PerToken(dtype, bias) for _ in range(3)))


@flow("qkv3_hand_fp8_dyn_tt", matmuls=3)
def per_tensor_qkv(dtype: torch.dtype, bias: bool) -> SameInput:
    """three hand_fp8_dyn_tt on one input"""
    return SameInput(*(PerTensor(dtype, bias) for _ in range(3)))
