"""MX and NVFP4 linears by hand: small groups along k with float8 or power-of-two scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.dialects.registry import flow
from tests.dialects.weights import E4M3, E4M3_MAX, HandLinear

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
WHY = "groups of 32 or 16 with their own scales are decoded and multiplied in floating point"


def e2m1_codes(x: Tensor) -> Tensor:
    """The nearest of the sixteen e2m1 codes, uint8: three bits of magnitude, then the sign."""
    nearest = (x.abs()[..., None] - torch.tensor(E2M1)).abs().argmin(-1)
    return (nearest + (x < 0) * 8).to(torch.uint8)


def packed(codes: Tensor) -> Tensor:
    """Two codes in a byte along the last dimension, the even one in the low bits."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def grouped(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``weight`` as ``[n, k / size, size]`` and its largest magnitudes ``[n, k / size, 1]``."""
    groups = weight.view(weight.shape[0], -1, size)
    return groups, groups.abs().amax(-1, keepdim=True)


def swizzled(scales: Tensor) -> Tensor:
    """Block scales ``[rows, groups]`` in the 128x4 tile order of Blackwell, flat."""
    rows, columns = scales.shape
    tall, wide = (rows + 127) // 128, (columns + 3) // 4
    padded = F.pad(scales.view(torch.uint8), (0, wide * 4 - columns, 0, tall * 128 - rows))
    tiles = padded.view(tall, 128, wide, 4).permute(0, 2, 1, 3).reshape(-1, 4, 32, 4)
    return tiles.transpose(1, 2).reshape(-1, 32, 16).flatten().view(scales.dtype)


