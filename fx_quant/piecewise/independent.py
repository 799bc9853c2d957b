"""The proof that each row of what a graph gives follows from its own row of what it is given.

A walk over a functional graph of ATen ops, which says of each tensor where it has the rows (``rows.Rows``) or that it
does not depend on them. What no rule knows is not proven. Of such a graph it follows that

- with more rows after the last, the rows before them are what they were: padding is sliced off and nothing else is;
- rows that repeat the last one hold what that one holds, so that they cannot fault where it does not: no index is out
  of range, no divisor is zero. What tells rows apart by their number (``positional``) may not choose what is read.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_quant.passes.nodes import returned
from fx_quant.piecewise import row_views  # noqa: F401  (registers its rules)
from fx_quant.piecewise.row_rulebook import RULES, Known
from fx_quant.piecewise.row_rules import pointwise
from fx_quant.piecewise.rows import Call, MixesRowsError, State, factor, has, not_proven, rows_by_shape, sizes
from fx_quant.piecewise.traced import Traced

_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
# Numbers of a tensor's shape; judged, as all numbers, where they are used.
_MEASURES = frozenset({"aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::sym_storage_offset"})


def prove_rows(traced: Traced) -> tuple[State, ...]:
    """Where each output has the rows; None for one that does not depend on them, and for a number.

    Args:
        traced: a graph, whose number of rows is 2 or more.

    Raises:
        MixesRowsError: it is not proven; says at which node and why.
    """
    states: dict[Node, Any] = {}
    for node in traced.graph.nodes:
        if node.op != "output":
            states[node] = _state(node, states, traced.symbol)
    if traced.holds_where:
        raise MixesRowsError(f"the piece is other ops where not {' and '.join(traced.holds_where)}")
    return tuple(states.get(each) if isinstance(each, Node) else None for each in returned(traced.graph))


def _state(node: Node, states: dict[Node, Any], symbol: Any) -> Any:
    value = node.meta.get("val")
    if node.op == "get_attr":
        return None
    if node.op == "placeholder":
        try:
            return rows_by_shape(sizes(value), symbol) if isinstance(value, Tensor) else None
        except ValueError as error:
            raise MixesRowsError(f"input {node.name} {error}") from error
    if node.target is operator.getitem:
        whole, item = node.args
        state: Any = states[whole]  # type: ignore[index]
        if isinstance(state, tuple):
            state = state[item]  # type: ignore[index]
        _check_shape(node, value, state, symbol)
        return state
    if not isinstance(node.target, torch._ops.OpOverload):
        if isinstance(value, _NUMBERS):
            return None  # a size computed of sizes; judged where it is used
        raise not_proven(node, "is an op without a schema, of which nothing is known")
    call = Call.of(node, states, symbol)
    state = _of_call(call)
    _check_shape(node, value, state, symbol)
    return state


def _of_call(call: Call) -> Any:
    target = call.node.target
    assert isinstance(target, torch._ops.OpOverload)
    if target._schema.is_mutable:
        raise call.fail("writes to memory in place")
    # Attention may drop some of its scores, and does not where it is not told to.
    chance = next((a.default_value for a in target._schema.arguments if a.name == "dropout_p"), None)
    if torch.Tag.nondeterministic_seeded in target.tags and call.given.get("dropout_p", chance) != 0:
        raise call.fail("draws random numbers")
    if target._schema.name in _MEASURES:
        return None
    known = Known(pointwise) if torch.Tag.pointwise in target.tags else RULES.get(target._schema.name)
    for name, value in call.given.items():
        if call.depends(value) and (known is None or name not in known.sizes):
            raise call.fail("takes the number of rows as a value")
    having = [each for _, each in call.operands() if call.state(each) is not None]
    if known is not None and (having or known.makes):
        return known.rule(call)
    if not having:
        return None  # the shape is checked
    raise call.fail("is an op of which it is not known whether it mixes rows")


def _check_shape(node: Node, value: Any, state: Any, symbol: Any) -> None:
    """That the sizes of ``value`` agree with what is said of it: no rule can say what is not so."""
    if isinstance(value, (tuple, list)):
        for i, each in enumerate(value):
            _check_shape(node, each, state[i] if isinstance(state, tuple) else state, symbol)
        return
    if isinstance(value, Tensor):
        shape = sizes(value)
        expected = [] if state is None else [state.dim]
        if [dim for dim, size in enumerate(shape) if has(size, symbol)] != expected:
            raise not_proven(node, f"gives sizes {list(shape)}, in which the rows are not where they were")
        if state is not None and factor(shape[state.dim], symbol) != state.outer * state.inner:
            raise not_proven(node, f"gives {shape[state.dim]} of {symbol} rows")
