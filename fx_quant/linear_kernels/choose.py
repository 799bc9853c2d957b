"""Choosing a kernel class: vLLM's functions over the one selection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, overload

import torch

from fx_quant.errors import NoKernelError
from fx_quant.kernels.registry import kernels
from fx_quant.kernels.select import disabled_kernels, verdicts
from fx_quant.linear_kernels.classes import KernelT, possible_kernels
from fx_quant.linear_kernels.configs import (
    FP8ScaledMMLinearLayerConfig,
    Int8ScaledMMLinearLayerConfig,
    MPLinearLayerConfig,
    QuantKey,
    ScaledMMLinearLayerConfig,
)
from fx_quant.linear_kernels.interface import ASKED, MMLinearKernel, refusal
from fx_quant.linear_kernels.registry import (
    Capability,
    FP8ScaledMMLinearKernel,
    Int8ScaledMMLinearKernel,
    MPLinearKernel,
    RegistryLinearKernel,
    resolve_capability,
)
from fx_quant.scheme import FLOAT_DTYPES, OperandSpec, dtype_name
from fx_quant.target import Target


def is_supported_and_can_implement_kernel(
    kernel: type[KernelT], config: Any, compute_capability: Capability = None
) -> tuple[bool, str]:
    """Whether ``kernel`` can run ``config`` on a machine, and why not: a reason is never empty.

    A class is switched off by its own name, its kernels' or their provider's in ``FX_QUANT_DISABLED_KERNELS``. What a
    class answers itself is asked first, as ``refusal`` reads it; then every requirement of its kernels.
    """
    name = getattr(kernel, "__name__", repr(kernel))
    if name in disabled_kernels():
        return False, f"{name}: is disabled by environment variable"
    target = resolve_capability(compute_capability)
    reasons = _own_reasons(kernel, config, target)
    if not reasons and _is_ours(kernel):
        reasons = kernel.unmet(config, target)
    return not reasons, "; ".join(f"{name}: {reason}" for reason in reasons)


def _is_ours(kernel: type[MMLinearKernel]) -> TypeGuard[type[RegistryLinearKernel]]:
    return isinstance(kernel, type) and issubclass(kernel, RegistryLinearKernel)


def _own_reasons(kernel: type[MMLinearKernel], config: Any, target: Target) -> list[str]:
    """Why a class says that it cannot, where it is not our requirements that speak: one reason, or none."""
    for method, argument in zip(ASKED, (target.capability, config), strict=True):
        if not (_is_ours(kernel) and kernel.inherits(method)):
            reason = refusal(kernel, method, argument)
            if reason is not None:
                return [reason]
    lacks = sorted(getattr(kernel, "__abstractmethods__", ()))
    return [f"does not implement {', '.join(lacks)}"] if lacks else []


def choose_scaled_mm_linear_kernel(
    config: Any,
    possible_kernels: Mapping[str, Sequence[type[KernelT]]],
    compute_capability: Capability = None,
    force_kernel: type[KernelT] | None = None,
    *,
    quantization: str | None = None,
) -> type[KernelT]:
    """The first class for the machine's platform that can run ``config``.

    A forced class that cannot is an error, where vLLM goes on to the others.

    Args:
        possible_kernels: classes by platform (``cpu``, ``cuda``, ``rocm``), best first. Where those that name kernels
            stand as the function of that name lists them, the one whose kernel ``select`` takes is the best of them.
        compute_capability: ``90`` for an H100, a ``Target`` or its name; None is this machine.
        force_kernel: this class, or an error.
        quantization: vLLM's name of the scheme, such as ``fp8_w8a8``: a part of the error.

    Raises:
        NoKernelError: (a ``ValueError``) none can, or the forced one cannot; the message holds every reason.
    """
    target, scheme = resolve_capability(compute_capability), f" ({quantization})" if quantization else ""
    if force_kernel is not None:
        ok, reason = is_supported_and_can_implement_kernel(force_kernel, config, target)
        if not ok:
            raise NoKernelError(
                f"forced kernel cannot run {config}{scheme} on {target}: {reason}. "
                "Remove force_kernel to let fx_quant choose."
            )
        return force_kernel
    reasons = []
    for candidate in _as_selected(possible_kernels.get(target.platform, ()), config, target):
        ok, reason = is_supported_and_can_implement_kernel(candidate, config, target)
        if ok:
            return candidate
        reasons.append(reason)
    why = "\n".join(reasons) or f"no kernel is listed for {target.platform}"
    raise NoKernelError(f"no kernel can run {config}{scheme} on {target}. Reasons:\n{why}")


def _as_selected(candidates: Sequence[type[KernelT]], config: Any, target: Target) -> Sequence[type[KernelT]]:
    """``candidates`` with those that name kernels in the order of the best that runs, if they are in that of the best.

    A class may name kernels that ``select`` asks before another's, and kernels that it asks after them.
    """
    naming = [cls for cls in candidates if _names_kernels(cls)]
    order = {kernel.name: i for i, kernel in enumerate(kernels())}
    best = [_best(cls, order) for cls in naming]
    if best != sorted(best) or not isinstance(config, (ScaledMMLinearLayerConfig, MPLinearLayerConfig)):
        return candidates
    running = {verdict.kernel: i for i, verdict in enumerate(verdicts(config.problem(), target)) if verdict.can_run}
    ordered = iter(sorted(naming, key=lambda cls: _best(cls, running)))
    return [next(ordered) if _names_kernels(cls) else cls for cls in candidates]


def _names_kernels(cls: type[MMLinearKernel]) -> bool:
    return _is_ours(cls) and bool(cls.KERNELS)


def _best(cls: Any, places: Mapping[str, int]) -> float:
    return min((places[name] for name in cls.KERNELS if name in places), default=math.inf)


def choose_mp_linear_kernel(
    config: MPLinearLayerConfig, compute_capability: Capability = None
) -> type[RegistryLinearKernel]:
    """The class that runs a weight-only ``config``.

    Raises:
        NoKernelError: none can; the message holds every reason.
    """
    return choose_scaled_mm_linear_kernel(config, possible_kernels(MPLinearKernel), compute_capability)


@overload
def init_fp8_linear_kernel(
    activation_quant_key: OperandSpec | QuantKey,
    weight_quant_key: OperandSpec | QuantKey,
    out_dtype: torch.dtype,
    force_kernel: type[FP8ScaledMMLinearKernel] | None = None,
    module_name: str | None = None,
    *,
    weight_shape: tuple[int, int] | None = None,
    compute_capability: Capability = None,
) -> RegistryLinearKernel: ...
@overload
def init_fp8_linear_kernel(
    activation_quant_key: OperandSpec | QuantKey,
    weight_quant_key: OperandSpec | QuantKey,
    input_dtype: torch.dtype,
    out_dtype: torch.dtype,
    weight_shape: tuple[int, int],
    force_kernel: type[FP8ScaledMMLinearKernel] | None = None,
    module_name: str | None = None,
    *,
    compute_capability: Capability = None,
) -> RegistryLinearKernel: ...
def init_fp8_linear_kernel(
    activation_quant_key: OperandSpec | QuantKey,
    weight_quant_key: OperandSpec | QuantKey,
    *given: Any,
    **named: Any,
) -> RegistryLinearKernel:
    """The kernel object for a float8 layer, chosen for this machine.

    vLLM has had two orders: ``(out_dtype, force_kernel, module_name)`` after the keys, and ``(input_dtype, out_dtype,
    weight_shape, force_kernel, module_name)``, which is meant where two dtypes follow, or ``input_dtype`` is named.

    Args:
        activation_quant_key, weight_quant_key: how each operand is quantized: an ``OperandSpec``, or a ``QuantKey``.
        given, named: ``out_dtype`` of the result, ``input_dtype`` of the activation, ``weight_shape`` ``(n, k)``,
            ``force_kernel``, ``module_name`` for the error, and ``compute_capability``.

    Raises:
        NoKernelError: none can; the message holds every reason.
        TypeError: an argument that neither order has.
    """
    of_today = "input_dtype" in named or sum(isinstance(each, torch.dtype) for each in given) > 1
    asked = (_of_today if of_today else _of_before)(*given, **named)
    _check_out_dtype(asked.out_dtype)
    config = FP8ScaledMMLinearLayerConfig(
        weight_quant_key, activation_quant_key, asked.out_dtype, asked.weight_shape, asked.input_dtype
    )
    return _init(FP8ScaledMMLinearKernel, config, asked.force_kernel, asked.module_name, asked.compute_capability)


class _Asked(NamedTuple):
    out_dtype: torch.dtype
    input_dtype: torch.dtype | None
    weight_shape: tuple[int, int] | None
    force_kernel: type[FP8ScaledMMLinearKernel] | None
    module_name: str | None
    compute_capability: Capability


def _of_before(
    out_dtype: torch.dtype,
    force_kernel: type[FP8ScaledMMLinearKernel] | None = None,
    module_name: str | None = None,
    *,
    weight_shape: tuple[int, int] | None = None,
    compute_capability: Capability = None,
) -> _Asked:
    return _Asked(out_dtype, None, weight_shape, force_kernel, module_name, compute_capability)


def _of_today(
    input_dtype: torch.dtype,
    out_dtype: torch.dtype,
    weight_shape: tuple[int, int] | None = None,
    force_kernel: type[FP8ScaledMMLinearKernel] | None = None,
    module_name: str | None = None,
    *,
    compute_capability: Capability = None,
) -> _Asked:
    return _Asked(out_dtype, input_dtype, weight_shape, force_kernel, module_name, compute_capability)


def init_int8_linear_kernel(
    is_channelwise: bool,
    is_static_input_scheme: bool,
    input_symmetric: bool,
    module_name: str | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    weight_shape: tuple[int, int] | None = None,
    compute_capability: Capability = None,
) -> RegistryLinearKernel:
    """The kernel object for an int8 layer, chosen for this machine; arguments as for ``init_fp8_linear_kernel``."""
    _check_out_dtype(out_dtype)
    config = Int8ScaledMMLinearLayerConfig(
        is_channelwise, is_static_input_scheme, input_symmetric, out_dtype, weight_shape
    )
    return _init(Int8ScaledMMLinearKernel, config, None, module_name, compute_capability)


def _check_out_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"out_dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}")


def _init(
    family: type[RegistryLinearKernel],
    config: ScaledMMLinearLayerConfig,
    force_kernel: type[RegistryLinearKernel] | None,
    module_name: str | None,
    compute_capability: Capability,
) -> RegistryLinearKernel:
    target = resolve_capability(compute_capability)
    try:
        chosen = choose_scaled_mm_linear_kernel(config, possible_kernels(family), target, force_kernel)
    except NoKernelError as error:
        raise NoKernelError(f"{module_name}: {error}" if module_name else str(error)) from None
    made = chosen(config)
    made.target = target
    return made
