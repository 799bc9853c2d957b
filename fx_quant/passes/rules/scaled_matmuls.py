"""Values of ATen's matmuls that take scales: ``_scaled_mm``, ``_scaled_mm_v2`` and ``_weight_int8pack_mm``."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fx_quant.passes.axes import Piece, Segment, extent
from fx_quant.passes.matrices import axis_of, tile_along
from fx_quant.passes.nodes import args_of, arguments, aten, dtype, same_shape, shape, uniform_value
from fx_quant.passes.values import Axis, Codes, Environment, Product, Rule, Stage, Tile, Unknown, Value
from fx_quant.scheme import FLOAT_DTYPES, Numerics


def _scaled_mm(env: Environment, node: Node) -> Value | None:
    """``aten._scaled_mm``: the shapes of the scales say what they are."""
    given = arguments(node)
    if given.get("scale_result") is not None:
        return Unknown(node, "_scaled_mm with scale_result, which compiled code ignores")
    return _product(env, node, given)


def _scaled_mm_v2(env: Environment, node: Node) -> Value | None:
    """``aten._scaled_mm_v2``, which ``torch.nn.functional.scaled_mm`` calls: recipes beside the scales."""
    given = arguments(node)
    if len(given["scale_a"]) != 1 or len(given["scale_b"]) != 1:
        return Unknown(node, "_scaled_mm_v2 with two levels of scales (NVFP4) has no rule")
    if any(map(int, (*(given["swizzle_a"] or ()), *(given["swizzle_b"] or ())))) or given.get("contraction_dim"):
        return Unknown(node, "_scaled_mm_v2 with swizzled scales or contraction_dim has no rule")
    recipes = tuple(int(recipe) for name in ("recipe_a", "recipe_b") for recipe in given[name])
    one_level = given | {"scale_a": given["scale_a"][0], "scale_b": given["scale_b"][0]}
    # Shapes alone do not tell [n, k / 128] from [k / 128, n] where both are square.
    return _product(env, node, one_level, scale_b_by_column=recipes == (_BLOCKS_1X128, _BLOCKS_1X128))


# torch.nn.functional.ScalingType.BlockWise1x128
_BLOCKS_1X128 = 4


def _product(env: Environment, node: Node, given: dict[str, Any], *, scale_b_by_column: bool = False) -> Value | None:
    a, b = env.value(given["self"]), env.value(given["mat2"])
    if not isinstance(a, Codes) or not isinstance(b, Codes):
        return Unknown(
            node, f"_scaled_mm of {dtype(given['self'])} and {dtype(given['mat2'])}: only 8-bit codes have a rule"
        )
    to = dtype(node)
    if to not in FLOAT_DTYPES or to is None:
        return Unknown(node, f"_scaled_mm that returns {to} has no rule")
    scales = _rowwise(node, given["scale_a"], given["scale_b"])
    block = None
    if scales is None:
        blocks = _blockwise(given, scale_b_by_column)
        if blocks is None:
            return Unknown(
                node,
                "_scaled_mm with scales that are neither float32 per tensor, row-wise nor of blocks of 128 "
                f"(scale_a {list(shape(given['scale_a']))}, scale_b {list(shape(given['scale_b']))})",
            )
        scales, block = blocks
    bias = given.get("bias")
    stage = Stage.B_SCALE if bias is None else Stage.BIAS
    return Product(
        gemm=node,
        a=a,
        b=b,
        rows=scales[0],
        columns=scales[1],
        bias=None if bias is None else tile_along(Axis.COLUMN, bias, node),
        dtype=to,
        stage=stage if to is torch.float32 else Stage.CAST,
        numerics=Numerics.SAME_ACCUM,
        offset=a.offset,
        block=block,
    )


_Scales = tuple[tuple[Tile, ...], tuple[Tile, ...]]


def _rowwise(node: Node, scale_a: Node, scale_b: Node) -> _Scales | None:
    factors: list[tuple[Tile, ...]] = []
    for scale, wanted in ((scale_a, Axis.ROW), (scale_b, Axis.COLUMN)):
        axis = axis_of(scale, node)
        if axis not in (Axis.SCALAR, wanted) or axis is None or dtype(scale) is not torch.float32:
            return None
        factors.append(() if uniform_value(scale) == 1 else (tile_along(axis, scale, node),))
    return factors[0], factors[1]


_BLOCK = 128


def _blockwise(given: dict[str, Any], scale_b_by_column: bool) -> tuple[_Scales, tuple[int, int]] | None:
    """Scales ``[m, k / 128]`` and ``[k / 128, n / 128]`` or ``[k / 128, n]``.

    Args:
        scale_b_by_column: the second is ``[n, k / 128]``.
    """
    scale_a, scale_b = given["scale_a"], given["scale_b"]
    (m, k), n = shape(given["self"]), shape(given["mat2"])[1]
    if not isinstance(k, int) or not isinstance(n, int) or k % _BLOCK:
        return None
    if dtype(scale_a) is not torch.float32 or dtype(scale_b) is not torch.float32:
        return None
    groups, wide = k // _BLOCK, -(-n // _BLOCK)
    if not same_shape(shape(scale_a), (m, groups)):
        return None
    axis_of_k = 0
    if scale_b_by_column:
        if not same_shape(shape(scale_b), (n, groups)):
            return None
        rows, high, axis_of_k = (Segment(n, Piece(0, n)),), 1, 1
    elif same_shape(shape(scale_b), (groups, wide)):
        rows, high = (Segment(wide, Piece(1, wide)), Segment(_BLOCK, None)), _BLOCK
    elif same_shape(shape(scale_b), (groups, n)):
        rows, high = (Segment(n, Piece(1, n)),), 1
    else:
        return None
    of_a = Tile(scale_a, (Segment(extent(m), Piece(0, extent(m))),), _groups(1, groups))
    return ((of_a,), (Tile(scale_b, rows, _groups(axis_of_k, groups)),)), (high, _BLOCK)


def _groups(axis: int, groups: int) -> tuple[Segment, ...]:
    """The side along k of a scale whose ``axis`` has one element for each group."""
    return Segment(groups, Piece(axis, groups)), Segment(_BLOCK, None)


def _int8pack_mm(env: Environment, node: Node) -> Value | None:
    """``aten._weight_int8pack_mm(x [m, k], weight [n, k], scales [n])``."""
    x, weight, scales = args_of(node)[:3]
    codes, to = env.value(weight), dtype(node)
    if not isinstance(codes, Codes) or to not in FLOAT_DTYPES or to is None or codes.offset != 0:
        return Unknown(node, "_weight_int8pack_mm of a weight that is not plain codes")
    b = Codes(codes.node, codes.dims[::-1], bounds=codes.bounds)
    return scaled_product(node, x, b, scales)


def scaled_product(node: Node, a: Codes | Node, b: Codes, scale: Node, column: Tile | None = None) -> Product | Unknown:
    """The product of a library's op ``a [..., k], b [k, n], scale [n]`` that multiplies by the scale.

    Args:
        column: the scale as one for each column, where its shape does not say so, such as ``[n, 1]``.
    """
    to, axis = dtype(node), axis_of(scale, node)
    if column is None and axis in (Axis.SCALAR, Axis.COLUMN):
        column = tile_along(axis, scale, node)
    if to is None or column is None:
        return Unknown(node, "a matmul whose scale is neither a scalar nor one for each column")
    return Product(
        gemm=node,
        a=a,
        b=b,
        rows=(),
        columns=(column,),
        bias=None,
        dtype=to,
        stage=Stage.B_SCALE if to is torch.float32 else Stage.CAST,
        numerics=Numerics.REASSOCIATED,
        offset=a.offset if isinstance(a, Codes) else 0,
    )


RULES: dict[object, Rule] = {
    aten._scaled_mm.default: _scaled_mm,
    aten._weight_int8pack_mm.default: _int8pack_mm,
}
if hasattr(aten, "_scaled_mm_v2"):
    RULES[aten._scaled_mm_v2.default] = _scaled_mm_v2
