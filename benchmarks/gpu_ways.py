"""Every way in which a case of ``gpu.py`` is computed: ours, PyTorch's, and those of libraries that are installed.

A peer is asked for by a probe, and what is missing is said in the table. Whatever kernel fx_quant itself can select on
the machine, of any provider, is also timed by itself, as ``kernel <name>``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import gpu_sources
import torch
import torch.nn.functional as F
from gpu_cases import BF16, DYNAMIC_RECIPES, Operands, Weights, gated, normed
from gpu_measure import Call, Way
from torch import Tensor

import fx_quant.kernels.triton.scaled_mm_kernels  # noqa: F401  (registers the ops)
from fx_quant.errors import NoKernelError
from fx_quant.kernels.eager import run_kernel, target_of
from fx_quant.kernels.select import Selection, select
from fx_quant.layers.activation import Quantized, quantize_activation
from fx_quant.layers.linear_operands import linear_problem
from fx_quant.ops import column_sums
from fx_quant.scheme import Scheme

fxq = torch.ops.fx_quant

# What leaves the activation as it is misses its quantization: three bits of a float8.
_UNQUANTIZED = 6e-2
_VLLM_LIBRARY = "FX_QUANT_VLLM_LIBRARY"
FAMILIES = ("bf16", "torch", "inductor", "tuned", "kernels", "torchao", "vllm", "deep_gemm", "flashinfer", "humming")


# --- probes -------------------------------------------------------------------------------------------------------


def _always() -> None:
    return None


def package(name: str) -> Callable[[], str | None]:
    """Whether a package is there, without importing it."""

    def needs() -> str | None:
        return None if importlib.util.find_spec(name) is not None else f"the package {name} is not installed"

    return needs


@functools.cache
def vllm() -> str | None:
    """Why vLLM's compiled ops are not here; its library alone is loaded from the path in FX_QUANT_VLLM_LIBRARY."""
    path = os.environ.get(_VLLM_LIBRARY)
    try:
        if path:
            torch.ops.load_library(path)
        else:
            importlib.import_module("vllm._custom_ops")
    except (ImportError, OSError) as error:
        said = str(error).splitlines()[0]
        return f"{said}; name its library in {_VLLM_LIBRARY}" if not path else f"{path} does not load: {said}"
    return None if hasattr(torch.ops._C, "cutlass_scaled_mm") else "its library has no cutlass_scaled_mm"


def humming() -> str | None:
    """Why Humming is not timed."""
    return package("humming")() or "installed, but there is no way to drive it yet: its weight loader was never tried"


# --- activations --------------------------------------------------------------------------------------------------


def quantizer(given: Operands, producer: Callable[..., Tensor] = lambda x: x) -> Callable[..., Quantized]:
    """Codes, scale and zero point of what ``producer`` returns, in the kernel that Inductor makes of both on a GPU."""
    spec = given.scheme.activation

    def run(*inputs: Tensor) -> Quantized:
        codes, scale, zero_point = quantize_activation(producer(*inputs), spec)
        # Scales of groups as matmuls read them: column by column.
        return codes, scale.t().contiguous().t() if spec.group else scale, zero_point

    return _compiled(run, tuned=False) if given.x.is_cuda else run


# --- linears ------------------------------------------------------------------------------------------------------


def _matmul(weights: Weights, a: Tensor, a_scale: Tensor, zero_point: Tensor | None, b_sum: Tensor | None) -> Tensor:
    n, extras = weights.codes.shape[0], {"a_zero_point": zero_point, "b_sum": b_sum, "block": weights.block}
    return fxq.triton_scaled_mm(a, weights.codes.t(), a_scale, weights.scale, None, n, BF16, **extras)


def _ours(given: Operands) -> Call:
    """Quantization, then our matmul; a weight-only linear by our first kernel that packs."""
    scheme = given.scheme
    if scheme.weight_only:
        names = [name for name in runnable(given) if name.startswith("triton")]
        if names:
            return _kernel(given, names[0])
        return lambda i: _weight_only(given, i)
    spec, quantize = scheme.activation, quantizer(given)
    sums = [None if spec.symmetric else column_sums(w.codes.t()) for (w,) in given.layers]

    def call(i: int) -> Tensor:
        (weights,) = given.layers[i]
        return _matmul(weights, *quantize(given.x), sums[i])

    return call


def _weight_only(given: Operands, i: int) -> Tensor:
    (weights,) = given.layers[i]
    n, block = weights.dense.shape[0], weights.block
    return fxq.triton_weight_only_mm(given.x, weights.codes.t(), None, weights.scale, None, n, BF16, block=block)


def _selected(given: Operands, name: str | None = None) -> Selection:
    n, k = given.layers[0][0].dense.shape
    problem = linear_problem(given.scheme, (n, k), BF16, BF16, None)
    return select(problem, target_of(given.x.device), force_kernel=name)


