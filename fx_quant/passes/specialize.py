"""Sizes of weights that are symbolic, made static by a guard: another size of weight compiles anew.

A weight that is no parameter (a plain attribute, an argument) has symbolic sizes under ``dynamic=True``. Kernels are
chosen, and weights packed, for sizes that are known. The rows of an activation are never made static.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fx_quant.compat import is_guarded, is_marked_dynamic
from fx_quant.passes.nodes import dtype, multiplied, shape
from fx_quant.problem import Size
from fx_quant.scheme import STORED_DTYPES


def specialize_weights(matmuls: Iterable[Node]) -> bool:
    """Make the sizes of the weights of ``matmuls`` static where that can be guarded; returns whether any changed."""
    weights = dict.fromkeys(weight for matmul in matmuls for weight in _weights(matmul))
    symbolic = [(w, i) for w in weights for i, size in enumerate(shape(w)) if not isinstance(size, int)]
    specialized = False
    for weight, i in symbolic:
        size = shape(weight)[i]
        if not isinstance(size, int) and why_symbolic(size) is None:
            int(size)  # adds the guard, after which every tensor of that size is known to have it
            specialized = True
    return specialized


def why_symbolic(size: Size) -> str | None:
    """Why ``size`` cannot be made static, in words; None where it is or can be."""
    if isinstance(size, int):
        return None
    if free_unbacked_symbols(size):
        return f"{size} is read off values"
    if is_marked_dynamic(size):
        return f"{size} was marked as dynamic"
    return None if is_guarded(size) else f"nothing would check a guard on {size}"


def _weights(matmul: Node) -> list[Node]:
    """Inputs of the graph that hold the codes of ``matmul``'s second operand: matrices, packed or not."""
    operand = multiplied(matmul)[1] if len(matmul.args) > 1 else None
    if not isinstance(operand, Node):
        return []
    seen, waiting, weights = {operand}, [operand], []
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder" and dtype(node) in STORED_DTYPES and len(shape(node)) == 2:
            weights.append(node)
        new = set(node.all_input_nodes) - seen
        seen |= new
        waiting += new
    return weights
