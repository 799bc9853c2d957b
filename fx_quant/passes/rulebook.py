"""Which rule proves the value of which op: ATen's rules, then the dialects' facts."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Mapping

from torch.fx import Node

from fx_quant.passes import dialects
from fx_quant.passes.contractions import (
    is_quantization,
    is_quantized_contraction,
    may_store_codes,
    subgraphs_of,
)
from fx_quant.passes.nodes import aten
from fx_quant.passes.rules import arithmetic, fake_quantize, matmuls, packing, scaled_matmuls, views
from fx_quant.passes.values import Environment, Rule, Value


def _merged(*tables: Mapping[object, Rule]) -> dict[object, Rule]:
    """One table of ``tables``; of several rules for an op the first that proves something counts."""
    merged: dict[object, Rule] = {}
    for table in tables:
        for op, rule in table.items():
            merged[op] = _either(merged[op], rule) if op in merged else rule
    return merged


def _either(first: Rule, second: Rule) -> Rule:
    @functools.wraps(second)
    def rule(env: Environment, node: Node) -> Value | None:
        value = first(env, node)
        return second(env, node) if value is None else value

    return rule


_MATMULS = _merged(matmuls.RULES, scaled_matmuls.RULES)
_RULES = _merged(views.RULES, arithmetic.RULES, packing.RULES, fake_quantize.RULES, _MATMULS)
# Ops that make codes of what has no low-bit dtype.
_STARTS = frozenset({*packing.STARTS, *fake_quantize.STARTS, aten.view.dtype, aten.round.decimals})
# Of the dialects, as they are now: one may come from outside at any time.
_NAMED: ChainMap[str, Rule] = ChainMap(dialects.MATMUL_RULES, dialects.RULES)


def rule_of(node: Node) -> Rule | None:
    """The rule for the op that ``node`` calls."""
    return _RULES.get(node.target) or _NAMED.get(str(node.target))


def is_matmul(node: object) -> bool:
    """Whether ``node`` is a matmul, of ATen or of a library."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return node.target in _MATMULS or str(node.target) in dialects.MATMUL_RULES


def starts_codes(node: Node) -> bool:
    """Whether ``node`` may hold codes or make them of wider tensors, is a library's quantized op, or runs a graph in
    which such a node stands.
    """
    if may_store_codes(node):
        return True
    if node.op != "call_function":
        return False
    if node.target in _STARTS or str(node.target) in _NAMED or own_kernel(node) is not None:
        return True
    return is_quantization(node) or is_quantized_contraction(node) or _starts_inside(node)


def _starts_inside(node: Node) -> bool:
    return any(starts_codes(inner) for graph in subgraphs_of(node) for inner in graph.nodes)


def own_kernel(node: Node) -> str | None:
    """What fused kernel of a library ``node`` calls, in words; None for any other op."""
    return dialects.OWN_KERNELS.get(str(node.target)) if node.op == "call_function" else None
