"""optimum-quanto: ``quanto::qbytes_mm(activations, weights [n, k], output_scales)``.

``output_scales`` is the weight's scale, ``[n, 1]``, ``[n]`` or a scalar, times the activation's where that is codes
too. Some devices scale the sum, some the weight before it. Source: ``optimum/quanto/library/qbytes_mm.py``.
"""

from __future__ import annotations

from torch.fx import Node

from fx_quant.passes.axes import Piece, Segment
from fx_quant.passes.nodes import args_of, dtype, same_shape, shape
from fx_quant.passes.rules.scaled_matmuls import scaled_product
from fx_quant.passes.values import Codes, Environment, Rule, Tile, Unknown, Value
from fx_quant.scheme import FLOAT_DTYPES


def _qbytes_mm(env: Environment, node: Node) -> Value | None:
    activation, weight, scale = args_of(node)[:3]
    codes, of_activation = env.value(weight), env.value(activation)
    if not isinstance(codes, Codes) or codes.offset != 0 or dtype(node) not in FLOAT_DTYPES:
        return Unknown(node, "qbytes_mm of a weight that is not plain codes")
    a = of_activation if isinstance(of_activation, Codes) else activation
    if isinstance(a, Node) and dtype(a) != dtype(node):
        return Unknown(node, f"qbytes_mm of a {dtype(a)} activation has no rule")
    b = Codes(codes.node, codes.dims[::-1], bounds=codes.bounds)
    n = shape(weight)[0]
    if not isinstance(n, int) or not same_shape(shape(scale), (n, 1)):
        return scaled_product(node, a, b, scale)
    # One a row of the weight as it is stored, and so one a column of the result.
    return scaled_product(node, a, b, scale, Tile(scale, (Segment(n, Piece(0, n)),)))


MATMUL_RULES: dict[str, Rule] = {"quanto.qbytes_mm.default": _qbytes_mm}
