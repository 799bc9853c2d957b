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
from gpu_cases import BF16, DYNAMIC_RECIPES, EPS, Operands, Weights, gated, normed, static_scale
from gpu_measure import Call, Way
from torch import Tensor

import fx_quant.kernels.triton_quantize  # noqa: F401  (registers the ops)
from fx_quant.activation import quantize_activation
from fx_quant.eager import run_kernel, target_of
from fx_quant.errors import NoKernelError
from fx_quant.linear_operands import linear_problem
from fx_quant.ops import column_sums, quantize, quantize_groups, rms_norm_quantize_dynamic
from fx_quant.scheme import FLOAT8_DTYPES, OperandSpec, Scheme, float8_max
from fx_quant.selection import Selection, select

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


# --- formulas -----------------------------------------------------------------------------------------------------


def formula(spec: OperandSpec) -> dict[str, Any]:
    """Arguments of ``quantize.dynamic`` for the eager layers' formula."""
    float8 = spec.dtype in FLOAT8_DTYPES
    limit = float8_max(spec.dtype) if float8 else 127.0
    return {
        "dtype": spec.dtype,
        "granularity": "per_tensor" if spec.granularity.kind == "per_tensor" else "per_token",
        "divisor": limit,
        "divide_dtype": torch.float32,
        "floor": 1 / (limit * 512) if float8 else torch.finfo(torch.float32).tiny,
        "floor_on": "scale",
        "scale_dtype": torch.float32,
        "reciprocal": float8,
        "lo": -limit,
        "hi": limit,
    }


def group_of(spec: OperandSpec) -> int:
    """Size of a group, 0 without."""
    return spec.granularity.size[0] if spec.granularity.size else 0


