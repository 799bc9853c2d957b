"""Values behind what unpacks codes narrower than a byte, and behind what looks them up."""

from __future__ import annotations

from torch.fx import Node

from fx_quant.passes.axes import seen_through
from fx_quant.passes.matrices import integer_range, stored_dtype
from fx_quant.passes.nodes import ANDS, CASTS, JOINS, RIGHT_SHIFTS, args_of, aten, dtype, is_op, shape
from fx_quant.passes.ranges import bounds_of
from fx_quant.passes.rules.steps import is_integer
from fx_quant.passes.values import Codes, Environment, Rule, Unknown, Value

_CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)


def _bounded(env: Environment, node: Node) -> Value | None:
    """``packed & mask``, ``packed >> bits``, a clamp of integers: codes within bounds, whatever held them."""
    to, bounds = dtype(node), bounds_of(node)
    if not is_integer(to) or bounds is None:
        return None
    codes = Codes.of(node, bounds)
    return None if stored_dtype(codes) is None else codes


def _joined(env: Environment, node: Node) -> Value | None:
    """``cat`` or ``stack`` of codes: their common range."""
    values = [env.value(part) for part in args_of(node)[0]]
    if not values or not all(isinstance(value, Codes) for value in values):
        return None
    bounds = [integer_range(value) for value in values if isinstance(value, Codes)]
    known = [bound for bound in bounds if bound is not None]
    if len(known) < len(bounds) or not is_integer(dtype(node)):
        return None
    joined = Codes.of(node, bounds=(min(low for low, _ in known), max(high for _, high in known)))
    return None if stored_dtype(joined) is None else joined


def _indexed(env: Environment, node: Node) -> Value | None:
    """``table[codes]`` of a vector is no affine value of the codes."""
    if len(shape(args_of(node)[0])) != 1:
        return None
    indices = [index for index in args_of(node)[1] if isinstance(index, Node)]
    if any(isinstance(env.value(index), Codes) and is_integer(dtype(index)) for index in indices):
        return Unknown(node, "the codes are decoded through a lookup table (as nf4 and fp4 are), which no kernel has")
    return None


def is_gathered(operand: object) -> bool:
    """Whether ``operand`` is rows of a tensor that are chosen by another, as GPTQ's ``scales[g_idx]``."""
    if not isinstance(operand, Node):
        return False
    base, _ = seen_through(operand, lambda node: is_op(node, *CASTS))
    return is_op(base, aten.index.Tensor, aten.index_select.default)


GATHERED = (
    "scales and zero points are chosen by an index tensor (GPTQ's g_idx), whose values no rule knows: quantize without "
    "desc_act"
)

# Which of these may make codes of what holds none by its dtype.
STARTS = frozenset({aten.index.Tensor, *ANDS, *RIGHT_SHIFTS, *JOINS})
RULES: dict[object, Rule] = {
    aten.index.Tensor: _indexed,
    **dict.fromkeys((*ANDS, *RIGHT_SHIFTS, *_CLAMPS), _bounded),
    **dict.fromkeys(JOINS, _joined),
}
