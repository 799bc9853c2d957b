"""Weights packed so that a GPU decodes their codes in registers by few instructions, two codes at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.scheme import FLOAT8_DTYPES

_WORDS = 16


@dataclass(frozen=True)
class PackedCodes:
    """A packed weight: ``[blocks, n, 64 bytes]`` of ``block`` codes of each row, so that a tile's part is contiguous.

    A block of integers is planes of 32 codes. Word i of 16 holds codes ``2 i`` and ``2 i + 1`` of every plane, the even
    ones in its low half and the first plane lowest, so that a shift and a mask take a pair of neighbours out of it.
    Blocks of float8 are what they were.

    Args:
        name: what kernels call such codes: ``int4``, ``int8``, ``uint8`` or ``float8``.
        weights: dtypes of the weight that is packed; int4 codes come two to a byte, ``code + 8``, even k low.
        dtype: of the packed tensor; None keeps the weight's.
        block: codes along k of a block.
    """

    name: str
    weights: frozenset[torch.dtype]
    dtype: torch.dtype | None
    block: int

    @property
    def per_byte(self) -> int:
        """Codes in a byte of the weight."""
        return 2 if self.name == "int4" else 1

    @property
    def width(self) -> int:
        """Elements of a row of a block."""
        return self.block if self.dtype is None else _WORDS

    def shape(self, n: int, columns: int) -> tuple[int, int, int]:
        """Shape of a packed weight of ``n`` rows and ``columns`` bytes."""
        return -(-columns * self.per_byte // self.block), n, self.width

    def pack(self, weight: Tensor) -> Tensor:
        """A weight ``[n, bytes]`` of any strides, packed; codes beyond it are finite."""
        stored = weight.contiguous().view(torch.uint8)
        if self.per_byte == 2:
            stored = torch.stack((stored & 0xF, stored >> 4), -1).flatten(1)
        elif self.name == "uint8":
            stored = stored ^ 0x80
        blocks = F.pad(stored, (0, -stored.shape[1] % self.block)).unflatten(1, (-1, self.block)).transpose(0, 1)
        if self.dtype is None:
            return blocks.contiguous().view(weight.dtype)
        # [blocks, n, planes, words, halves] with the planes moved inside the halves.
        ordered = blocks.unflatten(2, (-1, _WORDS, 2)).permute(0, 1, 3, 4, 2)
        if self.per_byte == 2:
            ordered = ordered[..., 0::2] | ordered[..., 1::2] << 4
        return ordered.contiguous().flatten(2).view(self.dtype)

    def unpack(self, packed: Tensor, n: int, columns: int) -> Tensor:
        """The weight ``[n, columns]`` that was packed, columns counted in bytes."""
        stored = packed.view(torch.uint8)
        if self.dtype is not None:
            halves = stored.unflatten(2, (_WORDS, 2, -1))
            if self.per_byte == 2:
                halves = torch.stack((halves & 0xF, halves >> 4), -1).flatten(-2)
            stored = halves.permute(0, 1, 4, 2, 3).flatten(2)
        rows = stored.transpose(0, 1).flatten(1)
        if self.per_byte == 2:
            return (rows[:, 0::2] | rows[:, 1::2] << 4)[:n, :columns]
        rows = rows[:n, :columns].contiguous()
        if self.name == "uint8":
            return rows ^ 0x80
        return rows.view(torch.int8 if self.dtype is not None else packed.dtype)


PACKED_CODES = {
    codes.name: codes
    for codes in (
        PackedCodes("int4", frozenset({torch.uint8}), torch.int32, 128),
        PackedCodes("int8", frozenset({torch.int8}), torch.int32, 64),
        PackedCodes("uint8", frozenset({torch.uint8}), torch.int32, 64),
        PackedCodes("float8", FLOAT8_DTYPES, None, 64),
    )
}
