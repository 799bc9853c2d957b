"""What codes stand for: ``(codes - zero_point) * scale + offset``, and one code from each nibble.

The one place that says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def decode(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    block: Sequence[int] | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """``(codes - zero_point) * scale + offset`` in float32, each step rounded, of the shape of ``codes``.

    Args:
        codes: of any shape, one code an element; ``[rows, k]`` with ``block``.
        scale: broadcastable to ``codes``; with ``block = (r, c)`` ``[ceil(rows / r), ceil(k / c)]``, where blocks at
            the ends may be cut short.
        zero_point: integers of the shape of ``scale``; None is 0.
        block: rows and columns of ``codes`` that share one scale, or None.
        offset: floats of the shape of ``scale``; None is 0.
    """
    values, shape = codes.to(torch.float32, copy=True), codes.shape
    as_groups = block is not None and block[0] == 1 and shape[1] % block[1] == 0
    if block is not None and as_groups:
        # Groups as a dim of their own, rather than a scale for each code.
        values = values.unflatten(1, (-1, block[1]))

    def spread(factor: Tensor) -> Tensor:
        if as_groups:
            return factor.unsqueeze(-1)
        return factor if block is None else repeat_blocks(factor, block, shape)

    values = values if zero_point is None else values.sub_(spread(zero_point))
    values = values.mul_(spread(scale).float())
    return (values if offset is None else values.add_(spread(offset))).reshape(shape)


def repeat_blocks(values: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """``out[n, k] = values[n // r, k // c]`` for any dtype and sign, such as zero points; nothing is checked."""
    rows, columns = (torch.arange(size, device=values.device) // step for size, step in zip(shape, block, strict=True))
    return values.index_select(0, rows).index_select(1, columns)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """``[..., 2 k]`` of 0..15 from bytes ``[..., k]``, the low nibble of each first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def unpack_codes(b: Tensor, k: int) -> Tensor:
    """Codes ``[k, n]`` of ``b``: itself, or int8 codes -8..7 of nibbles ``[k / 2, n]`` (code + 8, even k low)."""
    if b.shape[0] == k:
        return b
    weight = b.t()  # as it usually lies in memory
    return (unpack_nibbles(weight).to(torch.int8) - 8).t()