def runnable(given: Operands) -> list[str]:
    """Names of the kernels that fx_quant could select for these operands, best first."""
    try:
        return [verdict.kernel for verdict in _selected(given).verdicts if not verdict.reasons]
    except NoKernelError:
        return []


def _kernel(given: Operands, name: str, *, quantizes: bool = False) -> Call:
    """The matmul of given codes, or what eager PyTorch quantizes anew each time."""
    selection, scheme = _selected(given, name), given.scheme
    if scheme.weight_only:
        once: tuple[Tensor, Tensor | None, Tensor | None] = (given.x, None, None)
    else:
        once = quantize_activation(given.x, scheme.activation)

    def call(i: int) -> Tensor:
        (weights,) = given.layers[i]
        a, scale, zero_point = quantize_activation(given.x, scheme.activation) if quantizes else once
        return run_kernel(
            selection, a, weights.codes, scale, weights.scale, None, a_zero_point=zero_point, block=weights.block
        )

    return call


def _eager_torch(given: Operands) -> Call:
    names = [name for name in runnable(given) if name.startswith("pytorch")]
    if not names:
        raise NoKernelError("PyTorch has no matmul for these operands here")
    return _kernel(given, names[0], quantizes=True)


def _compiled(function: Callable[..., Any], tuned: bool) -> Callable[..., Any]:
    if not tuned:
        return torch.compile(function, dynamic=False)
    return torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")


def _dense(given: Operands, *, tuned: bool = False) -> Call:
    weights = [tuple(each.dense for each in layer) for layer in given.layers]
    if given.case.section == "chains":
        function = _compiled(gpu_sources.dense_chain, tuned)
        return lambda i: function(given.x, given.residual, given.norm, *weights[i])
    function = _compiled(F.linear, tuned) if tuned else F.linear
    return lambda i: function(given.x, *weights[i])


def _inductor(given: Operands, *, tuned: bool = False) -> Call:
    if given.case.section == "chains":
        chain = _compiled(gpu_sources.chain(given.case.recipe), tuned)

        def of_chain(i: int) -> Tensor:
            gate_up, down = given.layers[i]
            arguments = (gate_up.codes, gate_up.scale, down.codes, down.scale)
            return chain(given.x, given.residual, given.norm, *arguments)

        return of_chain
    function = _compiled(gpu_sources.linear(given.case.recipe), tuned)

    def call(i: int) -> Tensor:
        (weights,) = given.layers[i]
        return function(given.x, weights.codes, weights.scale)

    return call


_TORCHAO = {
    "tensor": ("Float8DynamicActivationFloat8WeightConfig", "PerTensor"),
    "row": ("Float8DynamicActivationFloat8WeightConfig", "PerRow"),
    "int8": ("Int8DynamicActivationInt8WeightConfig", None),
    "w8a16": ("Int8WeightOnlyConfig", None),
}


def _torchao(given: Operands) -> Call:
    import torchao.quantization as ao  # pyrefly: ignore[missing-import]

    name, granularity = _TORCHAO[given.case.recipe]
    options = {} if granularity is None else {"granularity": getattr(ao, granularity)()}
    modules = []
    for (weights,) in given.layers:
        n, k = weights.dense.shape
        module = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, device=given.x.device, dtype=BF16))
        module[0].weight = torch.nn.Parameter(weights.dense, requires_grad=False)
        ao.quantize_(module, getattr(ao, name)(**options))
        modules.append(_compiled(module, tuned=False))
    return lambda i: modules[i](given.x)


def _vllm(given: Operands) -> Call:
    ops, x, recipe = torch.ops._C, given.x, given.case.recipe
    m, dtype = x.shape[0], given.scheme.activation.dtype
    sums = [column_sums(w.codes.t()).view(1, -1) for (w,) in given.layers] if recipe == "int8 asym" else []

    def call(i: int) -> Tensor:
        (weights,) = given.layers[i]
        a, out = torch.empty_like(x, dtype=dtype), x.new_empty(m, weights.codes.shape[0])
        scale = x.new_empty((1,) if recipe == "tensor" else (m, 1), dtype=torch.float32)
        arguments = (out, a, weights.codes.t(), scale, weights.scale.reshape(1, -1))
        if recipe == "int8 asym":
            zero_point = x.new_empty((m, 1), dtype=torch.int32)
            ops.dynamic_scaled_int8_quant(a, x, scale, zero_point)
            ops.cutlass_scaled_mm_azp(*arguments, sums[i], zero_point, None)
            return out
        if recipe == "tensor":
            ops.dynamic_scaled_fp8_quant(a, x, scale)
        elif recipe == "row":
            ops.dynamic_per_token_scaled_fp8_quant(a, x, scale, None)
        else:
            ops.dynamic_scaled_int8_quant(a, x, scale, None)
        ops.cutlass_scaled_mm(*arguments, None)
        return out

    return call


