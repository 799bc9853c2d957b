"""Rules of padded dims: what pads them, and what becomes of them at each op.

A rule raises ``LookupError`` where nothing is proven; what padded its operands then stays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_quant.ops.purity import is_pure
from fx_quant.passes.axes import REPEAT, Piece, extent, own_dims, viewed
from fx_quant.passes.nodes import (
    ADDITIONS,
    CASTS,
    COPIES,
    DIVISIONS,
    MULTIPLICATIONS,
    SUBTRACTIONS,
    VIEWS,
    args_of,
    arguments,
    aten,
    constant,
    dtype,
    is_op,
    qualified_name,
    same_shape,
    same_size,
    shape,
    tensor,
    uniform_value,
)
from fx_quant.passes.padded import Padded, PaddedDims, PaddedNodes, Rule, Tail, grows
from fx_quant.passes.rules import padded_matmuls
from fx_quant.problem import Size

# --- pads ---------------------------------------------------------------------------------------------------------


def _filled(value: object, node: Node) -> Tail:
    """The tail of a pad with the number ``value``, in the dtype of ``node``."""
    number, kind = constant(value), dtype(node)
    if number is None or kind is None:
        return Tail.ANY
    if number == 0 and kind is not torch.float8_e8m0fnu:
        return Tail.ZERO
    return Tail.ANY if kind.is_floating_point else Tail.FINITE


def _padded(env: PaddedNodes, node: Node, source: Node, dim: int, tail: Tail, onto: PaddedDims) -> None:
    """Add to ``onto`` that ``node`` is ``source`` padded along ``dim``; nothing where that is not known."""
    before, after, inner = shape(source)[dim], shape(node)[dim], onto.get(dim)
    if not grows(before, after) or not env.memory.can_stand_for(source, node):
        if inner is not None:
            raise LookupError(f"{node} pads it again, in a way that is not known to only add at its end")
        return
    env.memory.join(source, node)
    outer = env.pads(node, source, Padded(before if inner is None else inner.kept, tail, (node, dim)))
    onto[dim] = outer if inner is None else env.join([outer, inner])


def _constant_pad(env: PaddedNodes, node: Node) -> PaddedDims:
    given = arguments(node)
    source, amounts = given["self"], given["pad"]
    result, rank = dict(env.of(source)), len(shape(source))
    for i in range(len(amounts) // 2):
        front, back = amounts[2 * i : 2 * i + 2]
        dim = rank - 1 - i
        if front == 0 and back == 0 and not isinstance(back, Node):
            continue
        if front != 0 or isinstance(front, Node):
            if dim in result:
                raise LookupError(f"{node} pads it again, at its front")
            continue
        _padded(env, node, source, dim, _filled(given["value"], node), result)
    return result


def _cat(env: PaddedNodes, node: Node) -> PaddedDims:
    given = arguments(node)
    tensors, rank = given["tensors"], len(shape(node))
    dim = given["dim"] % rank
    first, fills = tensors[0], [uniform_value(fill) for fill in tensors[1:]]
    if fills and None not in fills and len(shape(first)) == rank and dtype(first) == dtype(node):
        result = dict(env.of(first))
        if set(result) - {dim}:
            raise LookupError(f"{node} joins what is padded with what is not")
        tail = min(_filled(fill, node) for fill in fills)
        _padded(env, node, first, dim, tail, result)
        return result
    dims = [env.of(part) for part in tensors]
    result = {}
    for padded in set().union(*dims):
        if padded == dim or not all(padded in part for part in dims):
            raise LookupError(f"{node} joins what is padded with what is not")
        result[padded] = env.join([part[padded] for part in dims])
    return result


def _slice_scatter(env: PaddedNodes, node: Node) -> PaddedDims:
    """``fill[:m] = x`` made functional."""
    given = arguments(node)
    fill, source, rank = given["self"], given["src"], len(shape(node))
    if is_op(source, aten.copy.default) and not env.of(source):
        source = args_of(source)[1]  # which it copies into a slice of the fill
    dim = given["dim"] % rank
    is_fill = uniform_value(fill) is not None or is_op(fill, aten.empty.memory_format)
    if not is_fill or given["step"] != 1 or given["start"] not in (None, 0) or len(shape(source)) != rank:
        if env.of(fill) or env.of(source):
            raise LookupError(f"{node} writes what is padded into no padding")
        return {}
    result = dict(env.of(source))
    if set(result) - {dim}:
        raise LookupError(f"{node} writes what is padded into what is not")
    if dtype(source) != dtype(fill) or not same_shape(_without(source, dim), _without(fill, dim)):
        raise LookupError(f"{node} casts or broadcasts what is padded")
    _padded(env, node, source, dim, _filled(uniform_value(fill), node), result)
    return result


def _without(node: Node, dim: int) -> list[Size]:
    return [size for i, size in enumerate(shape(node)) if i != dim]


# --- views --------------------------------------------------------------------------------------------------------


def _view(env: PaddedNodes, node: Node) -> PaddedDims:
    source = args_of(node)[0]
    before = env.of(source)
    if is_op(node, *COPIES):
        return before
    dims = viewed(node, own_dims(source))
    if dims is None:
        raise LookupError(f"{node} regroups what is padded")
    result: PaddedDims = {}
    for axis, padded in before.items():
        try:
            place = _place(dims, axis, before, shape(source))
            result[place] = _regrouped(dims[place], padded)
        except LookupError as error:
            env.fail(padded.pad, str(error))  # which says nothing of the others
    return result


def _place(dims: Sequence[Sequence[Piece]], axis: int, before: PaddedDims, sizes: Sequence[Size]) -> int:
    """The dim of a view in which ``axis`` stands whole, as the slowest to change."""
    places = [i for i, dim in enumerate(dims) for piece in dim if piece.axis == axis]
    if len(places) != 1 or dims[places[0]][0] != Piece(axis, extent(sizes[axis])):
        raise LookupError("a view cuts what is padded, or puts another dim around it")
    if any(piece.axis in before or piece.axis == REPEAT for piece in dims[places[0]][1:]):
        raise LookupError("a view makes one dim of two that are padded")
    return places[0]


def _regrouped(dim: Sequence[Piece], padded: Padded) -> Padded:
    """``padded``, the slowest to change of ``dim``, as it is padded in whole."""
    inner = math.prod(piece.size for piece in dim[1:])
    if not isinstance(inner, int):
        raise LookupError("a view makes one dim of what is padded and one of a symbolic size")
    return Padded(padded.kept * inner, padded.tail, padded.pad)


def _slice(env: PaddedNodes, node: Node) -> PaddedDims:
    given, source = arguments(node), args_of(node)[0]
    result = dict(env.of(source))
    dim = given["dim"] % len(shape(source))
    padded = result.get(dim)
    if padded is None or same_size(shape(node)[dim], shape(source)[dim]):
        return result
    if given["step"] != 1 or given["start"] not in (None, 0) or not same_size(shape(node)[dim], padded.kept):
        raise LookupError(f"{node} does not drop just the padding")
    env.ends[node] = padded.pad
    del result[dim]
    return result


def _select(env: PaddedNodes, node: Node) -> PaddedDims:
    source, dim = args_of(node)[0], args_of(node)[1] % len(shape(args_of(node)[0]))
    result = env.of(source)
    if dim in result:
        raise LookupError(f"{node} takes one index of what is padded")
    return {axis - (axis > dim): padded for axis, padded in result.items()}


def _part(env: PaddedNodes, node: Node) -> PaddedDims:
    parts = env.parts(args_of(node)[0])
    return parts[args_of(node)[1]]


def _size(env: PaddedNodes, node: Node) -> PaddedDims:
    """``x.shape[dim]``, which stays what it is."""
    return {}


# --- elementwise --------------------------------------------------------------------------------------------------

# What is 0 at 0.
_ZERO_AT_ZERO = frozenset(
    {
        *(aten.abs.default, aten.neg.default, aten.round.default, aten.round.decimals, aten.trunc.default),
        *(aten.floor.default, aten.ceil.default, aten.relu.default, aten.silu.default, aten.gelu.default),
    }
)
_CLAMPS = frozenset({aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default})
# Of libraries; their other operands are scalars or of one element.
_ELEMENTWISE = frozenset(
    {
        *("fx_quant.quantize.default", "quantized_decomposed.quantize_per_tensor.default"),
        *("quantized_decomposed.quantize_per_tensor.tensor", "quantized_decomposed.dequantize_per_tensor.default"),
        "quantized_decomposed.dequantize_per_tensor.tensor",
    }
)


def is_elementwise(node: Node) -> bool:
    """Whether each element of ``node`` depends on its own elements of the operands, and on nothing else."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if is_op(node, *CASTS) or str(node.target) in _ELEMENTWISE:
        return not node.kwargs.get("pad")
    return torch.Tag.pointwise in node.target.tags and is_pure(node.target)


