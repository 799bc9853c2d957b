"""Linears that are spelled as something else, as the matmuls that they are.

A weight on the left is one on the right of what is transposed, and a convolution whose kernel has one element is a
linear of each position::

    w[n, k] @ x[..., k, t] == (x.mT @ w.T).mT
    conv(x[b, k, *s], w[n, k, 1, ...]) == linear(x.movedim(1, -1), w[n, k]).movedim(-1, 1)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from fx_quant.passes.emit import Emitter
from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.inputs import classify_inputs
from fx_quant.passes.nodes import args_of, arguments, aten, is_one, is_op, same_shape, same_size, shape
from fx_quant.passes.size_bounds import range_of
from fx_quant.passes.slices import coded_nodes

_SPELLINGS = (aten.mm.default, aten.bmm.default, aten.convolution.default)


@dataclass(frozen=True)
class Turned:
    """Linears that are spelled as something else.

    Args:
        matmuls: the name of what was replaced, by the name of the matmul.
        left: why others are left as they are, by name.
    """

    matmuls: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)


def turn(graph: Graph, static_indices: frozenset[int] | None, left: Mapping[str, str]) -> Turned:
    """Spell linears of a stored weight that is decoded as matmuls with the weight on the right.

    Args:
        left: those to leave: the reason, by name.
    """
    spelled = [node for node in graph.nodes if is_op(node, *_SPELLINGS)]
    spelled = [
        node for node in spelled if not is_op(node, aten.convolution.default) or attempt(_is_linear, node) is True
    ]
    coded = coded_nodes(graph) if spelled else set()
    spelled = [node for node in spelled if _weight(node) in coded]
    if not spelled:
        return Turned()
    runtime, emitter = classify_inputs(graph, static_indices).runtime, Emitter(graph)
    spelled = [node for node in spelled if _weight(node) not in runtime and _activation(node) in runtime]
    floats = [node for node in spelled if _activation(node) not in coded]
    left = {node.name: _MANY_ROWS for node in floats if _has_many_rows(node)} | dict(left)
    matmuls: dict[str, str] = {}
    for node in spelled:
        if node.name in left:
            continue
        with graph.inserting_before(node):
            found = attempt(_convolution if is_op(node, aten.convolution.default) else _on_the_left, emitter, node)
            if isinstance(found, Failure):
                continue
            matmul, result = found
            if not same_shape(result.meta["val"].stride(), node.meta["val"].stride()):
                result = emitter.call(aten.clone.default, result, memory_format=torch.contiguous_format, like=node)
        if same_shape(result.meta["val"].stride(), node.meta["val"].stride()):
            matmuls[matmul.name] = node.name
            emitter.replace(node, result)
    if matmuls:
        graph.eliminate_dead_code()
    return Turned(matmuls, left)


# Up to here a weight that is decoded beside a float activation is worth moving the activation for.
_FEW_ROWS = 128
_MANY_ROWS = (
    f"as a matmul it may have more than {_FEW_ROWS} rows of floats, where decoding the weight is not worth moving them"
)


def _has_many_rows(node: Node) -> bool:
    sizes = shape(node)
    rows = (sizes[0], *sizes[2:]) if is_op(node, aten.convolution.default) else (*sizes[:-2], sizes[-1])
    most = range_of(rows).high
    return most is None or most > _FEW_ROWS


def reasons(turned: Turned, why: Mapping[str, str], rewritten: Collection[str]) -> dict[str, str]:
    """Why each of ``turned`` that is not rewritten is to be left as it was, by its own name."""
    return {
        name: f"as a matmul: {why.get(matmul, 'it is not rewritten')}"
        for matmul, name in turned.matmuls.items()
        if matmul not in rewritten
    }


def _weight(node: Node) -> object:
    return args_of(node)[1 if is_op(node, aten.convolution.default) else 0]


def _activation(node: Node) -> object:
    return args_of(node)[0 if is_op(node, aten.convolution.default) else 1]


def _is_linear(node: Node) -> bool:
    """Whether a convolution looks at one element for each of its results, without groups, steps and padding."""
    given = arguments(node)
    return (
        all(map(is_one, (*shape(given["weight"])[2:], *given["stride"])))
        and not any(given["padding"])
        and not given["transposed"]
        and given["groups"] == 1
        and len(shape(given["input"])) == len(shape(given["weight"])) > 2
        and same_size(shape(given["input"])[1], shape(given["weight"])[1])
    )


def _on_the_left(emitter: Emitter, node: Node) -> tuple[Node, Node]:
    """``mm`` or ``bmm`` of the weight and the activation, and the result that it had."""
    order = [1, 0] if is_op(node, aten.mm.default) else [0, 2, 1]
    weight, x = args_of(node)[:2]
    x, weight = (emitter.call(aten.permute.default, operand, order, like=node) for operand in (x, weight))
    matmul = emitter.call(node.target, x, weight, like=node)
    return matmul, emitter.call(aten.permute.default, matmul, order, like=node)


def _convolution(emitter: Emitter, node: Node) -> tuple[Node, Node]:
    """``mm`` of the positions and the weight, and the result of the convolution.

    Raises:
        LookupError: a size that no node holds.
    """
    x, weight, bias = args_of(node)[:3]
    (n, k), rank = shape(weight)[:2], len(shape(x))
    x = emitter.call(aten.permute.default, x, [0, *range(2, rank), 1], like=node)
    x = emitter.reshape(x, [-1, k], like=node)
    weight = emitter.call(aten.permute.default, emitter.reshape(weight, [n, k], like=node), [1, 0], like=node)
    matmul = result = emitter.call(aten.mm.default, x, weight, like=node)
    if bias is not None:
        result = emitter.call(aten.add.Tensor, result, bias, like=node)
    sizes = shape(node)
    result = emitter.reshape(result, emitter.size_args((sizes[0], *sizes[2:], n), node, like=node), like=node)
    return matmul, emitter.call(aten.permute.default, result, [0, rank - 1, *range(1, rank - 1)], like=node)
