"""What must hold of codes and scales before a transform touches them."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from fx_quant.errors import FxQuantError
from fx_quant.errors import must as _must
from fx_quant.scheme import CODE_DTYPES, dtype_name

# pyrefly: ignore [missing-attribute]
INT4: torch.dtype = torch.int4
# pyrefly: ignore [missing-attribute]
UINT4: torch.dtype = torch.uint4


class WeightError(FxQuantError, ValueError):
    """Codes, scales or shapes of a weight that do not fit together, or that a transform does not take."""


must = partial(_must, error=WeightError)


def require_codes(codes: Tensor, dtypes: Collection[torch.dtype] = CODE_DTYPES, what: str = "weight") -> None:
    """Raise unless ``codes`` are two-dimensional, of one of ``dtypes``."""
    known = ", ".join(sorted(map(dtype_name, dtypes)))
    must(codes.dtype in dtypes, f"{what} must be codes of dtype {known}, got {dtype_name(codes.dtype)}")
    must(codes.dim() == 2, f"{what} must be [n, k], got {list(codes.shape)}; flatten or split it first")


def require_float(scale: Tensor, what: str) -> None:
    """Raise unless ``scale`` is of a float dtype that has arithmetic."""
    # Those of one byte, float8_e8m0fnu among them, have no arithmetic.
    floating = scale.dtype.is_floating_point and scale.dtype.itemsize > 1
    must(floating, f"{what} must be a float tensor (float32), got {dtype_name(scale.dtype)}; decode it first")


def checked_scale(scale: Tensor, what: str = "scale") -> Tensor:
    """``scale`` in float32, without its autograd history; every value finite and not negative."""
    require_float(scale, what)
    scale = scale.detach().float()
    bad = scale[~(scale.isfinite() & (scale >= 0))]
    if bad.numel():
        raise WeightError(
            f"{what} must be finite and not negative, got {bad.numel()} of {scale.numel()} that are not "
            f"(first: {bad[0].item():g}); load every shard's scale, and never an inverse scale, before this"
        )
    return scale
