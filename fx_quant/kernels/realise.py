"""A selection, realised: pad, cast, pack, call the kernel, unpad. Over tensors at once, and over the nodes of a graph.

Both faces run this one function, so that an eager call and a compiled one cannot differ in what they do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

import fx_quant.kernels.packed_weights  # noqa: F401  (registers the ops)
from fx_quant.kernels.layouts import FACTOR_PANELS, group_sums, padded
from fx_quant.kernels.select import Selection
from fx_quant.problem import Problem, Size

aten = torch.ops.aten
Value = TypeVar("Value")


@dataclass(frozen=True)
class Operands(Generic[Value]):
    """Arguments of ``fx_quant::scaled_mm`` or, with a float ``a``, of ``fx_quant::weight_only_mm``.

    Args:
        a: codes ``[m, k]``, or as many columns as the plan pads to; or a float activation ``[m, k]``.
        b: codes ``[k, n]``, or packed int4 ``[k / 2, n]``.
        a_scale: one element or ``[m, 1]``; with ``block = (r, c)`` ``[m, ceil(k / c)]``.
        b_scale: one element or ``[n]``; with ``block`` ``[ceil(n / r), ceil(k / c)]``.
        bias: ``[n]``.
        out_dtype: dtype of the result.
        a_zero_point: int32 of the shape of ``a_scale``.
        b_zero_point: integers of the shape of ``b_scale``.
        block: rows and columns of the weight that share one scale, or None.
        b_offset: floats of the shape of ``b_scale``.
    """

    a: Value
    b: Value
    a_scale: Value | None
    b_scale: Value | None
    bias: Value | None
    out_dtype: torch.dtype
    a_zero_point: Value | None = None
    b_zero_point: Value | None = None
    block: tuple[int, int] | None = None
    b_offset: Value | None = None


# What a weight has beside its codes, and what stands in the padding of each.
WEIGHT_FACTORS = {"b_scale": 1, "b_zero_point": 0, "b_offset": 0}


class Face(Protocol[Value]):
    """How the steps of a plan are done: over tensors at once, or as nodes of a graph."""

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Value:
        """The result of ``op``."""
        ...

    def cast(self, x: Value, to: torch.dtype) -> Value:
        """``x`` in ``to``, which holds each of its values."""
        ...

    def shape(self, x: Value) -> Sequence[Size]:
        """The sizes of ``x``."""
        ...

    def rows(self, x: Value) -> int | Value:
        """How many rows ``x`` has, as an argument of an op."""
        ...

    def missing_rows(self, x: Value, wanted: int) -> int | Value:
        """How many rows ``x`` lacks of ``wanted``, as an argument of an op; 0 where it is known to have as many."""
        ...

    def per_row(self, x: Value, of: Value) -> bool:
        """Whether ``x``, of one row or as many as ``of``, has as many."""
        ...


def kept_parts(selection: Selection, operands: Operands, constant: Collection[str]) -> dict[str, tuple[str, str]]:
    """What is computed once of operands that do not change: by part, the name of its operand and the layout.

    The parts are ``b`` (the weight as the kernel reads it), ``b_sum`` and ``WEIGHT_FACTORS``.

    Args:
        constant: names of the operands that do not change from call to call.
    """
    kernel, problem, padding = selection.kernel, selection.problem, selection.padding
    parts = {}
    if kernel.layout is not None:
        parts["b"] = "b", kernel.layout
    elif "b" in constant and (padding.n, padding.k) != (problem.n, problem.k):
        # Codes of int4 beyond k meet zeros of the activation, whatever they decode to.
        parts["b"] = "b", padded(padding.n, padding.k // problem.scheme.weight.codes_per_element)
    if operands.a_zero_point is not None and "b" in constant:
        parts["b_sum"] = "b", _sums(problem)
    if kernel.panel_factors and operands.block is not None and operands.block[0] == 1:
        for name in WEIGHT_FACTORS:
            if name in constant and getattr(operands, name) is not None:
                parts[name] = name, FACTOR_PANELS
    return parts


def _sums(problem: Problem) -> str:
    """The layout of the sums of the weight's codes: over k, or over each group where scales or bytes have several."""
    weight = problem.scheme.weight
    return (
        "sums" if weight.group is None and not weight.packed else group_sums(weight.group or problem.k, weight.packed)
    )


