"""``scaled_mm``: the matrix product of two quantized operands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fx_quant.ops.decode import repeat_blocks, unpack_codes
from fx_quant.ops.library import MATMUL_TAGS, register
from fx_quant.scheme import FLOAT8_DTYPES, INT8_DTYPES, dtype_name

OUT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.int32})


def accumulate(a: Tensor, b: Tensor) -> Tensor:
    """``sum_k a[m, k] * b[k, n]`` of codes: int32 (modulo 2**32) for integer codes, float32 for float8."""
    if a.dtype in FLOAT8_DTYPES:
        return a.float() @ b.float()
    # Exact for every k below 2**38 on every device, and BLAS-fast, which integer matmul is not.
    return (a.double() @ b.double()).to(torch.int64).to(torch.int32)


def dequantize(
    acc: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``cast(float32(acc) * a_scale * b_scale + bias)``, each step in float32 and in this order."""
    if out_dtype is torch.int32:
        return acc
    y = acc.float()
    if a_scale is not None:
        y = y * a_scale
    if b_scale is not None:
        y = y * b_scale
    if bias is not None:
        y = y + bias
    return y.to(out_dtype)


def correct(acc: Tensor, a_zero_point: Tensor | None, b_sum: Tensor | None) -> Tensor:
    """``sum_k (a - a_zero_point) b`` from ``acc = sum_k a b`` and ``b_sum[n] = sum_k b``, in int32."""
    if a_zero_point is None or b_sum is None:
        return acc
    return acc - a_zero_point * b_sum


def column_sums(b: Tensor) -> Tensor:
    """``sum_k b[k, n]`` of integer codes, int32 ``[n]``."""
    return b.sum(0, dtype=torch.int32)


def _one_element(scale: Tensor) -> bool:
    """Whether ``scale`` is known to have one element, without a guard on a symbolic size."""
    numel = scale.numel()
    if isinstance(numel, int):
        return numel == 1 and scale.dim() <= 2
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return scale.dim() <= 2 and statically_known_true(numel == 1)


def _fits_rows(x: Tensor, rows) -> bool:
    return _one_element(x) or (x.dim() == 2 and x.shape[1] == 1 and x.shape[0] == rows)


def fits_columns(x: Tensor, n) -> bool:
    """Whether ``x`` has one element or one for each column: ``[n]`` or ``[1, n]``."""
    return (
        _one_element(x) or (x.dim() == 1 and x.shape[0] == n) or (x.dim() == 2 and x.shape[0] == 1 and x.shape[1] == n)
    )


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def check_epilogue(n, bias, out_dtype, op: str) -> None:
    """Raise unless bias and out_dtype fit ``out[m, n]``."""
    torch._check(
        out_dtype in OUT_DTYPES,
        lambda: f"{op}: out_dtype must be float32, bfloat16, float16 or int32, got {dtype_name(out_dtype)}",
    )
    torch._check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == n),
        lambda: f"{op}: bias must have shape [n] = [{n}], got {list(bias.shape)}",
    )


def check_scaled_mm(
    a_rows, a_dtype, k, n, a_scale, b_scale, bias, out_dtype, op: str, *, a_zero_point=None, block=None
) -> None:
    """Raise unless scales, zero point, bias and out_dtype fit ``out[m, n]``; sizes may be symbolic."""
    check_epilogue(n, bias, out_dtype, op)
    if block is not None:
        check_blocks(a_rows, k, n, a_scale, b_scale, block, op)
    else:
        torch._check(
            a_scale is None or _fits_rows(a_scale, a_rows),
            lambda: f"{op}: a_scale must have one element or shape [m, 1] = [{a_rows}, 1], got {list(a_scale.shape)}",
        )
        torch._check(
            b_scale is None or fits_columns(b_scale, n),
            lambda: f"{op}: b_scale must have one element or shape [n] = [{n}], got {list(b_scale.shape)}",
        )
    if a_zero_point is not None:
        torch._check(
            a_dtype in INT8_DTYPES and a_zero_point.dtype is torch.int32 and _fits_rows(a_zero_point, a_rows),
            lambda: (
                f"{op}: a_zero_point must be int32 of one element or shape [m, 1] = [{a_rows}, 1] beside integer "
                f"codes, got {dtype_name(a_zero_point.dtype)} {list(a_zero_point.shape)} beside {dtype_name(a_dtype)}"
            ),
        )
    if out_dtype is torch.int32:
        torch._check(
            a_scale is None and b_scale is None and bias is None and a_dtype in INT8_DTYPES,
            lambda: f"{op}: out_dtype int32 is the raw accumulator of integer codes; it takes no scale and no bias",
        )


