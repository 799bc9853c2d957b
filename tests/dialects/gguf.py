"""GGUF's blocks as diffusers decodes them in its forward: records of bytes, shifts by a literal, ``d * q - dmin * m``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.dialects.hand import NOT_FASTER
from tests.dialects.registry import flow
from tests.dialects.weights import HandLinear

F16, UINT8 = torch.float16, torch.uint8


def as_bytes(values: Tensor) -> Tensor:
    """``[blocks]`` or ``[blocks, count]`` of float16 or int8 as bytes ``[blocks, ...]``."""
    return values.reshape(values.shape[0], -1).contiguous().view(UINT8)


def parts(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """``blocks [count, bytes]`` cut into columns of ``sizes`` and the rest."""
    return torch.split(blocks, [*sizes, blocks.shape[1] - sum(sizes)], dim=1)


def scale_of(half: Tensor, dtype: torch.dtype) -> Tensor:
    return half.view(F16).to(dtype)


def shifted(packed: Tensor, width: int, *bits: int) -> Tensor:
    """``packed [blocks, bytes]`` as ``[blocks, ..., len(bits), width]``, each shifted by its bits."""
    by = torch.tensor(bits, device=packed.device, dtype=UINT8).reshape((1, 1, len(bits), 1))
    return packed.reshape((packed.shape[0], -1, 1, width)) >> by


def pairs(codes: Tensor, width: int) -> Tensor:
    """Codes 0..15 ``[blocks, size]`` two to a byte: of ``2 * width`` neighbours the first ``width`` are low."""
    low, high = codes.unflatten(1, (-1, 2, width)).unbind(2)
    return (low | high << 4).flatten(1)


def limits(groups: Tensor) -> tuple[Tensor, Tensor]:
    return groups.amin(-1), groups.amax(-1)


class Blocks(HandLinear):
    """``blocks [n k / size, bytes]``, records of ``size`` weights."""

    size = 32

    def hold(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.register_buffer("blocks", self.encoded(weight.reshape(-1, self.size)))

    def encoded(self, weight: Tensor) -> Tensor:
        """The records of ``weight [blocks, size]``."""
        raise NotImplementedError  # of each kind of block

    def decoded(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """``[blocks, size]``, as diffusers has it."""
        raise NotImplementedError  # of each kind of block

    def forward(self, x: Tensor) -> Tensor:
        weight = self.decoded(self.blocks, x.dtype).reshape(self.n, self.k)
        return F.linear(x, weight, self.bias)


@flow("gguf_q8_0", expected="recognised", why=NOT_FASTER)
class Q8_0(Blocks):
    """34 bytes a block of 32: a float16 scale, int8 codes; d * x"""

    def encoded(self, weight: Tensor) -> Tensor:
        d = (weight.abs().amax(1) / 127).to(F16)
        return torch.cat((as_bytes(d), as_bytes((weight / d[:, None]).round().to(torch.int8))), 1)

    def decoded(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        d, x = parts(blocks, 2)
        return scale_of(d, dtype) * x.view(torch.int8)


@flow("gguf_q4_0", expected="recognised", why=NOT_FASTER)
class Q4_0(Blocks):
    """18 bytes a block of 32: a float16 scale, nibbles; d * (q - 8)"""

    def encoded(self, weight: Tensor) -> Tensor:
        d = (weight.abs().amax(1) / 7).to(F16)
        codes = ((weight / d[:, None]).round() + 8).clamp(0, 15).to(UINT8)
        return torch.cat((as_bytes(d), pairs(codes, 16)), 1)

    def decoded(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        d, qs = parts(blocks, 2)
        codes = (shifted(qs, 16, 0, 4) & 0x0F).reshape((blocks.shape[0], -1)).to(torch.int8) - 8
        return scale_of(d, dtype) * codes


@flow("gguf_q4_1", group="developers", expected="recognised", why=NOT_FASTER)
class Q4_1(Blocks):
    """20 bytes a block of 32: float16 scale and least value, nibbles; d * q + m"""

    def encoded(self, weight: Tensor) -> Tensor:
        low, high = limits(weight)
        d, m = ((high - low) / 15).to(F16), low.to(F16)
        codes = ((weight - m[:, None]) / d[:, None]).round().clamp(0, 15).to(UINT8)
        return torch.cat((as_bytes(d), as_bytes(m), pairs(codes, 16)), 1)

    def decoded(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        d, m, qs = parts(blocks, 2, 2)
        codes = (shifted(qs, 16, 0, 4) & 0x0F).reshape((blocks.shape[0], -1))
        return (scale_of(d, dtype) * codes) + scale_of(m, dtype)


class KQuant(Blocks):
    """Scales and least values of eight groups in six bits each, times one float16 of either."""

    size, levels = 256, 15

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes of d, dmin and the twelve of scales, and codes ``[blocks, 8, 32]``."""
        groups = weight.unflatten(1, (8, 32))
        low, high = limits(groups)
        low = low.clamp(max=0)
        scale, least = (high - low) / self.levels, -low
        d, dmin = ((each.amax(1) / 63).to(F16) for each in (scale, least))
        sc, m = ((each / unit[:, None]).round().clamp(1, 63).to(UINT8) for each, unit in ((scale, d), (least, dmin)))
        step, start = d[:, None].float() * sc, dmin[:, None].float() * m
        codes = ((groups + start[..., None]) / step[..., None]).round().clamp(0, self.levels).to(UINT8)
        tops = [each[:, :4] | each[:, 4:] >> 4 << 6 for each in (sc, m)]
        packed = torch.cat((*tops, sc[:, 4:] & 15 | m[:, 4:] << 4), 1)
        return torch.cat((as_bytes(d), as_bytes(dmin), packed), 1), codes

    def decoded_factors(self, d: Tensor, dmin: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        count = scales.shape[0]
        d_bits, m_bits, both = torch.split(scales.view(UINT8).reshape((count, 3, 4)), 1, dim=-2)
        sc = torch.cat([d_bits & 0x3F, (both & 0x0F) | ((d_bits >> 2) & 0x30)], dim=-1).reshape((count, 8))
        m = torch.cat([m_bits & 0x3F, (both >> 4) | ((m_bits >> 2) & 0x30)], dim=-1).reshape((count, 8))
        scale = (scale_of(d, dtype) * sc).reshape((count, -1, 1))
        return scale, (scale_of(dmin, dtype) * m).reshape((count, -1, 1))


@flow("gguf_q4_k", group="developers", expected="recognised", why=NOT_FASTER)
class Q4K(KQuant):
    """144 bytes a block of 256: d, dmin, eight scales and least values of six bits, nibbles; d sc * q - dmin m"""

    def encoded(self, weight: Tensor) -> Tensor:
        factors, codes = self.factors(weight)
        return torch.cat((factors, pairs(codes.flatten(1), 32)), 1)

    def decoded(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        d, dmin, scales, qs = parts(blocks, 2, 2, 12)
        scale, least = self.decoded_factors(d, dmin, scales, dtype)
        codes = (shifted(qs, 32, 0, 4) & 0x0F).reshape((blocks.shape[0], -1, 32))
        return (scale * codes - least).reshape((blocks.shape[0], self.size))


@flow("gguf_q5_k", expected="recognised", why=NOT_FASTER)
class Q5K(KQuant):
    """176 bytes a block of 256: as Q4_K, the fifth bits of eight groups in a byte"""

    levels = 31

    def encoded(self, weight: Tensor) -> Tensor:
        factors, codes = self.factors(weight)
        fifth = ((codes >> 4) << torch.arange(8, dtype=UINT8)[:, None]).sum(1).to(UINT8)
        return torch.cat((factors, fifth, pairs((codes & 15).flatten(1), 32)), 1)

    def decoded(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        d, dmin, scales, qh, qs = parts(blocks, 2, 2, 12, 32)
        scale, least = self.decoded_factors(d, dmin, scales, dtype)
        low = (shifted(qs, 32, 0, 4) & 0x0F).reshape((blocks.shape[0], -1, 32))
        fifth = (shifted(qh, 32, *range(8)) & 0x01).reshape((blocks.shape[0], -1, 32))
        codes = low | (fifth << 4)
        return (scale * codes - least).reshape((blocks.shape[0], self.size))


@flow("gguf_q6_k", expected="recognised", why=NOT_FASTER)
class Q6K(Blocks):
    """210 bytes a block of 256: nibbles, pairs of bits, int8 scales of 16, one float16; d sc * (q - 32)"""

    size = 256

    def encoded(self, weight: Tensor) -> Tensor:
        groups = weight.unflatten(1, (16, 16))
        scale = groups.abs().amax(-1) / 31
        d = (scale.amax(1) / 127).to(F16)
        sc = (scale / d[:, None]).round().clamp(1, 127).to(torch.int8)
        step = d[:, None].float() * sc
        codes = ((groups / step[..., None]).round() + 32).clamp(0, 63).to(UINT8).flatten(1)
        high = ((codes >> 4).unflatten(1, (2, 4, 32)) << torch.tensor([0, 2, 4, 6], dtype=UINT8)[:, None]).sum(2)
        return torch.cat((pairs(codes & 15, 64), high.flatten(1).to(UINT8), as_bytes(sc), as_bytes(d)), 1)

    def decoded(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        ql, qh, scales, d = parts(blocks, 128, 64, 16)
        scale = (scale_of(d, dtype) * scales.view(torch.int8).to(dtype)).reshape((blocks.shape[0], 16, 1))
        low = (shifted(ql, 64, 0, 4) & 0x0F).reshape((blocks.shape[0], -1, 32))
        high = (shifted(qh, 32, 0, 2, 4, 6) & 0x03).reshape((blocks.shape[0], -1, 32))
        codes = ((low | (high << 4)).to(torch.int8) - 32).reshape((blocks.shape[0], 16, -1))
        return (scale * codes).reshape((blocks.shape[0], self.size))
