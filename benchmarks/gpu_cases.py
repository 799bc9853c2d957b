"""What ``gpu.py`` times: the linears of Llama-3 8B and 70B, their quantization, and their MLPs, with exact references.

A case has several sets of weights, together larger than the GPU's L2 cache, which its calls take in turns. What is
right is computed in float64 from codes that the canonical ops chose, for the first and the last rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fx_quant.kernels.triton.architectures import Architecture
from fx_quant.layers.activation import quantize_activation
from fx_quant.layers.quantize_weight import quantize_weight
from fx_quant.ops import dequantize_weight
from fx_quant.scheme import Scheme
from fx_quant.weights import pack_int4

BF16 = torch.bfloat16
ROWS = (1, 8, 16, 64, 256, 1024, 4096, 8192)
EPS = 1e-5
GROUP = 128
# Rows of each end of a result that are compared; a row depends on no other but through a scale for all.
_SAMPLE = 64
_MOST_LAYERS = 16


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder: hidden state, results of the qkv projection, and of half of gate_up."""

    hidden: int
    qkv: int
    ffn: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """``(n, k)`` of the linears of a layer."""
        return {
            "qkv": (self.qkv, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }


MODELS: Mapping[str, Model] = MappingProxyType({"8B": Model(4096, 6144, 14336), "70B": Model(8192, 10240, 28672)})

# ``{f8}`` is the float8 of the GPU.
RECIPES: Mapping[str, str] = MappingProxyType(
    {
        "tensor": "{f8} per_tensor (dynamic) x {f8} per_tensor",
        "row": "{f8} per_token (dynamic) x {f8} per_channel",
        "block": "{f8} per_group(128) (dynamic) x {f8} per_block(128, 128)",
        "int8": "int8 per_token (dynamic) x int8 per_channel",
        "int8 asym": "int8 per_token asymmetric (dynamic) x int8 per_channel",
        "w8a16": "bfloat16 x int8 per_channel",
        "w4a16": "bfloat16 x int4 per_group(128)",
    }
)
DYNAMIC_RECIPES = ("tensor", "row", "block", "int8", "int8 asym")
CHAIN_RECIPES = ("row", "block")
SECTIONS = ("ceilings", "linears", "chains", "compile")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        section: of ``SECTIONS``.
        what: which operands, such as ``8B qkv``.
        recipe: a name of ``RECIPES``.
        m: rows of the activation.
        n: columns of the result; of the hidden layer for a chain.
        k: columns of the activation.
    """

    section: str
    what: str
    recipe: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.section}: {self.what} {self.recipe}, m = {self.m}"


def cases(section: str, recipes: Sequence[str], models: Sequence[str], rows: Sequence[int]) -> list[Case]:
    """The cases of a section for what was asked; recipes that it does not have are passed over."""
    found = []
    for recipe in recipes:
        for model in models:
            sizes = MODELS[model]
            if section == "linears" and recipe in RECIPES:
                found += [
                    Case(section, f"{model} {name}", recipe, m, n, k)
                    for name, (n, k) in sizes.linears().items()
                    for m in rows
                ]
            if section == "chains" and recipe in CHAIN_RECIPES:
                found += [Case(section, f"{model} MLP", recipe, m, sizes.ffn, sizes.hidden) for m in rows]
    return found


# --- the floor ----------------------------------------------------------------------------------------------------


def weight_bytes(recipe: str, n: int, k: int) -> float:
    """Of codes and scales that a linear reads."""
    if recipe == "w4a16":
        return n * k / 2 + 4 * n * k / GROUP
    return n * k + (4 * n * k / GROUP**2 if recipe == "block" else 4 * n)


def _linear_floor(recipe: str, m: int, n: int, k: int, on: Architecture) -> tuple[float, float]:
    """Seconds of the products, and of the bytes: bfloat16 in, codes, bfloat16 out."""
    dtype = BF16 if recipe.endswith("a16") else torch.int8 if recipe.startswith("int8") else torch.float8_e4m3fn
    return 2.0 * m * n * k / on.rate(dtype), (weight_bytes(recipe, n, k) + 2 * m * (n + k)) / on.bandwidth


def floor(case: Case, on: Architecture) -> tuple[float, str]:
    """Microseconds that no kernel can beat there, and whether ``memory`` or ``compute`` is what limits."""
    if case.section == "chains":
        shapes = ((2 * case.n, case.k), (case.k, case.n))
        parts = [_linear_floor(case.recipe, case.m, n, k, on) for n, k in shapes]
    else:
        parts = [_linear_floor(case.recipe, case.m, case.n, case.k, on)]
    compute, memory = (sum(part[i] for part in parts) for i in (0, 1))
    return 1e6 * sum(max(part) for part in parts), "compute" if compute > memory else "memory"


# --- operands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weights:
    """One quantized linear.

    Args:
        codes: ``[n, k]``, or packed int4 ``[n, k / 2]``.
        scale: float32, ``[]``, ``[n]`` or one for each block.
        block: ``(rows, columns)`` that share a scale, or None.
        dense: the float weight that the codes stand for, bfloat16.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    block: tuple[int, int] | None
    dense: Tensor

    def decoded(self) -> Tensor:
        """``[k, n]`` in float64."""
        return dequantize_weight(self.codes.t(), self.dense.shape[1], self.scale, None, self.block).double()


@dataclass(frozen=True, eq=False)
class Operands:
    """What the ways of a case compute with.

    Args:
        x: ``[m, k]``, bfloat16.
        layers: sets of weights: one linear each, two for a chain.
        norm: weight of the RMSNorm, ``[k]``.
        residual: like ``x``.
        rows: those that are compared.
        expected: their result with the first set, float64.
    """

    case: Case
    x: Tensor
    layers: Sequence[tuple[Weights, ...]]
    norm: Tensor
    residual: Tensor
    rows: Tensor
    expected: Tensor

    @property
    def scheme(self) -> Scheme:
        """How the case's recipe quantizes."""
        return scheme(self.case.recipe, self.x.device)


def float8(device: torch.device) -> torch.dtype:
    """That of the GPU's tensor cores."""
    amd = device.type == "cuda" and torch.version.hip is not None
    fnuz = amd and "gfx942" in torch.cuda.get_device_properties(device).gcnArchName
    return torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn


def scheme(recipe: str, device: torch.device) -> Scheme:
    """How ``recipe`` quantizes on ``device``."""
    name = str(float8(device)).removeprefix("torch.")
    return Scheme.parse(RECIPES[recipe].format(f8=name))


def layers_needed(nbytes: float, cache: int) -> int:
    """Sets of weights, at least four, that are four times the L2 cache together, up to a number that memory holds."""
    return max(4, min(_MOST_LAYERS, -(-4 * cache // max(int(nbytes), 1))))


def _weights(found: Scheme, n: int, k: int, generator: torch.Generator) -> Weights:
    weight = torch.randn(n, k, generator=generator, device=generator.device) / k**0.5
    quantized, block = quantize_weight(weight, found.weight), found.weight.block
    codes = pack_int4(quantized.codes) if found.weight.packed else quantized.codes
    scale = quantized.scale.flatten() if block is None and quantized.scale.numel() > 1 else quantized.scale
    return Weights(found, codes, scale, block, quantized.dequantize().to(BF16))


def operands(case: Case, device: torch.device, cache: int) -> Operands:
    """Random operands of ``case``, always the same; ``cache`` is the size of the L2 cache in bytes."""
    generator = torch.Generator(device).manual_seed(case.m)
    found = scheme(case.recipe, device)
    shapes: tuple[tuple[int, int], ...] = ((case.n, case.k),)
    if case.section == "chains":
        shapes = ((2 * case.n, case.k), (case.k, case.n))
    count = layers_needed(sum(weight_bytes(case.recipe, n, k) for n, k in shapes), cache)
    layers = [tuple(_weights(found, n, k, generator) for n, k in shapes) for _ in range(count)]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(BF16)

    x, norm, residual = normal(case.m, case.k), normal(case.k), normal(case.m, case.k)
    rows = torch.arange(case.m, device=device)
    rows = torch.cat((rows[:_SAMPLE], rows[_SAMPLE:][-_SAMPLE:]))
    given = Operands(case, x, layers, norm, residual, rows, x)
    return Operands(case, x, layers, norm, residual, rows, reference(given))


# --- what is right ------------------------------------------------------------------------------------------------


def decoded(x: Tensor, found: Scheme) -> Tensor:
    """What the codes of ``x`` stand for, float64; ``x`` itself where the activation stays float."""
    if found.weight_only:
        return x.double()
    codes, scale, zero_point = quantize_activation(x, found.activation)
    values = codes.double() if zero_point is None else codes.double() - zero_point
    if found.activation.group:
        scale = scale.repeat_interleave(found.activation.group, 1)[:, : x.shape[1]]
    return values * scale.double()


def normed(given: Operands) -> Tensor:
    """The RMSNorm of ``x + residual``, bfloat16."""
    total = (given.x + given.residual).float()
    rms = (total.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (total * rms * given.norm.float()).to(BF16)


def reference(given: Operands) -> Tensor:
    """The result of the first weights for the rows that are compared, in float64 but where bfloat16 is stored."""
    rows = given.rows
    if given.case.section == "chains":
        gate_up, down = given.layers[0]
        y = decoded(normed(given), gate_up.scheme)[rows] @ gate_up.decoded()
        return decoded(gated(y.to(BF16)), down.scheme) @ down.decoded()
    (weights,) = given.layers[0]
    return decoded(given.x, weights.scheme)[rows] @ weights.decoded()


def gated(y: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[gate, up]``, as eager rounds it."""
    gate, up = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def relative_error(given: Operands, result: Tensor) -> float:
    """``norm(result - expected) / norm(expected)`` of the compared rows; NaN where a result is not finite."""
    got = result.reshape(-1, result.shape[-1])[given.rows].double()
    error = ((got - given.expected).norm() / given.expected.norm()).item()
    return error if got.isfinite().all() else float("nan")
