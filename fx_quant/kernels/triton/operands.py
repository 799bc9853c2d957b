"""The operands of a scaled matmul on a GPU, checked once, whichever form computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_quant.ops import check_scaled_mm, column_sums
from fx_quant.scheme import FLOAT8_DTYPES


def recipe_of(a_dtype: torch.dtype, block: tuple[int, int] | None) -> str:
    """How codes of ``a_dtype`` are multiplied and scaled.

    ``int8`` and ``float8`` have scales that leave the sum. With scales along k it is ``int8_group`` or
    ``float8_group``, and ``float8_block`` where 128 columns share one.
    """
    codes = "int8" if a_dtype is torch.int8 else "float8"
    if block is not None:
        return f"{codes}_{'block' if codes == 'float8' and block[0] % 128 == 0 else 'group'}"
    return codes


@dataclass(frozen=True)
class ScaledOperands:
    """Operands of ``fx_quant::scaled_mm``, checked.

    Args:
        a: codes ``[m, k]``: int8, or float8 of any kind.
        b: codes ``[k, n]``, usually the transposed view of a weight ``[n, k]``.
        a_scale, b_scale, bias: as in ``fx_quant::scaled_mm``; None is 1, 1 and 0.
        a_zero_point: int32, one or one a row, or None.
        b_sum: int32 ``[n]``, the sum of ``b`` over k; given with ``a_zero_point``.
        block: ``(rows of the weight, codes along k)`` that share a scale of ``b``, or None.
        out_dtype: dtype of the result.
    """

    a: Tensor
    b: Tensor
    a_scale: Tensor | None
    b_scale: Tensor | None
    bias: Tensor | None
    a_zero_point: Tensor | None
    b_sum: Tensor | None
    block: tuple[int, int] | None
    out_dtype: torch.dtype

    @property
    def recipe(self) -> str:
        """What configurations differ by, as ``recipe_of`` says it."""
        return recipe_of(self.a.dtype, self.block)

    @property
    def m(self) -> int:
        """Rows of the result."""
        return self.a.shape[0]

    @property
    def n(self) -> int:
        """Columns of the result."""
        return self.b.shape[1]

    @property
    def k(self) -> int:
        """Length of a sum."""
        return self.a.shape[1]


def scaled_operands(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    out_dtype: torch.dtype,
    *,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
    block: Sequence[int] | None = None,
) -> ScaledOperands:
    """Check the operands of ``triton_scaled_mm``.

    Raises:
        RuntimeError: dtypes or shapes do not fit.
    """
    name = "triton_scaled_mm"
    (m, k), (b_k, b_n) = a.shape, b.shape
    dtypes = {a.dtype, b.dtype}
    torch._check(
        (b_k, b_n) == (k, n) and (dtypes == {torch.int8} or dtypes <= set(FLOAT8_DTYPES)),
        lambda: (
            f"{name}: a [m, k] and b [k, n] must both be int8 or both float8, "
            f"got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)} for n={n}"
        ),
    )
    torch._check(
        block is None or a_zero_point is None,
        lambda: f"{name}: block scales take no a_zero_point; quantize symmetrically",
    )
    check_scaled_mm(m, a.dtype, k, n, a_scale, b_scale, bias, out_dtype, name, a_zero_point=a_zero_point, block=block)
    if a_zero_point is None:
        b_sum = None
    elif b_sum is None:
        b_sum = column_sums(b)
    sizes = None if block is None else (block[0], block[1])
    return ScaledOperands(a, b, a_scale, b_scale, bias, a_zero_point, b_sum, sizes, out_dtype)


def vector_stride(x: Tensor | None, dim: int) -> int:
    """Stride of a scale, zero point or bias; 0 repeats a single element."""
    return 0 if x is None or x.numel() == 1 else x.stride(dim)


def grouped_strides(x: Tensor | None, grouped: bool) -> tuple[int, int]:
    """Strides of a scale or zero point along rows and k; ``grouped``: where both vary."""
    if x is None:
        return 0, 0
    return (x.stride(0), x.stride(1)) if grouped else (vector_stride(x, -1), 0)


def scale_arguments(operands: ScaledOperands) -> dict[str, Any]:
    """What tile and swapped kernels take of scales and bias, and of zero point and sums unless blocks share scales."""
    a_scale, b_scale = operands.a_scale, operands.b_scale
    scales: dict[str, Any] = {
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "bias_ptr": operands.bias,
        "stride_bias": vector_stride(operands.bias, 0),
    }
    if operands.block is None:
        return scales | {
            "a_zero_point_ptr": operands.a_zero_point,
            "b_sum_ptr": operands.b_sum,
            "stride_a_scale": vector_stride(a_scale, 0),
            "stride_b_scale": vector_stride(b_scale, -1),
            "stride_a_zero_point": vector_stride(operands.a_zero_point, 0),
            "stride_b_sum": vector_stride(operands.b_sum, 0),
        }
    (a_scale_m, a_scale_k), (b_scale_n, b_scale_k) = grouped_strides(a_scale, True), grouped_strides(b_scale, True)
    return scales | {
        "stride_a_scale_m": a_scale_m,
        "stride_a_scale_k": a_scale_k,
        "stride_b_scale_n": b_scale_n,
        "stride_b_scale_k": b_scale_k,
        "GROUP_N": operands.block[0],
        "GROUP_K": operands.block[1],
    }


def weight_only_arguments(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, block: Sequence[int] | None
) -> dict[str, Any]:
    """What both kernels of a weight-only matmul take of ``x``, of the weight's factors and of the bias."""
    scale_n, scale_k = grouped_strides(scale, block is not None)
    zero_point_n, zero_point_k = grouped_strides(zero_point, block is not None)
    return {
        "x_ptr": x,
        "bias_ptr": bias,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_scale_n": scale_n,
        "stride_scale_k": scale_k,
        "stride_zero_point_n": zero_point_n,
        "stride_zero_point_k": zero_point_k,
        "stride_bias": vector_stride(bias, 0),
        "GROUP_N": 1 if block is None else block[0],
        "GROUP_K": 0 if block is None else block[1],
    }
