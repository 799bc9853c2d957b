"""How far apart two results may be: one table for every test, each row with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fx_quant.scheme import Numerics


@dataclass(frozen=True)
class Tolerance:
    """``|actual - expected| <= rtol * |expected| + atol * max |expected|``.

    ``atol`` counts in units of the largest expected value, because an error of a sum follows its terms, not itself.
    """

    rtol: float
    atol: float


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16

TOLERANCES: Mapping[tuple[Numerics, torch.dtype], Tolerance] = MappingProxyType(
    {
        # Bit-equal, by definition.
        (Numerics.EXACT, _F32): Tolerance(0.0, 0.0),
        (Numerics.EXACT, _BF16): Tolerance(0.0, 0.0),
        (Numerics.EXACT, _F16): Tolerance(0.0, 0.0),
        # Three float32 roundings in the epilogue (2**-24 each), and a float32 sum of float8 products in another order
        # (measured 3e-7 of the largest result at k = 4096).
        (Numerics.SAME_ACCUM, _F32): Tolerance(4e-7, 1e-6),
        # The same, then one rounding to 8 (11) bits of significand may fall on the other side: one unit in the last
        # place, 2**-7 (2**-10) of the value at most.
        (Numerics.SAME_ACCUM, _BF16): Tolerance(2**-7, 1e-6),
        (Numerics.SAME_ACCUM, _F16): Tolerance(2**-10, 1e-6),
        # Every product is rounded to float32 before the sum instead of the scales after it.
        (Numerics.REASSOCIATED, _F32): Tolerance(1e-6, 2e-6),
        # Dequantized operands may be rounded to the activation's dtype before they are multiplied: 2**-9 (2**-12) per
        # operand, which the sum averages but cancellation exposes.
        (Numerics.REASSOCIATED, _BF16): Tolerance(2**-7, 4e-3),
        (Numerics.REASSOCIATED, _F16): Tolerance(2**-10, 5e-4),
        # int8 and float8 codes against the float module: the noise of quantization itself, 1 to 3 % of the result.
        (Numerics.APPROXIMATE, _F32): Tolerance(5e-2, 5e-2),
        (Numerics.APPROXIMATE, _BF16): Tolerance(5e-2, 5e-2),
        (Numerics.APPROXIMATE, _F16): Tolerance(5e-2, 5e-2),
    }
)


def assert_within(actual: Tensor, expected: Tensor, numerics: Numerics, terms: float | Tensor = 0.0) -> None:
    """Raise AssertionError unless ``actual`` is ``expected`` up to ``numerics``; shape, dtype and NaN must agree.

    ``terms`` is the largest term of the sum, where few results may all be what cancellation left of it. As a tensor it
    is the sum of the magnitudes of each element's own terms, which is what they are held to then; where that is not
    finite there is nothing to compare, and what overflows is as good as the largest number.
    """
    tolerance = TOLERANCES[numerics, expected.dtype] if expected.dtype in (_F32, _BF16, _F16) else Tolerance(0.0, 0.0)
    if isinstance(terms, Tensor) and expected.is_floating_point():
        assert actual.shape == expected.shape and actual.dtype is expected.dtype
        info, compared = torch.finfo(expected.dtype), terms.isfinite()
        was, now = (x.double().clamp(-info.max, info.max) for x in (expected, actual))
        off = (now - was).abs()
        allowed = tolerance.rtol * was.abs() + tolerance.atol * terms
        if tolerance.atol:
            # Numbers below the least normal one carry few bits, and a scale may be one of them.
            allowed = allowed + max(info.smallest_normal * info.eps, 2.0**-126)
        wrong = compared & ~(off <= allowed) & ~(was.isnan() & now.isnan())
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()} off by {off[wrong].tolist()}, allowed {allowed[wrong].tolist()}"
        )
        return
    largest = expected[expected.isfinite()] if expected.is_floating_point() else expected
    largest = largest.abs().max().item() if largest.numel() else 0.0
    largest = max(largest, 0.0 if isinstance(terms, Tensor) else terms)
    torch.testing.assert_close(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol * largest, equal_nan=True)
