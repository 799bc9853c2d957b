"""The operands of a canonical op in a graph, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fx_quant.kernels.realise import Operands
from fx_quant.passes.nodes import args_of

SCALED_MM = torch.ops.fx_quant.scaled_mm.default
WEIGHT_ONLY_MM = torch.ops.fx_quant.weight_only_mm.default
CANONICAL = frozenset({SCALED_MM, WEIGHT_ONLY_MM})


def operands_of(node: Node) -> Operands[Node]:
    """The operands of the canonical op ``node``."""
    if node.target is WEIGHT_ONLY_MM:
        a, b, b_scale, b_zero_point, bias, out_dtype = args_of(node)
        offset = node.kwargs.get("b_offset")
        assert offset is None or isinstance(offset, Node)
        operands = Operands(a, b, None, b_scale, bias, out_dtype, None, b_zero_point, _block(node), offset)
    else:
        zero_points: dict[str, Any] = {f"{name}_zero_point": node.kwargs.get(f"{name}_zero_point") for name in "ab"}
        assert all(point is None or isinstance(point, Node) for point in zero_points.values())
        operands = Operands(*args_of(node), **zero_points, block=_block(node))
    return operands


def _block(node: Node) -> tuple[int, int] | None:
    block = node.kwargs.get("block")
    if block is None:
        return None
    assert isinstance(block, (list, tuple))
    rows, columns = block
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    return rows, columns
