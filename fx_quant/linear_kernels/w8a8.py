"""vLLM's functions of float8 codes that are given with their scales, and its probes of CUTLASS, over the one selection.

Keyword arguments are vLLM's: ``qinput [m, k]`` and ``weight [k, n]`` float8 codes, ``scale_a`` and ``scale_b`` decode
factors, ``input_2d`` what ``qinput`` was quantized from (rows beyond its own are padding, which is dropped), and
``output_shape`` the shape of the result. A name says what scales its function takes, and where it runs; the kernel is
the one that ``select`` chooses there. Compiled, each is the canonical op, and the backend chooses.

Source: vLLM, ``model_executor/layers/quantization/utils/w8a8_utils.py`` (names and arguments).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fx_quant.errors import NoKernelError, must
from fx_quant.kernels.select import disabled_kernels
from fx_quant.layers.linear_operands import check_bias, describe
from fx_quant.linear_kernels.classes import derived_classes
from fx_quant.linear_kernels.fp8_linear import Fp8LinearOp, is_rocm
from fx_quant.linear_kernels.registry import Capability, resolve_capability
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES
from fx_quant.target import Target

_ANY_SCALES = "torch_channelwise_w8a8_scaled_mm takes scales of any shape"


def dispatch_w8a8_scaled_mm(
    cutlass_fp8_supported: bool,
    per_tensor_weights: bool,
    per_tensor_activations: bool,
    use_per_token_if_dynamic: bool | None,
    *,
    compute_capability: Capability = None,
) -> Callable[..., Tensor]:
    """The function for such scales: one of the five below, in vLLM's order.

    Args:
        cutlass_fp8_supported: take CUTLASS; what the probe of that name answers.
        per_tensor_weights, per_tensor_activations: ``scale_b`` and ``scale_a`` have one element.
        use_per_token_if_dynamic: the activation has a scale for each row.
        compute_capability: ``90`` for an H100, a ``Target`` or its name; None is this machine.

    Raises:
        ValueError: a flag that is neither True nor False.
    """
    flags = {
        "cutlass_fp8_supported": cutlass_fp8_supported,
        "per_tensor_weights": per_tensor_weights,
        "per_tensor_activations": per_tensor_activations,
        "use_per_token_if_dynamic": use_per_token_if_dynamic,
    }
    for name, flag in flags.items():
        must(
            isinstance(flag, bool) or (flag is None and name == "use_per_token_if_dynamic"),
            lambda name=name, flag=flag: (
                f"{name} must be True or False, got {type(flag).__name__}" + (f"; call {name}()" * callable(flag))
            ),
        )
    if cutlass_fp8_supported:
        return cutlass_w8a8_scaled_mm
    target = resolve_capability(compute_capability)
    if per_tensor_weights and per_tensor_activations:
        return rocm_per_tensor_w8a8_scaled_mm if target.platform == "rocm" else torch_per_tensor_w8a8_scaled_mm
    rows = use_per_token_if_dynamic and not per_tensor_weights and not per_tensor_activations
    if rows and _supported("RowWiseTorchFP8ScaledMMLinearKernel", target):
        return torch_per_token_w8a8_scaled_mm
    return torch_channelwise_w8a8_scaled_mm


# --- the functions ------------------------------------------------------------------------------------------------


def cutlass_w8a8_scaled_mm(
    *,
    qinput: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    output_shape: Sequence[int],
    input_2d: Tensor | None = None,
) -> Tensor:
    """``cast(scale_a * (qinput @ weight) * scale_b + bias)`` by CUTLASS, for scales of any shape.

    Args:
        qinput: float8 codes ``[m, k]``.
        weight: float8 codes ``[k, n]``, of any strides.
        out_dtype: float32, bfloat16 or float16.
        scale_a: one element, or ``[m, 1]``.
        scale_b: one element, or one for each column: ``[n]``, ``[n, 1]`` or ``[1, n]``.
        bias: ``[n]``.
        output_shape: of the result; its sizes multiply to those of ``[rows, n]``.
        input_2d: ``[rows, k]``, of no more rows than ``qinput``, whose others are dropped; None is all.

    Raises:
        ValueError: operands that do not fit together.
        NoKernelError: CUTLASS cannot run it here; the message holds every reason.
    """
    (name,) = derived_classes()["CutlassFP8ScaledMMLinearKernel"].KERNELS
    try:
        return _scaled_mm(qinput, weight, out_dtype, scale_a, scale_b, bias, input_2d, output_shape, force_kernel=name)
    except NoKernelError as error:
        raise NoKernelError(
            f"cutlass_w8a8_scaled_mm runs CUTLASS or nothing: {error} {_ANY_SCALES}, on every device.", error.verdicts
        ) from None


def torch_per_tensor_w8a8_scaled_mm(
    *,
    qinput: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    input_2d: Tensor,
    output_shape: Sequence[int],
) -> Tensor:
    """The product for one scale each; arguments and errors as for ``cutlass_w8a8_scaled_mm``, on every device."""
    for name, scale in (("scale_a", scale_a), ("scale_b", scale_b)):
        must(
            scale.numel() == 1,
            lambda name=name, scale=scale: f"{name} must have one element, got {describe(scale)}; {_ANY_SCALES}",
        )
    return _scaled_mm(qinput, weight, out_dtype, scale_a, scale_b, bias, input_2d, output_shape)


def rocm_per_tensor_w8a8_scaled_mm(
    *,
    qinput: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    input_2d: Tensor,
    output_shape: Sequence[int],
) -> Tensor:
    """``torch_per_tensor_w8a8_scaled_mm`` on ROCm, where few rows have kernels of their own; elsewhere an error."""
    must(
        is_rocm(qinput.device),
        lambda: (
            f"rocm_per_tensor_w8a8_scaled_mm must run on ROCm, got codes on {qinput.device}; "
            "torch_per_tensor_w8a8_scaled_mm runs there"
        ),
    )
    return torch_per_tensor_w8a8_scaled_mm(
        qinput=qinput,
        weight=weight,
        out_dtype=out_dtype,
        scale_a=scale_a,
        scale_b=scale_b,
        bias=bias,
        input_2d=input_2d,
        output_shape=output_shape,
    )


def torch_per_token_w8a8_scaled_mm(
    *,
    qinput: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    input_2d: Tensor,
    output_shape: Sequence[int],
) -> Tensor:
    """The product for a scale of each row and of each column; arguments and errors as for the other functions."""
    sizes = (("scale_a", scale_a, qinput.shape[0], "row"), ("scale_b", scale_b, weight.shape[-1], "column"))
    for name, scale, size, side in sizes:
        must(
            scale.numel() == size,
            lambda name=name, scale=scale, size=size, side=side: (
                f"{name} must have an element for each of the {size} {side}s, got {describe(scale)}; {_ANY_SCALES}"
            ),
        )
    return _scaled_mm(qinput, weight, out_dtype, scale_a, scale_b, bias, input_2d, output_shape)


def torch_channelwise_w8a8_scaled_mm(
    *,
    qinput: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    input_2d: Tensor,
    output_shape: Sequence[int],
) -> Tensor:
    """The product for scales of any shape; arguments and errors as for ``cutlass_w8a8_scaled_mm``, on every device."""
    return _scaled_mm(qinput, weight, out_dtype, scale_a, scale_b, bias, input_2d, output_shape)


def _scaled_mm(
    qinput: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    input_2d: Tensor | None,
    output_shape: Sequence[int],
    force_kernel: str | None = None,
) -> Tensor:
    must(
        qinput.dim() == 2 and qinput.dtype in FLOAT8_DTYPES,
        lambda: f"qinput must be float8 codes [m, k], got {describe(qinput)}; quantize and flatten it first",
    )
    m, k = qinput.shape
    must(
        weight.dim() == 2 and weight.dtype in FLOAT8_DTYPES and weight.shape[0] == k,
        lambda: f"weight must be float8 codes [k, n] with k = {k}, got {describe(weight)}; give weight.t() of [n, k]",
    )
    n = weight.shape[1]
    must(
        scale_a.is_floating_point() and (scale_a.numel() == 1 or list(scale_a.shape) == [m, 1]),
        lambda: f"scale_a must be float of one element or [m, 1] = [{m}, 1], got {describe(scale_a)}; reshape it",
    )
    must(
        scale_b.is_floating_point() and (scale_b.numel() == 1 or list(scale_b.shape) in ([n], [n, 1], [1, n])),
        lambda: (
            f"scale_b must be float of one element, [n] = [{n}], [n, 1] or [1, n], got {describe(scale_b)}; "
            "convert_to_channelwise makes one of each shard's"
        ),
    )
    must(
        out_dtype in FLOAT_DTYPES,
        lambda: f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}; cast the result",
    )
    check_bias(bias, n)
    rows = m if input_2d is None else input_2d.shape[0]
    must(
        rows <= m,
        lambda: f"input_2d must have no more rows than the {m} of qinput, got {rows}; give what qinput was made of",
    )
    must(
        -1 in output_shape or math.prod(output_shape) == rows * n,
        lambda: f"output_shape must hold [{rows}, {n}], got {list(output_shape)}; end it in n = {n}",
    )
    if rows < m:
        qinput, scale_a = qinput[:rows], scale_a if scale_a.numel() == 1 else scale_a[:rows]
    op = Fp8LinearOp(force_kernel=force_kernel)
    return op.apply(qinput, weight, scale_b, out_dtype, scale_a, bias=bias).reshape(*output_shape)


# --- probes -------------------------------------------------------------------------------------------------------


def cutlass_fp8_supported(compute_capability: Capability = None) -> bool:
    """Whether CUTLASS multiplies float8 codes with scales of tensors, rows and columns.

    Args:
        compute_capability: ``90`` for an H100, a ``Target`` or its name; None is this machine.

    Raises:
        ValueError: no such machine.
    """
    return _supported("CutlassFP8ScaledMMLinearKernel", resolve_capability(compute_capability))


def cutlass_block_fp8_supported(compute_capability: Capability = None) -> bool:
    """Whether CUTLASS multiplies float8 codes with scales of 1 x 128 and 128 x 128; as ``cutlass_fp8_supported``."""
    return _supported("CutlassFP8BlockScaledMMLinearKernel", resolve_capability(compute_capability))


def cutlass_group_gemm_supported(compute_capability: Capability = None) -> bool:
    """False on every machine: no kernel here multiplies groups of matrices (a mixture of experts) by CUTLASS."""
    resolve_capability(compute_capability)
    return False


def sparse_cutlass_supported(compute_capability: Capability = None) -> bool:
    """False on every machine: no kernel here multiplies weights of which two in four are zero by CUTLASS."""
    resolve_capability(compute_capability)
    return False


def maybe_create_device_identity() -> None:
    """Do nothing: vLLM makes a scale of one for ``torch._scaled_mm`` by it; kernels here make their own."""


def _supported(name: str, target: Target) -> bool:
    """Whether a kernel of the class ``name`` runs on ``target``."""
    off = disabled_kernels()
    return name not in off and any(
        not off & {kernel.name, kernel.provider} and not kernel.requires.unmet_by_target(target)
        for kernel in derived_classes()[name].kernels()
    )