def realise(face: Face[Value], selection: Selection, operands: Operands[Value], kept: dict[str, Value]) -> Value:
    """``out [m, n]`` of the selected kernel on ``operands``.

    Padded codes are 0, padded scales 1 (finite), padded zero points, offsets and bias 0.

    Args:
        kept: what ``kept_parts`` asks for.
    """
    kernel, problem, padding = selection.kernel, selection.problem, selection.padding
    # Of the codes of an activation, those along k may be padded already, by its quantize.
    pad_n, pad_k = padding.n - problem.n, padding.k - face.shape(operands.a)[1]
    more = face.missing_rows(operands.a, padding.rows) if padding.rows else 0

    def grown(x: Value | None, behind: Sequence[Size | Value], value: float) -> Value | None:
        """``x`` with ``behind[i]`` more elements of ``value`` in dim ``i``."""
        if x is None or not any(behind):
            return x
        pads = [size for count in reversed(behind) for size in (0, count)]
        return face.call(aten.constant_pad_nd.default, x, pads, value)

    def to_shape(x: Value | None, shape: Sequence[Size], value: float) -> Value | None:
        if x is None:
            return x
        return grown(x, [wanted - size for wanted, size in zip(shape, face.shape(x), strict=True)], value)

    def more_rows(x: Value | None, value: float) -> Value | None:
        """One element for each row grows with the rows; one for all stays as it is."""
        grows = x is not None and more and len(face.shape(x)) > 1 and face.per_row(x, operands.a)
        return grown(x, (more, 0), value) if grows else x

    def more_columns(x: Value | None, value: float) -> Value | None:
        if x is None or not pad_n or all(size == 1 for size in face.shape(x)):
            return x
        return grown(x, [0] * (len(face.shape(x)) - 1) + [pad_n], value)

    a = (
        operands.a
        if not (more or pad_k)
        else face.call(aten.constant_pad_nd.default, operands.a, [0, pad_k, 0, more], 0)
    )
    if kernel.a_dtype is not None:
        a = face.cast(a, kernel.a_dtype)
    factors = {"a_scale": operands.a_scale, "a_zero_point": operands.a_zero_point}
    factors |= {name: kept.get(name, getattr(operands, name)) for name in WEIGHT_FACTORS}
    if operands.block is None:
        factors["a_scale"] = more_rows(factors["a_scale"], 1)
        factors["a_zero_point"] = more_rows(factors["a_zero_point"], 0)
        for name, fill in WEIGHT_FACTORS.items():
            factors[name] = more_columns(factors[name], fill)
    elif more or (padding.n, padding.k) != (problem.n, problem.k):
        down, across = problem.scheme.weight.scale_shape(padding.n, padding.k)
        a_scale = factors["a_scale"]
        if problem.scheme.activation.group is None:
            factors["a_scale"] = more_rows(a_scale, 1)
        elif a_scale is not None:
            factors["a_scale"] = grown(a_scale, (more, across - face.shape(a_scale)[1]), 1)
        factors["a_zero_point"] = more_rows(factors["a_zero_point"], 0)
        for name, fill in WEIGHT_FACTORS.items():
            if name not in kept:
                factors[name] = to_shape(factors[name], (down, across), fill)
    sums = kept.get("b_sum")
    is_by_group = _sums(problem) != "sums"
    if operands.a_zero_point is not None and sums is None and not is_by_group:
        sums = face.call(aten.sum.dim_IntList, operands.b, [0], dtype=torch.int32)
    given = {
        "a_zero_point": factors["a_zero_point"],
        "b_sum": sums if is_by_group else more_columns(sums, 0),
        "b_zero_point": factors["b_zero_point"],
        "block": operands.block,
        "b_offset": factors["b_offset"],
    }
    out = face.call(
        selection.overload(),
        a,
        _weight(face, selection, operands.b, kept),
        factors["a_scale"],
        factors["b_scale"],
        grown(operands.bias, (pad_n,), 0),
        padding.n,
        operands.out_dtype,
        **{name: value for name, value in given.items() if value is not None},
    )
    if more:
        out = face.call(aten.slice.Tensor, out, 0, 0, face.rows(operands.a))
    if pad_n:
        out = face.call(aten.slice.Tensor, out, 1, 0, problem.n)
        out = face.call(aten.clone.default, out, memory_format=torch.contiguous_format)
    return out


def _weight(face: Face[Value], selection: Selection, b: Value, kept: dict[str, Value]) -> Value:
    """The weight as the kernel reads it: packed, or ``[k, n]``, padded as planned."""
    kernel, padding = selection.kernel, selection.padding
    if "b" in kept:
        return kept["b"] if kernel.layout is not None else face.call(aten.permute.default, kept["b"], [1, 0])
    k, n = face.shape(b)
    pad_n, pad_k = padding.n - n, padding.k // selection.problem.scheme.weight.codes_per_element - k
    if not (pad_n or pad_k):
        return b
    # Padded as [n, k]: padding makes its result row-major, and GPU kernels read b column by column.
    b = face.call(aten.permute.default, b, [1, 0])
    b = face.call(aten.constant_pad_nd.default, b, [0, pad_k, 0, pad_n], 0)
    return face.call(aten.permute.default, b, [1, 0])
