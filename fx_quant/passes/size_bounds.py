"""The least and the largest that a symbolic size may be, from facts already known; no guard is added."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.utils._sympy.functions import Max

from fx_quant.problem import Size, SizeRange


def range_of(sizes: Iterable[Size]) -> SizeRange:
    """Range of the product of ``sizes``."""
    low, high = 1, 1
    for size in sizes:
        low *= least(size)
        largest = size if isinstance(size, int) else _upper(size)
        high = None if high is None or largest is None else high * largest
    return SizeRange(low, high)


def least(size: Size) -> int:
    """What ``size`` is at least; ``m + max(0, 17 - m)``, as a pad to 17 rows is traced, is at least 17."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    lower = [_lower(size.node.shape_env, expression)]
    for largest in expression.atoms(Max):
        # A sum is at least what it is with any one of the terms of a maximum in it.
        if expression.is_Add and largest in expression.args:
            lower += [_lower(size.node.shape_env, expression - largest + term) for term in largest.args]
    return max(lower)


def _lower(env: torch.fx.experimental.symbolic_shapes.ShapeEnv, expression) -> int:
    bound = env.bound_sympy(expression).lower
    return max(int(bound), 0) if bound.is_Integer else 0


def _upper(size: torch.SymInt) -> int | None:
    """The largest that ``size`` may be; None where nothing says so."""
    bound = size.node.shape_env.bound_sympy(size.node.expr).upper
    # Unbounded is a sympy infinity or the huge integer that stands for one.
    return int(bound) if bound.is_Integer and bound < 2**48 else None
