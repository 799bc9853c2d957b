"""Scales and codes of fused shards, of activations, and of other hardware's float8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fx_quant.ops import decode
from fx_quant.scheme import CODE_DTYPES, FLOAT8_DTYPES, INT8_DTYPES, dtype_name
from fx_quant.weights.checks import (
    checked_scale,
    must,
    require_codes,
    require_float,
)

# A loader starts the scale of every shard at finfo(float32).min. Doubled (fnuz) or rounded to bfloat16 it becomes -inf,
# so anything below every float8 is "never loaded".
_NEVER_LOADED = torch.finfo(torch.float8_e4m3fn).min


# --- fused shards with one scale each -------------------------------------------------------------------------


def _shards_with_rows(weight_scale: Tensor, logical_widths: Sequence[int]) -> list[tuple[int, float]]:
    """``(rows, scale)`` of each shard that has rows; a scale that was never loaded is resolved or an error."""
    require_float(weight_scale, "weight_scale")
    widths = list(logical_widths)
    must(
        all(isinstance(width, int) and width >= 0 for width in widths),
        f"logical_widths must be the rows of each shard, got {widths}",
    )
    values: list[float] = weight_scale.detach().float().flatten().tolist()
    if len(values) == 1:
        values *= len(widths)
    must(
        len(values) == len(widths),
        f"weight_scale must hold one scale, or one for each of the {len(widths)} logical_widths, got {len(values)}",
    )
    shards = [(width, value) for width, value in zip(widths, values, strict=True) if width]
    if shards and shards[-1][1] <= _NEVER_LOADED:
        loaded = sorted({value for value in values if value > _NEVER_LOADED})
        must(
            len(loaded) == 1,
            "weight_scale must have one value if its last shard's was never loaded, as in a checkpoint that is already "
            f"fused, got {len(loaded)}; load the missing scales",
        )
        shards = [(width, loaded[0]) for width, _ in shards]
    checked_scale(torch.tensor([scale for _, scale in shards]), "weight_scale")
    return shards


def convert_to_channelwise(weight_scale: Tensor, logical_widths: Sequence[int]) -> Tensor:
    """One scale per output row from one scale per fused shard.

    ``out[row, 0] = weight_scale[i]`` for every row of shard i. A shard of width 0 takes no row. If the last shard's
    scale was never loaded (``finfo(float32).min``), the checkpoint was fused on disk and its one scale is for all rows.

    Args:
        weight_scale: ``[shards]``, or one element for all shards; float.
        logical_widths: rows of each shard.

    Returns:
        ``[sum(logical_widths), 1]``, float32.

    Raises:
        WeightError: another number of scales than of widths; a scale that is negative or not finite.
    """
    shards = _shards_with_rows(weight_scale, logical_widths)
    rows = torch.tensor([width for width, _ in shards], dtype=torch.int64)
    scales = torch.tensor([scale for _, scale in shards], dtype=torch.float32)
    return scales.repeat_interleave(rows)[:, None].to(weight_scale.device)


def per_tensor_dequantize(codes: Tensor, scale: Tensor | float) -> Tensor:
    """``float32(codes) * scale``, one scale for all.

    Args:
        codes: any shape; int8, uint8 or float8. NaN codes stay NaN.
        scale: one element, float. A decode factor, though the seed calls it ``inv_scale``.

    Returns:
        The shape of ``codes``, float32: float16, which the seed goes through, has no room for scales near 1e-6.

    Raises:
        WeightError: not codes; more than one scale, or one that is negative or not finite.
    """
    must(codes.dtype in CODE_DTYPES, f"codes must be int8, uint8 or float8, got {dtype_name(codes.dtype)}")
    factor = checked_scale(torch.as_tensor(scale, dtype=None if isinstance(scale, Tensor) else torch.float32))
    must(
        factor.numel() == 1,
        f"scale must have one element, got {list(factor.shape)}; multiply by blocks as QuantizedWeight.dequantize does",
    )
    return decode(codes.detach(), factor.reshape(()).to(codes.device))


def requantize_with_max_scale(
    weight: Tensor, weight_scale: Tensor, logical_widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Float8 shards with a scale each, brought to one shared scale: the largest.

    ``codes' = float8(float32(codes) * (scale_i / max_scale))`` for the rows of shard i. As no ratio exceeds 1, nothing
    can overflow; a code may become subnormal or zero, by at most half a step of float8. NaN codes stay NaN. Shards that
    already have the largest scale keep their codes, bit for bit.

    If the last shard's scale was never loaded (``finfo(float32).min``), the checkpoint was fused on disk: its one
    scale is returned and the codes stay as they are. Shards of width 0 are ignored, their scales too.

    Args:
        weight: ``[n, k]``, float8.
        weight_scale: ``[shards]``, or one element for all shards (nothing to do); float.
        logical_widths: rows of each shard, together n.

    Returns:
        ``(max_scale, weight)``: a scalar ``[]`` in float32 (1 for a weight without rows), and new codes ``[n, k]``.

    Raises:
        WeightError: widths that do not sum to n; a scale that is negative, not finite or, but for a fused checkpoint,
            never loaded.
    """
    require_codes(weight, FLOAT8_DTYPES)
    shards = _shards_with_rows(weight_scale, logical_widths)
    rows = sum(width for width, _ in shards)
    must(rows == weight.shape[0], f"logical_widths must sum to the n = {weight.shape[0]} of weight, got {rows}")
    max_scale = max((scale for _, scale in shards), default=1.0)
    weight = weight.detach().clone()
    for shard, (_, scale) in zip(weight.split([width for width, _ in shards]), shards, strict=True):
        if scale != max_scale:
            shard.copy_((shard.float() * (scale / max_scale)).to(shard.dtype))
    return torch.tensor(max_scale, dtype=torch.float32, device=weight_scale.device), weight