def _deep_gemm(given: Operands) -> Call:
    import deep_gemm  # pyrefly: ignore[missing-import]

    quantize = quantizer(given)

    def call(i: int) -> Tensor:
        (weights,) = given.layers[i]
        codes, scale, _ = quantize(given.x)
        out = given.x.new_empty(given.x.shape[0], weights.codes.shape[0])
        deep_gemm.fp8_gemm_nt((codes, scale), (weights.codes, weights.scale), out, disable_ue8m0_cast=True)
        return out

    return call


def _flashinfer(given: Operands) -> Call:
    from flashinfer.gemm import fp8_blockscale_gemm_sm90  # pyrefly: ignore[missing-import]

    def call(i: int) -> Tensor:
        (weights,) = given.layers[i]
        return fp8_blockscale_gemm_sm90(given.x, weights.codes, None, weights.scale)

    return call


def linear_ways(given: Operands) -> list[Way]:
    """Of one linear."""
    recipe = given.case.recipe
    ways = [Way("fx_quant", "fx_quant", _always, _ours)]
    if recipe in DYNAMIC_RECIPES:
        ways.append(Way("eager quant + torch", "torch", _always, _eager_torch))
    ways += [
        Way("bf16", "bf16", _always, _dense, _UNQUANTIZED),
        Way("bf16 max-autotune", "tuned", _always, functools.partial(_dense, tuned=True), _UNQUANTIZED),
        Way("inductor", "inductor", _always, _inductor),
        Way("inductor max-autotune", "tuned", _always, functools.partial(_inductor, tuned=True)),
    ]
    for name in runnable(given):
        prepare = functools.partial(_kernel, name=name)
        ways.append(Way(f"kernel {name}", "kernels", _always, prepare, part=recipe in DYNAMIC_RECIPES))
    if recipe in _TORCHAO:
        ways.append(Way("torchao", "torchao", package("torchao"), _torchao, _UNQUANTIZED))
    if recipe in ("tensor", "row", "int8", "int8 asym"):
        ways.append(Way("vllm", "vllm", vllm, _vllm))
    if recipe == "block":
        ways.append(Way("deep_gemm", "deep_gemm", package("deep_gemm"), _deep_gemm))
        ways.append(Way("flashinfer", "flashinfer", package("flashinfer"), _flashinfer))
    if recipe.endswith("a16"):
        ways.append(Way("humming", "humming", humming, _inductor))
    return ways


# --- chains -------------------------------------------------------------------------------------------------------


def _our_chain(given: Operands) -> Call:
    first, second = quantizer(given, gpu_sources.rms_norm), quantizer(given, gated)

    def call(i: int) -> Tensor:
        gate_up, down = given.layers[i]
        y = _matmul(gate_up, *first(given.x, given.residual, given.norm), None)
        return _matmul(down, *second(y), None)

    return call


def _eager_chain(given: Operands) -> Call:
    scheme: Scheme = given.scheme
    target = target_of(given.x.device)

    def selection(weights: Weights) -> Selection:
        n, k = weights.dense.shape
        problem = linear_problem(scheme, (n, k), BF16, BF16, None)
        names = [v.kernel for v in select(problem, target).verdicts if not v.reasons and v.kernel.startswith("pytorch")]
        if not names:
            raise NoKernelError("PyTorch has no matmul for these operands here")
        return select(problem, target, force_kernel=names[0])

    first, second = map(selection, given.layers[0])

    def apply(found: Selection, x: Tensor, weights: Weights) -> Tensor:
        codes, scale, _ = quantize_activation(x, scheme.activation)
        return run_kernel(found, codes, weights.codes, scale, weights.scale, None, block=weights.block)

    def call(i: int) -> Tensor:
        gate_up, down = given.layers[i]
        return apply(second, gated(apply(first, normed(given), gate_up)), down)

    return call


def chain_ways(given: Operands) -> list[Way]:
    """Of an MLP with its norm: a code on the other side of a rounding changes the second linear's codes."""
    partial = functools.partial
    return [
        Way("fx_quant", "fx_quant", _always, _our_chain, 3e-2),
        Way("bf16", "bf16", _always, _dense, 2 * _UNQUANTIZED),
        Way("bf16 max-autotune", "tuned", _always, partial(_dense, tuned=True), 2 * _UNQUANTIZED),
        Way("eager quant + torch", "torch", _always, _eager_chain, 3e-2),
        Way("inductor", "inductor", _always, _inductor, 3e-2),
        Way("inductor max-autotune", "tuned", _always, partial(_inductor, tuned=True), 3e-2),
    ]


_WAYS: dict[str, Callable[[Operands], list[Way]]] = {
    "linears": linear_ways,
    "chains": chain_ways,
}


def ways(given: Operands, peers: tuple[str, ...]) -> list[Way]:
    """Those of the case that were asked for by family; ours always."""
    return [way for way in _WAYS[given.case.section](given) if way.family == "fx_quant" or way.family in peers]
