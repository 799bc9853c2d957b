"""Small quantized modules: ``POSITIVE`` must be recognised, ``ADVERSARIAL`` look almost like them and must keep their meaning.

Every module takes ``x[..., k]`` and is built deterministically by ``build(name, dtype, bias)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

K, N = 64, 48
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# The floor that vLLM puts under a float8 scale.
VLLM_SCALE_FLOOR = 1.0 / (E4M3_MAX * 512.0)

Builder = Callable[..., nn.Module]


def require_uint8_int_mm() -> None:
    """Skip the test that calls this where torch cannot multiply the uint8 codes of an asymmetric activation."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    try:
        torch._int_mm(codes, codes.to(torch.int8))
    except RuntimeError as error:
        if "Expected self dtype to be of type int8" not in str(error):
            raise
        pytest.skip("torch._int_mm takes no uint8 codes before torch 2.12")


# --- deterministic data -----------------------------------------------------------------------------------------


def inputs(dtype: torch.dtype = torch.bfloat16, ndim: int = 2, rows: int = 24, k: int = K, seed: int = 0) -> Tensor:
    """``[rows, k]``, with ``2`` before it for each further dim; rows differ in magnitude, so their scales do too."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*(2,) * (ndim - 2), rows, k) if ndim > 1 else (k,)
    magnitude = torch.logspace(-1, 1, rows).unsqueeze(-1) if ndim > 1 else 1.0
    return (torch.randn(shape, generator=generator) * magnitude).to(dtype)


def image_inputs(dtype: torch.dtype = torch.bfloat16, ndim: int = 2, rows: int = 24, k: int = K) -> Tensor:
    """Pixels: uint8 ``[rows, k]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*(2,) * (ndim - 2), rows, k), generator=generator, dtype=torch.uint8)


def square_inputs(dtype: torch.dtype = torch.bfloat16, ndim: int = 2, rows: int = N, k: int = K) -> Tensor:
    """As many rows as the linear has output features, so that a bias fits along either side."""
    return inputs(dtype, 2, N, k)


