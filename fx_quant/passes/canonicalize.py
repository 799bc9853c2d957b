"""Sites to canonical ops: the matmul, its scales, zero points and bias, wherever the codes came from."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fx_quant.passes.arrange import blocks, combined, matrix, number, vectors
from fx_quant.passes.axes import extent
from fx_quant.passes.canonical import SCALED_MM, WEIGHT_ONLY_MM
from fx_quant.passes.emit import Emitter
from fx_quant.passes.matrices import stored_dtype
from fx_quant.passes.nodes import aten, dtype_of, rounded_number, same_shape, same_size, shape
from fx_quant.passes.problems import code_shift, corrects_outside, is_unsigned, near_range, taken_off
from fx_quant.passes.ranges import bounds_of, is_near
from fx_quant.passes.sites import Site
from fx_quant.passes.values import Codes, Product, Tile

INT32, INT64, FLOAT32, ADD = torch.int32, torch.int64, torch.float32, aten.add.Tensor
_TWO_POINTS = "two zero points of one operand whose values are not known, and whose sum may wrap around"


def canonicalize(emitter: Emitter, site: Site) -> tuple[Node, Node]:
    """Replace the site's root by a canonical op and what stands around it.

    Returns the canonical op, and the node ``[m, n]`` that holds what the root held.

    Raises:
        LookupError: a symbolic size that the new nodes need has no node in the graph, or scales do not fit together.
    """
    product, root = site.product, site.root
    if product is None:
        return emitter.current(root), emitter.current(root)
    with emitter.graph.inserting_before(root):
        if not isinstance(product.a, Codes):
            out = result = _weight_only(emitter, site, product)
        elif corrects_outside(product, **_how(site)):
            out, result = _corrected(emitter, site, product)
        else:
            out = result = _scaled(emitter, site, product)
        whole = result
        if len(shape(root)) != 2:
            sizes = emitter.size_args(shape(root), root, like=root)
            whole = emitter.reshape(result, sizes, like=root)
    emitter.replace(root, whole)
    return out, result


def _scaled(emitter: Emitter, site: Site, product: Product) -> Node:
    """``fx_quant::scaled_mm`` with everything in it."""
    root, k, scheme = site.root, site.problem.k, site.problem.scheme
    a, zero_point = _activation(emitter, product, root)
    assert zero_point.rest is None
    b = _weight(emitter, site, product)
    a_to = scheme.activation.scale_dtype
    if scheme.activation.group is None:
        a_scale = combined(emitter, vectors(emitter, product.rows, root, a_to, [-1, 1]), root)
    else:
        groups = scheme.weight.scales_along(k)
        product = _scalars_to_weight(product)
        a_scale = combined(emitter, blocks(emitter, product.rows, 1, groups, root, a_to), root)
        if a_scale is not None:
            a_scale = _widened(emitter, a_scale, a, groups, root)
    b_scale, b_zero_point = _weight_factors(emitter, site, product)
    extras = {
        "a_zero_point": zero_point.near,
        "b_zero_point": b_zero_point,
        "block": None if product.block is None else list(product.block),
    }
    extras = {name: value for name, value in extras.items() if value is not None}
    bias = _bias(emitter, product, site)
    return emitter.call(SCALED_MM, a, b, a_scale, b_scale, bias, product.dtype, like=root, **extras)


def _scalars_to_weight(product: Product) -> Product:
    """Scales of the whole activation moved to the weight, whose blocks have a matrix of them already."""
    if product.rows and all(factor.row_block is None and factor.group is None for factor in product.rows):
        return dataclasses.replace(product, rows=(), columns=(*product.columns, *product.rows))
    return product


def _widened(emitter: Emitter, scale: Node, a: Node, groups: int, like: Node) -> Node:
    """``[m, 1]``, or ``[1, groups]`` of all rows of ``a``, repeated to ``[m, groups]``."""
    m = shape(a)[0]
    has_rows = same_size(shape(scale)[0], m)
    if has_rows and same_size(shape(scale)[-1], groups):
        return scale
    rows = -1 if has_rows else emitter.size_argument(extent(m), like)
    return emitter.call(aten.expand.default, scale, [rows, groups], like=like)


def _weight_blocks(emitter: Emitter, product: Product, site: Site, to: torch.dtype) -> Node:
    """Scales ``[ceil(n / r), ceil(k / c)]`` of the weight, 1 where it has none."""
    assert product.block is not None
    root, problem = site.root, site.problem
    sizes = problem.scheme.weight.scale_shape(problem.n, problem.k)
    scale = combined(emitter, blocks(emitter, product.columns, product.block[0], sizes[1], root, to), root)
    return _full(emitter, number(emitter, 1.0, root, to) if scale is None else scale, list(sizes), root)


def _full(emitter: Emitter, node: Node, sizes: list[int], like: Node) -> Node:
    return node if same_shape(shape(node), sizes) else emitter.call(aten.expand.default, node, sizes, like=like)


def _activation(emitter: Emitter, product: Product, root: Node) -> tuple[Node, Point]:
    """Codes ``[m, k]``, as int8 where they are bytes, and their zero point."""
    assert isinstance(product.a, Codes)
    to = stored_dtype(product.a)
    assert to is not None
    # Unpacked ones may still stand in int32.
    a = emitter.cast(matrix(emitter, product.a, root), to, like=root)
    shift = -product.offset
    if is_unsigned(product):
        wide = emitter.call(aten.sub.Tensor, emitter.cast(a, INT32, like=root), 128, like=root)
        a, shift = emitter.cast(wide, torch.int8, like=root), shift - 128
    return a, _point(emitter, product, product.a, product.a_zero_points, [-1, 1], shift)


@dataclasses.dataclass(frozen=True)
class Point:
    """A zero point: what of it the integer sum holds, int32, and what is taken off in float32; None is 0.

    Where there is a rest there is a near part.
    """

    near: Node | None
    rest: Node | None


def _point(
    emitter: Emitter,
    product: Product,
    codes: Codes,
    factors: Sequence[Tile],
    sizes: list[int],
    shift: int,
) -> Point:
    """The zero points ``factors`` of integer ``codes`` and the integer ``shift`` as one, flattened to ``sizes``."""
    root = product.gemm
    far = [] if product.wraps else [factor for factor in factors if not is_near(factor)]
    if len(far) > 1:
        raise LookupError(_TWO_POINTS)
    near = [factor for factor in factors if factor not in far]
    points, rest = vectors(emitter, near, root, INT32, sizes), None
    if far:
        low, high = near_range(codes, far[0])
        point, rest = _split(emitter, far[0], low, high, root, sizes)
        points.append(point)
    if shift:
        points.append(number(emitter, shift, root, INT32))
    return Point(combined(emitter, points, root, aten.add.Tensor), rest)


def _split(emitter: Emitter, factor: Tile, low: int, high: int, like: Node, sizes: list[int]) -> tuple[Node, Node]:
    """``factor`` as an int32 in ``low`` to ``high`` and the float32 that is missing."""
    if not isinstance(factor.source, Node):
        near = min(max(int(factor.source), low), high)
        return number(emitter, near, like, INT32), number(emitter, factor.source - near, like, FLOAT32)
    (whole,) = vectors(emitter, [factor], like, dtype_of(factor.source), sizes)
    pair = emitter.call(torch.ops.fx_quant.split_zero_point.default, whole, low, high, like=like)
    near, rest = (emitter.call(operator.getitem, pair, i, like=like) for i in range(2))
    return near, rest


def _corrected(emitter: Emitter, site: Site, product: Product) -> tuple[Node, Node]:
    """The raw sum, and what becomes of it when zero points are corrected and scales multiplied around it.

    With integers ``a' = a - near_a`` and ``b' = b - near_b`` the sum, less the rests of the zero points, is::

        sum_k (a' - rest_a) (b' - rest_b) = sum_k a' b' - rest_a[m] (sum_k b' - k rest_b[n]) - rest_b[n] sum_k a'
        sum_k a' b' = acc - near_b[n] * sum_k a'

    An offset of the weight is multiplied with the other's sum, ``sum_k (a' - rest_a)``.
    """
    assert isinstance(product.a, Codes)
    root, k = site.root, site.problem.k

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return emitter.call(target, *args, like=root, **kwargs)

    a, of_a = _activation(emitter, product, root)
    b = _weight(emitter, site, product)
    shift = -code_shift(product, **_how(site))
    of_b = _point(emitter, product, product.b, product.b_zero_points, [-1], shift)
    extras = {} if of_a.near is None else {"a_zero_point": of_a.near}
    out = result = call(SCALED_MM, a, b, None, None, None, INT32, **extras)
    rows = None
    if of_b.near is not None or product.b_offsets:
        rows = call(aten.sum.dim_IntList, a, [1], True, dtype=INT32)
        if of_a.near is not None:
            rows = call(aten.sub.Tensor, rows, call(aten.mul.Tensor, of_a.near, k))
    if rows is not None and of_b.near is not None:
        result = call(aten.sub.Tensor, out, call(aten.mul.Tensor, rows, of_b.near))
    if product.dtype is INT32:
        return out, result
    result = emitter.cast(result, FLOAT32, like=root)
    if of_a.rest is not None:
        columns = call(aten.sum.dim_IntList, b, [0], dtype=INT32)
        if of_b.near is not None:
            columns = call(aten.sub.Tensor, columns, call(aten.mul.Tensor, of_b.near, k))
        columns = emitter.cast(columns, FLOAT32, like=root)
        if of_b.rest is not None:
            columns = call(aten.sub.Tensor, columns, call(aten.mul.Tensor, of_b.rest, k))
        result = call(aten.sub.Tensor, result, call(aten.mul.Tensor, of_a.rest, columns))
    rows = None if rows is None else emitter.cast(rows, FLOAT32, like=root)
    if of_b.rest is not None and rows is not None:
        result = call(aten.sub.Tensor, result, call(aten.mul.Tensor, rows, of_b.rest))
    of_rows = vectors(emitter, product.rows, root, FLOAT32, [-1, 1])
    of_columns = vectors(emitter, product.columns, root, FLOAT32, [-1])
    if product.b_offsets and rows is not None:
        if of_a.rest is not None:
            rows = call(aten.sub.Tensor, rows, call(aten.mul.Tensor, of_a.rest, k))
        # The offset is added to the scaled codes, so the activation's scales come last.
        shift = call(aten.mul.Tensor, rows, _offset(emitter, product, root))
        result, of_columns = call(aten.add.Tensor, _times(emitter, result, of_columns, root), shift), []
    result = _times(emitter, result, [*of_rows, *of_columns], root)
    bias = _bias(emitter, product, site)
    if bias is not None:
        result = call(aten.add.Tensor, result, bias)
    return out, emitter.cast(result, product.dtype, like=root)


def _times(emitter: Emitter, node: Node, factors: Sequence[Node], like: Node) -> Node:
    return functools.reduce(lambda out, factor: emitter.call(aten.mul.Tensor, out, factor, like=like), factors, node)


def _offset(emitter: Emitter, product: Product, like: Node) -> Node:
    """What is added to the scaled codes of the weight, ``[n]`` or ``[]``, in float32."""
    offsets = [combined(emitter, vectors(emitter, each, like, FLOAT32, [-1]), like) for each in product.b_offsets]
    total = combined(emitter, [offset for offset in offsets if offset is not None], like, ADD)
    assert total is not None
    return total


def _weight_only(emitter: Emitter, site: Site, product: Product) -> Node:
    """``fx_quant::weight_only_mm`` with everything in it."""
    root, problem = site.root, site.problem
    assert isinstance(product.a, Node)
    # Scales of the result's rows have no place in the op: the result is multiplied by them, as in the source.
    if product.rows:
        raise LookupError("a weight-only matmul whose result is scaled by rows")
    x = emitter.reshape(product.a, [-1, problem.k], like=root)
    b = _weight(emitter, site, product)
    extras: dict[str, Any] = {} if product.block is None else {"block": list(product.block)}
    if product.b_offsets:
        point = None
        b_scale, extras["b_offset"] = _scale_and_offset(emitter, site, product)
    else:
        b_scale, point = _weight_factors(emitter, site, product)
    if b_scale is None:
        b_scale = number(emitter, 1.0, root, problem.scheme.weight.scale_dtype)
    bias = _bias(emitter, product, site)
    return emitter.call(WEIGHT_ONLY_MM, x, b, b_scale, point, bias, product.dtype, like=root, **extras)


def _scale_and_offset(emitter: Emitter, site: Site, product: Product) -> tuple[Node, Node]:
    """Scale and offset of the weight, of one shape, with what is subtracted from the codes taken off the offset."""
    root, problem = site.root, site.problem
    groups = problem.scheme.weight.scales_along(problem.k)

    def arranged(factors: Sequence[Tile]) -> list[Node]:
        if product.block is None:
            return vectors(emitter, factors, root, FLOAT32, [-1])
        return blocks(emitter, factors, product.block[0], groups, root, FLOAT32)

    scale = combined(emitter, arranged(product.columns), root)
    if scale is None:
        scale = number(emitter, 1.0, root, FLOAT32)
    parts = [combined(emitter, arranged(offset), root) for offset in product.b_offsets]
    points, shift = arranged(product.b_zero_points), code_shift(product, **_how(site))
    point = combined(emitter, [*points, *([number(emitter, -shift, root, FLOAT32)] if shift else [])], root, ADD)
    offset = combined(emitter, [part for part in parts if part is not None], root, ADD)
    assert offset is not None
    if point is not None:
        offset = emitter.call(
            aten.sub.Tensor, offset, emitter.call(aten.mul.Tensor, point, scale, like=root), like=root
        )
    sizes = list(problem.scheme.weight.scale_shape(problem.n, problem.k)) if product.block is not None else None
    return _alike(emitter, scale, offset, root, sizes)


def _weight_factors(emitter: Emitter, site: Site, product: Product) -> tuple[Node | None, Node | None]:
    """Scale and zero point of the weight as the ops take them: of one shape where there is a zero point."""
    root, problem, weight = site.root, site.problem, site.problem.scheme.weight
    if len(product.b_zero_points) > 1 and not all(map(is_near, product.b_zero_points)):
        raise LookupError(_TWO_POINTS)
    every = [bounds_of(point.source) or (-(2**63), 2**63 - 1) for point in product.b_zero_points]
    # Read in each call, so in 64 bits only where they are stored so and not known to be small.
    kind = INT32 if all(low >= -(2**31) and high < 2**31 for low, high in every) else INT64
    if product.block is None:
        scale = combined(emitter, vectors(emitter, product.columns, root, weight.scale_dtype, [-1]), root)
        points = vectors(emitter, product.b_zero_points, root, kind, [-1])
    else:
        scale = _weight_blocks(emitter, product, site, weight.scale_dtype)
        points = blocks(emitter, product.b_zero_points, product.block[0], weight.scales_along(problem.k), root, kind)
    shift = -code_shift(product, **_how(site))
    points = [_with_room(emitter, point, bounds, shift, root) for point, bounds in zip(points, every, strict=True)]
    if shift:
        points.append(number(emitter, shift, root, kind))
    point = combined(emitter, points, root, aten.add.Tensor)
    if point is None:
        return scale, None
    if isinstance(product.a, Codes) and _in_int8([*every, (shift, shift)]):
        point = emitter.cast(point, torch.int8, like=root)
    if scale is None:
        scale = number(emitter, 1.0, root, weight.scale_dtype)
    return _alike(emitter, scale, point, root)


def _in_int8(bounds: Sequence[tuple[int, int]]) -> bool:
    """Whether int8, a byte for each group to read, holds the sum of what lies within ``bounds``."""
    return sum(low for low, _ in bounds) >= -128 and sum(high for _, high in bounds) <= 127


def _with_room(emitter: Emitter, point: Node, bounds: tuple[int, int], shift: int, like: Node) -> Node:
    """``point`` so that adding ``shift`` does not wrap around: at the ends of its dtype it may be ``shift`` off.

    There it is so large that float32, in which codes are decoded, does not tell the two apart.
    """
    info = torch.iinfo(dtype_of(point))
    if info.min <= bounds[0] + shift and bounds[1] + shift <= info.max:
        return point
    return emitter.call(aten.clamp.default, point, info.min + max(-shift, 0), info.max - max(shift, 0), like=like)


def _alike(emitter: Emitter, scale: Node, point: Node, like: Node, sizes: list[int] | None = None) -> tuple[Node, Node]:
    """Scale and zero point, or offset, repeated to one shape: ``sizes`` where they are given."""
    sizes = sizes or list(torch.broadcast_shapes(scale.meta["val"].shape, point.meta["val"].shape))
    return _full(emitter, scale, sizes, like), _full(emitter, point, sizes, like)


def _how(site: Site) -> dict[str, bool]:
    """How a kernel is given the weight's codes."""
    return {"packed": site.problem.scheme.weight.packed, "constant": site.problem.constant_weight}


