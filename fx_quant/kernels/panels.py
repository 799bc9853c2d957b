"""Weights ``[n, k]`` in panels of 64 columns and back, for each order in which the native CPU code reads a panel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 64
_CONTIGUOUS = torch.contiguous_format


# What moves together is copied as one word.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_panels(weight: Tensor, group: int) -> Tensor:
    """``[n, k]`` -> contiguous ``[ceil(n/64), ceil(k/group), 64, group]``, zeros where there is no weight."""
    n, k = weight.shape
    padded = weight if n % PANEL == k % group == 0 else F.pad(weight, (0, -k % group, 0, -n % PANEL))
    panels, groups, word = -(-n // PANEL), -(-k // group), _WORDS.get(group * weight.element_size())
    if word is None or not padded.numel():
        return padded.reshape(panels, PANEL, groups, group).permute(0, 2, 1, 3).clone(memory_format=_CONTIGUOUS)
    columns = _as_words(padded, word).reshape(panels, PANEL, groups)
    packed = columns.new_empty(panels, groups, PANEL)
    for panel in range(panels):
        packed[panel].copy_(columns[panel].t())  # of two dims: block by block
    return packed.view(weight.dtype).reshape(panels, groups, PANEL, group)


def _as_words(x: Tensor, word: torch.dtype) -> Tensor:
    """``x [n, k]`` with what lies side by side as one word; copied where no word begins where it should."""
    times = word.itemsize // x.element_size()
    is_whole = x.stride() == (x.shape[1], 1) and x.storage_offset() % times == 0
    return (x if is_whole else x.clone(memory_format=_CONTIGUOUS).reshape(-1).reshape(x.shape)).view(word)


def from_panels(packed: Tensor, n: int, k: int) -> Tensor:
    """``[n, k]`` of the panels of ``to_panels``."""
    panels, groups, _, group = packed.shape
    return packed.permute(0, 2, 1, 3).reshape(panels * PANEL, groups * group)[:n, :k]


def panel_shape(group: int) -> Callable[[int, int], tuple[int, ...]]:
    """``(n, k)`` to the shape that ``to_panels`` gives."""
    return lambda n, k: (-(-n // PANEL), -(-k // group), PANEL, group)


def byte_panels(weight: Tensor, group: int) -> Tensor:
    """``to_panels`` of codes of a byte each; padding does not know float8."""
    return to_panels(weight.view(torch.uint8), group).view(weight.dtype)


def codes_from_panels(packed: Tensor, n: int, k: int) -> Tensor:
    """``[n, k]`` of the panels of ``byte_panels``."""
    return from_panels(packed.view(torch.uint8), n, k).view(packed.dtype)


def to_amx(weight: Tensor) -> Tensor:
    """``[n, k]`` -> ``[ceil(n/64), ceil(k/64), 4, 16, 16, 4]``: tiles of 16 columns, each as groups of 4 k of them."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % 64, 0, -n % PANEL))
    return padded.reshape(-(-n // PANEL), 4, 16, -(-k // 64), 16, 4).permute(0, 3, 1, 4, 2, 5).contiguous()


def from_amx(packed: Tensor, n: int, k: int) -> Tensor:
    """``[n, k]`` of the tiles of ``to_amx``."""
    panels, steps = packed.shape[:2]
    return packed.permute(0, 2, 4, 1, 3, 5).reshape(panels * PANEL, steps * 64)[:n, :k]


def to_pairs(weight: Tensor) -> Tensor:
    """``[n, k]`` -> ``[ceil(n/64), ceil(k/2), 64, 2]``, half a panel as ``decode_bf16.h`` reads it.

    It has quarters, lanes and columns, of which quarters and lanes change places.
    """
    panels = byte_panels(weight, 2)
    columns = panels.view(torch.uint8).unflatten(2, (2, 2, 4, 4)).transpose(3, 4).flatten(2, 5)
    return columns.contiguous().view(weight.dtype)


def from_pairs(packed: Tensor, n: int, k: int) -> Tensor:
    """``[n, k]`` of the columns of ``to_pairs``."""
    columns = packed.view(torch.uint8).unflatten(2, (2, 4, 2, 4)).transpose(3, 4).flatten(2, 5)
    return from_panels(columns, n, k).view(packed.dtype)


def to_int4_words(weight: Tensor) -> Tensor:
    """``[n, k / 2]`` bytes (code + 8, even k low) -> ``[ceil(n/64), ceil(k/8), 64, 4]``; missing codes are 0."""
    n, pairs = weight.shape
    padded = F.pad(weight, (0, -pairs % 4, 0, -n % PANEL), value=0x88)
    # Bytes b0..b3 of a column hold k 0..7: the even ones are the nibbles of the first two bytes, the odd ones follow.
    quads = padded.reshape(-(-n // PANEL), PANEL, -1, 4).permute(0, 2, 1, 3)
    low, high = quads & 0xF, quads >> 4
    return torch.cat([nibbles[..., 0::2] | nibbles[..., 1::2] << 4 for nibbles in (low, high)], -1)


def from_int4_words(packed: Tensor, n: int, k: int) -> Tensor:
    """``[n, k]`` bytes of the words of ``to_int4_words``."""
    low, high = packed & 0xF, packed >> 4
    nibbles = torch.stack((low, high), -1).flatten(-2)  # even k 0, 2, 4, 6, then odd k
    quads = nibbles[..., :4] | nibbles[..., 4:] << 4
    return from_panels(quads.contiguous(), n, k)


def to_vnni_int4(weight: Tensor) -> Tensor:
    """``[n, k / 2]`` bytes (code + 8, even k low) -> ``[ceil(n/64), ceil(k/8), 256]``; missing codes are 0."""
    bytes_missing = -weight.shape[1] % 4
    padded = F.pad(weight, (0, bytes_missing)) if bytes_missing else weight
    if not padded.numel():
        return to_panels(padded, 4).flatten(2)
    # k 0..3 of a column are the low nibbles of four bytes, k 4..7 the high ones.
    words = _as_words(padded, torch.int32)
    columns = _nibbles_in_bytes(words & 0xFFFF) | _nibbles_in_bytes(words >> 16 & 0xFFFF) << 4
    return to_panels(columns.view(torch.uint8), 4).flatten(2)


def _nibbles_in_bytes(words: Tensor) -> Tensor:
    """The four nibbles of the lower half of each word as its four bytes."""
    words = (words | words << 8) & 0x00FF00FF
    return (words | words << 4) & 0x0F0F0F0F


def from_vnni_int4(packed: Tensor, n: int, k: int) -> Tensor:
    """``[n, k]`` bytes of the panels of ``to_vnni_int4``."""
    columns = packed.unflatten(2, (PANEL, 4))
    nibbles = from_panels(torch.cat((columns & 15, columns >> 4), -1), n, 2 * k)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def factor_panels(factor: Tensor) -> Tensor:
    """``[n, groups]`` -> contiguous ``[ceil(n/64), groups, 64]``, zeros where there is no column."""
    n, groups = factor.shape
    padded = F.pad(factor, (0, 0, 0, -n % PANEL))
    return padded.reshape(-(-n // PANEL), PANEL, groups).transpose(1, 2).clone(memory_format=_CONTIGUOUS)
