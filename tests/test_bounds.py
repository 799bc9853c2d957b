"""Integers that are proven to lie within bounds: differences that cannot wrap around, and codes of fewer bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.graphs import assert_same_meaning, prove, trace

N, K, G = 16, 64, 16
U8, I8, I16, I32 = torch.uint8, torch.int8, torch.int16, torch.int32
Codes = Callable[[Tensor, Tensor], Tensor]


def integers(*shape: int, dtype: torch.dtype = I8) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, dtype=dtype)


def said(codes: Codes, dtype: torch.dtype) -> str:
    """What is found of a weight of ``codes``, a zero point for each channel, which must mean what it meant."""

    def graph(x, w, z, s):
        return x @ (codes(w, z).float() * s).t()

    inputs = torch.randn(3, K), integers(N, K, dtype=dtype), integers(N, 1, dtype=dtype), torch.rand(N, 1) + 0.5
    source = trace(graph, *inputs)
    proven = prove(source)
    assert_same_meaning(source, proven.graph, inputs)
    found = [f"{site.words} -> {site.numerics}" for site in proven.found.sites]
    return "; ".join([*found, *(f"miss: {miss.rule}" for miss in proven.found.misses)])


INT4 = "float32 x int4 per_channel asymmetric -> reassociated"
UINT8 = "float32 x uint8 per_channel asymmetric -> reassociated"
FITS: dict[str, tuple[Codes, torch.dtype, str]] = {
    "masked int8": (lambda w, z: (w & 15) - (z & 15), I8, INT4),
    "masked int16": (lambda w, z: (w & 15) - (z & 15), I16, INT4),
    "eight bits in int16": (lambda w, z: (w & 255) - (z & 255), I16, UINT8),
    "bytes in int16": (lambda w, z: w.to(I16) - z.to(I16), U8, UINT8),
    "masked bytes as int8": (lambda w, z: (w & 15).to(I8) - (z & 15).to(I8), U8, INT4),
    "a stored zero point less one": (lambda w, z: (w & 15) - ((z & 15) + 1), I8, INT4),
    "clamped": (lambda w, z: w.clamp(0, 15) - z.clamp(0, 15), I8, INT4),
    "clamped one after the other": (lambda w, z: w.clamp(min=0).clamp(max=15) - z.clamp(0, 15), I8, INT4),
    "the largest difference": (lambda w, z: (w & 127) - (z & 127), I8, "float32 x int8 per_channel asymmetric -> "),
    "shifted": (lambda w, z: (w >> 4) - (z >> 4), I8, INT4),
    "shifted words": (lambda w, z: (w >> 28) - (z >> 28), I32, INT4),
}


@pytest.mark.parametrize(("codes", "dtype", "found"), FITS.values(), ids=FITS)
def test_a_difference_that_fits_its_dtype_does_not_wrap_around(codes, dtype, found):
    assert said(codes, dtype).startswith(found)


def wraps(dtype: torch.dtype) -> str:
    return f"miss: a zero point is subtracted in {dtype}, where the difference may wrap around"


WRAP: dict[str, tuple[Codes, torch.dtype]] = {
    "no mask": (lambda w, z: w - z, I8),
    "one mask": (lambda w, z: (w & 15) - z, I8),
    "a mask of all bits": (lambda w, z: (w & 255) - (z & 15), I8),
    "a negative mask": (lambda w, z: (w & -16) - (z & 15), I8),
    "unsigned": (lambda w, z: (w & 15) - (z & 15), U8),
    "one past the largest": (lambda w, z: (w & 127) - ((z & 127) + 2), I8),
    "clamped too wide": (lambda w, z: w.clamp(-100, 15) - z.clamp(0, 100), I8),
    "clamped at one end": (lambda w, z: w.clamp(min=-15) - z.clamp(max=15), I8),
}


@pytest.mark.parametrize(("codes", "dtype"), WRAP.values(), ids=WRAP)
def test_a_difference_that_may_not_fit_is_missed(codes, dtype):
    assert said(codes, dtype) == wraps(dtype)


NARROW: dict[str, tuple[Codes, torch.dtype, str]] = {
    "the sign of a nibble": (lambda w, z: w << 4 >> 4, I8, "float32 x int4 per_channel -> "),
    "the high nibble": (lambda w, z: w >> 4, I8, "float32 x int4 per_channel -> "),
    "the top of a word": (lambda w, z: w >> 28, I32, "float32 x int4 per_channel -> "),
    "clamped": (lambda w, z: w.clamp(-8, 7), I32, "float32 x int4 per_channel -> "),
    "clamped to a byte": (lambda w, z: w.clamp(-128, 127), I32, "float32 x int8 per_channel -> "),
    "wider than a byte": (lambda w, z: w.clamp(-128, 128), I32, "miss: the weight is decoded from stored codes"),
    "more than a byte of a word": (lambda w, z: w >> 23, I32, "miss: the weight is decoded from stored codes"),
}


@pytest.mark.parametrize(("codes", "dtype", "found"), NARROW.values(), ids=NARROW)
def test_codes_are_of_as_many_bits_as_their_bounds(codes, dtype, found):
    assert said(codes, dtype).startswith(found)


def words_of_gptq(bits: int, kind: torch.dtype) -> Callable[..., Tensor]:
    """Weights as GPTQModel's and auto-round's torch kernels unpack them: int32 words, shifts, a cast, a mask."""

    def graph(x: Tensor, words: Tensor, zero_words: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
        zeros = torch.bitwise_right_shift(zero_words.unsqueeze(2), shifts).to(kind).bitwise_and(2**bits - 1)
        codes = torch.bitwise_right_shift(words.unsqueeze(1), shifts.unsqueeze(-1)).to(kind).bitwise_and(2**bits - 1)
        codes = codes.view(scales.shape[0], -1, scales.shape[1]) - zeros.reshape(scales.shape)[:, None]
        return x @ (scales[:, None] * codes).view(K, N)

    return graph


@pytest.mark.parametrize(("bits", "kind"), [(4, I8), (8, I16)])
def test_words_that_are_unpacked_to_a_narrow_dtype_have_zero_points(bits, kind):
    many = 32 // bits
    inputs = (
        torch.randn(3, K),
        integers(K // many, N, dtype=I32),
        integers(K // G, N // many, dtype=I32),
        torch.rand(K // G, N),
        torch.arange(0, 32, bits, dtype=I32),
    )
    source = trace(words_of_gptq(bits, kind), *inputs)
    proven = prove(source)
    assert_same_meaning(source, proven.graph, inputs)
    assert [site.words for site in proven.found.sites] == [
        f"float32 x {'int4' if bits == 4 else 'uint8'} per_group(16) asymmetric"
    ]


def test_an_activation_that_is_clamped_in_int32_is_quantized():
    def graph(x, w, s):
        scale = x.abs().amax(-1, keepdim=True) / 127
        q = (x / scale).round().to(I32).clamp(-128, 127).to(I8)
        return (q.float() * scale) @ (w.float() * s).t()

    (site,) = prove(trace(graph, torch.randn(3, K), integers(N, K), torch.rand(N, 1))).found.sites
    assert site.words == "int8 per_token (dynamic) x int8 per_channel"
    assert site.codes.meta["val"].dtype is I8