def float_weight(n: int, k: int, seed: int) -> Tensor:
    """A float32 weight ``[n, k]`` whose rows differ in magnitude."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(n, k, generator=generator) * torch.linspace(0.02, 0.2, n).unsqueeze(-1)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes ``[n, k]`` and one scale per row ``[n]``."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().clamp(-128, 127).to(torch.int8), scale


def float8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 codes ``[n, k]`` and one scale per row ``[n, 1]``."""
    scale = weight.abs().amax(1, keepdim=True) / E4M3_MAX
    return (weight / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def float8_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 codes ``[n, k]`` and one scale ``[]``."""
    scale = weight.abs().amax() / E4M3_MAX
    return (weight / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


class Quantized(nn.Module):
    """Holds ``weight`` (codes ``[n, k]``), ``weight_scale`` and ``bias``."""

    quantize_weight = staticmethod(int8_rows)

    def __init__(self, dtype: torch.dtype, bias: bool, k: int = K, n: int = N, seed: int = 0) -> None:
        super().__init__()
        codes, scale = self.quantize_weight(float_weight(n, k, seed))
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        values = torch.linspace(-1, 1, n).to(dtype)
        self.bias = nn.Parameter(values, requires_grad=False) if bias else None

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


# --- int8 -------------------------------------------------------------------------------------------------------


class Int8Linear(Quantized):
    """Per-token dynamic int8: absmax / 127 in float32 with a floor, divide, round, clamp, ``_int_mm``, scale, bias, cast.

    Subclasses replace one step.
    """

    def choose_scale(self, x: Tensor) -> Tensor:
        return (x.abs().amax(-1, keepdim=True).float() / 127.0).clamp(min=1e-5)

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.round(x.float() / scale).clamp(-128, 127).to(torch.int8)

    def product(self, codes: Tensor) -> Tensor:
        return torch._int_mm(codes, self.weight.t())

    def epilogue(self, acc: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return self.add_bias(acc.float() * scale * self.weight_scale).to(dtype)

    def rows(self, x: Tensor) -> Tensor:
        scale = self.choose_scale(x)
        return self.epilogue(self.product(self.quantize(x, scale)), scale, x.dtype)

    def forward(self, x: Tensor):
        return self.rows(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Int8ScalesFirst(Int8Linear):
    """``acc * (x_scale * weight_scale)``."""

    def epilogue(self, acc, scale, dtype):
        return self.add_bias(acc.float() * (scale * self.weight_scale)).to(dtype)


class Int8BiasAfterCast(Int8Linear):
    """The bias is added in the model's dtype, after the result was rounded to it."""

    def epilogue(self, acc, scale, dtype):
        return self.add_bias((acc.float() * scale * self.weight_scale).to(dtype))


class Int8ColumnFirst(Int8Linear):
    """``acc * weight_scale * x_scale``."""

    def epilogue(self, acc, scale, dtype):
        return self.add_bias(acc.float() * self.weight_scale * scale).to(dtype)


class Int8Static(Int8Linear):
    """One calibrated activation scale."""

    def __init__(self, dtype, bias, **sizes):
        super().__init__(dtype, bias, **sizes)
        self.register_buffer("x_scale", torch.tensor(0.05))

    def choose_scale(self, x):
        return self.x_scale


# --- float8 -----------------------------------------------------------------------------------------------------


class Fp8Linear(Quantized):
    """Float8 through ``torch._scaled_mm`` with its own scales and bias."""

    quantize_weight = staticmethod(float8_tensor)

    def choose_scale(self, x: Tensor) -> Tensor:
        return x.abs().amax().float().clamp(min=1e-12) / E4M3_MAX

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)

    def product(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return torch._scaled_mm(
            codes, self.weight.t(), scale_a=scale, scale_b=self.weight_scale, bias=self.bias, out_dtype=dtype
        )

    def rows(self, x: Tensor) -> Tensor:
        scale = self.choose_scale(x)
        return self.product(self.quantize(x, scale), scale, x.dtype)

    def forward(self, x: Tensor):
        return self.rows(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Fp8Static(Fp8Linear):
    """One calibrated activation scale."""

    def __init__(self, dtype, bias, **sizes):
        super().__init__(dtype, bias, **sizes)
        self.register_buffer("x_scale", torch.tensor(0.02))

    def choose_scale(self, x):
        return self.x_scale


class Fp8Row(Fp8Linear):
    """One scale per row of ``x`` and one per row of the weight."""

    quantize_weight = staticmethod(float8_rows)

    def choose_scale(self, x):
        return (x.abs().amax(-1, keepdim=True).float() / E4M3_MAX).clamp(min=1e-12)

    def product(self, codes, scale, dtype):
        return torch._scaled_mm(
            codes, self.weight.t(), scale_a=scale, scale_b=self.weight_scale.t(), bias=self.bias, out_dtype=dtype
        )


class VllmPerTensor(Fp8Linear):
    """The per-tensor path of vLLM's ``Fp8LinearOp``: multiply by the reciprocal, mm, narrow, view."""

    def choose_scale(self, x):
        return (x.abs().max().unsqueeze(-1).float() / E4M3_MAX).clamp(min=VLLM_SCALE_FLOOR)

    def quantize(self, x, scale):
        return (x.float() * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)

    def product(self, codes, scale, dtype):
        return torch._scaled_mm(
            codes, self.weight.t(), out_dtype=dtype, scale_a=scale, scale_b=self.weight_scale.view(1), bias=self.bias
        )

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        return torch.narrow(self.rows(rows), 0, 0, rows.shape[0]).view(*x.shape[:-1], self.weight.shape[0])


class VllmPerToken(VllmPerTensor):
    """The row-wise path of vLLM's ``Fp8LinearOp``."""

    quantize_weight = staticmethod(float8_rows)

    def choose_scale(self, x):
        return (x.abs().amax(dim=-1).unsqueeze(-1).float() / E4M3_MAX).clamp(min=VLLM_SCALE_FLOOR)

    def product(self, codes, scale, dtype):
        return torch._scaled_mm(
            codes, self.weight.t(), out_dtype=dtype, scale_a=scale, scale_b=self.weight_scale.t(), bias=self.bias
        )


class VllmChannelwise(VllmPerToken):
    """The fallback of vLLM's ``Fp8LinearOp``: unit scales into float32, narrow, then dequantize in the open."""

    def __init__(self, dtype, bias, **sizes):
        super().__init__(dtype, bias, **sizes)
        self.register_buffer("identity", torch.ones(1))

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        scale = self.choose_scale(rows)
        codes = self.quantize(rows, scale)
        out = torch._scaled_mm(
            codes, self.weight.t(), scale_a=self.identity, scale_b=self.identity, out_dtype=torch.float32
        )
        out = torch.narrow(out, 0, 0, rows.shape[0])
        scale = torch.narrow(scale, 0, 0, rows.shape[0])
        out = self.add_bias(out * scale * self.weight_scale.t())
        return out.to(x.dtype).view(*x.shape[:-1], self.weight.shape[0])


# --- compositions -----------------------------------------------------------------------------------------------


class Qkv(nn.Module):
    """Three linears on one ``x``; each quantizes it anew, as separate modules do."""

    def __init__(self, linear: Builder, dtype, bias, **sizes):
        super().__init__()
        self.q, self.k, self.v = (linear(dtype, bias, seed=seed, **sizes) for seed in range(3))

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


class GeluChain(nn.Module):
    """``x + down(gelu(up(x)))``."""

    def __init__(self, linear: Builder, dtype, bias, k: int = K, n: int = N):
        super().__init__()
        self.up = linear(dtype, bias, k=k, n=n, seed=0)
        self.down = linear(dtype, bias, k=n, n=k, seed=1)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


# --- torchao ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_float8_hardware_check() -> Iterator[None]:
    """torchao asks for a GPU with float8 when it converts; its arithmetic runs on a CPU too."""
    from torchao.quantization import quant_api

    check = quant_api._check_hardware_support
    quant_api._check_hardware_support = lambda *_: None
    try:
        yield
    finally:
        quant_api._check_hardware_support = check


def _torchao(config: Callable[[], object], dtype, bias, k: int = K, n: int = N, seed: int = 0) -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_

    linear = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(float_weight(n, k, seed))
        if bias:
            linear.bias.copy_(torch.linspace(-1, 1, n))
    model = nn.Sequential(linear.to(dtype)).eval().requires_grad_(False)
    with _without_float8_hardware_check():
        quantize_(model, config())
    return model


def _torchao_int8():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    # torchao would otherwise change Inductor's options for the whole process.
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _torchao_float8(granularity: str):
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig
    from torchao.quantization import granularity as granularities

    return Float8DynamicActivationFloat8WeightConfig(
        granularity=getattr(granularities, granularity)(), set_inductor_config=False
    )


# --- must be recognised -----------------------------------------------------------------------------------------


def _formula(**arguments: object) -> Mapping[str, object]:
    return MappingProxyType(arguments)


_INT8_FORMULA = _formula(
    dtype=torch.int8,
    granularity="per_token",
    divisor=127.0,
    divide_dtype=torch.float32,
    floor=1e-5,
    floor_on="scale",
    scale_dtype=torch.float32,
    reciprocal=False,
    lo=-128.0,
    hi=127.0,
)
_FP8_FORMULA = _formula(
    dtype=E4M3,
    granularity="per_tensor",
    divisor=E4M3_MAX,
    divide_dtype=torch.float32,
    floor=1e-12,
    floor_on="amax",
    scale_dtype=torch.float32,
    reciprocal=False,
    lo=-E4M3_MAX,
    hi=E4M3_MAX,
)
_FP8_ROW_FORMULA = _formula(**{**_FP8_FORMULA, "granularity": "per_token", "floor_on": "scale"})
_VLLM_FORMULA = _formula(**{**_FP8_FORMULA, "floor_on": "scale", "floor": VLLM_SCALE_FLOOR, "reciprocal": True})
_VLLM_TOKEN_FORMULA = _formula(**{**_VLLM_FORMULA, "granularity": "per_token"})


@dataclass(frozen=True)
class Positive:
    """A module whose quantized matmuls must all be found.

    Args:
        build: ``build(dtype, bias, k=, n=) -> module``.
        scheme: every site's scheme, printed.
        formula: arguments of ``fx_quant::quantize.dynamic`` that restate its dynamic quantization, None where it is
            static or belongs to a library whose formula may change.
        sites: quantized matmuls in one forward.
        dtypes: activation dtypes that the module works with.
    """

    build: Builder
    scheme: str
    formula: Mapping[str, object] | None = None
    sites: int = 1
    dtypes: tuple[torch.dtype, ...] = FLOATS


_INT8_TOKEN = "int8 per_token (dynamic) x int8 per_channel"
_FP8_TENSOR = "float8_e4m3fn per_tensor (dynamic) x float8_e4m3fn per_tensor"
_FP8_TOKEN = "float8_e4m3fn per_token (dynamic) x float8_e4m3fn per_channel"

POSITIVE: Mapping[str, Positive] = MappingProxyType(
    {
        "int8_int_mm": Positive(Int8Linear, _INT8_TOKEN, _INT8_FORMULA),
        "int8_int_mm_scales_first": Positive(Int8ScalesFirst, _INT8_TOKEN, _INT8_FORMULA),
        "int8_int_mm_bias_after_cast": Positive(Int8BiasAfterCast, _INT8_TOKEN, _INT8_FORMULA),
        "int8_int_mm_col_first": Positive(Int8ColumnFirst, _INT8_TOKEN, _INT8_FORMULA),
        "int8_int_mm_static": Positive(Int8Static, "int8 per_tensor (static) x int8 per_channel"),
        "fp8_scaled_mm_tensor": Positive(Fp8Linear, _FP8_TENSOR, _FP8_FORMULA),
        "fp8_scaled_mm_tensor_static": Positive(Fp8Static, _FP8_TENSOR.replace("dynamic", "static")),
        "fp8_scaled_mm_row": Positive(Fp8Row, _FP8_TOKEN, _FP8_ROW_FORMULA),
        "fp8_vllm_per_tensor": Positive(VllmPerTensor, _FP8_TENSOR, _VLLM_FORMULA),
        "fp8_vllm_per_token": Positive(VllmPerToken, _FP8_TOKEN, _VLLM_TOKEN_FORMULA),
        "fp8_vllm_channelwise": Positive(VllmChannelwise, _FP8_TOKEN, _VLLM_TOKEN_FORMULA),
        "torchao_int8": Positive(partial(_torchao, _torchao_int8), _INT8_TOKEN),
        "torchao_fp8_tensor": Positive(partial(_torchao, partial(_torchao_float8, "PerTensor")), _FP8_TENSOR),
        "torchao_fp8_row": Positive(
            partial(_torchao, partial(_torchao_float8, "PerRow")), _FP8_TOKEN, dtypes=(torch.bfloat16,)
        ),
        "qkv_shared": Positive(partial(Qkv, Int8Linear), _INT8_TOKEN, _INT8_FORMULA, sites=3),
        "qkv_shared_fp8": Positive(partial(Qkv, Fp8Row), _FP8_TOKEN, _FP8_ROW_FORMULA, sites=3),
        "int8_gelu_chain": Positive(partial(GeluChain, Int8Linear), _INT8_TOKEN, _INT8_FORMULA, sites=2),
    }
)


# --- must keep their meaning ------------------------------------------------------------------------------------


class NoRound(Int8Linear):
    """The cast to int8 truncates toward zero."""

    def quantize(self, x, scale):
        return (x.float() / scale).clamp(-128, 127).to(torch.int8)


class FloorInsteadOfRound(Int8Linear):
    def quantize(self, x, scale):
        return torch.floor(x.float() / scale).clamp(-128, 127).to(torch.int8)


class ClampAtZero(Int8Linear):
    def quantize(self, x, scale):
        return torch.round(x.float() / scale).clamp(0, 127).to(torch.int8)


class NarrowRange(Int8Linear):
    """A tighter scale, so that -128 would be reached if the clamp did not stop at -127."""

    def choose_scale(self, x):
        return (x.abs().amax(-1, keepdim=True).float() / 150.0).clamp(min=1e-5)

    def quantize(self, x, scale):
        return torch.round(x.float() / scale).clamp(-127, 127).to(torch.int8)


class HalfScaleDivision(Int8Linear):
    """``amax / 127`` is rounded to the activation's dtype before it becomes float32."""

    def choose_scale(self, x):
        return (x.abs().amax(-1, keepdim=True) / 127.0).float().clamp(min=1e-5)


class OtherXScale(Int8Linear):
    def rows(self, x):
        scale = self.choose_scale(x * 2)
        return self.epilogue(self.product(self.quantize(x, scale)), scale, x.dtype)


class NarrowAccumulator(Int8Linear):
    def epilogue(self, acc, scale, dtype):
        return self.add_bias(acc.to(torch.bfloat16) * scale * self.weight_scale).to(dtype)


class NarrowBetweenScales(Int8Linear):
    def epilogue(self, acc, scale, dtype):
        return self.add_bias((acc.float() * scale).to(torch.bfloat16) * self.weight_scale).to(dtype)


class NarrowDequantScale(Int8Linear):
    """Quantized with a float32 scale, dequantized with that scale rounded to bfloat16."""

    def epilogue(self, acc, scale, dtype):
        return super().epilogue(acc, scale.to(torch.bfloat16).float(), dtype)


class ExpandedRows(Int8Linear):
    """One row of ``x`` is quantized and repeated."""

    def rows(self, x):
        scale = self.choose_scale(x[:1])
        codes = self.quantize(x[:1], scale).expand(x.shape[0], -1).contiguous()
        return self.epilogue(self.product(codes), scale, x.dtype)


class ScaleTimes(Int8Linear):
    def epilogue(self, acc, scale, dtype):
        return super().epilogue(acc, scale * 1.5, dtype)


class FlippedScale(Int8Linear):
    """Row i is dequantized with the scale of row m - 1 - i."""

    def epilogue(self, acc, scale, dtype):
        return super().epilogue(acc, scale.flip(0), dtype)


class ColumnAmax(Int8Linear):
    """The scale that quantizes varies along k, so no scale after the sum undoes it."""

    def rows(self, x):
        column_scale = (x.abs().amax(0, keepdim=True).float() / 127.0).clamp(min=1e-5)
        codes = self.quantize(x, column_scale)
        return self.epilogue(self.product(codes), self.choose_scale(x), x.dtype)


class BiasAlpha(Int8Linear):
    def epilogue(self, acc, scale, dtype):
        return torch.add(acc.float() * scale * self.weight_scale, self.bias, alpha=3).to(dtype)


class AccumulatorReturned(Int8Linear):
    def forward(self, x):
        x = x.reshape(-1, x.shape[-1])
        scale = self.choose_scale(x)
        acc = self.product(self.quantize(x, scale))
        return self.epilogue(acc, scale, x.dtype), acc


class CodesReturned(Int8Linear):
    def forward(self, x):
        x = x.reshape(-1, x.shape[-1])
        scale = self.choose_scale(x)
        codes = self.quantize(x, scale)
        return self.epilogue(self.product(codes), scale, x.dtype), codes


class ScaledReturned(Int8Linear):
    """The product is also used before the bias."""

    def forward(self, x):
        x = x.reshape(-1, x.shape[-1])
        scale = self.choose_scale(x)
        scaled = self.product(self.quantize(x, scale)).float() * scale * self.weight_scale
        return self.add_bias(scaled).to(x.dtype), scaled


class DequantizedAlongK(Int8Linear):
    """Activation codes are decoded with one scale per column k, then a float matmul."""

    def rows(self, x):
        scale = (x.abs().amax(0, keepdim=True).float() / 127.0).clamp(min=1e-5)
        decoded = self.quantize(x, scale).float() * scale
        weight = self.weight.float() * self.weight_scale[:, None]
        return self.add_bias(decoded @ weight.t()).to(x.dtype)


class WeightScaleOnK(Int8Linear):
    """Weight codes are decoded with one scale per input feature, then a float matmul."""

    def __init__(self, dtype, bias, k: int = K, **sizes):
        super().__init__(dtype, bias, k=k, **sizes)
        self.register_buffer("column_scale", torch.linspace(0.01, 0.1, k))

    def rows(self, x):
        scale = self.choose_scale(x)
        decoded = self.quantize(x, scale).float() * scale
        weight = self.weight.float() * self.column_scale
        return self.add_bias(decoded @ weight.t()).to(x.dtype)


class WeightMutated(Int8Linear):
    """The weight changes between quantize and matmul, in every call."""

    def product(self, codes):
        self.weight.bitwise_xor_(1)
        return super().product(codes)


class WeightScaleMutated(Int8Linear):
    """The weight's scale changes between matmul and dequantize, in every call."""

    def epilogue(self, acc, scale, dtype):
        self.weight_scale.mul_(2.0)
        return super().epilogue(acc, scale, dtype)


class XScaleMutated(Int8Static):
    """Quantized with the old scale, dequantized with the new one."""

    def product(self, codes):
        acc = super().product(codes)
        self.x_scale.mul_(2.0)
        return acc


class InputMutated(Int8Linear):
    """``x`` is doubled in place after it was quantized, and its new value joins the result."""

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        scale = self.choose_scale(rows)
        codes = self.quantize(rows, scale)
        x.mul_(2.0)
        out = self.epilogue(self.product(codes), scale, x.dtype).reshape(*x.shape[:-1], -1)
        return out + x.amax(-1, keepdim=True)


class UnrelatedInt8(nn.Module):
    """An int8 mask that was never a quantized anything, then a float linear."""

    def __init__(self, dtype, bias, k: int = K, n: int = N):
        super().__init__()
        self.linear = nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)
        with torch.no_grad():
            self.linear.weight.copy_(float_weight(n, k, 0))
            if bias:
                self.linear.bias.copy_(torch.linspace(-1, 1, n))
        self.register_buffer("mask", (torch.arange(k) % 3 > 0).to(torch.int8))

    def forward(self, x):
        return self.linear(x * self.mask.to(x.dtype))


class Uint8Image(UnrelatedInt8):
    """Pixels divided by 255, then a float linear."""

    def forward(self, x):
        return self.linear(x.to(self.linear.weight.dtype) / 255.0)


class TransposedThenBias(Int8Linear):
    """The bias runs along the rows, since the product was transposed first; needs m == n."""

    def epilogue(self, acc, scale, dtype):
        return self.add_bias((acc.float() * scale * self.weight_scale).t()).to(dtype)


class RowsSwapped(Int8Linear):
    """Rows change places between the matmul and their scale; the shape is the same before and after."""

    def epilogue(self, acc, scale, dtype):
        swapped = acc.view(2, -1, acc.shape[1]).transpose(0, 1).reshape(acc.shape)
        return super().epilogue(swapped, scale, dtype)


class Colsum127(Int8Linear):
    """uint8 codes are 128 higher, but 127 times the column sums of the weight is taken off."""

    offset = 127

    def __init__(self, dtype, bias, **sizes):
        require_uint8_int_mm()
        super().__init__(dtype, bias, **sizes)
        self.register_buffer("colsum", self.colsum_source().to(torch.int32).sum(1, dtype=torch.int32))

    def colsum_source(self) -> Tensor:
        return self.weight

    def product(self, codes):
        shifted = (codes.to(torch.int32) + 128).to(torch.uint8)
        return torch._int_mm(shifted, self.weight.t()) - self.offset * self.colsum


class ColsumOfAnotherWeight(Colsum127):
    """The right offset, but the column sums of another weight."""

    offset = 128

    def colsum_source(self):
        return int8_rows(float_weight(*self.weight.shape, seed=7))[0]


class AddmmBeta(Int8Linear):
    """Dequantize, then ``2 * bias + a @ b``."""

    def rows(self, x):
        scale = self.choose_scale(x)
        decoded = self.quantize(x, scale).float() * scale
        weight = self.weight.float() * self.weight_scale[:, None]
        return torch.addmm(self.bias.float(), decoded, weight.t(), beta=2).to(x.dtype)


_ALL = frozenset({"a_scale", "b_scale", "bias"})
_SCALES = frozenset({"a_scale", "b_scale"})
_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class NearMiss:
    """A module that is nearly a quantized linear; whatever is rewritten, its result stays that of eager.

    Some wrong rewrites are smaller than any honest tolerance, so a test must look at the ops that were emitted.

    Args:
        build: ``build(dtype, bias, k=, n=) -> module``.
        why: what differs from the plain module, and what must hold.
        dynamic: arguments that ``fx_quant::quantize.dynamic`` must carry if it is emitted for the activation; None: it must
            not be emitted.
        codes: ``fx_quant::quantize`` with the graph's own scale may compute the codes.
        gemm: the matmul may become ``fx_quant::scaled_mm``, at least as a raw accumulator.
        folds: operands that ``scaled_mm`` may take over from the graph.
        inputs: makes the module's ``x`` from ``(dtype, ndim, rows)``.
        needs_bias: the module is only defined with a bias.
        mutates: a call changes the module's buffers or its input, so compare fresh copies.
    """

    build: Builder
    why: str
    dynamic: Mapping[str, object] | None = field(default_factory=lambda: _INT8_FORMULA)
    codes: bool = True
    gemm: bool = True
    folds: frozenset[str] = _ALL
    inputs: Callable[..., Tensor] = inputs
    needs_bias: bool = False
    mutates: bool = False


ADVERSARIAL: Mapping[str, NearMiss] = MappingProxyType(
    {
        "no_round": NearMiss(
            NoRound, "the cast truncates: no quantize op, which rounds, may stand in", dynamic=None, codes=False
        ),
        "floor_instead_of_round": NearMiss(
            FloorInsteadOfRound, "floor is not round: no quantize op may stand in", dynamic=None, codes=False
        ),
        "clamp_at_zero": NearMiss(
            ClampAtZero, "negative codes are cut: only with lo=0", dynamic=_formula(**{**_INT8_FORMULA, "lo": 0.0})
        ),
        "range_-127": NearMiss(
            NarrowRange,
            "the range ends at -127 and is reached: only with lo=-127 and divisor 150",
            dynamic=_formula(**{**_INT8_FORMULA, "lo": -127.0, "divisor": 150.0}),
        ),
        "bf16_scale_division": NearMiss(
            HalfScaleDivision,
            "the division rounds to the activation's dtype: only with that divide_dtype (here: bfloat16 models)",
            dynamic=_formula(**{**_INT8_FORMULA, "divide_dtype": torch.bfloat16}),
        ),
        "other_x_scale": NearMiss(
            OtherXScale, "the scale comes from 2 * x: the given-scale quantize only", dynamic=None
        ),
        "narrow_accumulator": NearMiss(
            NarrowAccumulator, "the accumulator is rounded to bfloat16: no scale may move before that", folds=_NOTHING
        ),
        "narrow_between_scales": NearMiss(
            NarrowBetweenScales,
            "bfloat16 rounding stands between the two scales: only the first may fold",
            folds=frozenset({"a_scale"}),
        ),
        "narrow_dequant_scale": NearMiss(
            NarrowDequantScale, "dequantizes with the rounded scale: a_scale must be that one, not the quantize's own"
        ),
        "expanded_rows": NearMiss(
            ExpandedRows, "one row is quantized and repeated: quantizing every row of x is wrong"
        ),
        "scale_times_1p5": NearMiss(ScaleTimes, "a_scale is 1.5 times the scale that quantized"),
        "per_token_scale_flipped": NearMiss(
            FlippedScale, "a_scale is in another order than the rows that it quantized"
        ),
        "column_amax": NearMiss(
            ColumnAmax, "quantized with one scale per k: not per_token, not per_tensor", dynamic=None
        ),
        "bias_alpha_3": NearMiss(
            BiasAlpha, "three times the bias is added: the bias itself may not fold", folds=_SCALES, needs_bias=True
        ),
        "accumulator_has_foreign_user": NearMiss(
            AccumulatorReturned, "the int32 accumulator is an output: it stays, and is computed once", folds=_NOTHING
        ),
        "codes_returned": NearMiss(CodesReturned, "the codes are an output: they stay, bit for bit"),
        "double_use_of_scaled": NearMiss(
            ScaledReturned, "the product is used before the bias too: no bias in it", folds=_SCALES
        ),
        "scale_varies_along_k": NearMiss(
            DequantizedAlongK, "one scale per k cannot leave the sum: a float matmul", dynamic=None, gemm=False
        ),
        "weight_scale_on_k": NearMiss(
            WeightScaleOnK, "one weight scale per k cannot leave the sum: a float matmul", gemm=False
        ),
        "weight_mutated": NearMiss(
            WeightMutated, "the weight changes in every call: nothing of it may be packed or folded", mutates=True
        ),
        "weight_scale_mutated": NearMiss(
            WeightScaleMutated, "b_scale is the buffer's value after mul_, and changes in every call", mutates=True
        ),
        "x_scale_mutated": NearMiss(
            XScaleMutated, "quantized with the old scale, dequantized with the new", dynamic=None, mutates=True
        ),
        "input_mutated": NearMiss(InputMutated, "the codes are those of x before it was doubled", mutates=True),
        "unrelated_int8": NearMiss(
            UnrelatedInt8, "an int8 mask is no quantization", dynamic=None, codes=False, gemm=False
        ),
        "uint8_image": NearMiss(
            Uint8Image, "pixels are no quantization", dynamic=None, codes=False, gemm=False, inputs=image_inputs
        ),
        "product_transposed_then_bias": NearMiss(
            TransposedThenBias, "the bias runs along m", folds=_SCALES, inputs=square_inputs, needs_bias=True
        ),
        "rows_swapped_before_scale": NearMiss(
            RowsSwapped, "the row scale meets other rows than those of the sum", folds=frozenset({"b_scale"})
        ),
        "colsum_127": NearMiss(Colsum127, "codes + 128 corrected by 127: no int8 product equals it", folds=_NOTHING),
        "colsum_of_another_weight": NearMiss(
            ColsumOfAnotherWeight,
            "corrected by another weight's column sums: no int8 product equals it",
            folds=_NOTHING,
        ),
        "addmm_beta_2": NearMiss(
            AddmmBeta, "twice the bias is added: the bias itself may not fold", folds=_SCALES, needs_bias=True
        ),
    }
)


def build(name: str, dtype: torch.dtype = torch.bfloat16, bias: bool = True, k: int = K, n: int = N) -> nn.Module:
    """The module called ``name`` in either table, in eval mode, without gradients."""
    entry = POSITIVE[name] if name in POSITIVE else ADVERSARIAL[name]
    return entry.build(dtype, bias, k=k, n=n).eval().requires_grad_(False)