def _elementwise(env: PaddedNodes, node: Node) -> PaddedDims:
    sizes = shape(node)
    result = env.aligned(node, node.all_input_nodes, len(sizes), sizes)
    return {dim: Padded(padded.kept, _tail(env, node, dim - len(sizes)), padded.pad) for dim, padded in result.items()}


def _tail(env: PaddedNodes, node: Node, dim: int) -> Tail:
    """What stands behind the end of ``dim`` (counted from the last) of an elementwise op."""
    kind = dtype(node)
    if kind is None:
        return Tail.ANY
    least = Tail.ANY if kind.is_floating_point or kind.is_complex else Tail.FINITE
    tails = [_operand_tail(env, operand, dim) for operand in node.args]
    if kind is torch.float8_e8m0fnu or not tails:
        return least
    first = tails[0]
    if is_op(node, *CASTS):
        if first is Tail.FINITE and kind in (torch.float32, torch.float64, torch.bfloat16):
            source = dtype(args_of(node)[0])
            return Tail.FINITE if source is not None and not source.is_floating_point else least
        return Tail.ZERO if first is Tail.ZERO else least
    if is_op(node, *_ZERO_AT_ZERO):
        return Tail.ZERO if first is Tail.ZERO else least
    if is_op(node, *_CLAMPS):
        return Tail.ZERO if first is Tail.ZERO and _holds_zero(node) else least
    if is_op(node, *MULTIPLICATIONS):
        return Tail.ZERO if Tail.ZERO in tails and min(tails) >= Tail.FINITE else least
    if is_op(node, *DIVISIONS):
        by = constant(args_of(node)[1])
        return Tail.ZERO if first is Tail.ZERO and by is not None and math.isfinite(by) and by != 0 else least
    if is_op(node, *ADDITIONS, *SUBTRACTIONS):
        # Any multiple of 0 is 0.
        finite = math.isfinite(node.kwargs.get("alpha", 1))  # pyrefly: ignore[bad-argument-type]
        return Tail.ZERO if finite and min(tails) is Tail.ZERO else least
    return least


