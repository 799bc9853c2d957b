"""``Fp8LinearOp``: a float8 linear as a function of its tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fx_quant.activation import quantize_activation
from fx_quant.eager import eager_selection, run_kernel, target_of
from fx_quant.linear import linear_problem, must
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, Granularity, OperandSpec, Scheme, dtype_name
from fx_quant.selection import Selection


class Fp8LinearOp:
    """A float8 linear as a function of its tensors, with the interface of vLLM's ``Fp8LinearOp``.

    The kernel is chosen by ``select``; rows are padded as its plan says: to 17 for ``torch._scaled_mm`` on CUDA in
    eager calls, not in compiled ones.

    Args:
        use_per_token_if_dynamic: one scale a row rather than one in all, where no ``input_scale`` is given.
        pad_output: pad rows (True) or not (False) whatever the mode; None decides by the mode of each call.
        force_kernel: the kernel to run, or raise.
    """

    def __init__(
        self,
        use_per_token_if_dynamic: bool = False,
        pad_output: bool | None = None,
        force_kernel: str | None = None,
    ) -> None:
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
        """``[..., k] -> [..., n]``.

        Args:
            input: float, or float8 codes with their ``input_scale``.
            weight: float8 codes ``[k, n]``.
            weight_scale: one element, or one for each column: ``[n]``, ``[n, 1]`` or ``[1, n]``.
            out_dtype: dtype of the result; ``input``'s by default, which codes have none of.
            input_scale: static: one element; for codes also one for each row, ``[m, 1]``. None is dynamic.
            input_scale_ub: bound of a dynamic per-token scale's amax.
            bias: ``[n]``.

        Raises:
            ValueError: operands that do not fit together.
            NoKernelError: no kernel can run it, or the forced one cannot.
        """
        _check_fp8(input, weight, weight_scale, out_dtype, input_scale)
        x = input.reshape(-1, input.shape[-1])
        per_token = self.use_per_token_if_dynamic if use_per_token_if_dynamic is None else use_per_token_if_dynamic
        codes, a_scale = self._codes(x, weight.dtype, input_scale, input_scale_ub, per_token)
        b_scale = weight_scale.float().flatten()
        out_dtype = out_dtype or input.dtype
        if torch.compiler.is_compiling():
            out = torch.ops.fx_quant.scaled_mm(codes, weight, a_scale, b_scale, bias, out_dtype)
        else:
            selection = self._selection(codes, a_scale, weight, b_scale, bias, out_dtype, input_scale is None)
            out = run_kernel(selection, codes, weight.t(), a_scale, b_scale, bias)
        return out.reshape(*input.shape[:-1], weight.shape[1])

    def _codes(
        self, x: Tensor, dtype: torch.dtype, scale: Tensor | None, scale_ub: Tensor | None, per_token: bool
    ) -> tuple[Tensor, Tensor]:
        if x.dtype in FLOAT8_DTYPES:
            assert scale is not None
            return x, scale.float() if scale.numel() > 1 else scale.float().reshape(())
        granularity = Granularity.PER_TOKEN if per_token and scale is None else Granularity.PER_TENSOR
        spec = OperandSpec(dtype, granularity, dynamic=scale is None)
        codes, found, _ = quantize_activation(x, spec, scale, scale_ub=scale_ub)
        return codes, found

    def _selection(
        self,
        codes: Tensor,
        a_scale: Tensor,
        weight: Tensor,
        b_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        dynamic: bool,
    ) -> Selection:
        activation = Granularity.PER_TENSOR if a_scale.dim() == 0 else Granularity.PER_TOKEN
        channels = Granularity.PER_TENSOR if b_scale.numel() == 1 else Granularity.PER_CHANNEL
        scheme = Scheme(OperandSpec(codes.dtype, activation, dynamic=dynamic), OperandSpec(weight.dtype, channels))
        k, n = weight.shape
        problem = linear_problem(scheme, (n, k), codes.dtype, out_dtype, bias)
        selection = eager_selection(problem, target_of(codes.device), self.force_kernel)
        if self.pad_output is False:
            selection = replace(selection, padding=replace(selection.padding, rows=0))
        return selection


def _check_fp8(
    input: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: torch.dtype | None, input_scale: Tensor | None
) -> None:
    must(
        weight.dim() == 2 and weight.dtype in FLOAT8_DTYPES,
        lambda: f"weight must be float8 [k, n], got {dtype_name(weight.dtype)} {list(weight.shape)}",
    )
    k, n = weight.shape
    must(
        input.shape[-1] == k,
        lambda: f"input must end in k = {k}, the rows of weight {list(weight.shape)}, got {list(input.shape)}",
    )
    must(
        weight_scale.numel() in (1, n),
        lambda: f"weight_scale must have 1 or n = {n} elements, got {list(weight_scale.shape)}",
    )
    if input.dtype in FLOAT8_DTYPES:
        m = input.numel() // max(k, 1)
        must(
            input_scale is not None and (input_scale.numel() == 1 or list(input_scale.shape) == [m, 1]),
            lambda: f"float8 input needs its input_scale, one element or [m, 1] = [{m}, 1]",
        )
        must(out_dtype is not None, lambda: "float8 input needs an out_dtype: float32, bfloat16 or float16")
    else:
        must(
            input.dtype in FLOAT_DTYPES,
            lambda: f"input must be float32, bfloat16, float16 or float8, got {dtype_name(input.dtype)}",
        )