def _weight(emitter: Emitter, site: Site, product: Product) -> Node:
    """Codes ``[k, n]`` as the op takes them, less what ``code_shift`` says.

    Packed ones are two to a byte along k, as ``code + 8``, the even k in the low nibble.
    """
    root, k, weight = site.root, site.problem.k, site.problem.scheme.weight
    b, less = matrix(emitter, product.b, root), taken_off(product, **_how(site))
    if weight.packed:
        if k % 2:
            raise LookupError(f"k={k} is odd, and int4 codes are packed in pairs along k")
        nibbles = _less(emitter, emitter.cast(b, INT32, like=root), less - 8, root)
        pairs = emitter.call(aten.reshape.default, nibbles, [k // 2, 2, site.problem.n], like=root)
        low, high = (emitter.call(aten.select.int, pairs, 1, i, like=root) for i in range(2))
        b = emitter.call(aten.add.Tensor, low, emitter.call(aten.mul.Tensor, high, 16, like=root), like=root)
    elif less:
        b = _less(emitter, emitter.cast(b, INT32, like=root), less, root)
    return emitter.cast(b, weight.storage, like=root)


def _less(emitter: Emitter, codes: Node, number: int, like: Node) -> Node:
    return emitter.call(aten.sub.Tensor, codes, number, like=like) if number else codes


def _bias(emitter: Emitter, product: Product, site: Site) -> Node | None:
    """The bias as ``[n]`` in its own dtype."""
    bias = product.bias
    if bias is None:
        return None
    n, root = site.problem.n, site.root
    if not isinstance(bias.source, Node):
        device = root.meta["val"].device
        rounded = rounded_number(bias.source, FLOAT32)
        number = bias.source if math.isfinite(rounded) else rounded
        return emitter.call(aten.full.default, [n], number, dtype=FLOAT32, device=device, like=root)
    node = emitter.reshape(bias.source, [-1], like=root)
    if bias.row_block is None and n != 1:
        node = emitter.call(aten.expand.default, node, [n], like=root)
    return node