@flow("hand_mxfp4_gptoss", expected="unsupported", why=WHY)
class MxFp4TableLookup(HandLinear):
    """gpt-oss: uint8 blocks [n, groups, 16], uint8 exponents, a table lookup written into slices, ldexp, F.linear"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        groups, amax = grouped(weight, 32)
        exponent = torch.floor(torch.log2(amax)) - 2
        self.register_buffer("blocks", packed(e2m1_codes(groups / torch.exp2(exponent))))
        self.register_buffer("exponents", (exponent.squeeze(-1) + 127).to(torch.uint8))
        self.register_buffer("table", torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        exponents = (self.exponents.to(torch.int32) - 127).reshape(-1, 1)
        blocks = self.blocks.reshape(-1, 16)
        weight = torch.empty(blocks.shape[0], 32, dtype=self.table.dtype)
        weight[:, 0::2] = self.table[(blocks & 0x0F).to(torch.long)]
        weight[:, 1::2] = self.table[(blocks >> 4).to(torch.long)]
        torch.ldexp(weight, exponents, out=weight)
        return F.linear(x, weight.view(self.n, self.k).to(x.dtype), self.bias)


@flow("hand_mxfp8_emul", expected="unsupported", why=WHY)
class MxFp8Emulated(HandLinear):
    """vLLM's MXFP8 emulation: float8 weight, uint8 exponents of groups of 32, decoded to bfloat16, F.linear"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        groups, amax = grouped(weight, 32)
        exponent = torch.ceil(torch.log2(amax / E4M3_MAX))
        self.register_buffer("weight", (groups / torch.exp2(exponent)).to(E4M3).view(self.n, self.k))
        self.register_buffer("exponents", (exponent.squeeze(-1) + 127).to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.exp2(self.exponents.to(torch.float32) - 127.0)
        groups = self.weight.to(torch.float32).view(self.n, self.k // 32, 32)
        weight = (groups * scale.unsqueeze(-1)).view(self.n, self.k).to(torch.bfloat16)
        return F.linear(x, weight.to(x.dtype), self.bias).to(x.dtype)


@flow("hand_nvfp4_emul", expected="unsupported", why=WHY)
class NvFp4Emulated(HandLinear):
    """vLLM's NVFP4 emulation: e2m1 codes, e4m3 scales of groups of 16 and a global scale, both sides; F.linear"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        groups, amax = grouped(weight, 16)
        global_scale = amax.max() / (E2M1_MAX * E4M3_MAX)
        scale = (amax / E2M1_MAX / global_scale).clamp(max=E4M3_MAX).to(E4M3)
        codes = e2m1_codes(groups / (scale.float() * global_scale))
        self.register_buffer("weight", packed(codes).view(self.n, self.k // 2))
        self.register_buffer("weight_scale", scale.squeeze(-1))
        self.register_buffer("global_scale", global_scale)
        self.register_buffer("x_global_scale", torch.tensor(400.0))
        self.register_buffer("table", torch.tensor(E2M1))

    def decoded_weight(self, dtype: torch.dtype) -> Tensor:
        """``[n, k]``."""
        flat = self.weight.flatten()
        codes = torch.stack((flat & 0x0F, (flat & 0xF0) >> 4), dim=1).flatten()
        sign = torch.where((codes & 8).to(torch.bool), -1.0, 1.0)
        values = self.table[(codes & 7).to(torch.long)] * sign
        scale = (self.weight_scale.to(torch.float32) * self.global_scale).unsqueeze(-1)
        return (values.reshape(self.n, self.k // 16, 16) * scale).reshape(self.n, self.k).to(dtype)

    def fake_quantized(self, x: Tensor) -> Tensor:
        """``x`` through e2m1 codes, rounded by a ladder of comparisons."""
        groups = x.reshape(-1, x.shape[-1] // 16, 16)
        amax = groups.abs().amax(-1, keepdim=True).to(torch.float32)
        scale = (self.x_global_scale * (amax * (1 / E2M1_MAX))).clamp(-E4M3_MAX, E4M3_MAX)
        scale = scale.to(E4M3).to(torch.float32)
        inverse = torch.where(scale == 0, 0.0, 1.0 / (scale * (1.0 / self.x_global_scale)))
        scaled = (groups.to(torch.float32) * inverse).clamp(-E2M1_MAX, E2M1_MAX)
        magnitude = scaled.abs()
        rounded: Tensor | float = E2M1_MAX
        # Halves round to the code with an even significand, so the comparisons alternate.
        for limit, value, inclusive in (
            (5.0, 4.0, True),
            (3.5, 3.0, False),
            (2.5, 2.0, True),
            (1.75, 1.5, False),
            (1.25, 1.0, True),
            (0.75, 0.5, False),
            (0.25, 0.0, True),
        ):
            rounded = torch.where(magnitude <= limit if inclusive else magnitude < limit, value, rounded)
        return (rounded * torch.sign(scaled) * (scale / self.x_global_scale)).reshape(x.shape).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.decoded_weight(x.dtype)
        return F.linear(self.fake_quantized(x), weight, self.bias)


@flow("hand_nvfp4_smm", gpu_only=True, expected="unsupported", why="fp4 codes multiply on sm100 only")
class NvFp4ScaledMm(HandLinear):
    """native NVFP4: torch._scaled_mm on float4_e2m1fn_x2 views with swizzled e4m3 scales, times alpha"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        groups, amax = grouped(weight, 16)
        self.register_buffer("weight", packed(e2m1_codes(groups / (amax / E2M1_MAX))).view(self.n, self.k // 2))
        self.register_buffer("weight_scale", (amax / E2M1_MAX).squeeze(-1).to(E4M3))
        self.register_buffer("alpha", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(-1, x.shape[-1]).unflatten(-1, (-1, 16)).float()
        scale = (groups.abs().amax(-1) / E2M1_MAX).to(E4M3)
        scaled = (groups / scale.float().unsqueeze(-1)).clamp(-E2M1_MAX, E2M1_MAX)
        limits = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        codes = torch.bucketize(scaled.abs(), limits).to(torch.uint8) + (scaled < 0).to(torch.uint8) * 8
        y = torch._scaled_mm(
            packed(codes.flatten(-2)).contiguous().view(torch.float4_e2m1fn_x2),
            self.weight.view(torch.float4_e2m1fn_x2).t(),
            scale_a=swizzled(scale),
            scale_b=swizzled(self.weight_scale),
            out_dtype=x.dtype,
        )
        return self.plus_bias(y * self.alpha).view(*x.shape[:-1], -1)
