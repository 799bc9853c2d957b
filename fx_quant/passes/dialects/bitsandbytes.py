"""bitsandbytes: ``int8_scaled_mm(A [m, k], B [n, k], row_stats [m], col_stats [n], bias, dtype)``.

``cast(float32(A @ B.t()) * (row_stats * col_stats) * c + bias)`` with the largest magnitudes of rows, so that ``c`` is
to be ``1 / 127 ** 2``, which is 6.200012e-5 and what CUDA has; other backends have 6.200124e-5. Source:
``backends/default/ops.py``, csrc/kernels.cu
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fx_quant.passes.axes import Piece, Segment, extent
from fx_quant.passes.matrices import tile_along
from fx_quant.passes.nodes import arguments, dtype, shape, tensor
from fx_quant.passes.values import Axis, Codes, Environment, Product, Rule, Stage, Tile, Unknown, Value
from fx_quant.scheme import FLOAT_DTYPES, Numerics

_ON_CUDA, _ELSEWHERE = 6.200012e-05, 6.200124e-05


def _int8_scaled_mm(env: Environment, node: Node) -> Value | None:
    given = arguments(node)
    a, weight, to = env.value(given["A"]), env.value(given["B"]), dtype(node)
    if not isinstance(a, Codes) or not isinstance(weight, Codes) or a.offset or weight.offset:
        return Unknown(node, "int8_scaled_mm of what is not plain codes has no rule")
    if len(shape(given["A"])) != 2 or to not in FLOAT_DTYPES or to is None:
        return Unknown(node, "int8_scaled_mm of what is not two matrices has no rule")
    m, n = shape(given["A"])[0], shape(given["B"])[0]
    row_stats, column_stats = given["row_stats"], given["col_stats"]
    if len(shape(row_stats)) != 1 or len(shape(column_stats)) != 1 or not isinstance(n, int):
        return Unknown(node, "int8_scaled_mm whose statistics are not one a row has no rule")
    bias, result = given.get("bias"), tensor(node)
    on_cuda = result is not None and result.is_cuda
    return Product(
        gemm=node,
        a=a,
        b=Codes(weight.node, weight.dims[::-1], bounds=weight.bounds),
        rows=(Tile(row_stats, (Segment(extent(m), Piece(0, extent(m))),)),),
        columns=(
            Tile(column_stats, (Segment(n, Piece(0, n)),)),
            Tile(_ON_CUDA if on_cuda else _ELSEWHERE),
        ),
        bias=None if bias is None else tile_along(Axis.COLUMN, bias, node),
        dtype=to,
        stage=Stage.CAST if to is not torch.float32 else Stage.B_SCALE if bias is None else Stage.BIAS,
        numerics=Numerics.SAME_ACCUM,
    )


MATMUL_RULES: dict[str, Rule] = {"bitsandbytes.int8_scaled_mm.default": _int8_scaled_mm}
