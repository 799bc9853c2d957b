"""``weight_only_mm``: the matrix product of a float activation and a quantized weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fx_quant.ops.decode import decode, unpack_codes
from fx_quant.ops.library import MATMUL_TAGS, register
from fx_quant.ops.scaled_mm import check_blocks, check_epilogue, dequantize, fits_columns
from fx_quant.scheme import CODE_DTYPES, FLOAT_DTYPES, dtype_name


def dequantize_weight(
    b: Tensor,
    k: int,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    block: Sequence[int] | None,
    b_offset: Tensor | None = None,
) -> Tensor:
    """``(b - b_zero_point) * b_scale + b_offset`` in float32, ``[k, n]``; arguments as for ``weight_only_mm``."""
    codes = unpack_codes(b, k)
    if block is None:
        return decode(codes, b_scale, b_zero_point, offset=b_offset)
    return decode(codes.t(), b_scale, b_zero_point, block, b_offset).t()


def weight_only_mm(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    block: Sequence[int] | None = None,
    b_offset: Tensor | None = None,
) -> Tensor:
    """Matrix product of a float activation and a quantized weight.

    ``out[m, n] = cast(sum_k x[m, k] * ((b[k, n] - b_zero_point) * b_scale + b_offset) + bias[n])`` in float32.

    Args:
        x: ``[m, k]``, float32, bfloat16 or float16.
        b: codes ``[k, n]``, int8, uint8 or float8; or int4 codes in uint8 ``[k / 2, n]``, two to a byte along k:
            ``code + 8``, the even k in the low nibble. Usually a transposed weight.
        b_scale: one element, ``[n]`` or ``[1, n]``, float32. With ``block = [r, c]``: ``[ceil(n / r), ceil(k / c)]``;
            groups of ``g`` along k are ``block = [1, g]``.
        b_zero_point: as ``b_scale``, integer; None is 0.
        bias: ``[n]``, any float dtype, added in float32.
        out_dtype: float32, bfloat16 or float16.
        block: rows and columns of the weight ``[n, k]`` that share one scale, or None.
        b_offset: as ``b_scale``, any float dtype; None is 0.
    """
    more = {"block": block, "b_offset": b_offset}
    check_weight_only_mm(x, b, b.shape[1], b_scale, b_zero_point, bias, out_dtype, "weight_only_mm", **more)
    acc = x.float() @ dequantize_weight(b, x.shape[1], b_scale, b_zero_point, block, b_offset)
    return dequantize(acc, None, None, bias, out_dtype).contiguous()


def check_weight_only_mm(
    x, b, n, b_scale, b_zero_point, bias, out_dtype, op: str, *, block=None, b_offset=None
) -> None:
    """Raise unless the operands of a weight-only matmul fit together; the rows of ``x`` may be symbolic."""
    torch._check(
        x.dim() == 2 and x.dtype in FLOAT_DTYPES,
        lambda: f"{op}: x must be [m, k] of float32, bfloat16 or float16, got {dtype_name(x.dtype)} {list(x.shape)}",
    )
    check_epilogue(n, bias, out_dtype, op)
    torch._check(out_dtype is not torch.int32, lambda: f"{op}: out_dtype must be a float dtype, got int32")
    k = x.shape[1]
    torch._check(
        b.dim() != 2
        or (b.shape[0] == k and b.dtype in CODE_DTYPES)
        or (b.dtype is torch.uint8 and 2 * b.shape[0] == k),
        lambda: (
            f"{op}: b must be codes [k, n] = [{k}, {n}], or two int4 codes to a byte [k / 2, n], "
            f"got {dtype_name(b.dtype)} {list(b.shape)}"
        ),
    )
    if block is not None:
        check_blocks(x.shape[0], k, n, None, b_scale, block, op)
    else:
        torch._check(
            fits_columns(b_scale, n),
            lambda: f"{op}: b_scale must have one element or shape [n] = [{n}], got {list(b_scale.shape)}",
        )
    torch._check(
        b_zero_point is None or (b_zero_point.shape == b_scale.shape and not b_zero_point.dtype.is_floating_point),
        lambda: (
            f"{op}: b_zero_point must be integers of the shape of b_scale, {list(b_scale.shape)}, "
            f"got {dtype_name(b_zero_point.dtype)} {list(b_zero_point.shape)}"
        ),
    )
    torch._check(
        b_offset is None or (b_offset.shape == b_scale.shape and b_offset.dtype.is_floating_point),
        lambda: (
            f"{op}: b_offset must be floats of the shape of b_scale, {list(b_scale.shape)}, "
            f"got {dtype_name(b_offset.dtype)} {list(b_offset.shape)}"  # pyrefly: ignore[missing-attribute]
        ),
    )


def _weight_only_mm_fake(x, b, b_scale, b_zero_point, bias, out_dtype, *, block=None, b_offset=None):
    more = {"block": block, "b_offset": b_offset}
    check_weight_only_mm(x, b, b.shape[1], b_scale, b_zero_point, bias, out_dtype, "weight_only_mm", **more)
    return x.new_empty((x.shape[0], b.shape[1]), dtype=out_dtype)


register(
    "weight_only_mm(Tensor x, Tensor b, Tensor b_scale, Tensor? b_zero_point, Tensor? bias, ScalarType out_dtype, *, "
    "SymInt[]? block=None, Tensor? b_offset=None) -> Tensor",
    weight_only_mm,
    _weight_only_mm_fake,
    MATMUL_TAGS,
)
