"""Running a selected kernel eagerly: what ``passes/assign.py`` writes into a graph, done at once."""

from __future__ import annotations

import functools
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.kernels.base import empty_product
from fx_quant.kernels.packing import Layout, register_layout
from fx_quant.machine import detect_target
from fx_quant.ops import column_sums
from fx_quant.problem import Problem
from fx_quant.reasons import without_compiler
from fx_quant.scheme import dtype_name
from fx_quant.selection import DISABLED_VARIABLE, Selection, select
from fx_quant.target import Target


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """The machine that tensors on ``device`` run on; asked once, as a call must cost microseconds."""
    return detect_target(device)


def eager_selection(problem: Problem, target: Target, force_kernel: str | None = None) -> Selection:
    """``select`` for an eager call; remembered for equal arguments. Says once what a missing C++ compiler costs.

    Raises:
        NoKernelError: no kernel can run it, or the forced one cannot.
    """
    return _remembered(problem, target, force_kernel, os.environ.get(DISABLED_VARIABLE, ""))


@functools.lru_cache(maxsize=1024)
def _remembered(problem: Problem, target: Target, force_kernel: str | None, _disabled: str) -> Selection:
    selection = select(problem, target, force_kernel=force_kernel, mode="eager")
    if force_kernel is None and selection.without_compiler:
        _warn_once(without_compiler(selection.without_compiler[:1]))
    return selection


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(f"fx_quant: {text}", stacklevel=5)


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

    Padded codes are 0, padded scales 1 (finite), padded zero points and bias 0. Where a size is 0 no kernel is called.

    Args:
        selection: kernel and padding plan.
        a: codes ``[m, k]``, or a float activation for a weight-only kernel.
        weight: codes ``[n, k]`` (or packed int4 ``[n, k / 2]``), any strides.
        a_scale: one element or ``[m, 1]``; with ``block = (r, c)`` ``[m, ceil(k / c)]``.
        b_scale: one element or ``[n]``; with ``block`` ``[ceil(n / r), ceil(k / c)]``.
        bias: ``[n]``.
        a_zero_point: int32 of the shape of ``a_scale``; beside integer codes only.
        b_zero_point: integers of the shape of ``b_scale``; for a weight-only kernel only.
        block: rows and columns of the weight that share one scale, or None.
    """
    kernel, problem, padding = selection.kernel, selection.problem, selection.padding
    m = a.shape[0]
    if 0 in (m, problem.n, problem.k):
        return empty_product(a, problem.n, bias, problem.out_dtype)
    rows = max(m, padding.rows)
    if rows > m or padding.k > problem.k:
        a = F.pad(a, (0, padding.k - problem.k, 0, rows - m))
    if kernel.a_dtype is not None:
        a = a.to(kernel.a_dtype)
    sums = None if a_zero_point is None else _grown(_sums(weight), (padding.n,), 0)
    if block is None:
        a_scale, a_zero_point = _more_rows(a_scale, m, rows, 1), _more_rows(a_zero_point, m, rows, 0)
        b_scale, b_zero_point = _more_columns(b_scale, padding.n, 1), _more_columns(b_zero_point, padding.n, 0)
    else:
        down, across = -(-padding.n // block[0]), -(-padding.k // block[1])
        a_scale = _grown(a_scale, (rows, across), 1)
        b_scale, b_zero_point = _grown(b_scale, (down, across), 1), _grown(b_zero_point, (down, across), 0)
    given = {"a_zero_point": a_zero_point, "b_sum": sums, "b_zero_point": b_zero_point, "block": block}
    extras = {name: value for name, value in given.items() if value is not None}
    b, bias = _weight_for(selection, weight), _grown(bias, (padding.n,), 0)
    out = kernel.overload()(a, b, a_scale, b_scale, bias, padding.n, problem.out_dtype, **extras)
    return out if out.shape == (m, problem.n) else out[:m, : problem.n].contiguous()


def _weight_for(selection: Selection, weight: Tensor) -> Tensor:
    """``weight [n, k]`` as the kernel reads it: packed, or ``[k, n]``, padded as planned."""
    kernel, problem, padding = selection.kernel, selection.problem, selection.padding
    if kernel.layout is not None:
        return _packed(weight, kernel.layout)
    if (padding.n, padding.k) == (problem.n, problem.k):
        return weight.t()
    # Two int4 codes are one byte. Those beyond k meet zeros of the activation, whatever they decode to.
    codes = problem.k // weight.shape[1]
    return _packed(weight, _aligned(weight.dtype, kernel.requires.align, kernel.requires.align // codes)).t()


@functools.cache
def _aligned(dtype: torch.dtype, rows: int, columns: int) -> str:
    """The layout of weights whose sizes are padded to multiples, so that each is padded once, not at each call."""
    layout = Layout(
        name=f"{dtype_name(dtype)}_aligned_{rows}x{columns}",
        weights=frozenset({dtype}),
        dtype=dtype,
        shape=lambda n, k: (n + -n % rows, k + -k % columns),
        pack=lambda weight: F.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)).contiguous(),
        unpack=lambda packed, n, k: packed[:n, :k],
    )
    return register_layout(layout).name


def _sums(weight: Tensor) -> Tensor:
    return _packed(weight, "sums") if weight.dtype is torch.int8 else column_sums(weight.t())


def _packed(weight: Tensor, layout: str) -> Tensor:
    return torch.ops.fx_quant.prepack([weight], [layout])[0]


def _more_rows(x: Tensor | None, m: int, rows: int, value: float) -> Tensor | None:
    """``x [m, 1]`` with ``rows`` rows; one element for all rows stays as it is."""
    return x if x is None or x.dim() < 2 or x.shape[0] != m else _grown(x, (rows, 1), value)


def _more_columns(x: Tensor | None, n: int, value: float) -> Tensor | None:
    """``x`` of one element for each column with ``n`` elements; one element for all columns stays as it is."""
    return x if x is None or x.numel() == 1 else _grown(x, (n,), value)


def _grown(x: Tensor | None, shape: tuple[int, ...], value: float) -> Tensor | None:
    """``x`` in the first corner of a tensor of ``shape`` filled with ``value``."""
    if x is None or x.shape == shape:
        return x
    behind = [(0, wanted - size) for wanted, size in zip(shape, x.shape, strict=True)]
    return F.pad(x, [each for pair in reversed(behind) for each in pair], value=value)
