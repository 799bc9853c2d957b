"""The eager face: a kernel selected for the device that tensors are on, and its plan realised over them at once."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fx_quant.errors import NoKernelError
from fx_quant.kernels.context import CompileContext, of_call
from fx_quant.kernels.layouts import CODES, Held, repacked
from fx_quant.kernels.machine import detect_target
from fx_quant.kernels.realise import WEIGHT_FACTORS, Operands, kept_parts, realise
from fx_quant.kernels.registry import empty_product
from fx_quant.kernels.select import DISABLED_VARIABLE, Selection, select
from fx_quant.problem import Problem
from fx_quant.reasons import without_compiler
from fx_quant.scheme import scale_dtype_of
from fx_quant.target import Target


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """The machine that tensors on ``device`` run on; asked once, as a call must cost microseconds."""
    return detect_target(device)


def eager_selection(
    problem: Problem, target: Target, force_kernel: str | None = None, context: CompileContext | None = None
) -> Selection:
    """``select`` for an eager call; remembered for equal arguments. Says once what a missing C++ compiler costs.

    Args:
        context: what may be padded, and whether rows must stand alone, if not as ``fx_quant.mode`` says; the mode is
            always as that says.

    Raises:
        NoKernelError: no kernel can run it, or the forced one cannot.
    """
    return _said(problem, target, force_kernel, of_call(context), os.environ.get(DISABLED_VARIABLE, ""))


def expected_selection(
    problem: Problem, target: Target, force_kernel: str | None = None, context: CompileContext | None = None
) -> Selection | None:
    """``eager_selection`` before there is a call: nothing is said, and None is returned where no kernel can run it."""
    try:
        return _remembered(problem, target, force_kernel, of_call(context), os.environ.get(DISABLED_VARIABLE, ""))
    except NoKernelError:
        return None


@functools.lru_cache(maxsize=1024)
def _remembered(
    problem: Problem, target: Target, force_kernel: str | None, context: CompileContext, _disabled: str
) -> Selection:
    return select(problem, target, force_kernel=force_kernel, context=context)


@functools.lru_cache(maxsize=1024)
def _said(
    problem: Problem, target: Target, force_kernel: str | None, context: CompileContext, disabled: str
) -> Selection:
    selection = _remembered(problem, target, force_kernel, context, disabled)
    if force_kernel is None and selection.without_compiler:
        _warn_once(without_compiler(selection.without_compiler[:1]))
    return selection


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(f"fx_quant: {text}", stacklevel=5)


class _AtOnce:
    """Does each step of a plan when it is asked for."""

    @staticmethod
    def call(op: Any, *args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)

    @staticmethod
    def cast(x: Tensor, to: torch.dtype) -> Tensor:
        return x.to(to)

    @staticmethod
    def shape(x: Tensor) -> torch.Size:
        return x.shape

    @staticmethod
    def rows(x: Tensor) -> int:
        return x.shape[0]

    @staticmethod
    def missing_rows(x: Tensor, wanted: int) -> int:
        return max(wanted - x.shape[0], 0)

    @staticmethod
    def per_row(x: Tensor, of: Tensor) -> bool:
        return x.shape[0] == of.shape[0]


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
    b_offset: Tensor | None = None,
    constant: Collection[str] = ("b",),
    held: Held | None = None,
) -> Tensor:
    """``out [m, n]`` of the selected kernel: pads, packs what is constant once, calls, unpads.

    Where a size is 0 no kernel is called.

    Args:
        selection: kernel and padding plan.
        a: codes ``[m, k]``, or ``[m, padding.k]`` with 0 behind; or a float activation for a weight-only kernel.
        weight: codes ``[n, k]`` (or packed int4 ``[n, k / 2]``), any strides.
        a_scale: one element or ``[m, 1]``; where the scheme's weight has a ``block = (r, c)`` ``[m, ceil(k / c)]``.
        b_scale: one element or ``[n]``; with a ``block`` ``[ceil(n / r), ceil(k / c)]``. Of 16 bits or more.
        bias: ``[n]``.
        a_zero_point: int32 of the shape of ``a_scale``; beside integer codes only.
        b_zero_point: integers of the shape of ``b_scale``; for a weight-only kernel only.
        b_offset: floats of the shape of ``b_scale``; for a weight-only kernel only.
        constant: which of ``b`` (the weight) and its ``WEIGHT_FACTORS`` are the same tensors in the next call, so that
            what is made of them is kept.
        held: what ``weight`` is where it is packed: a kernel that reads that layout is given it as it is.
    """
    problem = selection.problem
    if 0 in (a.shape[0], problem.n, problem.k):
        return empty_product(a, problem.n, bias, problem.out_dtype)
    block = problem.scheme.weight.block
    b = weight if held is not None else weight.t()
    operands = Operands(a, b, a_scale, b_scale, bias, problem.out_dtype, a_zero_point, b_zero_point, block, b_offset)
    parts = kept_parts(selection, operands, constant)
    if b_scale is not None and "b_scale" not in parts:
        operands = replace(operands, b_scale=b_scale.to(scale_dtype_of(b_scale.dtype)))
    kept: dict[str, Tensor] = {}
    if held is not None:
        if parts.get("b", ("", CODES))[1] == held.layout:
            kept["b"] = weight
            del parts["b"]
        elif "b" not in parts:
            (codes,) = torch.ops.fx_quant.prepack([weight], [repacked(CODES, held)])
            operands = replace(operands, b=codes.t())
        parts = {part: (name, repacked(x, held) if name == "b" else x) for part, (name, x) in parts.items()}
    if parts:
        sources = {"b": weight} | {name: getattr(operands, name) for name in WEIGHT_FACTORS}
        layouts = [layout for _, layout in parts.values()]
        packed = torch.ops.fx_quant.prepack([sources[name] for name, _ in parts.values()], layouts)
        kept |= dict(zip(parts, packed, strict=True))
    return realise(_AtOnce, selection, operands, kept)
