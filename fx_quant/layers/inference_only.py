"""Eager layers are for inference: a gradient that reaches one is an error, not a wrong number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fx_quant.errors import FxQuantError
from fx_quant.ops import MATMUL_TAGS, register


def refuse_gradient(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """Raise ``FxQuantError``; as an op, so that a compiled backward raises where it runs, not where it is traced.

    Args:
        grad: the gradient of the layer's result.
        shape: of the gradient that was asked for.
    """
    raise FxQuantError(
        "a quantized linear is for inference: the gradient of its input was asked for, which rounding has none of; "
        "call it under torch.no_grad(), or train the float model"
    )


register(
    "refuse_gradient(Tensor grad, SymInt[] shape) -> Tensor",
    refuse_gradient,
    lambda grad, shape: grad.new_empty(shape),
    MATMUL_TAGS,
)


class _NoGradient(torch.autograd.Function):
    """``out``, whose gradient with respect to ``x`` is an error."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore [bad-override]
        return None, torch.ops.fx_quant.refuse_gradient(grad_outputs[0], ctx.shape)


def without_gradient(out: Tensor, x: Tensor) -> Tensor:
    """``out``, computed of ``x.detach()``; a backward pass through it to an ``x`` that requires grad raises.

    Raises:
        FxQuantError: in the backward pass.
    """
    return _NoGradient.apply(out, x) if torch.is_grad_enabled() and x.requires_grad else out