def all_close_1d(x: Tensor, rtol: float = 1e-5) -> bool:
    """Whether all values are one value up to ``rtol``: ``max(x) - min(x) <= rtol * max |x|``, in float64.

    Relative only: the absolute 1e-8 of ``torch.allclose`` calls scales near 1e-6 equal that differ by 1 %. The order of
    ``x`` does not matter. Empty is true; a NaN or an infinity is false.

    Raises:
        WeightError: ``x`` is not 1-D; ``rtol`` is negative or NaN.
    """
    must(x.dim() == 1, f"x must be 1-D, got {list(x.shape)}")
    must(rtol >= 0, f"rtol must not be negative, got {rtol}")
    if x.numel() == 0:
        return True
    low, high = (value.item() for value in x.detach().double().aminmax())
    # inf - inf and NaN compare false.
    return high - low <= rtol * max(abs(low), abs(high)) < float("inf")


# --- activations' scales and zero points ----------------------------------------------------------------------


def merge_input_scales(scales: Tensor, azps: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The static input scales of fused shards, as one that covers the range of each.

    Symmetric: the largest. Asymmetric int8, where ``x ~= (codes - azp) * scale``::

        rmax = max(0, max_i scale_i * (127 - azp_i))        scale = (rmax - rmin) / 255
        rmin = min(0, min_i scale_i * (-128 - azp_i))       azp   = round(-128 - rmin / scale)

    in float64; the range always holds 0, so that 0 has a code. Rounded, where upstream truncates and is then often off
    by one. An empty range (all scales 0) gives scale 1 and azp 0. Scales that were never loaded
    (``finfo(float32).min``) and their azps are ignored.

    Args:
        scales: one per shard, float.
        azps: one per shard, an integer dtype; None is symmetric.

    Returns:
        ``(scale, azp)``: scalars ``[]``, float32 and int32 (None if symmetric).

    Raises:
        WeightError: no scale was loaded; one that is negative or not finite; another number of azps than of scales.
    """
    require_float(scales, "scales")
    scales = scales.detach().flatten()
    loaded = ~(scales <= _NEVER_LOADED)
    must(bool(loaded.any()), f"merge_input_scales needs a loaded scale, got none of {scales.numel()}")
    known = checked_scale(scales[loaded], "scales")
    if azps is None:
        largest = known.max()
        return torch.where(largest > 0, largest, 1.0), None
    _require_integer(azps, "azps")
    must(
        azps.numel() == scales.numel(),
        f"azps must hold one zero point for each of the {scales.numel()} scales, got {azps.numel()}",
    )
    known, zeros = known.double(), azps.flatten()[loaded].double()
    high = (known * (127 - zeros)).max().clamp(min=0)
    low = (known * (-128 - zeros)).min().clamp(max=0)
    scale = (high - low) / 255
    if scale == 0:
        return torch.ones_like(scale, dtype=torch.float32), torch.zeros_like(scale, dtype=torch.int32)
    return scale.float(), (-128 - low / scale).round().to(torch.int32)


def azp_adjoint(weight: Tensor, azp: Tensor | int | None = None) -> Tensor:
    """What an asymmetric activation adds to the sum: ``adjoint[0, n] = azp * sum_k weight[n, k]``.

    Then ``(a - azp) @ b == a @ b - adjoint``. Modulo 2**32, as the int32 sum that it corrects. Without rows along k: 0.

    Args:
        weight: ``[n, k]``, int8 or uint8; ``b`` is ``weight.t()``.
        azp: one zero point for all tokens; None is 1, for kernels that take one zero point per token beside this.

    Returns:
        ``[1, n]``, int32.

    Raises:
        WeightError: not integer codes; an azp that is not one integer.
    """
    require_codes(weight, INT8_DTYPES)
    sums = weight.sum(dim=1, dtype=torch.int64)[None]
    if isinstance(azp, Tensor):
        _require_integer(azp, "azp")
        must(azp.numel() == 1, f"azp must have one element, got {list(azp.shape)}; give per-token ones to the kernel")
        azp = int(azp.item())
    must(azp is None or isinstance(azp, int), f"azp must be an integer, got {azp}; zero points are not rounded here")
    return (sums if azp is None else sums * azp).to(torch.int32)


def _require_integer(x: Tensor, what: str) -> None:
    integer = not x.dtype.is_floating_point and not x.dtype.is_complex and x.dtype is not torch.bool
    must(integer, f"{what} must be an integer tensor (int32), got {dtype_name(x.dtype)}")


# --- float8 of other hardware ---------------------------------------------------------------------------------


def normalize_e4m3fn_to_e4m3fnuz(
    weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Float8 as most checkpoints hold it (e4m3fn) as the float8 of gfx94x (e4m3fnuz), with the same decoded values.

    The same bits mean half the value in fnuz, so scales double. Three patterns differ: 0x80 is -0 in fn but NaN in
    fnuz, so it becomes 0; 0x7f and 0xff are NaN in fn but 240 and -240 in fnuz, so they become its NaN, 0x80
    (upstream makes finite numbers of them). A scale that was never loaded stays recognisable as such.

    Args:
        weight: any shape, float8_e4m3fn.
        weight_scale, input_scale: any shape, float.

    Returns:
        ``(weight, weight_scale, input_scale)``: new tensors, ``weight`` in float8_e4m3fnuz.

    Raises:
        WeightError: another dtype of weight, or scales that are not float.

    Source: https://onnx.ai/onnx/technical/float8.html
    """
    must(
        weight.dtype is torch.float8_e4m3fn,
        f"weight must be float8_e4m3fn, got {dtype_name(weight.dtype)}; only that one is stored with another bias",
    )
    for what, scale in (("weight_scale", weight_scale), ("input_scale", input_scale)):
        if scale is not None:
            require_float(scale, what)
    bits = weight.detach().clone().view(torch.uint8)
    nan = (bits & 0x7F) == 0x7F
    # -0 first: the NaN of fnuz has its bits.
    bits.masked_fill_(bits == 0x80, 0).masked_fill_(nan, 0x80)
    doubled = None if input_scale is None else input_scale.detach() * 2
    return bits.view(torch.float8_e4m3fnuz), weight_scale.detach() * 2, doubled
