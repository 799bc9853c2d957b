"""What is quantized how: granularities, operand specs and schemes, as data that prints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

import torch

FLOAT8_DTYPES: frozenset[torch.dtype] = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    }
)
INT8_DTYPES: frozenset[torch.dtype] = frozenset({torch.int8, torch.uint8})
CODE_DTYPES: frozenset[torch.dtype] = FLOAT8_DTYPES | INT8_DTYPES


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float8_e4m3fn`` -> ``float8_e4m3fn``."""
    return str(dtype).removeprefix("torch.")


class Granularity(Enum):
    """Over what one scale is shared.

    ``PER_TOKEN`` is one scale for each row of the activation ``a[m, k]``; ``PER_CHANNEL`` one for each
    output column of ``b[k, n]`` (a row of the weight ``[n, k]``); ``UNSCALED`` no scale inside the GEMM at all.
    """

    PER_TENSOR = "per_tensor"
    PER_TOKEN = "per_token"
    PER_CHANNEL = "per_channel"
    UNSCALED = "unscaled"

    def __str__(self) -> str:
        return self.value


class Numerics(IntEnum):
    """How far a rewrite may be from the source graph, smallest first.

    ``EXACT``: bit-equal in eager. ``SAME_ACCUM``: same codes and the same sum of products; the roundings of the
    epilogue may differ. ``REASSOCIATED``: scales moved across the sum. ``APPROXIMATE``: anything beyond.
    """

    EXACT = 0
    SAME_ACCUM = 1
    REASSOCIATED = 2
    APPROXIMATE = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class OperandSpec:
    """How one operand of a GEMM is quantized.

    Args:
        dtype: the dtype of the codes.
        granularity: over what a scale is shared.
        dynamic: the scale is computed from the tensor at run time (activations only).
    """

    dtype: torch.dtype
    granularity: Granularity
    dynamic: bool = False

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {self.granularity}"


@dataclass(frozen=True)
class Scheme:
    """Activation spec x weight spec; prints as ``int8 per_token (dynamic) x int8 per_channel``."""

    activation: OperandSpec
    weight: OperandSpec

    def __str__(self) -> str:
        when = "dynamic" if self.activation.dynamic else "static"
        return f"{self.activation} ({when}) x {self.weight}"
