"""The linears that ``cpu.py`` times: how a model writes each scheme, the operands, and what is right in float64.

A *case* is one scheme, dtype, shape and number of threads; it has ``layers`` linears of distinct weights on one input,
so that a call of all of them reads the weights from memory, as the decode of a model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_quant.layers.linear import QuantizedLinear
from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.ops import dequantize_weight
from fx_quant.scheme import INT4_DTYPES, Scheme
from fx_quant.weights import pack_int4

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
STATIC_LIMIT = 4.8  # the largest activation that the static scheme's scale was calibrated for

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (2048, 2048), (3072, 768))
ROWS = (1, 4, 16, 64, 256, 1024)
WIDE = 64  # from this many rows on, the weight is no longer what is waited for
WIDE_WORK = (
    2**32
)  # multiply-adds and additions that a call of wide rows has at least, so that it is not the call itself
MOST_LAYERS = 8


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Args:
        scheme: a name of ``KINDS``.
        dtype: of the activation and the result, as in ``torch.float32``'s name.
        rows: every m.
    """

    scheme: str
    dtype: str
    n: int
    k: int
    threads: int
    rows: tuple[int, ...]

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.scheme} {self.dtype} {self.n} x {self.k}, {threads}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` itself."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Kind:
    """How a scheme is written and judged.

    Args:
        scheme: as ``Scheme`` prints; ``{}`` is the activation's dtype.
        bias: whether the linear has one.
        instruction: what multiplies fastest for a bfloat16 activation, and for a float32 one.
    """

    scheme: str
    bias: bool
    instruction: tuple[str, str]

    def parse(self, dtype: str) -> Scheme:
        """The scheme for activations of ``dtype``."""
        return Scheme.parse(self.scheme.format(dtype))


_INT8, _BF16 = ("vpdpbusd", "vpdpbusd"), ("vdpbf16ps", "vdpbf16ps")
_FLOAT = ("vdpbf16ps", "vfmadd231ps")
KINDS: Mapping[str, Kind] = {
    "w8a8": Kind("int8 per_token (dynamic) x int8 per_channel", True, _INT8),
    "w8a8-static": Kind("int8 per_tensor (static) x int8 per_channel", True, _INT8),
    "w8a16": Kind("{} x int8 per_channel", False, _FLOAT),
    "w8a16-g128": Kind("{} x int8 per_group(128)", False, _FLOAT),
    "f8a16": Kind("{} x float8_e4m3fn per_channel", False, _FLOAT),
    "w4a16-g128": Kind("{} x uint4 per_group(128) asymmetric", False, _FLOAT),
    "w4a16-g32": Kind("{} x uint4 per_group(32) asymmetric", False, _FLOAT),
    "w4a8-g32": Kind("int8 per_token (dynamic) x int4 per_group(32)", False, _INT8),
    "fp8": Kind("float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel", True, _BF16),
    "fp8-tensor": Kind("float8_e4m3fn per_tensor (dynamic) x float8_e4m3fn per_tensor", True, _BF16),
    "fp8-block": Kind("float8_e4m3fn per_group(128) x float8_e4m3fn per_block(128, 128)", False, _FLOAT),
}


@dataclass(frozen=True, eq=False)
class Operands:
    """One linear: the codes, and the float weight that they stand for.

    Args:
        codes: ``[n, k]``, for uint4 ``[n, k / 2]`` packed.
        scale: float32, ``[]``, ``[n]`` or one for each block.
        zero_point: for packed codes read as int4, 8 less than those of uint4.
        block: ``(rows, columns)`` that share a scale, where that is neither a tensor nor a channel.
        weight: ``[n, k]`` float32, exactly what the codes mean.
        bias: ``[n]`` float32.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    block: tuple[int, int] | None
    weight: Tensor
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Of what a kernel must read of the weight."""
        return sum(x.nbytes for x in (self.codes, self.scale, self.zero_point) if x is not None)


def make_operands(kind: Kind, dtype: str, n: int, k: int, seed: int) -> Operands:
    """A normal weight ``[n, k]`` of variance ``1 / k`` in the scheme of ``kind``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    return operands_of(kind, dtype, weight, torch.randn(n, generator=generator) / 10 if kind.bias else None)


def operands_of(kind: Kind, dtype: str, weight: Tensor, bias: Tensor | None) -> Operands:
    """The linear of a float ``weight [n, k]``, quantized in the scheme of ``kind`` for activations of ``dtype``."""
    scheme, k = kind.parse(dtype), weight.shape[1]
    found = quantize_weight(weight, scheme.weight)
    codes, zero_point, scale, block = found.codes, found.zero_point, found.scale, scheme.weight.block
    if scheme.weight.dtype in INT4_DTYPES:
        codes = pack_int4(codes)
        zero_point = None if zero_point is None else (zero_point - 8).to(torch.int8)
    if block is None and scale.numel() > 1:
        scale = scale.flatten()
    decoded = dequantize_weight(codes.t(), k, scale.reshape(-1) if block is None else scale, zero_point, block).t()
    return Operands(scheme, codes, scale, zero_point, block, decoded.contiguous(), bias)


def layers_needed(nbytes: int, cache: int) -> int:
    """Layers whose weights together are four times the last-level cache, so that none is still there at its turn.

    At most ``MOST_LAYERS``, for the sake of the compile time; then the timing evicts the cache between rounds.
    """
    return max(1, min(MOST_LAYERS, -(-4 * cache // nbytes)))


def wide_layers_needed(n: int, k: int) -> int:
    """Layers of a call of ``WIDE`` rows or more: in a model one call covers many."""
    return max(1, min(MOST_LAYERS, round(WIDE_WORK / (2 * WIDE * n * k))))


def activation(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Normal ``[m, k]``, always the same."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


# --- how models write them --------------------------------------------------------------------------------------------


def int8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and scales ``[m, 1]``."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (x.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


def float8(x: Tensor, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """float8 codes, and the scales of what shares one along ``dims``, which keep their dims."""
    scale = x.abs().amax(dims, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


class Source(nn.Module):
    """The linear of ``operands`` as a model writes it: ``forward(x[m, k]) -> [m, n]`` in ``x``'s dtype."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, operands: Operands) -> None:
        super().__init__()
        self.block = operands.block
        for name in ("codes", "scale", "zero_point", "bias"):
            self.register_buffer(name, getattr(operands, name))

    def plus_bias(self, y: Tensor) -> Tensor:
        """``y``, with the bias where there is one."""
        return y if self.bias is None else y + self.bias


class Int8Dynamic(Source):
    """Each token to int8, ``torch._int_mm``, scales, bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Signed codes throughout."""
        codes, scale = int8_per_token(x)
        return self.plus_bias(torch._int_mm(codes, self.codes.t()).float() * scale * self.scale).to(x.dtype)


class Uint8Dynamic(Source):
    """``Int8Dynamic`` for ``u8 x s8`` instructions: codes shifted by 128, which the columns' sums correct."""

    def forward(self, x: Tensor) -> Tensor:
        """Written so that Inductor's ``torch._int_mm`` of uint8 takes it."""
        codes, scale = int8_per_token(x)
        weight = self.codes.t()
        acc = torch._int_mm((codes.to(torch.int32) + 128).to(torch.uint8), weight)
        acc = acc - weight.sum(dim=0, keepdim=True, dtype=torch.int32) * 128
        return self.plus_bias(acc.float() * scale * self.scale).to(x.dtype)


class Int8Static(Source):
    """The whole activation by one scale that was calibrated, ``torch._int_mm``, scales, bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Codes beyond ``STATIC_LIMIT`` saturate."""
        scale = STATIC_LIMIT / 127
        codes = torch.clamp(torch.round(x.float() / scale), -128, 127).to(torch.int8)
        return self.plus_bias(torch._int_mm(codes, self.codes.t()).float() * (scale * self.scale)).to(x.dtype)


class WeightOnly(Source):
    """The weight dequantized, then a linear."""

    def forward(self, x: Tensor) -> Tensor:
        """Packed codes are taken apart first."""
        codes = self.codes
        if codes.dtype is torch.uint8:
            codes = torch.stack((codes & 0xF, codes >> 4), -1).flatten(1).to(torch.int8) - 8
        weight = codes.float()
        if self.block is None:
            return F.linear(x, (weight * self.scale[:, None]).to(x.dtype))
        weight = weight.unflatten(1, (-1, self.block[1]))
        if self.zero_point is not None:
            weight = weight - self.zero_point[..., None]
        return F.linear(x, (weight * self.scale[..., None]).flatten(1).to(x.dtype))


class Int8Groups(WeightOnly):
    """Each token to int8 and back, then a linear of the dequantized weight, whose scales are of groups."""

    def forward(self, x: Tensor) -> Tensor:
        """The codes of the activation are multiplied as floats."""
        codes, scale = int8_per_token(x)
        return super().forward(codes.float() * scale).to(x.dtype)


class Float8Tokens(Source):
    """Each token to float8, ``torch._scaled_mm`` with unit scales to float32, then both scales and the bias."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self.register_buffer("one", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """A CPU's ``_scaled_mm`` takes no scale for each row, so the scales come after it."""
        codes, scale = float8(x, -1)
        y = torch._scaled_mm(codes, self.codes.t(), scale_a=self.one, scale_b=self.one, out_dtype=torch.float32)
        return self.plus_bias(y * scale * self.scale).to(x.dtype)


class Float8Tensor(Source):
    """The activation to float8 by one scale, ``torch._scaled_mm`` with both scales, bias."""

    def forward(self, x: Tensor) -> Tensor:
        """One scale on each side."""
        codes, scale = float8(x, (0, 1))
        y = torch._scaled_mm(
            codes, self.codes.t(), scale_a=scale.reshape(()), scale_b=self.scale.reshape(()), out_dtype=x.dtype
        )
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Float8Blocks(Source):
    """Groups of 128 of each token and blocks of 128 x 128 of the weight, both dequantized, then a linear."""

    def forward(self, x: Tensor) -> Tensor:
        """Both n and k must be multiples of 128."""
        assert self.block is not None
        rows, columns = self.block
        codes, scale = float8(x.float().unflatten(1, (-1, columns)), -1)
        weight = self.codes.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        weight = (weight * self.scale[:, None, :, None]).flatten(2).flatten(0, 1)
        return F.linear((codes.float() * scale).flatten(1).to(x.dtype), weight.to(x.dtype))


_SOURCES: Mapping[str, type[Source]] = {
    "w8a8": Int8Dynamic,
    "w8a8-static": Int8Static,
    "w4a8-g32": Int8Groups,
    "fp8": Float8Tokens,
    "fp8-tensor": Float8Tensor,
    "fp8-block": Float8Blocks,
}


def source(scheme: str) -> type[Source]:
    """How a model writes ``scheme``, by its name in ``KINDS``."""
    return _SOURCES.get(scheme, WeightOnly)


def for_fx_quant(case: Case, operands: Operands) -> nn.Module:
    """What the backend is given: the source, or for packed int4 the ``QuantizedLinear`` that keeps it packed."""
    if operands.scheme.weight.dtype not in INT4_DTYPES:
        return source(case.scheme)(operands)
    zero_point = None if operands.zero_point is None else operands.zero_point.int() + 8  # of codes 0..15
    return QuantizedLinear(operands.scheme, operands.codes, operands.scale, weight_zero_point=zero_point)


# --- what is right ----------------------------------------------------------------------------------------------------


def exact(case: Case, operands: Operands, x: Tensor) -> Tensor:
    """The scheme's result in float64, of the activation as the source quantizes it."""
    if case.scheme in ("w8a8", "w4a8-g32"):
        codes, scale = int8_per_token(x)
        decoded = codes.double() * scale.double()
    elif case.scheme == "w8a8-static":
        scale = STATIC_LIMIT / 127
        decoded = torch.clamp(torch.round(x.float() / scale), -128, 127).double() * scale
    elif case.scheme in ("fp8", "fp8-tensor"):
        codes, scale = float8(x, -1 if case.scheme == "fp8" else (0, 1))
        decoded = codes.double() * scale.double()
    elif operands.block is not None and not operands.scheme.weight_only:
        codes, scale = float8(x.float().unflatten(1, (-1, operands.block[1])), -1)
        decoded = (codes.double() * scale.double()).flatten(1)
    else:
        decoded = x.double()
    return in_float64(operands, decoded)


def in_float64(operands: Operands, x: Tensor) -> Tensor:
    """``x`` times what the weight's codes mean, plus the bias, in float64."""
    y = x.double() @ operands.weight.double().t()
    return y if operands.bias is None else y + operands.bias.double()


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, over the layers, of ``norm(got - expected) / norm(expected)``; NaN where a result is not finite."""
    errors = [
        ((y.double().reshape(right.shape) - right).norm() / right.norm()).item()
        for y, right in zip(got, expected, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("nan")
