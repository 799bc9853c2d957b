"""Running a selected kernel eagerly: what ``passes/assign.py`` writes into a graph, done at once."""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.kernels import packing  # noqa: F401  (registers fx_quant::prepack)
from fx_quant.ops import column_sums
from fx_quant.problem import Problem
from fx_quant.selection import DISABLED_VARIABLE, Selection, select
from fx_quant.target import Target, detect_target


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """The machine that tensors on ``device`` run on; asked once, as a call must cost microseconds."""
    return detect_target(device)


def eager_selection(problem: Problem, target: Target, force_kernel: str | None = None) -> Selection:
    """``select`` for an eager call; remembered for equal arguments.

    Raises:
        NoKernelError: no kernel can run it, or the forced one cannot.
    """
    return _remembered(problem, target, force_kernel, os.environ.get(DISABLED_VARIABLE, ""))


@functools.lru_cache(maxsize=1024)
def _remembered(problem: Problem, target: Target, force_kernel: str | None, _disabled: str) -> Selection:
    return select(problem, target, force_kernel=force_kernel, mode="eager")


def run_kernel(
    selection: Selection,
    a: Tensor,
    weight: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    *,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """``out [m, n]`` of the selected kernel: pads, packs the weight once, calls, unpads.

    Args:
        a: codes ``[m, k]``, or a float activation for a weight-only kernel.
        weight: codes ``[n, k]`` (or packed int4 ``[n, k / 2]``), any strides.
        a_scale, b_scale, bias, a_zero_point, b_zero_point, block: as for ``fx_quant::scaled_mm`` and
            ``fx_quant::weight_only_mm``.
    """
    kernel, problem, padding = selection.kernel, selection.problem, selection.padding
    m = a.shape[0]
    if m == 0:
        return a.new_empty((0, problem.n), dtype=problem.out_dtype)
    pad_m, pad_n, pad_k = max(0, padding.rows - m), padding.n - problem.n, padding.k - problem.k
    sums = None
    if a_zero_point is not None:
        sums = _packed(weight, "sums") if weight.dtype is torch.int8 else column_sums(weight.t())
    if kernel.layout is not None:
        b = _packed(weight, kernel.layout)
    else:
        b = (F.pad(weight, (0, pad_k, 0, pad_n)) if pad_n or pad_k else weight).t()
    if pad_m or pad_k:
        a = F.pad(a, (0, pad_k, 0, pad_m))
    if kernel.a_dtype is not None:
        a = a.to(kernel.a_dtype)
    if pad_m:
        # Padding rows have codes of 0; their scale must only be finite.
        a_scale, a_zero_point = _more_rows(a_scale, pad_m, 1.0), _more_rows(a_zero_point, pad_m, 0)
    if pad_n:
        b_scale = b_scale if b_scale is None or b_scale.numel() == 1 or block else F.pad(b_scale, (0, pad_n), value=1.0)
        bias = None if bias is None else F.pad(bias, (0, pad_n))
        sums = None if sums is None else F.pad(sums, (0, pad_n))
    given = {"a_zero_point": a_zero_point, "b_sum": sums, "b_zero_point": b_zero_point, "block": block}
    extras = {name: value for name, value in given.items() if value is not None}
    out = kernel.overload()(a, b, a_scale, b_scale, bias, padding.n, problem.out_dtype, **extras)
    return out[:m, : problem.n].contiguous() if pad_m or pad_n else out


def _packed(weight: Tensor, layout: str) -> Tensor:
    return torch.ops.fx_quant.prepack([weight], [layout])[0]


def _more_rows(x: Tensor | None, rows: int, value: float) -> Tensor | None:
    return x if x is None or x.dim() < 2 or x.shape[0] == 1 else F.pad(x, (0, 0, 0, rows), value=value)
