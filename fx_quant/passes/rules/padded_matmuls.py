"""Rules of padded dims at matmuls: what is padded along k must add nothing to the sum."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from fx_quant.passes.canonical import SCALED_MM, WEIGHT_ONLY_MM
from fx_quant.passes.nodes import args_of, arguments, aten, dtype, is_one, is_single, same_size, shape, tensor
from fx_quant.passes.padded import Padded, PaddedDims, PaddedNodes, Rule, Tail


def _product(env: PaddedNodes, node: Node, a: Node, b: Node, beside: Sequence[object] = ()) -> PaddedDims:
    """``a @ b`` of two matrices or of a batch of them, and what is broadcast to the result ``beside``."""
    of_a, of_b = env.of(a), env.of(b)
    last = len(shape(a)) - 1
    k_of_a, k_of_b = of_a.get(last), of_b.get(last - 1)
    for padded in (k_of_a, k_of_b):
        if padded is not None:
            env.use(node, "k", padded, shape(a)[last])
    if k_of_a is not None or k_of_b is not None:
        if k_of_a is None or k_of_b is None or not same_size(shape(a)[last], shape(b)[last - 1]):
            raise LookupError("only one operand of the matmul is padded along k")
        if max(k_of_a.tail, k_of_b.tail) is not Tail.ZERO or min(k_of_a.tail, k_of_b.tail) is Tail.ANY:
            raise LookupError("what is padded along k is not known to add nothing to the sum")
        env.join([k_of_a, k_of_b])
    kind = dtype(node)
    tail = Tail.FINITE if kind is not None and not kind.is_floating_point else Tail.ANY
    result: PaddedDims = {}
    for dim in range(last - 1):
        if dim in of_a or dim in of_b:
            raise LookupError("a batch of matmuls is padded")
    for dim, padded in ((last - 1, of_a.get(last - 1)), (last, of_b.get(last))):
        if padded is not None:
            result[dim] = Padded(padded.kept, tail, padded.pad)
    sizes = shape(node)
    along = env.aligned(node, beside, len(sizes), sizes)
    if set(along) - set(result):
        raise LookupError("the matmul adds or multiplies what is padded to what is not")
    for dim in along:
        padded = env.join([result[dim], along[dim]])
        result[dim] = Padded(padded.kept, tail, padded.pad)
    for other in beside:
        if isinstance(other, Node) and tensor(other) is not None:
            _cut_beside(env, node, other, result, along)
    for side, dim in (("m", last - 1), ("n", last)):
        if dim in result:
            env.use(node, side, result[dim], sizes[dim])
    return result


def _cut_beside(env: PaddedNodes, node: Node, other: Node, result: PaddedDims, along: PaddedDims) -> None:
    """Take note of where ``other`` must be cut with the result."""
    sizes, rank = shape(node), len(shape(node))
    for dim in set(result) - set(along):
        own = dim - rank + len(shape(other))
        if own >= 0 and not is_one(shape(other)[own]):
            env.cut(node, other, own, dim, sizes)


def _matmul(env: PaddedNodes, node: Node) -> PaddedDims:
    return _product(env, node, *args_of(node)[:2])


def _addmm(env: PaddedNodes, node: Node) -> PaddedDims:
    bias, a, b = args_of(node)[:3]
    return _product(env, node, a, b, [bias])


def _aten_scaled_mm(env: PaddedNodes, node: Node) -> PaddedDims:
    given = arguments(node)
    scale_a, scale_b = given["scale_a"], given["scale_b"]
    row_wise = all(is_single(s) or len(shape(s)) == 2 for s in (scale_a, scale_b))
    row_wise = row_wise and (is_single(scale_a) or same_size(shape(scale_a)[1], 1))
    if not row_wise or not (is_single(scale_b) or same_size(shape(scale_b)[0], 1)) or given.get("scale_result"):
        raise LookupError("the matmul has scales of blocks")
    return _product(env, node, given["self"], given["mat2"], [scale_a, scale_b, given.get("bias")])


def _scaled_mm(env: PaddedNodes, node: Node) -> PaddedDims:
    given = arguments(node)
    if given["block"] is not None:
        return _rows_alone(env, node, given["a"], given["a_scale"], given["a_zero_point"])
    # A zero point of a stands in the padded part of k too, unless b is 0 there.
    dims = env.of(given["a"]).get(1), env.of(given["b"]).get(0)
    if given["a_zero_point"] is not None and (dims[1] is None or dims[1].tail is not Tail.ZERO) and any(dims):
        raise LookupError("what is padded along k is not known to add nothing to the sum")
    beside = [given[name] for name in ("a_scale", "b_scale", "bias", "a_zero_point")]
    return _product(env, node, given["a"], given["b"], beside)


def _weight_only_mm(env: PaddedNodes, node: Node) -> PaddedDims:
    return _rows_alone(env, node, arguments(node)["x"])


def _rows_alone(env: PaddedNodes, node: Node, a: Node, *factors: Node | None) -> PaddedDims:
    """A matmul of which nothing but rows is seen through: those of ``a``, and of factors of each row."""
    by_row = (a, *(each for each in factors if each is not None and not is_single(each)))
    if any(set(env.of(arg)) - ({0} if arg in by_row else set()) for arg in node.all_input_nodes):
        raise LookupError("only the rows of a matmul of blocks, or of a float activation, are seen through")
    rows = [env.of(each)[0] for each in by_row if env.of(each)]
    if not rows:
        return {}
    joined = env.join(rows)
    for each in by_row:
        if not env.of(each):
            env.cut(node, each, 0, 0, shape(node))
    env.use(node, "m", joined, shape(node)[0])
    return {0: Padded(joined.kept, Tail.ANY, joined.pad)}


RULES: dict[object, Rule] = {
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten._int_mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten._scaled_mm.default: _aten_scaled_mm,
    SCALED_MM: _scaled_mm,
    WEIGHT_ONLY_MM: _weight_only_mm,
}
