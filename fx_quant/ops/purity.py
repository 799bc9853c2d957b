"""Which ops are functions of their arguments alone. What is not known to be one is not merged and not folded."""

from __future__ import annotations

import functools
import math
import operator

import torch

# Every op of these is a function of its arguments but for those told apart below.
_NAMESPACES = frozenset({"aten", "prims", "fx_quant", "quantized_decomposed"})
# Memory as it was found, and ops that are called for what they do rather than for what they return.
_IMPURE_NAMES = ("empty", "new_empty", "_empty", "_functional_assert", "_functional_sym_constrain", "_philox")
_IMPURE_TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("nondeterministic_seeded", "nondeterministic_bitwise", "maybe_aliasing_or_mutating")
    if hasattr(torch.Tag, name)
)
_OF_NUMBERS = frozenset(
    {
        *(
            operator.getitem,
            operator.add,
            operator.sub,
            operator.mul,
            operator.floordiv,
            operator.truediv,
            operator.mod,
        ),
        *(operator.pow, operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        *(operator.and_, operator.or_, operator.xor, operator.not_, math.floor, math.ceil, math.trunc),
        *(torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite),
    }
)


def is_pure(target: object) -> bool:
    """Whether two calls of ``target`` with the same arguments are known to give the same, and to do nothing else."""
    return _is_pure_op(target) if isinstance(target, torch._ops.OpOverload) else target in _OF_NUMBERS


@functools.cache
def _is_pure_op(target: torch._ops.OpOverload) -> bool:
    schema = target._schema
    return (
        target.namespace in _NAMESPACES
        and bool(schema.returns)
        and not schema.is_mutable
        and not any(tag in target.tags for tag in _IMPURE_TAGS)
        and not target._opname.startswith(_IMPURE_NAMES)
        and not any("Generator" in str(argument.type) for argument in schema.arguments)
    )
