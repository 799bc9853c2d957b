"""The value algebra: one forward walk that gives each node what can be proven of its value.

Rules are about values, not spellings: each op maps the values of its inputs to a value. A node whose value cannot be
proven carries the rule that failed, so a miss explains itself.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph, Node

from fx_quant.passes.failures import Failure, attempt
from fx_quant.passes.matrices import is_full
from fx_quant.passes.nodes import (
    ADDITIONS,
    CASTS,
    COPIES,
    DIVISIONS,
    EXPANDS,
    MULTIPLICATIONS,
    PERMUTES,
    RESHAPES,
    RIGHT_SHIFTS,
    SUBTRACTIONS,
    aten,
    dtype,
    qualified_name,
    tensor,
)
from fx_quant.passes.rulebook import is_matmul, rule_of
from fx_quant.passes.values import Affine, Codes, Unknown, Value
from fx_quant.scheme import CODE_DTYPES


class Annotation:
    """Values of the nodes of one graph.

    Args:
        weight_only: matmuls of which the activation is to be taken as the float that it was decoded to.
    """

    def __init__(self, graph: Graph, weight_only: Collection[Node] = ()) -> None:
        self.weight_only = weight_only
        self._values: dict[Node, Value] = {}
        for node in graph.nodes:
            value = self._guarded(node)
            if value is not None:
                self._values[node] = value

    def value(self, node: object) -> Value | None:
        """What is proven of ``node``; None for plain floating point and for what is not a tensor node."""
        return self._values.get(node) if isinstance(node, Node) else None

    def _guarded(self, node: Node) -> Value | None:
        """The value of ``node``; what a rule raises makes it unknown and is no concern of other nodes."""
        value = attempt(self._evaluate, node)
        if not isinstance(value, Failure):
            return value
        rule = rule_of(node)
        name = "annotate" if rule is None else f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"
        return Unknown(node, value.reason(f"the rule {name} of {qualified_name(node.target)}"))

    def _evaluate(self, node: Node) -> Value | None:
        if tensor(node) is None:
            return None
        if node.op == "call_function":
            rule = rule_of(node)
            if rule is not None:
                value = rule(self, node)
                if value is not None:
                    return value
        # Whatever computed them, low-bit values are codes of something.
        if dtype(node) in CODE_DTYPES:
            return Codes.of(node)
        if node.op == "call_function" and node.target in _CARRIERS:
            return self._carried(node)
        return None

    def _carried(self, node: Node) -> Unknown | None:
        """A dequantize step that no rule proves: remember why, unless it is rather a float tensor that met codes."""
        inputs = node.all_input_nodes
        floats = [source for source in inputs if self.value(source) is None and is_full(source, node)]
        if floats and (node.target in ADDITIONS | SUBTRACTIONS or not all(is_full(s, node) for s in inputs)):
            return None
        for source in inputs:
            value = None if is_matmul(source) else self.value(source)
            if isinstance(value, Unknown):
                return value
            if isinstance(value, (Codes, Affine)):
                return Unknown(node, f"no rule proves {qualified_name(node.target)} of {_describe(value)}")
        return None


def _describe(value: Value) -> str:
    names: dict[type, str] = {
        Codes: "quantized codes",
        Affine: "a dequantized tensor",
    }
    return names.get(type(value), "a quantized value")


# Ops through which a dequantize may run that no rule proves; any other op ends in plain floating point.
_CARRIERS = frozenset(
    {
        *RESHAPES,
        *PERMUTES,
        *EXPANDS,
        *COPIES,
        *CASTS,
        *MULTIPLICATIONS,
        *DIVISIONS,
        *SUBTRACTIONS,
        *ADDITIONS,
        aten.slice.Tensor,
        aten.index.Tensor,
        aten.cat.default,
        aten.bitwise_and.Scalar,
        aten.bitwise_and.Tensor,
        *RIGHT_SHIFTS,
        aten.where.self,
    }
)
