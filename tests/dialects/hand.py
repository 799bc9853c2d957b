"""int8 linears as people write them by hand: which op multiplies, where the scales meet, how codes are made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.dialects.registry import flow
from tests.dialects.weights import Int8Linear, SameInput, float_weight

NOT_FASTER = "weight-only: the codes are decoded on the way, which pays only where a kernel reads them compressed"


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes ``[..., k]`` and scales ``[..., 1]``: ``amax.clamp(1e-5) / 127`` in float32, divide, round, clamp."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (x.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


class StaticInt8Linear(Int8Linear):
    """And a static activation: ``x_scale`` ``[]`` and ``x_zero_point`` ``[]`` int32."""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().hold(weight, dtype)
        self.register_buffer("x_scale", torch.tensor(0.03))
        self.register_buffer("x_zero_point", torch.tensor(5, dtype=torch.int32))


@flow("hand_i8_intmm_tok", group="developers")
class PerToken(Int8Linear):
    """per-token, torch._int_mm, (acc.float() * x_scale * w_scale + bias).to(dtype)"""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_token(x.reshape(-1, x.shape[-1]))
        y = torch._int_mm(codes, self.weight.t()).float() * scale * self.weight_scale
        return self.plus_bias(y).to(x.dtype).reshape(*x.shape[:-1], -1)


@flow("hand_i8_intmm_static", group="developers")
class StaticPerTensor(StaticInt8Linear):
    """static per-tensor, torch._int_mm, acc * (x_scale * w_scale)"""

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.clamp(torch.round(x / self.x_scale), -128, 127).to(torch.int8)
        acc = torch._int_mm(codes.view(-1, x.shape[-1]), self.weight.t())
        return self.plus_bias(acc * (self.x_scale * self.weight_scale)).to(x.dtype).view(*x.shape[:-1], -1)


@flow("hand_i8_intmm_tok_bf16")
class PerTokenInModelDtype(Int8Linear):
    """per-token, torch._int_mm, every scale and product in the activation's dtype, bias added in place"""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        scale = rows.abs().max(dim=-1, keepdim=True)[0] / 127.0
        codes = torch.round(rows / scale).clamp(-128, 127).to(torch.int8)
        y = torch._int_mm(codes, self.weight.t()).to(x.dtype) * (scale * self.weight_scale.to(x.dtype))
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


@flow("hand_i8_intmm_asym")
class StaticAsymmetric(StaticInt8Linear):
    """static per-tensor with a zero point, corrected on the int32 accumulator by zero_point * colsum(weight)"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().hold(weight, dtype)
        self.register_buffer("column_sum", self.weight.int().sum(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.clamp(torch.round(x.float() / self.x_scale) + self.x_zero_point, -128, 127).to(torch.int8)
        acc = torch._int_mm(codes.reshape(-1, x.shape[-1]), self.weight.t()) - self.x_zero_point * self.column_sum
        y = self.plus_bias(acc.float() * (self.x_scale * self.weight_scale))
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@flow("hand_i8_dyn_asym_tok")
class PerTokenAsymmetric(Int8Linear):
    """per-token with a zero point, x_scale * w_scale * (acc - zero_point * colsum(weight)).float()"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().hold(weight, dtype)
        self.register_buffer("column_sum", self.weight.int().sum(1, dtype=torch.int32)[None])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        scale = (high - low) / 255.0
        zero_point = torch.round(-128.0 - low / scale).to(torch.int32)
        codes = (torch.round(rows / scale) + zero_point).clamp(-128, 127).to(torch.int8)
        acc = torch._int_mm(codes, self.weight.t()) - zero_point * self.column_sum
        y = self.plus_bias(scale * self.weight_scale * acc.float())
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@flow("hand_i8_i32matmul")
class Int32Matmul(Int8Linear):
    """per-token, codes widened to int32 and multiplied by torch.matmul"""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_token(x)
        acc = torch.matmul(codes.to(torch.int32), self.weight.to(torch.int32).t())
        return self.plus_bias(acc.to(torch.float32) * scale * self.weight_scale).to(x.dtype)


