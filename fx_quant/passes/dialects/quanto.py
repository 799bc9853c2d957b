"""optimum-quanto: ``quanto::qbytes_mm(activations, weights [n, k], output_scales)``.

``output_scales`` is the weight's scale, times the activation's where that is codes too. Some devices scale the
sum, some the weight before it. Source: ``optimum/quanto/library/qbytes_mm.py``.
"""

from __future__ import annotations

from torch.fx import Node

from fx_quant.passes.nodes import args_of, dtype
from fx_quant.passes.rules.scaled_matmuls import scaled_product
from fx_quant.passes.values import Codes, Environment, Rule, Unknown, Value
from fx_quant.scheme import FLOAT_DTYPES


def _qbytes_mm(env: Environment, node: Node) -> Value | None:
    activation, weight, scale = args_of(node)[:3]
    codes, of_activation = env.value(weight), env.value(activation)
    if not isinstance(codes, Codes) or codes.offset != 0 or dtype(node) not in FLOAT_DTYPES:
        return Unknown(node, "qbytes_mm of a weight that is not plain codes")
    a = of_activation if isinstance(of_activation, Codes) else activation
    if isinstance(a, Node) and dtype(a) != dtype(node):
        return Unknown(node, f"qbytes_mm of a {dtype(a)} activation has no rule")
    return scaled_product(node, a, Codes(codes.node, codes.dims[::-1], bounds=codes.bounds), scale)


MATMUL_RULES: dict[str, Rule] = {"quanto.qbytes_mm.default": _qbytes_mm}
