"""The variants of a flow: how its module is built and called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["no_grad", "inference_mode", "grad", "freezing"]
Inputs = Callable[["Variant"], tuple[tuple[Any, ...], dict[str, Any]]]

_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Variant:
    """How a module is built and called.

    Args:
        dtype: of the activation, the bias and the result.
        ndim: rank of the activation; its last dimension is k.
        dynamic: whether the rows are marked dynamic.
        bias: whether the linear has one.
        mode: under what it runs. ``grad`` lets plain parameters require a gradient, ``freezing`` compiles with
            Inductor's option of that name under ``no_grad``.
        single_row: m = 1 instead of 32.
    """

    dtype: torch.dtype
    ndim: int
    dynamic: bool
    bias: bool
    mode: Mode = "no_grad"
    single_row: bool = False

    def __str__(self) -> str:
        rows = "m1" if self.single_row else "dynamic" if self.dynamic else "static"
        mode = "" if self.mode == "no_grad" else f"_{self.mode}"
        return f"{_SHORT[self.dtype]}_{self.ndim}d_{rows}_{'bias' if self.bias else 'no_bias'}{mode}"

    def context(self) -> contextlib.AbstractContextManager[object]:
        """What the call runs under."""
        if self.mode == "grad":
            return contextlib.nullcontext()
        return torch.inference_mode() if self.mode == "inference_mode" else torch.no_grad()


@dataclass(frozen=True)
class Activation:
    """Makes one normal activation ``[..., k]`` of a variant's rank, always the same.

    Args:
        k: its last dimension.
    """

    k: int = 256

    def __call__(self, variant: Variant) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``((x,), {})``, the rows marked dynamic where the variant says so."""
        if variant.single_row:
            shape: tuple[int, ...] = (1,) * (variant.ndim - 1) + (self.k,)
        else:
            shape = (32, self.k) if variant.ndim == 2 else (4, 8, self.k)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(variant.dtype)
        return (marked(x, variant, x.dim() - 1),), {}


def marked(x: Tensor, variant: Variant, dims: int) -> Tensor:
    """``x``, its first ``dims`` dimensions marked dynamic where the variant says so."""
    if variant.dynamic:
        for dim in range(dims):
            torch._dynamo.mark_dynamic(x, dim)
    return x


_BF16, _F32 = torch.bfloat16, torch.float32

# Between them every axis takes both values.
FEW = (Variant(_BF16, 3, dynamic=True, bias=True), Variant(_F32, 2, dynamic=False, bias=False))

ALL = (
    *(
        Variant(dtype, ndim, dynamic, bias)
        for dtype in (_BF16, _F32)
        for ndim in (3, 2)
        for dynamic in (True, False)
        for bias in (True, False)
    ),
    *(Variant(dtype, ndim, False, True, single_row=True) for dtype in (_BF16, _F32) for ndim in (3, 2)),
    Variant(_BF16, 3, False, True, "inference_mode"),
    Variant(_F32, 2, True, True, "inference_mode"),
    Variant(_BF16, 3, False, True, "grad"),
    Variant(_F32, 2, True, True, "grad"),
    Variant(_BF16, 3, False, True, "freezing"),
    Variant(_F32, 3, False, True, "freezing"),
)

# A whole model has its own rank and biases.
FEW_OF_A_MODEL = (Variant(_BF16, 3, False, True), Variant(_F32, 3, False, True))
ALL_OF_A_MODEL = tuple(
    Variant(dtype, 3, dynamic, True, mode)
    for dtype in (_BF16, _F32)
    for dynamic, mode in ((False, "no_grad"), (True, "no_grad"), (False, "inference_mode"), (False, "freezing"))
)


def variants(which: str, *, whole_model: bool = False) -> tuple[Variant, ...]:
    """The ``few`` or ``all`` variants of a linear or of a whole model.

    Raises:
        ValueError: ``which`` is neither.
    """
    if which not in ("few", "all"):
        raise ValueError(f"variants must be 'few' or 'all', got {which!r}")
    if whole_model:
        return FEW_OF_A_MODEL if which == "few" else ALL_OF_A_MODEL
    return FEW if which == "few" else ALL
