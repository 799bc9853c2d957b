"""``quantize_dynamic`` with a scale for each group of neighbours along k."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.ops.quantize import quantize_dynamic, quantize_dynamic_fake


def quantize_groups(x: Tensor, group: int, **quantize_args: Any) -> tuple[Tensor, Tensor]:
    """``quantize_dynamic`` of ``x [..., k]``, each ``group`` neighbours along k being a token of their own.

    The last group of a row may be shorter. ``group=0`` is ``quantize_dynamic`` itself.

    Args:
        quantize_args: keyword arguments of ``quantize_dynamic``; with groups the granularity must be ``per_token``.

    Returns:
        codes ``[..., k]``; scale ``[..., ceil(k / group)]``, float32, with the scales of one group of all rows next to
        each other (``[m, k / group]`` has strides ``(1, m)``), as matmuls with scales of blocks want them.

    Raises:
        RuntimeError: a negative group, or groups of a tensor that has one scale.
    """
    check_group(group, quantize_args["granularity"])
    if not group:
        return quantize_dynamic(x, **quantize_args)
    k = x.shape[-1]
    groups = -(-k // group)
    # Zeros beyond k change no amax.
    rows = F.pad(x, (0, groups * group - k)).unflatten(-1, (groups, group))
    codes, scale = quantize_dynamic(rows, **quantize_args)
    return codes.flatten(-2)[..., :k].contiguous(), empty_group_scale(x, group).copy_(scale.squeeze(-1))


def quantize_groups_fake(x: Tensor, group: int, **quantize_args: Any) -> tuple[Tensor, Tensor]:
    """The shapes, dtypes and strides of ``quantize_groups``."""
    check_group(group, quantize_args["granularity"])
    codes, scale = quantize_dynamic_fake(x, **quantize_args)
    if group:
        scale = empty_group_scale(x, group)
    return codes, scale


def empty_group_scale(x: Tensor, group: int) -> Tensor:
    """An uninitialized scale of groups for ``x``, in the layout of ``quantize_groups``."""
    groups = -(-x.shape[-1] // group)
    return x.new_empty((groups, *x.shape[:-1]), dtype=torch.float32).movedim(0, -1)


def check_group(group: int, granularity: str) -> None:
    """Raise unless a group fits the granularity."""
    torch._check(
        group == 0 or (group > 0 and granularity == "per_token"),
        lambda: (
            f"quantize: group must be 0, or the number of neighbours that share a scale with granularity 'per_token'; "
            f"got {group} with {granularity!r}"
        ),
    )
