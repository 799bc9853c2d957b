"""``gated_mm``: a quantized matmul to gate and up, and ``silu(gate) * up``, in one; and its result quantized."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.ops.library import MATMUL_TAGS, register
from fx_quant.ops.quantize import DYNAMIC_ARGS, quantize
from fx_quant.ops.quantize_groups import quantize_groups, quantize_groups_fake
from fx_quant.ops.scaled_mm import check_scaled_mm, scaled_mm


def gated_mm(a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The gated half of an MLP: ``silu(a @ gate) * (a @ up)`` of two quantized operands.

    ``out[m, n] = cast(silu(float32(y[m, j])) * float32(y[m, n + j]))`` for ``j < n``, where ``y [m, 2n]`` is
    ``scaled_mm(a, b, a_scale, b_scale, None, out_dtype)``, rounded to ``out_dtype`` as a linear layer's result is, and
    ``silu(g) = g / (1 + exp(-g))`` in float32.

    Args:
        a: codes ``[m, k]``, int8 or float8.
        b: codes ``[k, 2n]``: a transposed weight ``[2n, k]``, the gate's rows first.
        a_scale: one element or ``[m, 1]``, float32; None is 1.
        b_scale: one element, ``[2n]`` or ``[1, 2n]``, float32; None is 1.
        out_dtype: bfloat16, float16 or float32.

    ``m == 0`` returns an empty tensor.

    Raises:
        RuntimeError: dtypes or shapes do not fit, or ``b`` has an odd number of columns.
    """
    check_gated_mm(a, b, a_scale, b_scale, out_dtype, "gated_mm")
    gate, up = scaled_mm(a, b, a_scale, b_scale, None, out_dtype).float().chunk(2, 1)
    return (F.silu(gate) * up).to(out_dtype)


def gated_mm_static(a, b, a_scale, b_scale, out_dtype, scale: Tensor, **quantize_args: Any) -> Tensor:
    """``quantize(gated_mm(...), scale)``, codes ``[m, n]``; the keyword arguments are those of ``quantize``."""
    return quantize(gated_mm(a, b, a_scale, b_scale, out_dtype), scale, **quantize_args)


def gated_mm_dynamic(a, b, a_scale, b_scale, out_dtype, group: int, **quantize_args: Any) -> tuple[Tensor, Tensor]:
    """``gated_mm`` quantized with a scale for each ``group`` neighbours of a row; the last group may be shorter.

    The keyword arguments are those of ``quantize_dynamic``; the granularity is ``per_token``, a group being a token.

    Returns:
        codes ``[m, n]``; scale ``[m, ceil(n / group)]``, float32, with strides ``(1, m)``, as matmuls with scales of
        blocks want them.
    """
    _check_group(group, quantize_args["granularity"])
    return quantize_groups(gated_mm(a, b, a_scale, b_scale, out_dtype), group, **quantize_args)


def check_gated_mm(a, b, a_scale, b_scale, out_dtype, op: str) -> None:
    """Raise unless the operands of a gated matmul fit together; the rows of ``a`` may be symbolic."""
    torch._check(
        a.dim() == 2 and b.dim() == 2 and a.shape[1] == b.shape[0] and b.shape[1] % 2 == 0,
        lambda: f"{op}: a and b must be [m, k] and [k, 2n], got {list(a.shape)} and {list(b.shape)}",
    )
    torch._check(out_dtype is not torch.int32, lambda: f"{op}: out_dtype must be a float dtype, got int32")
    check_scaled_mm(a.shape[0], a.dtype, a.shape[1], b.shape[1], a_scale, b_scale, None, out_dtype, op)


def _check_group(group: int, granularity: str) -> None:
    torch._check(
        group > 0 and granularity == "per_token",
        lambda: (
            f"gated_mm: group must be the number of neighbours that share a scale, with granularity 'per_token'; "
            f"got {group} with {granularity!r}"
        ),
    )


def gated_mm_fake(a, b, a_scale, b_scale, out_dtype):
    """The shape and dtype of ``gated_mm``."""
    check_gated_mm(a, b, a_scale, b_scale, out_dtype, "gated_mm")
    return a.new_empty((a.shape[0], b.shape[1] // 2), dtype=out_dtype)


def gated_mm_static_fake(a, b, a_scale, b_scale, out_dtype, scale, *, dtype, **_):
    """The shape and dtype of ``gated_mm_static``."""
    return gated_mm_fake(a, b, a_scale, b_scale, out_dtype).to(dtype)


def gated_mm_dynamic_fake(a, b, a_scale, b_scale, out_dtype, group, **quantize_args):
    """The shapes, dtypes and strides of ``gated_mm_dynamic``."""
    _check_group(group, quantize_args["granularity"])
    y = gated_mm_fake(a, b, a_scale, b_scale, out_dtype)
    return quantize_groups_fake(y, group, **quantize_args)


_OPERANDS = "Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, ScalarType out_dtype"
STATIC_ARGS = "Tensor scale, *, ScalarType dtype, bool reciprocal, float lo, float hi"


def register_gated_mm(prefix: str, plain, static, dynamic) -> None:
    """Register ``<prefix>gated_mm`` and its overloads, with these bodies and the canonical fake functions."""
    name = f"{prefix}gated_mm"
    register(f"{name}({_OPERANDS}) -> Tensor", plain, gated_mm_fake, MATMUL_TAGS)
    register(f"{name}.static({_OPERANDS}, {STATIC_ARGS}) -> Tensor", static, gated_mm_static_fake, MATMUL_TAGS)
    register(
        f"{name}.dynamic({_OPERANDS}, int group, {DYNAMIC_ARGS}) -> (Tensor codes, Tensor scale)",
        dynamic,
        gated_mm_dynamic_fake,
        MATMUL_TAGS,
    )


register_gated_mm("", gated_mm, gated_mm_static, gated_mm_dynamic)
