"""A decoder of Llama's kind with random weights, which the models' benchmark runs: one token, or a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Of a decoder; ``context`` is the length of its static cache."""

    hidden: int = 2048
    layers: int = 6
    ffn: int = 5632
    heads: int = 16
    vocab: int = 32000
    context: int = 256

    @property
    def head(self) -> int:
        """Features of one head."""
        return self.hidden // self.heads


class Norm(nn.Module):
    """RMS norm over the last dim, computed in float32."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` in its own dtype."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


Rope = tuple[Tensor, Tensor]


def rotated(x: Tensor, rope: Rope) -> Tensor:
    """``x [b, heads, t, head]`` with positions, by ``(cos, sin)``, each ``[1, 1, t, head]``."""
    first, second = x.chunk(2, -1)
    return x * rope[0] + torch.cat((-second, first), -1) * rope[1]


class Block(nn.Module):
    """Attention and gated feed-forward; the cache is the caller's."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm, self.ffn_norm = Norm(size.hidden), Norm(size.hidden)
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden, bias=False)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)
        self.gate = nn.Linear(size.hidden, size.ffn, bias=False)
        self.up = nn.Linear(size.hidden, size.ffn, bias=False)
        self.down = nn.Linear(size.ffn, size.hidden, bias=False)

    def projected(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """``q, k, v``, each ``[b, heads, t, head]``, of ``x [b, t, hidden]``."""
        b, t, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, t, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return rotated(q, rope), rotated(k, rope), v

    def finished(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The block's result, with the keys and values of the whole cache."""
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        normed = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    """``forward(ids[1, t], positions[t]) -> [1, 1, vocab]``, the last token's logits; the cache is updated in place."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocab, size.hidden)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = Norm(size.hidden)
        self.head = nn.Linear(size.hidden, size.vocab, bias=False)
        steps = 1 / 10000 ** (torch.arange(0, size.head, 2).float() / size.head)
        angles = torch.outer(torch.arange(size.context).float(), steps).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for i in range(size.layers):
            for name in ("keys", "values"):
                self.register_buffer(f"{name}_{i}", torch.zeros(1, size.heads, size.context, size.head))

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """``(cos, sin)`` of the positions."""
        return self.cos[positions][None, None].to(dtype), self.sin[positions][None, None].to(dtype)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Positions must follow those that the cache holds."""
        x = self.embedding(ids)
        rope = self.rope(positions, x.dtype)
        mask = (torch.arange(self.size.context) <= positions[:, None])[None, None]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            q, k, v = block.projected(x, rope)
            keys, values = getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            x = block.finished(x, q, keys, values, mask)
        return self.head(self.norm(x[:, -1:]))


class PastDecoder(nn.Module):
    """A decoder without state, as exporters want it: the cache goes in, and what is new of it comes out.

    ``forward(ids[1, t], past[layers, 2, 1, heads, p, head])`` gives ``logits[1, 1, vocab]`` and what follows ``past``,
    ``[layers, 2, 1, heads, t, head]``.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Positions are those after ``past``."""
        before, count = past.shape[4], ids.shape[1]
        positions = torch.arange(before, before + count)
        x = self.decoder.embedding(ids)
        rope = self.decoder.rope(positions, x.dtype)
        mask = (torch.arange(before + count) <= positions[:, None])[None, None]
        new = []
        for block, (old_keys, old_values) in zip(self.decoder.blocks, past.unbind(), strict=True):
            assert isinstance(block, Block)
            q, k, v = block.projected(x, rope)
            new.append(torch.stack((k, v)))
            x = block.finished(x, q, torch.cat((old_keys, k), 2), torch.cat((old_values, v), 2), mask)
        return self.decoder.head(self.decoder.norm(x[:, -1:])), torch.stack(new)


def decoder(size: Size) -> Decoder:
    """Random weights, always the same: normal, of variance ``1 / k``."""
    torch.manual_seed(0)
    model = Decoder(size).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model
