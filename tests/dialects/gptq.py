"""int4 weight-only linears: GPTQ's int32 words, two nibbles in a byte, and PyTorch's packed op for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.dialects.hand import NOT_FASTER
from tests.dialects.registry import flow
from tests.dialects.weights import HandLinear, uint4_groups

GROUP = 32


@flow("hand_w4a16_u8pack", group="developers", expected="recognised", why=NOT_FASTER)
class TwoInAByte(HandLinear):
    """asymmetric groups of 32, two nibbles in a uint8: stack, (codes - zero_point) * scale, F.linear"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scale, zero_point = uint4_groups(weight, GROUP)
        self.register_buffer("packed", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("weight_scale", scale.to(dtype))
        self.register_buffer("weight_zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.packed & 15, self.packed >> 4], -1).view(self.n, self.k // GROUP, GROUP)
        centred = codes.to(x.dtype) - self.weight_zero_point[..., None].to(x.dtype)
        return F.linear(x, (centred * self.weight_scale[..., None]).view(self.n, self.k), self.bias)


@flow("hand_w4a16_gptq_i32", expected="unsupported", why="the values of g_idx are not known to a graph")
class Int32Words(HandLinear):
    """GPTQ: int32 qweight [k/8, n] and qzeros [k/32, n/8], shifts by a vector, scales[g] * (codes - zeros[g])"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scale, zero_point = uint4_groups(weight, GROUP)
        codes, zero_point = codes.t().contiguous().int(), zero_point.t().contiguous().int()
        words = torch.zeros(self.k // 8, self.n, dtype=torch.int32)
        zero_words = torch.zeros(self.k // GROUP, self.n // 8, dtype=torch.int32)
        for i in range(8):
            words |= codes[i::8] << (4 * i)
            zero_words |= zero_point[:, i::8] << (4 * i)
        self.register_buffer("qweight", words)
        self.register_buffer("qzeros", zero_words)
        self.register_buffer("scales", scale.to(dtype).t().contiguous())
        self.register_buffer("g_idx", torch.arange(self.k, dtype=torch.int32) // GROUP)
        self.register_buffer("shifts", torch.arange(0, 32, 4, dtype=torch.int32)[None])

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.bitwise_right_shift(self.qzeros.unsqueeze(2).expand(-1, -1, 8), self.shifts.unsqueeze(0))
        zeros = zeros.bitwise_and(15).reshape(self.scales.shape)
        codes = torch.bitwise_right_shift(self.qweight.unsqueeze(1).expand(-1, 8, -1), self.shifts.unsqueeze(-1))
        codes = torch.bitwise_and(codes, 15)
        codes = codes.reshape(codes.shape[0] * codes.shape[1], codes.shape[2])
        group = self.g_idx.long()
        weight = self.scales[group] * (codes - zeros[group])
        y = torch.matmul(x.reshape(-1, x.shape[-1]), weight.to(x.dtype)).reshape(*x.shape[:-1], self.n)
        return self.plus_bias(y)


@flow("hand_w4a16_awq_i32", expected="recognised", why=NOT_FASTER)
class Int32WordsOfColumns(HandLinear):
    """AWQ: int32 qweight [k, n/8] and qzeros [k/32, n/8] along n in AWQ's order, (codes - zeros) * scales by group"""

    # Column i of eight is at nibble ORDER[i]; AWQ's kernels read them so.
    ORDER = (0, 4, 1, 5, 2, 6, 3, 7)

    def words(self, codes: Tensor) -> Tensor:
        """Eight columns of ``codes [rows, n]`` to an int32 word."""
        out = torch.zeros(codes.shape[0], self.n // 8, dtype=torch.int32)
        for column, nibble in enumerate(self.ORDER):
            out |= codes[:, column::8].int() << (4 * nibble)
        return out

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scale, zero_point = uint4_groups(weight, GROUP)
        self.register_buffer("qweight", self.words(codes.t()))
        self.register_buffer("qzeros", self.words(zero_point.t()))
        self.register_buffer("scales", scale.to(dtype).t().contiguous())
        self.register_buffer("shifts", torch.tensor([4 * nibble for nibble in self.ORDER], dtype=torch.int32))

    def unpacked(self, words: Tensor) -> Tensor:
        """Codes ``[rows, n]`` of int32 words ``[rows, n / 8]``."""
        return torch.bitwise_and(words[:, :, None] >> self.shifts, 15).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        codes, zeros = self.unpacked(self.qweight), self.unpacked(self.qzeros)
        zeros = zeros.repeat_interleave(GROUP, 0)
        weight = (codes - zeros).to(x.dtype) * self.scales.repeat_interleave(GROUP, 0)
        y = torch.matmul(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], self.n)
        return self.plus_bias(y)


@flow("hand_w4a16_int4pack_cpu", expected="recognised", why=NOT_FASTER)
class PackedForCpu(HandLinear):
    """gpt-fast's WeightOnlyInt4Linear on a CPU: aten._weight_int4pack_mm_for_cpu"""

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scale, zero_point = uint4_groups(weight, GROUP)
        # The op decodes (codes - 8) * scale + zero.
        scale = scale.to(dtype).float()
        zero = (8 - zero_point.float()) * scale
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
        self.register_buffer("scale_and_zero", torch.stack([scale.t(), zero.t()], -1).to(dtype).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scale_and_zero)
        return self.plus_bias(y.reshape(*x.shape[:-1], self.n))
