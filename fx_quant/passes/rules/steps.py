"""Steps that rules share: rounding a dequantized value, and one more step down a matmul's epilogue."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from fx_quant.passes.nodes import constant
from fx_quant.passes.values import Affine, Codes, Product, Stage, Value
from fx_quant.scheme import Numerics


def as_affine(value: Value | None) -> Affine | None:
    """Codes as the affine value without factors; None for anything but codes and affine values."""
    if isinstance(value, Codes):
        return Affine(value, ())
    return value if isinstance(value, Affine) else None


def factor_source(operand: object) -> Node | float:
    """``operand`` as a factor's source: a node, or a Python float."""
    number = constant(operand)
    if number is not None:
        return float(number)
    assert isinstance(operand, Node)
    return operand


def rounded(value: Affine, to: torch.dtype) -> Affine:
    """``value`` after it was computed in or cast to dtype ``to``."""
    return dataclasses.replace(value, epsilon=max(value.epsilon, torch.finfo(to).eps))


def stepped(product: Product, to: torch.dtype, stage: Stage, *, exact: bool, **changes: Any) -> Product:
    """``product`` after one more step, in dtype ``to``.

    Args:
        exact: the step is the canonical epilogue's own, on exact operands.
        changes: the fields that the step sets.
    """
    in_order = stage.value > product.stage.value
    numerics = product.numerics if exact and in_order else max(product.numerics, Numerics.SAME_ACCUM)
    skipped = product.skipped + (product.dtype in (torch.bfloat16, torch.float16))
    return dataclasses.replace(product, dtype=to, stage=stage, numerics=numerics, skipped=skipped, **changes)