def quantized(x: Tensor, spec: OperandSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point by our kernels."""
    if not spec.symmetric:
        return fxq.triton_quantize_asymmetric(x, granularity=spec.granularity.kind)
    codes, scale = fxq.triton_quantize_dynamic(x, **formula(spec), group=group_of(spec))
    return codes, scale, None


# --- linears ------------------------------------------------------------------------------------------------------


def _matmul(weights: Weights, a: Tensor, a_scale: Tensor, zero_point: Tensor | None, b_sum: Tensor | None) -> Tensor:
    n, extras = weights.codes.shape[0], {"a_zero_point": zero_point, "b_sum": b_sum, "block": weights.block}
    return fxq.triton_scaled_mm(a, weights.codes.t(), a_scale, weights.scale, None, n, BF16, **extras)


def _ours_in_two(given: Operands) -> Call:
    spec = given.scheme.activation
    sums = [None if spec.symmetric else column_sums(w.codes.t()) for (w,) in given.layers]

    def call(i: int) -> Tensor:
        (weights,) = given.layers[i]
        return _matmul(weights, *quantized(given.x, spec), sums[i])

    return call


def _ours(given: Operands) -> Call:
    """The linear as one op, where there is one; a weight-only one by our first kernel that packs."""
    scheme = given.scheme
    if scheme.weight_only:
        names = [name for name in runnable(given) if name.startswith("triton")]
        if names:
            return _kernel(given, names[0])
        return lambda i: _weight_only(given, i)
    return _ours_in_two(given)


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

    def call(i: int) -> Tensor:
        (weights,) = given.layers[i]
        codes, scale, _ = quantized(given.x, given.scheme.activation)
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
        ways.append(Way("fx_quant in two", "fx_quant", _always, _ours_in_two))
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


# --- quantization -------------------------------------------------------------------------------------------------


def _ours_quantizes(given: Operands) -> Call:
    spec, recipe, x = given.scheme.activation, given.case.recipe, given.x
    if recipe == "static":
        scale, limit = static_scale(x, spec.dtype), float8_max(spec.dtype)
        arguments = {"dtype": spec.dtype, "reciprocal": True, "lo": -limit, "hi": limit}
        return lambda i: (fxq.triton_quantize_static(x, scale, **arguments), scale)
    if recipe.startswith("norm"):
        arguments = {**formula(spec), "group": group_of(spec)}
        op = fxq.triton_rms_norm_quantize.dynamic
        return lambda i: op(x, given.norm, EPS, given.residual, **arguments)[:2]
    return lambda i: tuple(part for part in quantized(x, spec) if part is not None)


def _canonical(given: Operands, *, compiled: bool = False) -> Call:
    """The plain PyTorch bodies of the canonical ops, eager or compiled."""
    spec, recipe, x = given.scheme.activation, given.case.recipe, given.x
    wrap = functools.partial(_compiled, tuned=False) if compiled else lambda function: function
    if recipe == "static":
        scale, limit = static_scale(x, spec.dtype), float8_max(spec.dtype)
        function = wrap(lambda x, scale: quantize(x, scale, spec.dtype, True, -limit, limit))
        return lambda i: (function(x, scale), scale)
    arguments = formula(spec)
    if recipe.startswith("norm"):
        group = group_of(spec)
        function = wrap(
            lambda x, norm, residual: rms_norm_quantize_dynamic(x, norm, EPS, residual, group=group, **arguments)
        )
        return lambda i: function(x, given.norm, given.residual)[:2]
    if spec.symmetric:
        function = wrap(lambda x: quantize_groups(x, group_of(spec), **arguments))
        return lambda i: function(x)
    function = wrap(lambda x: quantize_activation(x, spec))
    return lambda i: function(x)


def _vllm_quantizes(given: Operands) -> Call:
    ops, x, recipe = torch.ops._C, given.x, given.case.recipe
    dtype, m = given.scheme.activation.dtype, given.x.shape[0]

    def call(i: int) -> tuple[Tensor, ...]:
        codes = torch.empty_like(x, dtype=dtype)
        scale = x.new_empty((1,) if recipe == "tensor" else (m, 1), dtype=torch.float32)
        if recipe == "tensor":
            ops.dynamic_scaled_fp8_quant(codes, x, scale)
        elif recipe == "row":
            ops.dynamic_per_token_scaled_fp8_quant(codes, x, scale, None)
        else:
            ops.dynamic_scaled_int8_quant(codes, x, scale, None)
        return codes, scale

    return call


def quantize_ways(given: Operands) -> list[Way]:
    """Of a quantization; 1e-3 is a code now and then, where a norm's sum was taken in another order."""
    ways = [
        Way("fx_quant", "fx_quant", _always, _ours_quantizes, 1e-2),
        Way("eager", "torch", _always, _canonical, 1e-2),
        Way("inductor", "inductor", _always, functools.partial(_canonical, compiled=True), 1e-2),
    ]
    if given.case.recipe in ("tensor", "row", "int8"):
        ways.append(Way("vllm", "vllm", vllm, _vllm_quantizes, 1e-2))
    return ways


# --- chains -------------------------------------------------------------------------------------------------------


def _our_chain(given: Operands) -> Call:
    spec = given.scheme.activation
    arguments = {**formula(spec), "group": group_of(spec)}
    norm_quantize = fxq.triton_rms_norm_quantize.dynamic
    activate = _compiled(gated, tuned=False) if given.x.is_cuda else gated

    def call(i: int) -> Tensor:
        gate_up, down = given.layers[i]
        codes, scale, _ = norm_quantize(given.x, given.norm, EPS, given.residual, **arguments)
        y = activate(_matmul(gate_up, codes, scale, None, None))
        return _matmul(down, *quantized(y, spec), None)

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
    "quantize": quantize_ways,
    "chains": chain_ways,
}


def ways(given: Operands, peers: tuple[str, ...]) -> list[Way]:
    """Those of the case that were asked for by family; ours always."""
    return [way for way in _WAYS[given.case.section](given) if way.family == "fx_quant" or way.family in peers]