def check_blocks(a_rows, k, n, a_scale, b_scale, block, op: str) -> None:
    """Raise unless ``block`` and the scales of blocks fit ``a [a_rows, k]`` and ``b [k, n]``."""
    torch._check(
        len(block) == 2 and all(size > 0 for size in block),
        lambda: f"{op}: block must be two positive sizes (rows and columns of the weight [n, k]), got {list(block)}",
    )
    along_k = _blocks(k, block[1])
    torch._check(
        a_scale is None
        or (a_scale.dim() == 2 and a_scale.shape[0] == a_rows and a_scale.shape[1] == along_k)
        or _fits_rows(a_scale, a_rows),
        lambda: (
            f"{op}: a_scale must have one element or shape [m, 1] or [m, k / block] = [{a_rows}, {along_k}], "
            f"got {list(a_scale.shape)}"
        ),
    )
    along_n = _blocks(n, block[0])
    torch._check(
        b_scale is not None and list(b_scale.shape) == [along_n, along_k],
        lambda: (
            f"{op}: b_scale must have shape [n / block, k / block] = [{along_n}, {along_k}], "
            f"got {None if b_scale is None else list(b_scale.shape)}"
        ),
    )


# --- scaled_mm ------------------------------------------------------------------------------------------------


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    block: Sequence[int] | None = None,
) -> Tensor:
    """Matrix product of two quantized operands.

    ``out[m, n] = cast(float32(sum_k (a[m, k] - a_zero_point) * b[k, n]) * a_scale * b_scale + bias[n])``; the sum is
    int32 for integer codes and float32 for float8, the rest float32 in this order. With ``block = [r, c]`` the scales
    vary along k: ``out = cast(sum_j float32(sum_{k in j} a b) * a_scale[m, j] * b_scale[n / r, j] + bias)`` over the
    blocks ``j`` of ``c`` neighbours along k, the zero points taken off ``a`` and ``b`` in the sums of the blocks.

    Args:
        a: ``[m, k]``, int8 or float8.
        b: ``[k, n]``, same family as ``a``; usually a transposed ``[n, k]`` weight. Beside integer codes also int4
            codes in uint8 ``[k / 2, n]``, two to a byte along k: ``code + 8``, the even k in the low nibble.
        a_scale: one element or ``[m, 1]``, float32; None is 1. With ``block`` also ``[m, ceil(k / c)]``.
        b_scale: one element, ``[n]`` or ``[1, n]``, float32; None is 1. With ``block``: ``[ceil(n / r), ceil(k / c)]``.
        bias: ``[n]``, any float dtype, added in float32.
        out_dtype: dtype of the result; ``torch.int32`` returns the raw accumulator of integer codes.
        a_zero_point: int32, one element or ``[m, 1]``; None is 0. Integer codes only.
        b_zero_point: integers of the shape of ``b_scale``; None is 0. Integer codes only. Beside it a sum is in
            float32, where int32 might not hold it.
        block: rows and columns of the weight ``[n, k]`` that share one scale, or None.

    A zero scale gives zeros. ``m == 0`` returns an empty tensor.
    """
    _check_all(a, b, a_scale, b_scale, bias, out_dtype, a_zero_point, b_zero_point, block)
    if a.dtype in INT8_DTYPES:
        b = unpack_codes(b, a.shape[1])
    if block is not None:
        assert b_scale is not None
        is_by_block = a_scale is not None and a_scale.dim() == 2 and a_scale.shape[1] == b_scale.shape[1]
        of_blocks = a_scale if is_by_block else None
        acc = accumulate_blocks(a, b, of_blocks, b_scale, b_zero_point, block, a_zero_point=a_zero_point)
        return dequantize(acc, None if is_by_block else a_scale, None, bias, out_dtype).contiguous()
    if b_zero_point is not None:
        of_rows = b_zero_point.reshape(-1, 1).expand(b.shape[1], 1)
        one = torch.ones_like(of_rows, dtype=torch.float32)
        acc = accumulate_blocks(a, b, None, one, of_rows, (1, max(a.shape[1], 1)), a_zero_point=a_zero_point)
        return dequantize(acc, a_scale, b_scale, bias, out_dtype).contiguous()
    acc = accumulate(a, b)
    if a_zero_point is not None:
        acc = correct(acc, a_zero_point, column_sums(b))
    return dequantize(acc, a_scale, b_scale, bias, out_dtype).contiguous()


