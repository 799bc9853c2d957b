"""Values behind views, copies and casts."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch.fx import Node

from fx_quant.passes.axes import viewed
from fx_quant.passes.matrices import ACCUMULATORS, holds_exactly, integer_range
from fx_quant.passes.nodes import (
    CASTS,
    COPIES,
    PERMUTES,
    RESHAPES,
    VIEWS,
    args_of,
    aten,
    dtype,
    is_op,
    same_shape,
    same_size,
    shape,
)
from fx_quant.passes.rules.steps import is_integer, may_wrap, rounded, stepped
from fx_quant.passes.slices import cut_of
from fx_quant.passes.values import Affine, Codes, ColumnSum, Environment, Product, Rule, Stage, Unknown, Value
from fx_quant.scheme import CODE_DTYPES, FLOAT_DTYPES


def _view(env: Environment, node: Node) -> Value | None:
    """Any op that only regroups axes: reshape, permute, expand, copy."""
    value = env.value(args_of(node)[0])
    if isinstance(value, Codes):
        dims = viewed(node, value.dims)
        if dims is not None:
            return dataclasses.replace(value, dims=dims)
        # Low-bit codes in another arrangement are codes of their own.
        return None if dtype(node) in CODE_DTYPES else Unknown(node, "a view mixes rows and columns of the codes")
    if isinstance(value, Affine):
        dims = viewed(node, value.codes.dims)
        if dims is None:
            return Unknown(node, "a view mixes rows and columns of the codes")
        return dataclasses.replace(value, codes=dataclasses.replace(value.codes, dims=dims))
    if isinstance(value, Product):
        return value if _keeps_columns(node) else None
    if isinstance(value, ColumnSum):
        if is_op(node, *COPIES) or (value.zero_point is None and is_op(node, *RESHAPES)):
            return value
        same = not is_op(node, *PERMUTES) and same_shape(shape(node), shape(args_of(node)[0]))
        return value if same else None
    return None


def _keeps_columns(node: Node) -> bool:
    """Whether a view leaves the last dim alone, so that rows keep their flattened order."""
    before, after = shape(args_of(node)[0]), shape(node)
    if is_op(node, *RESHAPES):
        return bool(before) and bool(after) and same_size(before[-1], after[-1])
    return not is_op(node, *PERMUTES) and same_shape(before, after)


def _slice(env: Environment, node: Node) -> Value | None:
    """A slice that keeps everything, such as the unpad of an operand that was not padded, or a part of codes."""
    found = cut_of(node)
    source = args_of(node)[0] if found is None else found[0]
    value = env.value(source)
    if same_shape(shape(node), shape(source)):
        return value
    if isinstance(value, Affine) and found is not None:
        return Unknown(node, "a part of a decoded weight that is no slice of its codes, scales and zero points")
    if not isinstance(value, Codes) or not is_integer(dtype(node)):
        return None
    bounds = integer_range(value)
    return None if bounds is None else Codes.of(node, bounds)


def _cast(env: Environment, node: Node) -> Value | None:
    value, to = env.value(args_of(node)[0]), dtype(node)
    assert to is not None
    if isinstance(value, Codes):
        if holds_exactly(value, to):
            # What is cast to a byte is where codes are told from the steps that quantize or unpack them.
            narrows = to in CODE_DTYPES and dtype(value.node) not in CODE_DTYPES
            return Codes.of(node, integer_range(value)) if narrows else value
        if to in CODE_DTYPES:
            return None
        return Unknown(node, f"a cast of the codes to {to} is not exact")
    if isinstance(value, Affine):
        return rounded(value, to) if to in FLOAT_DTYPES else None
    if isinstance(value, ColumnSum):
        source = dtype(args_of(node)[0])
        widened = source is torch.int32 and to is torch.int64
        return value if to in ACCUMULATORS and not (widened and may_wrap(value, source)) else None
    if isinstance(value, Product):
        if to not in FLOAT_DTYPES:
            return value if to == value.dtype else None
        if value.dtype == to:
            return value
        if value.dtype in ACCUMULATORS:
            stage = value.stage if to is torch.float32 else Stage.CAST
            return dataclasses.replace(value, dtype=to, stage=stage)
        if value.dtype is torch.float32:
            return dataclasses.replace(value, dtype=to, stage=Stage.CAST)
        # The value still holds the narrow rounding, which the canonical op would not make.
        return stepped(value, to, Stage.CAST, exact=False)
    return None


RULES: dict[object, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int, operator.getitem), _slice),
}
