"""Quantization of a float weight by round to nearest, in every scheme that a weight may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, OperandSpec, dtype_name
from fx_quant.weights import INT4, UINT4, expand_block_scale, require

# The dtype that holds the codes, and their range.
_INTEGERS: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.int8: (torch.int8, -128, 127),
    torch.uint8: (torch.uint8, 0, 255),
    INT4: (torch.int8, -8, 7),
    UINT4: (torch.uint8, 0, 15),
}
# Of e4m3fnuz, 224 rather than its 240: the codes and decoded values are then those of an e4m3fn weight after
# normalize_e4m3fn_to_e4m3fnuz, bit for bit, so both kinds of hardware run one model. vLLM has 224 too.
_FLOAT8_MAX: dict[torch.dtype, float] = {dtype: torch.finfo(dtype).max for dtype in FLOAT8_DTYPES} | {
    torch.float8_e4m3fnuz: 224.0
}
# Below it a float32 loses precision, and with it the promise that no code is further than half a step away.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as ``w ~= (codes - zero_point) * scale``.

    Args:
        codes: ``[n, k]``; int8 and uint8 for ``torch.int4`` and ``torch.uint4``, one code per element: see ``pack_int4``.
        scale: float32; ``[]`` per_tensor, ``[n, 1]`` per_channel, ``[n, ceil(k / g)]`` per_group(g),
            ``[ceil(n / r), ceil(k / c)]`` per_block(r, c).
        zero_point: int32 of the shape of ``scale``, in the range of the codes; None if symmetric.
        spec: how the weight is quantized.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: OperandSpec

    def dequantize(self) -> Tensor:
        """``(codes - zero_point) * scale``, ``[n, k]`` in float32."""
        codes = self.codes.float()
        if self.zero_point is not None:
            codes = codes - _per_code(self.zero_point.float() - _low(self.spec), self.spec, codes) - _low(self.spec)
        return codes * _per_code(self.scale, self.spec, codes)


def quantize_weight(weight: Tensor, spec: OperandSpec) -> QuantizedWeight:
    """Codes, scales and zero points of a float weight, by round to nearest even in float32.

    Symmetric, with ``amax = max |w|`` over what shares a scale::

        scale = amax / qmax        codes = clamp(round(w / scale), -qmax, qmax)

    ``qmax`` is 127 for int8 and 7 for int4: -128 and -8 stay unused, so that ``-w`` gives ``-codes``, no code stands for
    a value beyond amax, and a kernel may negate or take the absolute value of a code. For float8 it is the dtype's
    largest value (e4m3fnuz: 224, as vLLM has it and as a normalized e4m3fn weight has it), and the cast rounds.

    Asymmetric, with ``lo = min(0, min w)`` and ``hi = max(0, max w)``, so that 0 is exact::

        scale = (hi - lo) / (qmax - qmin)        zero_point = round(qmin - lo / scale)
        codes = clamp(round(w / scale) + zero_point, qmin, qmax)

    over the whole range of the dtype. Where all weights that share a scale are 0, it is 1; otherwise it is at least
    2**-126, the smallest normal float32. So ``|w - dequantize()| <= scale / 2`` for integer codes, up to float32
    rounding. Groups and blocks at the end of a row or column may be cut short. An empty weight gives empty codes.

    Args:
        weight: ``[n, k]``; float32, bfloat16 or float16.
        spec: dtype (int8, uint8, float8, ``torch.int4``, ``torch.uint4``), granularity (per_tensor, per_channel,
            per_group, per_block) and symmetry; ``dynamic`` is for activations.

    Raises:
        WeightError: a NaN or an infinity in ``weight``; a spec that no weight can have (float8 asymmetric, unsigned
            symmetric, a granularity of activations or without its size).
    """
    _check_spec(spec)
    _check_weight(weight)
    weight = weight.detach().float()
    low, high = _extremes(weight, spec)
    if spec.symmetric:
        amax = torch.maximum(high, -low)
        scale = _finite_scale(amax / _largest(spec.dtype), amax)
        zero_point = None
    else:
        _, qmin, qmax = _INTEGERS[spec.dtype]
        # Divided before subtracted: hi - lo may overflow.
        scale = _finite_scale(high / (qmax - qmin) - low / (qmax - qmin), high - low)
        zero_point = (qmin - low / scale).round().clamp(qmin, qmax).to(torch.int32)
    return QuantizedWeight(_codes(weight, scale, zero_point, spec), scale, zero_point, spec)


def _largest(dtype: torch.dtype) -> float:
    return _FLOAT8_MAX[dtype] if dtype in FLOAT8_DTYPES else _INTEGERS[dtype][2]