def _operand_tail(env: PaddedNodes, operand: object, dim: int) -> Tail:
    """What of ``operand`` meets the padded part of ``dim``."""
    number = constant(operand)
    if number is not None:
        return Tail.ZERO if number == 0 else Tail.FINITE if math.isfinite(number) else Tail.ANY
    padded = env.of(operand).get(dim + len(shape(operand)))
    if padded is not None:
        return padded.tail
    kind = dtype(operand)
    if kind is not None and not kind.is_floating_point:
        return Tail.FINITE
    # As everywhere where a scale leaves a sum: that of stored codes is taken to be finite.
    stored = isinstance(operand, Node) and operand not in env.runtime
    return Tail.FINITE if stored and kind in (torch.float32, torch.bfloat16, torch.float16) else Tail.ANY


def _holds_zero(node: Node) -> bool:
    given = arguments(node)
    low, high = given.get("min"), given.get("max")
    bounds = [constant(bound) for bound in (low, high) if bound is not None]
    if None in bounds:
        return False
    return (low is None or low <= 0) and (high is None or high >= 0)


# --- reductions ---------------------------------------------------------------------------------------------------

_LARGEST = frozenset({aten.amax.default, aten.max.default, aten.max.dim})
_SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList})


def _reduction(env: PaddedNodes, node: Node) -> PaddedDims | tuple[PaddedDims, ...]:
    given, source = arguments(node), args_of(node)[0]
    rank, before, kind = len(shape(source)), env.of(source), dtype(node)
    named = given.get("dim")
    named = [named] if isinstance(named, int) else named or range(rank)
    over = {dim % rank for dim in named}
    for dim in over & set(before):
        if not _is_neutral(node, before[dim]):
            raise LookupError(f"{qualified_name(node.target)} reduces over what is padded, which changes with it")
    keeps = bool(given.get("keepdim"))
    result: PaddedDims = {}
    for dim, padded in before.items():
        if dim in over:
            continue
        place = dim if keeps else dim - sum(other < dim for other in over)
        tail = Tail.FINITE if kind is not None and not kind.is_floating_point else Tail.ANY
        result[place] = Padded(padded.kept, tail, padded.pad)
    return (result, result) if tensor(node) is None else result