def accumulate_blocks(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    block: Sequence[int],
    *,
    a_zero_point: Tensor | None = None,
) -> Tensor:
    """``sum_j float32(sum_{k in j} a b) * a_scale[m, j] * b_scale[n / r, j]``, float32 ``[m, n]``."""
    rows, columns = block
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
    shifted = a_zero_point is not None or b_zero_point is not None
    if shifted:
        # Exact, as every sum of integers that float64 holds.
        a, b = a.double(), b.double()
        a = a if a_zero_point is None else a - a_zero_point
        b = b if b_zero_point is None else b - repeat_blocks(b_zero_point, block, b.t().shape).t()
    for j in range(_blocks(a.shape[1], columns)):
        along = slice(j * columns, (j + 1) * columns)
        part = (a[:, along] @ b[along] if shifted else accumulate(a[:, along], b[along])).float()
        scale = b_scale[:, j].float().repeat_interleave(rows)[: b.shape[1]]
        out += (part if a_scale is None else part * a_scale[:, j : j + 1].float()) * scale
    return out


def _check_operands(a, b) -> None:
    both_int8 = a.dtype in INT8_DTYPES and b.dtype in INT8_DTYPES
    torch._check(
        a.dim() == 2
        and b.dim() == 2
        and (a.shape[1] == b.shape[0] or (both_int8 and b.dtype is torch.uint8 and a.shape[1] == 2 * b.shape[0])),
        lambda: (
            f"scaled_mm: a and b must be [m, k] and [k, n], got {list(a.shape)} and {list(b.shape)}; "
            "b of two int4 codes to a byte is [k / 2, n]"
        ),
    )
    both_float8 = a.dtype in FLOAT8_DTYPES and b.dtype in FLOAT8_DTYPES
    torch._check(
        both_float8 or both_int8,
        lambda: (
            f"scaled_mm: a and b must both be int8 or both float8, got {dtype_name(a.dtype)} and {dtype_name(b.dtype)}"
        ),
    )


def _check_all(a, b, a_scale, b_scale, bias, out_dtype, a_zero_point, b_zero_point, block) -> None:
    _check_operands(a, b)
    (m, k), n = a.shape, b.shape[1]
    extras = {"a_zero_point": a_zero_point, "block": block}
    check_scaled_mm(m, a.dtype, k, n, a_scale, b_scale, bias, out_dtype, "scaled_mm", **extras)
    torch._check(
        b_zero_point is None
        or (
            b_scale is not None
            and a.dtype in INT8_DTYPES
            and b_zero_point.shape == b_scale.shape
            and not b_zero_point.dtype.is_floating_point
        ),
        lambda: (
            "scaled_mm: b_zero_point must be integers of the shape of b_scale, beside integer codes, "
            f"got {dtype_name(b_zero_point.dtype)} {list(b_zero_point.shape)} beside {dtype_name(a.dtype)}"
        ),
    )


def _scaled_mm_fake(a, b, a_scale, b_scale, bias, out_dtype, *, a_zero_point=None, b_zero_point=None, block=None):
    _check_all(a, b, a_scale, b_scale, bias, out_dtype, a_zero_point, b_zero_point, block)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


register(
    "scaled_mm(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, Tensor? bias, ScalarType out_dtype, *, "
    "Tensor? a_zero_point=None, Tensor? b_zero_point=None, SymInt[]? block=None) -> Tensor",
    scaled_mm,
    _scaled_mm_fake,
    MATMUL_TAGS,
)
