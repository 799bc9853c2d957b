"""Quantization of a float weight by round to nearest, in every scheme that a weight may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fx_quant.ops import decode, repeat_blocks
from fx_quant.scheme import FLOAT8_DTYPES, FLOAT_DTYPES, OperandSpec, dtype_name, float8_max
from fx_quant.weights import INT4, UINT4
from fx_quant.weights.checks import must

# The dtype that holds the codes, and their range.
_INTEGERS: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.int8: (torch.int8, -128, 127),
    torch.uint8: (torch.uint8, 0, 255),
    INT4: (torch.int8, -8, 7),
    UINT4: (torch.uint8, 0, 15),
}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as ``w ~= (codes - zero_point) * scale``.

    Args:
        codes: ``[n, k]``; for ``torch.int4`` and ``torch.uint4`` int8 and uint8, not yet packed: see ``pack_int4``.
        scale: of the spec's ``scale_dtype``; ``[]`` per_tensor, ``[n, 1]`` per_channel, ``[n, ceil(k / g)]``
            per_group(g), ``[ceil(n / r), ceil(k / c)]`` per_block(r, c).
        zero_point: int32 of the shape of ``scale``, in the range of the codes; None if symmetric.
        spec: how the weight is quantized.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: OperandSpec

    def dequantize(self) -> Tensor:
        """``(codes - zero_point) * scale``, ``[n, k]`` in float32."""
        return decode(self.codes, self.scale, self.zero_point, self.spec.block)


def quantize_weight(weight: Tensor, spec: OperandSpec) -> QuantizedWeight:
    """Codes, scales and zero points of a float weight, by round to nearest even in float32.

    Symmetric, with ``amax = max |w|`` over what shares a scale::

        scale = amax / qmax        codes = clamp(round(w / scale), -qmax, qmax)

    ``qmax`` is 127 for int8 and 7 for int4: -128 and -8 stay unused, so that ``-w`` gives ``-codes``, no code stands
    for a value beyond amax, and a kernel may negate a code or take its absolute value. For float8 it is the dtype's
    largest value (e4m3fnuz: 224, as vLLM has it and as a normalized e4m3fn weight has it), and the cast rounds.

    Asymmetric, with ``lo = min(0, min w)`` and ``hi = max(0, max w)``, so that 0 is exact::

        scale = (hi - lo) / (qmax - qmin)        zero_point = round(qmin - lo / scale)
        codes = clamp(round(w / scale) + zero_point, qmin, qmax)

    over the whole range of the dtype. Where all weights that share a scale are 0, it is 1; otherwise it is at least
    2**-126, the smallest normal float32. Scales of bfloat16 or float16 are rounded up to one, at least the smallest
    normal one. So ``|w - dequantize()| <= scale / 2`` for integer codes, up to float32 rounding. Groups and blocks at
    the end of a row or column may be cut short. An empty weight gives empty codes.

    Args:
        weight: ``[n, k]``; float32, bfloat16 or float16.
        spec: dtype (int8, uint8, float8, ``torch.int4``, ``torch.uint4``), granularity (per_tensor, per_channel,
            per_group, per_block) and symmetry; ``dynamic`` is for activations.

    Raises:
        WeightError: a NaN or an infinity in ``weight``, or a scale that is infinite in the spec's dtype of it; a spec
            that no weight can have (float8 asymmetric, unsigned symmetric, a granularity of activations or without its
            size).
    """
    _check_spec(spec)
    _check_weight(weight)
    weight = weight.detach().float()
    low, high = _extremes(weight, spec)
    if spec.symmetric:
        amax = torch.maximum(high, -low)
        scale = torch.where(amax == 0, 1.0, _held_scale(amax / _largest(spec.dtype), spec))
        zero_point = None
    else:
        _, qmin, qmax = _INTEGERS[spec.dtype]
        # Divided before subtracted: hi - lo may overflow.
        step = high / (qmax - qmin) - low / (qmax - qmin)
        scale = torch.where(high == low, 1.0, _held_scale(step, spec))
        zero_point = (qmin - low / scale).round().clamp(qmin, qmax).to(torch.int32)
    return QuantizedWeight(_codes(weight, scale, zero_point, spec), scale.to(spec.scale_dtype), zero_point, spec)


def _held_scale(scale: Tensor, spec: OperandSpec) -> Tensor:
    """``scale``, at least the smallest normal one, in float32: of 16 bits the next that is not smaller.

    With a smaller one the largest weight would be beyond the largest code.
    """
    to = spec.scale_dtype
    # Below it a scale loses precision, and with it the promise that no code is further than half a step away.
    scale = scale.clamp(min=torch.finfo(to).tiny)
    if to is torch.float32:
        return scale
    held = scale.to(to)
    held = (held.view(torch.int16) + (held.float() < scale)).view(to).float()
    must(
        bool(held.isfinite().all()),
        f"scales must be finite in {dtype_name(to)}, got {float(scale.max()):g}; say bfloat16 scales or none",
    )
    return held


def _largest(dtype: torch.dtype) -> float:
    return float8_max(dtype) if dtype in FLOAT8_DTYPES else _INTEGERS[dtype][2]


def _codes(weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: OperandSpec) -> Tensor:
    codes = weight / _per_code(scale, spec, weight.shape)
    largest = _largest(spec.dtype)
    if spec.dtype in FLOAT8_DTYPES:
        return codes.clamp_(-largest, largest).to(spec.dtype)
    storage, smallest, _ = _INTEGERS[spec.dtype]
    # In place, as a large weight is large in float32.
    codes = codes.round_()
    if zero_point is None:
        return codes.clamp_(-largest, largest).to(storage)
    return codes.add_(_per_code(zero_point, spec, weight.shape)).clamp_(smallest, largest).to(storage)


def _extremes(weight: Tensor, spec: OperandSpec) -> tuple[Tensor, Tensor]:
    """``min(0, min w)`` and ``max(0, max w)`` over what shares a scale, in the shape of the scale."""
    n, k = weight.shape
    shape, (rows, columns) = spec.scale_shape(n, k), spec.granularity.block_within(n, k)
    down, across = shape or (1, 1)
    # The range holds 0 anyway, so padding with it changes nothing.
    padded = torch.nn.functional.pad(weight, (0, across * columns - k, 0, down * rows - n))
    blocks = padded.reshape(down, rows, across, columns)
    low, high = blocks.amin((1, 3)).clamp(max=0), blocks.amax((1, 3)).clamp(min=0)
    return low.reshape(shape), high.reshape(shape)


def _per_code(values: Tensor, spec: OperandSpec, shape: torch.Size) -> Tensor:
    """``values``, of the shape of the scale, broadcastable to ``[n, k]``."""
    return values if spec.block is None else repeat_blocks(values, spec.block, shape)


def _check_weight(weight: Tensor) -> None:
    must(weight.dim() == 2, f"weight must be [n, k], got {list(weight.shape)}; flatten or split it first")
    must(
        weight.dtype in FLOAT_DTYPES,
        f"weight must be float32, bfloat16 or float16, got {dtype_name(weight.dtype)}; cast it, or dequantize codes",
    )
    nans, infinities = int(weight.isnan().sum()), int(weight.isinf().sum())
    must(
        nans + infinities == 0,
        f"weight must be finite, got {nans} NaN and {infinities} infinite of {weight.numel()} values; "
        "look for them in the checkpoint, or leave this weight in float",
    )


def _check_spec(spec: OperandSpec) -> None:
    dtype = spec.dtype
    known = sorted(map(dtype_name, (*_INTEGERS, *FLOAT8_DTYPES)))
    must(
        dtype in _INTEGERS or dtype in FLOAT8_DTYPES, f"spec.dtype must be {', '.join(known)}, got {dtype_name(dtype)}"
    )
    must(
        spec.scale_dtype in FLOAT_DTYPES,
        f"spec.scale_dtype must be float32, bfloat16 or float16, got {spec}; quantize to scales of one of these",
    )
    must(
        not spec.offset, f"a weight is quantized with zero points and without offsets, got {spec}; say symmetric=False"
    )
    must(not spec.dynamic, "spec.dynamic is for activations: a weight is quantized once; say dynamic=False")
    must(
        spec.symmetric or dtype in _INTEGERS,
        f"an asymmetric weight must have an integer dtype, got {dtype_name(dtype)}; say symmetric=True",
    )
    must(
        not spec.symmetric or dtype not in (torch.uint8, UINT4),
        f"a symmetric weight must have a signed dtype, got {dtype_name(dtype)}; say symmetric=False, int8 or int4",
    )
    must(
        spec.granularity.of_weight and spec.granularity.is_sized,
        f"spec.granularity must be per_tensor, per_channel, per_group(g) or per_block(r, c), got {spec.granularity}",
    )