@flow("hand_i8_floatmm")
class FloatMatmul(Int8Linear):
    """per-token, codes widened to float32 and multiplied by F.linear, which is exact at this k"""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_token(x)
        y = F.linear(codes.to(torch.float32), self.weight.to(torch.float32)) * (scale * self.weight_scale)
        return self.plus_bias(y).to(x.dtype)


@flow("hand_i8_fakequant_static", group="developers")
class StaticFakeQuant(StaticInt8Linear):
    """static per-tensor with a zero point: both operands dequantized in the activation's dtype, then F.linear"""

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.clamp(torch.round(x / self.x_scale) + self.x_zero_point, -128, 127).to(torch.int8)
        decoded = (codes.to(x.dtype) - self.x_zero_point.to(x.dtype)) * self.x_scale.to(x.dtype)
        weight = self.weight.to(x.dtype) * self.weight_scale[:, None].to(x.dtype)
        return F.linear(decoded, weight, self.bias)


@flow(
    "hand_i8_aten_fakequant",
    expected="unsupported",
    why="fake_quantize ops hold no codes: the weight is float in memory and is quantized in every call",
)
class AtenFakeQuant(StaticInt8Linear):
    """aten.fake_quantize_per_tensor_affine on the activation, _per_channel_affine on a float weight, F.linear"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().hold(weight, dtype)
        self.register_buffer("float_weight", weight)
        self.register_buffer("weight_zero_point", torch.zeros(self.n, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        decoded = torch.fake_quantize_per_tensor_affine(x.float(), self.x_scale, self.x_zero_point, -128, 127)
        weight = torch.fake_quantize_per_channel_affine(
            self.float_weight, self.weight_scale, self.weight_zero_point, 0, -128, 127
        )
        return F.linear(decoded.to(x.dtype), weight.to(x.dtype), self.bias)


@flow("hand_i8_w8a16_pre", expected="recognised", why=NOT_FASTER)
class WeightOnlyDecoded(Int8Linear):
    """weight-only, the weight decoded before F.linear"""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale[:, None].to(x.dtype), self.bias)


class ScaleInModelDtype(Int8Linear):
    """``weight_scale`` in the activation's dtype."""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().hold(weight, dtype)
        self.weight_scale = self.weight_scale.to(dtype)


@flow("gptfast_w8a16", group="developers", expected="recognised", why=NOT_FASTER)
class WeightOnlyScaledAfter(ScaleInModelDtype):
    """gpt-fast's WeightOnlyInt8Linear: F.linear(x, weight.to(x.dtype)) * scales"""

    def forward(self, x: Tensor) -> Tensor:
        return self.plus_bias(F.linear(x, self.weight.to(dtype=x.dtype)) * self.weight_scale)


@flow("hand_i8_weight_int8pack", expected="recognised", why=NOT_FASTER)
class WeightInt8Pack(ScaleInModelDtype):
    """weight-only, torch._weight_int8pack_mm"""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.weight, self.weight_scale)
        return self.plus_bias(y.reshape(*x.shape[:-1], -1))


def qkv(linear: type[Int8Linear], dtype: torch.dtype, bias: bool) -> SameInput:
    """Three of ``linear`` on one input."""
    return SameInput(*(linear(dtype, bias, float_weight()) for _ in range(3)))


@flow("qkv3_hand_i8_intmm_tok", group="developers", matmuls=3)
def per_token_qkv(dtype: torch.dtype, bias: bool) -> SameInput:
    """three hand_i8_intmm_tok on one input: one quantize serves all"""
    return qkv(PerToken, dtype, bias)


@flow("qkv3_hand_i8_fakequant_static", matmuls=3)
def static_fake_quant_qkv(dtype: torch.dtype, bias: bool) -> SameInput:
    """three hand_i8_fakequant_static on one input"""
    return qkv(StaticFakeQuant, dtype, bias)
