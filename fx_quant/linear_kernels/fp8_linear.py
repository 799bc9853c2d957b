"""``Fp8LinearOp``: a float8 linear as a function of its tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.compat import sym_max
from fx_quant.errors import must
from fx_quant.kernels.eager import eager_selection, run_kernel, target_of
from fx_quant.kernels.padding import SCALED_MM_ROWS
from fx_quant.kernels.select import Selection
from fx_quant.layers.activation import quantize_activation
from fx_quant.layers.inference_only import without_gradient
from fx_quant.layers.linear_operands import describe, linear_problem
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, Granularity, OperandSpec, Scheme

# Made here, because Dynamo of torch 2.11 breaks the graph where a spec is made.
_SPECS = {
    (dtype, name): OperandSpec(dtype, granularity, dynamic=name != "static")
    for dtype in FLOAT8_DTYPES
    for name, granularity in (
        ("static", Granularity.PER_TENSOR),
        ("per_tensor", Granularity.PER_TENSOR),
        ("per_token", Granularity.PER_TOKEN),
    )
}


class Fp8LinearOp:
    """A float8 linear as a function of its tensors, with the interface of vLLM's ``Fp8LinearOp``.

    The kernel is chosen by ``select``; whether fewer rows than 17 are padded for it is decided at each call. The
    result is the same either way.

    Args:
        use_per_token_if_dynamic: one scale a row rather than one in all, where no ``input_scale`` is given.
        pad_output: None pads as the plan of the selection says: for ``torch._scaled_mm`` on CUDA in eager calls, unless
            ``fx_quant.mode`` says otherwise, not in compiled ones. True pads for every kernel, compiled too, but on
            ROCm, which never gains by it. False never pads.
        force_kernel: the kernel of eager calls, or raise; compiled ones have the backend's option of that name.
        cutlass_fp8_supported: as vLLM's calls have it, by name. Which kernels there are is asked of the machine, so it
            is kept and changes nothing; ``disabled_kernels`` and ``FX_QUANT_DISABLED_KERNELS`` leave ``cutlass`` out.
    """

    def __init__(
        self,
        use_per_token_if_dynamic: bool = False,
        pad_output: bool | None = None,
        force_kernel: str | None = None,
        *,
        cutlass_fp8_supported: bool | None = None,
    ) -> None:
        self.cutlass_fp8_supported = cutlass_fp8_supported
        self.use_per_token_if_dynamic = use_per_token_if_dynamic
        self.pad_output = pad_output
        self.force_kernel = force_kernel

    def apply(
        self,
        input: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        out_dtype: torch.dtype | None = None,
        input_scale: Tensor | None = None,
        input_scale_ub: Tensor | None = None,
        bias: Tensor | None = None,
        use_per_token_if_dynamic: bool | None = None,
    ) -> Tensor:
        """``[..., k] -> [..., n]``: ``cast(sum_k codes[m, k] * weight[k, n] * a_scale * weight_scale + bias)``.

        Scales are decode factors; they are not checked to be finite and positive, which would wait for the device.

        Args:
            input: float, or float8 codes with their ``input_scale``.
            weight: float8 codes ``[k, n]``, of any strides.
            weight_scale: one element, or one for each column: ``[n]``, ``[n, 1]`` or ``[1, n]``.
            out_dtype: dtype of the result; ``input``'s by default, which codes have none of.
            input_scale: static: one element; for codes also one for each row, ``[m, 1]``. None is dynamic.
            input_scale_ub: bound of a dynamic per-token scale's amax, one element.
            bias: ``[n]``.
            use_per_token_if_dynamic: for this call; None is the op's own.

        Raises:
            ValueError: operands that do not fit together.
            NoKernelError: no kernel can run it, or the forced one cannot.
        """
        _check_fp8(input, weight, weight_scale, out_dtype, input_scale, input_scale_ub, bias)
        x = input.detach().reshape(-1, input.shape[-1])
        per_token = self.use_per_token_if_dynamic if use_per_token_if_dynamic is None else use_per_token_if_dynamic
        codes, a_scale = self._codes(x, weight.dtype, input_scale, input_scale_ub, per_token)
        b_scale = weight_scale.float().flatten()
        out_dtype = out_dtype or input.dtype
        if torch.compiler.is_compiling():
            out = self._compiled(codes, weight, a_scale, b_scale, bias, out_dtype)
        else:
            selection = self.selection(codes, a_scale, weight, b_scale, bias, out_dtype, dynamic=input_scale is None)
            out = run_kernel(selection, codes, weight.t(), a_scale, b_scale, bias)
        return without_gradient(out.reshape(*input.shape[:-1], weight.shape[1]), input)

    def _codes(
        self, x: Tensor, dtype: torch.dtype, scale: Tensor | None, scale_ub: Tensor | None, per_token: bool
    ) -> tuple[Tensor, Tensor]:
        if x.dtype in FLOAT8_DTYPES:
            assert scale is not None
            return x, scale.float() if scale.numel() != 1 else scale.float().reshape(())
        spec = _SPECS[dtype, "static" if scale is not None else "per_token" if per_token else "per_tensor"]
        codes, a_scale, _ = quantize_activation(x, spec, scale, scale_ub=scale_ub)
        return codes, a_scale

    def _compiled(
        self, codes: Tensor, weight: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if not self.pad_output or is_rocm(codes.device):
            return torch.ops.fx_quant.scaled_mm(codes, weight, a_scale, b_scale, bias, dtype)
        m = codes.shape[0]
        missing = sym_max(SCALED_MM_ROWS - m, 0)
        codes = F.pad(codes, (0, 0, 0, missing))  # pyrefly: ignore [bad-argument-type]
        if a_scale.dim():
            a_scale = F.pad(a_scale, (0, 0, 0, missing), value=1.0)  # pyrefly: ignore [bad-argument-type]
        return torch.ops.fx_quant.scaled_mm(codes, weight, a_scale, b_scale, bias, dtype)[:m]

    def selection(
        self,
        codes: Tensor,
        a_scale: Tensor,
        weight: Tensor,
        b_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        *,
        dynamic: bool = False,
    ) -> Selection:
        """The kernel and the padding of an eager call, with the verdict of every other kernel.

        Args:
            codes, weight: float8 ``[m, k]`` and ``[k, n]``.
            a_scale: ``[]``, or ``[m, 1]``.
            b_scale: one element, or ``[n]``.
            bias: ``[n]``.
            out_dtype: dtype of the result.
            dynamic: ``a_scale`` was computed from the activation.

        Raises:
            NoKernelError: no kernel can run it, or the forced one cannot.
        """
        activation = Granularity.PER_TENSOR if a_scale.dim() == 0 else Granularity.PER_TOKEN
        channels = Granularity.PER_TENSOR if b_scale.numel() == 1 else Granularity.PER_CHANNEL
        scheme = Scheme(OperandSpec(codes.dtype, activation, dynamic=dynamic), OperandSpec(weight.dtype, channels))
        k, n = weight.shape
        problem = linear_problem(scheme, (n, k), codes.dtype, out_dtype, bias)
        selection = eager_selection(problem, target_of(codes.device), self.force_kernel)
        if self.pad_output is None:
            return selection
        rows = SCALED_MM_ROWS if self.pad_output and selection.target.platform != "rocm" else 0
        return replace(selection, padding=replace(selection.padding, rows=rows))


def is_rocm(device: torch.device) -> bool:
    """Whether ``device`` is an AMD GPU; without looking at it, so that it can be traced."""
    return device.type == "cuda" and torch.version.hip is not None


def _check_fp8(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype | None,
    input_scale: Tensor | None,
    input_scale_ub: Tensor | None,
    bias: Tensor | None,
) -> None:
    must(
        weight.dim() == 2 and weight.dtype in FLOAT8_DTYPES,
        lambda: f"weight must be float8 [k, n], got {describe(weight)}",
    )
    k, n = weight.shape
    must(
        input.dim() > 0 and input.shape[-1] == k,
        lambda: f"input must end in k = {k}, the rows of weight {list(weight.shape)}, got {list(input.shape)}",
    )
    must(
        weight_scale.is_floating_point() and list(weight_scale.shape) in ([], [1], [1, 1], [n], [n, 1], [1, n]),
        lambda: (
            f"weight_scale must be float of one element, [n] = [{n}], [n, 1] or [1, n], got {describe(weight_scale)}"
        ),
    )
    must(
        out_dtype is None or out_dtype in FLOAT_DTYPES,
        lambda: f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}",
    )
    must(
        bias is None or (list(bias.shape) == [n] and bias.dtype in FLOAT_DTYPES),
        lambda: f"bias must be float32, bfloat16 or float16 of shape [n] = [{n}], got {describe(bias)}",
    )
    if input.dtype not in FLOAT8_DTYPES:
        must(
            input.dtype in FLOAT_DTYPES,
            lambda: f"input must be float32, bfloat16, float16 or float8, got {describe(input)}",
        )
        return
    must(out_dtype is not None, lambda: "float8 input needs an out_dtype: float32, bfloat16 or float16")
    must(input_scale_ub is None, lambda: "float8 input is quantized already, got an input_scale_ub; leave it out")
    _check_codes_scale(input, input_scale)


def _check_codes_scale(codes: Tensor, scale: Tensor | None) -> None:
    m = codes.numel() // max(codes.shape[-1], 1)
    must(
        scale is not None
        and scale.is_floating_point()
        and (scale.numel() == 1 or (scale.dim() == 2 and scale.shape[0] == m and scale.shape[1] == 1)),
        lambda: f"float8 input needs its float input_scale, one element or [m, 1] = [{m}, 1], got {describe(scale)}",
    )
