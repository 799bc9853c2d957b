"""Weights in ggml's blocks, and the decoder as a GGUF file for llama.cpp: its own weights, as that quantizes them.

A block is 32 weights of a row and their float16 scale: Q8_0 holds codes of int8, Q4_0 codes of 0..15 that stand for
``codes - 8``, those of the second half of the block in the high nibbles.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from cpu_decoder import Block, Decoder
from torch import Tensor

BLOCK = 32  # weights that share a scale
ALIGNMENT = 32  # of each tensor in a file
F32, Q4_0, Q8_0 = 0, 2, 8  # ggml's types
TYPES: Mapping[str, int] = {"Q4_0": Q4_0, "Q8_0": Q8_0}
_FILE_TYPES: Mapping[str, int] = {"Q4_0": 2, "Q8_0": 7}


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight in blocks.

    Args:
        codes: int8 ``[n, blocks, 32]``: -127..127 of Q8_0, -8..7 of Q4_0.
        scale: float16 ``[n, blocks]``.
    """

    kind: str
    codes: Tensor
    scale: Tensor

    def stored(self) -> Tensor:
        """The bytes ``[n, bytes of a row]`` as ggml has them."""
        codes = self.codes
        if self.kind == "Q4_0":
            low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
            codes = low | high << 4
        return torch.cat((self.scale[..., None].contiguous().view(torch.uint8), codes.view(torch.uint8)), -1).flatten(1)

    def decoded(self) -> Tensor:
        """What they stand for, float32 ``[n, k]``."""
        return (self.codes.float() * self.scale.float()[..., None]).flatten(1)


def quantized(weight: Tensor, kind: str) -> Blocks:
    """``weight [n, k]`` as llama.cpp quantizes it; k is a multiple of 32."""
    groups = weight.float().unflatten(1, (-1, BLOCK))
    if kind == "Q8_0":
        scale = groups.abs().amax(-1) / 127
    else:
        # The value of the largest magnitude becomes -8, whichever its sign: the scale has the other one.
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8
    codes = groups * torch.where(scale == 0, 0.0, 1 / scale)[..., None]
    codes = codes.round() if kind == "Q8_0" else (codes + 8.5).floor().clamp(max=15) - 8
    return Blocks(kind, codes.to(torch.int8), scale.half())


# --- the decoder ------------------------------------------------------------------------------------------------------


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of a projection whose halves of a head are rotated, for llama.cpp, which rotates neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _tensors(model: Decoder, kind: str) -> Iterator[tuple[str, int, tuple[int, ...], Tensor]]:
    """``(name, type, shape, bytes)`` of each; what is written of a weight is what the model has from then on."""

    def blocks(weight: Tensor) -> Tensor:
        found = quantized(weight, kind)
        weight.copy_(found.decoded())
        return found.stored()

    def matrix(name: str, stored: Tensor, k: int) -> tuple[str, int, tuple[int, ...], Tensor]:
        return f"{name}.weight", TYPES[kind], (stored.shape[0], k), stored

    def norm(name: str, weight: Tensor) -> tuple[str, int, tuple[int, ...], Tensor]:
        return f"{name}.weight", F32, tuple(weight.shape), weight.view(torch.uint8)

    hidden, heads = model.size.hidden, model.size.heads
    yield matrix("token_embd", blocks(model.embedding.weight), hidden)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        q, k, v = blocks(block.qkv.weight).chunk(3)
        yield norm(f"blk.{i}.attn_norm", block.attention_norm.weight)
        yield matrix(f"blk.{i}.attn_q", _neighbours(q, heads), hidden)
        yield matrix(f"blk.{i}.attn_k", _neighbours(k, heads), hidden)
        yield matrix(f"blk.{i}.attn_v", v, hidden)
        yield norm(f"blk.{i}.ffn_norm", block.ffn_norm.weight)
        linears = {"attn_output": block.out, "ffn_gate": block.gate, "ffn_up": block.up, "ffn_down": block.down}
        for name, linear in linears.items():
            yield matrix(f"blk.{i}.{name}", blocks(linear.weight), linear.in_features)
    yield norm("output_norm", model.norm.weight)
    yield matrix("output", blocks(model.head.weight), hidden)


@torch.no_grad()
def write_decoder(model: Decoder, kind: str, path: Path) -> None:
    """The float32 ``model`` as a GGUF file whose matrices are all ``kind``; its weights become what the file holds."""
    size = model.size
    facts: dict[str, str | int | float] = {
        "general.architecture": "llama",
        "general.name": "decoder of the benchmark",
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        "llama.vocab_size": size.vocab,
        "llama.context_length": size.context,
        "llama.embedding_length": size.hidden,
        "llama.block_count": size.layers,
        "llama.feed_forward_length": size.ffn,
        "llama.attention.head_count": size.heads,
        "llama.attention.head_count_kv": size.heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": size.head,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "no_vocab",
    }
    tensors = list(_tensors(model, kind))
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts)))
        for name, value in facts.items():
            file.write(_text(name) + _value(value))
        offset = 0
        for name, type_, shape, stored in tensors:
            # ggml names the fastest dim first.
            file.write(_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
            file.write(struct.pack("<IQ", type_, offset))
            offset += -(-stored.numel() // ALIGNMENT) * ALIGNMENT
        for _, _, _, stored in tensors:
            _align(file)
            stored.contiguous().numpy().tofile(file)
        _align(file)


def _align(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: str | int | float) -> bytes:
    """A fact's type and value: a string, uint32 or float32."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)
