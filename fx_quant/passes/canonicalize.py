"""Sites to canonical ops: the matmul, its scales, zero points and bias, wherever the codes came from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.fx import Node

from fx_quant.passes.arrange import blocks, combined, matrix, number, vectors
from fx_quant.passes.axes import extent
from fx_quant.passes.canonical import SCALED_MM, WEIGHT_ONLY_MM
from fx_quant.passes.emit import Emitter
from fx_quant.passes.matrices import integer_range, stored_dtype
from fx_quant.passes.nodes import aten, rounded_number, same_shape, same_size, shape
from fx_quant.passes.problems import corrects_weight, is_unsigned
from fx_quant.passes.sites import Site
from fx_quant.passes.values import Axis, Codes, Factor, Product, Tile
from fx_quant.scheme import INT4_DTYPES

INT32, FLOAT32 = torch.int32, torch.float32


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
        elif corrects_weight(product):
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
    root, k = site.root, site.problem.k
    a, zero_point = _activation(emitter, product, root)
    b = _stored(emitter, product.b, root)
    extras: dict[str, Any] = {} if zero_point is None else {"a_zero_point": zero_point}
    if product.block is None:
        a_scale = combined(emitter, vectors(emitter, product.rows, root, FLOAT32, [-1, 1]), root)
        b_scale = combined(emitter, vectors(emitter, product.columns, root, FLOAT32, [-1]), root)
    else:
        extras["block"] = list(product.block)
        groups = -(-k // product.block[1])
        product = _scalars_to_weight(product)
        a_scale = combined(emitter, blocks(emitter, product.rows, 1, groups, root, FLOAT32), root)
        if a_scale is not None:
            a_scale = _widened(emitter, a_scale, a, groups, root)
        b_scale = _weight_blocks(emitter, product, site, FLOAT32)
    bias = _bias(emitter, product, site)
    return emitter.call(SCALED_MM, a, b, a_scale, b_scale, bias, product.dtype, like=root, **extras)


def _scalars_to_weight(product: Product) -> Product:
    """Scales of the whole activation moved to the weight, whose blocks have a matrix of them already."""
    if any(_is_scalar(factor) for factor in product.rows) and all(map(_is_scalar, product.rows)):
        return dataclasses.replace(product, rows=(), columns=(*product.columns, *product.rows))
    return product


def _is_scalar(factor: Factor | Tile) -> bool:
    if isinstance(factor, Tile):
        return factor.row_block is None and factor.group is None
    return factor.axis is Axis.SCALAR


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
    root, (high, wide) = site.root, product.block
    sizes = [-(-site.problem.n // high), -(-site.problem.k // wide)]
    scale = combined(emitter, blocks(emitter, product.columns, high, sizes[1], root, to), root)
    return _full(emitter, number(emitter, 1.0, root, to) if scale is None else scale, sizes, root)


def _full(emitter: Emitter, node: Node, sizes: list[int], like: Node) -> Node:
    return node if same_shape(shape(node), sizes) else emitter.call(aten.expand.default, node, sizes, like=like)


def _stored(emitter: Emitter, codes: Codes, like: Node) -> Node:
    """``codes`` as a matrix of a low-bit dtype: unpacked ones may still stand in int32."""
    to = stored_dtype(codes)
    assert to is not None
    return emitter.cast(matrix(emitter, codes, like), to, like=like)


def _activation(emitter: Emitter, product: Product, root: Node) -> tuple[Node, Node | None]:
    """Codes ``[m, k]``, as int8 where they are bytes, and their zero point."""
    assert isinstance(product.a, Codes)
    a = _stored(emitter, product.a, root)
    points = vectors(emitter, product.a_zero_points, root, INT32, [-1, 1])
    shift = -product.offset
    if is_unsigned(product):
        wide = emitter.call(aten.sub.Tensor, emitter.cast(a, INT32, like=root), 128, like=root)
        a, shift = emitter.cast(wide, torch.int8, like=root), shift - 128
    if shift:
        points.append(number(emitter, shift, root, INT32))
    return a, combined(emitter, points, root, aten.add.Tensor)


def _corrected(emitter: Emitter, site: Site, product: Product) -> tuple[Node, Node]:
    """The raw sum, and what becomes of it when the weight's zero point is corrected and scaled around it.

    ``sum_k (a - a_zero_point) (b - b_zero_point) = acc - b_zero_point[n] * sum_k (a - a_zero_point)``.
    """
    root, k = site.root, site.problem.k
    a, zero_point = _activation(emitter, product, root)
    b = _stored(emitter, product.b, root)
    extras = {} if zero_point is None else {"a_zero_point": zero_point}
    out = emitter.call(SCALED_MM, a, b, None, None, None, INT32, like=root, **extras)
    sums = emitter.call(aten.sum.dim_IntList, a, [1], True, dtype=INT32, like=root)
    if zero_point is not None:
        whole = emitter.call(aten.mul.Tensor, zero_point, k, like=root)
        sums = emitter.call(aten.sub.Tensor, sums, whole, like=root)
    points = vectors(emitter, product.b_zero_points, root, INT32, [-1])
    if product.b.offset:
        points.append(number(emitter, -product.b.offset, root, INT32))
    point = combined(emitter, points, root, aten.add.Tensor)
    assert point is not None
    result = emitter.call(aten.sub.Tensor, out, emitter.call(aten.mul.Tensor, sums, point, like=root), like=root)
    if product.dtype is INT32:
        return out, result
    result = emitter.cast(result, FLOAT32, like=root)
    for scale in (
        *vectors(emitter, product.rows, root, FLOAT32, [-1, 1]),
        *vectors(emitter, product.columns, root, FLOAT32, [-1]),
    ):
        result = emitter.call(aten.mul.Tensor, result, scale, like=root)
    bias = _bias(emitter, product, site)
    if bias is not None:
        result = emitter.call(aten.add.Tensor, result, bias, like=root)
    return out, emitter.cast(result, product.dtype, like=root)


def _weight_only(emitter: Emitter, site: Site, product: Product) -> Node:
    """``fx_quant::weight_only_mm`` with everything in it."""
    root, problem = site.root, site.problem
    assert isinstance(product.a, Node)
    x = emitter.reshape(product.a, [-1, problem.k], like=root)
    b, lowest = _weight(emitter, site, product)
    shift = -product.b.offset - lowest
    # Scales of the result's rows have no place in the op: the result is multiplied by them, as in the source.
    if product.rows:
        raise LookupError("a weight-only matmul whose result is scaled by rows")
    if product.block is None:
        b_scale = combined(emitter, vectors(emitter, product.columns, root, FLOAT32, [-1]), root)
        points = vectors(emitter, product.b_zero_points, root, INT32, [-1])
    else:
        b_scale = _weight_blocks(emitter, product, site, FLOAT32)
        high, groups = product.block[0], -(-problem.k // product.block[1])
        points = blocks(emitter, product.b_zero_points, high, groups, root, INT32)
    if b_scale is None:
        b_scale = number(emitter, 1.0, root, FLOAT32)
    if shift:
        points.append(number(emitter, shift, root, INT32))
    point = combined(emitter, points, root, aten.add.Tensor)
    if point is not None:
        b_scale, point = _alike(emitter, b_scale, point, root)
    extras = {} if product.block is None else {"block": list(product.block)}
    bias = _bias(emitter, product, site)
    return emitter.call(WEIGHT_ONLY_MM, x, b, b_scale, point, bias, product.dtype, like=root, **extras)


def _alike(emitter: Emitter, scale: Node, point: Node, like: Node) -> tuple[Node, Node]:
    """Scale and zero point repeated to one shape."""
    sizes = list(torch.broadcast_shapes(scale.meta["val"].shape, point.meta["val"].shape))
    return _full(emitter, scale, sizes, like), _full(emitter, point, sizes, like)


def _weight(emitter: Emitter, site: Site, product: Product) -> tuple[Node, int]:
    """Codes ``[k, n]`` as the op takes them, and the integer that it is to add to them to get those of the source.

    Codes of 16 values are packed two to a byte along k, as ``code + 8``, the even k in the low nibble.
    """
    root = site.root
    if site.problem.scheme.weight.dtype not in INT4_DTYPES:
        return _stored(emitter, product.b, root), 0
    b = matrix(emitter, product.b, root)
    bounds = integer_range(dataclasses.replace(product.b, offset=0))
    assert bounds is not None
    if site.problem.k % 2:
        raise LookupError(f"k={site.problem.k} is odd, and int4 codes are packed in pairs along k")
    nibbles = emitter.cast(b, INT32, like=root)
    if bounds[0]:
        nibbles = emitter.call(aten.sub.Tensor, nibbles, bounds[0], like=root)
    pairs = emitter.call(aten.reshape.default, nibbles, [site.problem.k // 2, 2, site.problem.n], like=root)
    low = emitter.call(aten.select.int, pairs, 1, 0, like=root)
    high = emitter.call(aten.mul.Tensor, emitter.call(aten.select.int, pairs, 1, 1, like=root), 16, like=root)
    packed = emitter.cast(emitter.call(aten.add.Tensor, low, high, like=root), torch.uint8, like=root)
    return packed, bounds[0] + 8


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
    if bias.axis is Axis.SCALAR and n != 1:
        node = emitter.call(aten.expand.default, node, [n], like=root)
    return node
