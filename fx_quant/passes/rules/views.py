"""Values behind views, copies and casts."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from fx_quant.passes.matrices import EPILOGUE_DTYPES, holds_exactly, is_transpose
from fx_quant.passes.nodes import (
    CASTS,
    COPIES,
    EXPANDS,
    PERMUTES,
    RESHAPES,
    args_of,
    aten,
    dtype,
    is_one,
    same_shape,
    same_size,
    shape,
)
from fx_quant.passes.rules.steps import rounded, stepped
from fx_quant.passes.values import (
    Affine,
    Axis,
    Broadcast,
    Codes,
    ColumnSum,
    Environment,
    Product,
    Rule,
    Stage,
    Unknown,
    Value,
)
from fx_quant.scheme import CODE_DTYPES


def _keeps_columns(node: Node) -> bool:
    """Whether a reshape leaves the last dim alone, so that rows keep their flattened order."""
    before, after = shape(args_of(node)[0]), shape(node)
    return bool(before) and bool(after) and same_size(before[-1], after[-1])


def _viewed(codes: Codes, node: Node) -> Codes:
    if not codes.views and codes.offset == 0 and dtype(codes.node) == dtype(node):
        return Codes(node)
    return dataclasses.replace(codes, views=(*codes.views, node))


def _view(env: Environment, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    if isinstance(value, Codes):
        return _viewed(value, node)
    if isinstance(value, Affine):
        if _keeps_columns(node) or all(f.axis is Axis.SCALAR for f in value.factors):
            return dataclasses.replace(value, codes=_viewed(value.codes, node))
        return Unknown(node, "a reshape splits the dimension along which the scale varies")
    if isinstance(value, Broadcast):
        return value if same_shape(shape(node), shape(args_of(node)[0])) else None
    if isinstance(value, Product):
        return value if _keeps_columns(node) else None
    if isinstance(value, ColumnSum):
        return value
    return None


def _permute(env: Environment, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    if isinstance(value, Codes):
        return _viewed(value, node)
    if isinstance(value, Affine):
        codes = _viewed(value.codes, node)
        if all(f.axis is Axis.SCALAR for f in value.factors):
            return dataclasses.replace(value, codes=codes)
        if is_transpose(node):
            factors = tuple(dataclasses.replace(f, axis=f.axis.transposed()) for f in value.factors)
            return dataclasses.replace(value, codes=codes, factors=factors)
        return Unknown(node, "a permutation mixes the rows along which the scale varies")
    return None


def _expand(env: Environment, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    before, after = shape(args_of(node)[0]), shape(node)
    if same_shape(after, before):
        return value
    repeats = len(before) >= 2 and same_shape(after[-2:], before[-2:])
    if isinstance(value, Broadcast):
        return value if repeats else None
    if isinstance(value, (Codes, Affine)) and repeats and all(map(is_one, before[:-2])):
        return Broadcast(value)
    return _viewed(value, node) if isinstance(value, Codes) else None


def _copy(env: Environment, node: Node) -> Value | None:
    value = env.value(args_of(node)[0])
    if isinstance(value, Codes):
        return _viewed(value, node)
    if isinstance(value, Affine):
        return dataclasses.replace(value, codes=_viewed(value.codes, node))
    return value


def _slice(env: Environment, node: Node) -> Value | None:
    """A slice that keeps everything, such as the unpad of an operand that was not padded."""
    if same_shape(shape(node), shape(args_of(node)[0])):
        return _copy(env, node) if not isinstance(env.value(args_of(node)[0]), Codes) else env.value(args_of(node)[0])
    return None


def _cast(env: Environment, node: Node) -> Value | None:
    value, to = env.value(args_of(node)[0]), dtype(node)
    assert to is not None
    if isinstance(value, Codes):
        if holds_exactly(value, to):
            return value
        if to in CODE_DTYPES:
            return None
        return Unknown(node, f"a cast of the codes to {to} is not exact")
    if isinstance(value, Affine):
        return rounded(value, to) if to in EPILOGUE_DTYPES else None
    if isinstance(value, ColumnSum):
        return value if to in (torch.int32, torch.int64) else None
    if isinstance(value, Product):
        if to not in EPILOGUE_DTYPES:
            return value if to == value.dtype else None
        if value.dtype == to:
            return value
        if value.dtype is torch.int32:
            stage = value.stage if to is torch.float32 else Stage.CAST
            return dataclasses.replace(value, dtype=to, stage=stage)
        if value.dtype is torch.float32:
            return dataclasses.replace(value, dtype=to, stage=Stage.CAST)
        # The value still holds the narrow rounding, which the canonical op would not make.
        return stepped(value, to, Stage.CAST, exact=False)
    return None


RULES: dict[object, Rule] = {
    **dict.fromkeys(RESHAPES, _view),
    **dict.fromkeys(PERMUTES, _permute),
    **dict.fromkeys(EXPANDS, _expand),
    **dict.fromkeys(COPIES, _copy),
    **dict.fromkeys(CASTS, _cast),
    aten.slice.Tensor: _slice,
}