def _is_neutral(node: Node, padded: Padded) -> bool:
    """Whether a reduction gives the same without the padded part."""
    if padded.tail is not Tail.ZERO:
        return False
    kind = dtype(node)
    if is_op(node, *_SUMS):
        return kind is not None and not kind.is_floating_point
    # Zeros raise no maximum of magnitudes; of nothing at all there is none. Where it stands is another question.
    some = bool(statically_known_true(padded.kept > 0))
    return is_op(node, *_LARGEST - {aten.max.dim}) and some and _is_magnitude(args_of(node)[0])


def _is_magnitude(node: Node) -> bool:
    """Whether ``node`` is known to hold no negative number; of integers the least has a negative magnitude."""
    kind = dtype(node)
    while is_op(node, *CASTS, *VIEWS, aten.amax.default) and kind is not None and kind.is_floating_point:
        node = args_of(node)[0]
        kind = dtype(node)
    return is_op(node, aten.abs.default) and kind is not None and kind.is_floating_point


def _quantize_dynamic(env: PaddedNodes, node: Node) -> tuple[PaddedDims, ...]:
    """``fx_quant::quantize.dynamic``: codes, and a scale of the largest magnitude of a row, or of all."""
    source = args_of(node)[0]
    before, kind = env.of(source), node.kwargs["dtype"]
    per_token = node.kwargs["granularity"] == "per_token"
    last = len(shape(source)) - 1
    if node.kwargs.get("pad"):
        raise LookupError("fx_quant.quantize pads k itself")
    for dim, padded in before.items():
        some = bool(statically_known_true(padded.kept > 0))
        if (dim == last or not per_token) and not (padded.tail is Tail.ZERO and some):
            # What is computed of the codes is padded all the same, so that the matmul can say that it keeps the pad.
            why = "fx_quant.quantize takes the largest magnitude of what is padded, which changes with it"
            env.fail(padded.pad, why)
    assert isinstance(kind, torch.dtype)
    tail = Tail.ANY if kind.is_floating_point else Tail.FINITE
    codes = {dim: Padded(padded.kept, tail, padded.pad) for dim, padded in before.items()}
    scale = {d: Padded(p.kept, Tail.ANY, p.pad) for d, p in before.items() if per_token and d != last}
    return codes, scale


_RULES: dict[object, Rule] = {
    aten.constant_pad_nd.default: _constant_pad,
    aten.cat.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    **dict.fromkeys(VIEWS, _view),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    operator.getitem: _part,
    aten.sym_size.int: _size,
    **dict.fromkeys(_SUMS | _LARGEST, _reduction),
    **dict.fromkeys((aten.amin.default, aten.min.default, aten.min.dim, aten.mean.dim, aten.mean.default), _reduction),
    torch.ops.fx_quant.quantize.dynamic: _quantize_dynamic,
    **padded_matmuls.RULES,
}


def may_pad(node: Node) -> bool:
    """Whether ``node`` may pad an operand."""
    if is_op(node, aten.cat.default):
        return any(uniform_value(part) is not None for part in args_of(node)[0][1:])
    return is_op(node, aten.constant_pad_nd.default, aten.slice_scatter.default)


def rule_of(node: Node) -> Rule | None:
    """The rule for the op that ``node`` calls."""
    rule: Callable | None = _RULES.get(node.target) if node.op == "call_function" else None
    return rule if rule is not None else _elementwise if is_elementwise(node) else None
