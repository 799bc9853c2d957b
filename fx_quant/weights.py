"""Checkpoint transforms: scales, codes and layouts of weights, as a kernel wants them.

Each function runs once, at load: it checks values as well as shapes, so it wants real tensors, not fake or meta ones.
None modifies its inputs, except those named with a trailing underscore. A weight is ``[n, k]``, one row per output
channel, and int4 codes are unpacked (one per element) everywhere but in ``pack_int4`` and ``unpack_int4``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fx_quant.errors import FxQuantError
from fx_quant.scheme import CODE_DTYPES, FLOAT8_DTYPES, INT4_DTYPES, INT8_DTYPES, dtype_name

# pyrefly: ignore [missing-attribute]
INT4: torch.dtype = torch.int4
# pyrefly: ignore [missing-attribute]
UINT4: torch.dtype = torch.uint4

# A loader starts the scale of every shard at finfo(float32).min. Doubled (fnuz) or rounded to bfloat16 it becomes -inf,
# so anything below every float8 is "never loaded".
_NEVER_LOADED = torch.finfo(torch.float8_e4m3fn).min


class WeightError(FxQuantError, ValueError):
    """Codes, scales or shapes of a weight that do not fit together, or that a transform does not take."""


def require(holds: bool, message: str) -> None:
    """Raise ``WeightError(message)`` unless ``holds``."""
    if not holds:
        raise WeightError(message)


def _require_codes(codes: Tensor, dtypes: Collection[torch.dtype] = CODE_DTYPES, what: str = "weight") -> None:
    known = ", ".join(sorted(map(dtype_name, dtypes)))
    require(codes.dtype in dtypes, f"{what} must be codes of dtype {known}, got {dtype_name(codes.dtype)}")
    require(codes.dim() == 2, f"{what} must be [n, k], got {list(codes.shape)}; flatten or split it first")


def _require_float(scale: Tensor, what: str) -> None:
    # Those of one byte, float8_e8m0fnu among them, have no arithmetic.
    floating = scale.dtype.is_floating_point and scale.dtype.itemsize > 1
    require(floating, f"{what} must be a float tensor (float32), got {dtype_name(scale.dtype)}; decode it first")


def _require_block(block: tuple[int, int]) -> None:
    fits = len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    require(fits, f"block must be (rows, columns), both positive, got {block}")


def _require_multiple(multiple: int, what: str) -> None:
    require(isinstance(multiple, int) and multiple > 0, f"{what} must be a positive integer, got {multiple}")


def _checked_scale(scale: Tensor, what: str = "scale") -> Tensor:
    """``scale`` in float32, without its autograd history; every value finite and not negative."""
    _require_float(scale, what)
    scale = scale.detach().float()
    bad = scale[~(scale.isfinite() & (scale >= 0))]
    if bad.numel():
        raise WeightError(
            f"{what} must be finite and not negative, got {bad.numel()} of {scale.numel()} that are not "
            f"(first: {bad[0].item():g}); load every shard's scale, and never an inverse scale, before this"
        )
    return scale


# --- fused shards with one scale each -------------------------------------------------------------------------


def _shards_with_rows(weight_scale: Tensor, logical_widths: Sequence[int]) -> list[tuple[int, float]]:
    """``(rows, scale)`` of each shard that has rows; a scale that was never loaded is resolved or an error."""
    _require_float(weight_scale, "weight_scale")
    widths = list(logical_widths)
    require(
        all(isinstance(width, int) and width >= 0 for width in widths),
        f"logical_widths must be the rows of each shard, got {widths}",
    )
    values: list[float] = weight_scale.detach().float().flatten().tolist()
    if len(values) == 1:
        values *= len(widths)
    require(
        len(values) == len(widths),
        f"weight_scale must hold one scale, or one for each of the {len(widths)} logical_widths, got {len(values)}",
    )
    shards = [(width, value) for width, value in zip(widths, values, strict=True) if width]
    if shards and shards[-1][1] <= _NEVER_LOADED:
        loaded = sorted({value for value in values if value > _NEVER_LOADED})
        require(
            len(loaded) == 1,
            "weight_scale must have one value if its last shard's was never loaded, as in a checkpoint that is already "
            f"fused, got {len(loaded)}; load the missing scales",
        )
        shards = [(width, loaded[0]) for width, _ in shards]
    _checked_scale(torch.tensor([scale for _, scale in shards]), "weight_scale")
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
    require(codes.dtype in CODE_DTYPES, f"codes must be int8, uint8 or float8, got {dtype_name(codes.dtype)}")
    factor = _checked_scale(torch.as_tensor(scale, dtype=None if isinstance(scale, Tensor) else torch.float32))
    require(factor.numel() == 1, f"scale must have one element, got {list(factor.shape)}; see dequantize_blockwise")
    return codes.detach().float() * factor.reshape(()).to(codes.device)


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
    return requantize_with_max_scale_(weight.detach().clone(), weight_scale, logical_widths)


def requantize_with_max_scale_(
    weight: Tensor, weight_scale: Tensor, logical_widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``requantize_with_max_scale`` that writes the codes into ``weight`` and returns it."""
    _require_codes(weight, FLOAT8_DTYPES)
    shards = _shards_with_rows(weight_scale, logical_widths)
    rows = sum(width for width, _ in shards)
    require(rows == weight.shape[0], f"logical_widths must sum to the n = {weight.shape[0]} of weight, got {rows}")
    max_scale = max((scale for _, scale in shards), default=1.0)
    for shard, (_, scale) in zip(weight.detach().split([width for width, _ in shards]), shards, strict=True):
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
    require(x.dim() == 1, f"x must be 1-D, got {list(x.shape)}")
    require(rtol >= 0, f"rtol must not be negative, got {rtol}")
    if x.numel() == 0:
        return True
    low, high = (value.item() for value in x.detach().double().aminmax())
    # inf - inf and NaN compare false.
    return high - low <= rtol * max(abs(low), abs(high)) < float("inf")


def merge_shards(
    weights: Sequence[Tensor], scales: Sequence[Tensor], *, block: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The projections of a fused linear (q, k, v or gate, up) stacked along n, with their scales.

    Without ``block`` each shard is per_tensor (one element) or per_channel (``[n_i]`` or ``[n_i, 1]``) and the result
    is per_channel. With it, ``scales[i]`` is ``[ceil(n_i / r), ceil(k / c)]``; ``(1, g)`` is per_group(g). No code
    changes, so the result is exact.

    Args:
        weights: ``[n_i, k]`` each, one dtype.
        scales: one for each weight.
        block: ``(r, c)``: rows and columns that share a scale.

    Returns:
        ``(codes, scale)``: ``[sum(n_i), k]``, and float32 ``[sum(n_i), 1]`` or ``[ceil(sum(n_i) / r), ceil(k / c)]``.

    Raises:
        WeightError: no shards, or shards of different k or dtype; a scale that does not fit its weight; a shard other
            than the last whose rows end inside a block.
    """
    require(
        len(weights) == len(scales) > 0,
        f"merge_shards wants as many weights as scales, and one at least, got {len(weights)} and {len(scales)}",
    )
    for weight in weights:
        _require_codes(weight)
    kinds = sorted({f"{dtype_name(weight.dtype)} with k = {weight.shape[1]}" for weight in weights})
    require(len(kinds) == 1, f"shards must have one dtype and one k, got {'; '.join(kinds)}")
    if block is None:
        rows = [_scale_of_rows(scale, weight.shape[0]) for weight, scale in zip(weights, scales, strict=True)]
        return torch.cat([weight.detach() for weight in weights]), torch.cat(rows)
    _require_block(block)
    for i, weight in enumerate(weights[:-1]):
        require(
            weight.shape[0] % block[0] == 0,
            f"every shard but the last must end where a block of {block[0]} rows ends, got {weight.shape[0]} rows in "
            f"shard {i}; dequantize and quantize it again, or keep the projections apart",
        )
    blocks = [_scale_of_blocks(scale, block, weight.shape) for weight, scale in zip(weights, scales, strict=True)]
    return torch.cat([weight.detach() for weight in weights]), torch.cat(blocks)


def _scale_of_rows(scale: Tensor, n: int) -> Tensor:
    """``scale`` of one element, ``[n]`` or ``[n, 1]`` as ``[n, 1]``, float32."""
    scale = _checked_scale(scale)
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(n, 1)
    require(
        scale.shape in ((n,), (n, 1)),
        f"scale must have one element or shape [n] = [{n}] or [n, 1], got {list(scale.shape)}; "
        "for groups and blocks say block=(rows, columns)",
    )
    return scale.reshape(n, 1)


def _scale_of_blocks(scale: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """``scale`` of ``[ceil(n / r), ceil(k / c)]``, float32."""
    _require_block(block)
    grid = [_ceil_div(size, step) for size, step in zip(shape, block, strict=True)]
    require(
        list(scale.shape) == grid,
        f"scale of a {list(shape)} weight in blocks of {block} must be {grid}, got {list(scale.shape)}",
    )
    return _checked_scale(scale)


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
    _require_float(scales, "scales")
    scales = scales.detach().flatten()
    loaded = ~(scales <= _NEVER_LOADED)
    require(bool(loaded.any()), f"merge_input_scales needs a loaded scale, got none of {scales.numel()}")
    known = _checked_scale(scales[loaded], "scales")
    if azps is None:
        largest = known.max()
        return torch.where(largest > 0, largest, 1.0), None
    _require_integer(azps, "azps")
    require(
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
    _require_codes(weight, INT8_DTYPES)
    sums = weight.sum(dim=1, dtype=torch.int64)[None]
    if isinstance(azp, Tensor):
        _require_integer(azp, "azp")
        require(
            azp.numel() == 1, f"azp must have one element, got {list(azp.shape)}; give per-token ones to the kernel"
        )
        azp = int(azp.item())
    require(azp is None or isinstance(azp, int), f"azp must be an integer, got {azp}; zero points are not rounded here")
    return (sums if azp is None else sums * azp).to(torch.int32)


def _require_integer(x: Tensor, what: str) -> None:
    integer = not x.dtype.is_floating_point and not x.dtype.is_complex and x.dtype is not torch.bool
    require(integer, f"{what} must be an integer tensor (int32), got {dtype_name(x.dtype)}")


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
    return normalize_e4m3fn_to_e4m3fnuz_(weight.detach().clone(), weight_scale, input_scale)


def normalize_e4m3fn_to_e4m3fnuz_(
    weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``normalize_e4m3fn_to_e4m3fnuz`` that rewrites the codes in the memory of ``weight``; the scales are new tensors.

    The result is a float8_e4m3fnuz view of that memory; ``weight`` itself, still e4m3fn, is not to be used any more.
    """
    require(
        weight.dtype is torch.float8_e4m3fn,
        f"weight must be float8_e4m3fn, got {dtype_name(weight.dtype)}; only that one is stored with another bias",
    )
    for what, scale in (("weight_scale", weight_scale), ("input_scale", input_scale)):
        if scale is not None:
            _require_float(scale, what)
    bits = weight.detach().view(torch.uint8)
    nan = (bits & 0x7F) == 0x7F
    # -0 first: the NaN of fnuz has its bits.
    bits.masked_fill_(bits == 0x80, 0).masked_fill_(nan, 0x80)
    doubled = None if input_scale is None else input_scale.detach() * 2
    return bits.view(torch.float8_e4m3fnuz), weight_scale.detach() * 2, doubled


# --- layouts --------------------------------------------------------------------------------------------------


def _ceil_div(size: int, step: int) -> int:
    return -(-size // step)


def _pad_to(x: Tensor, shape: Sequence[int], value: float) -> Tensor:
    """``x`` in the first corner of a tensor of ``shape`` filled with ``value``; ``x`` itself if it has that shape."""
    if list(x.shape) == list(shape):
        return x
    # Not F.pad: constant_pad_nd has no float8 everywhere.
    out = torch.full(tuple(shape), value, dtype=torch.float32, device=x.device).to(x.dtype)
    out[tuple(slice(size) for size in x.shape)] = x.detach()
    return out


def pad_weight(
    weight: Tensor,
    scale: Tensor,
    multiple_n: int,
    multiple_k: int,
    bias: Tensor | None = None,
    *,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A symmetric weight made wide and deep enough for a kernel's alignment; slice its output to the old n.

    Codes pad with 0, scales with 1 (finite, so that no 0 * inf arises), the bias with 0. A scale of one element covers
    the padding already. What needs no padding is returned as it came, without a copy.

    Args:
        weight: ``[n, k]`` codes; n and k are padded to multiples of ``multiple_n`` and ``multiple_k``.
        scale: one element, ``[n]`` or ``[n, 1]``; with ``block`` ``[ceil(n / r), ceil(k / c)]``.
        bias: ``[n]``, any dtype.
        block: ``(r, c)``: rows and columns that share a scale; ``(1, g)`` for groups.

    Returns:
        ``(weight, scale, bias)``, padded; ``scale`` keeps its number of dimensions and its dtype.

    Raises:
        WeightError: a scale or bias that does not fit the weight; a multiple below 1.
    """
    _require_codes(weight)
    _require_multiple(multiple_n, "multiple_n")
    _require_multiple(multiple_k, "multiple_k")
    n, k = weight.shape
    wide = (_ceil_div(n, multiple_n) * multiple_n, _ceil_div(k, multiple_k) * multiple_k)
    if bias is not None:
        require(list(bias.shape) == [n], f"bias must have shape [n] = [{n}], got {list(bias.shape)}")
        bias = _pad_to(bias, wide[:1], 0)
    if block is not None:
        _scale_of_blocks(scale, block, weight.shape)
        scale = _pad_to(scale, [_ceil_div(size, step) for size, step in zip(wide, block, strict=True)], 1)
    else:
        _scale_of_rows(scale, n)
        if scale.numel() != 1:
            scale = _pad_to(scale, (wide[0], *scale.shape[1:]), 1)
    return _pad_to(weight, wide, 0), scale, bias


def expand_block_scale(scale: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """One scale per block as one per code: ``out[n, k] = scale[n // r, k // c]``.

    Args:
        scale: ``[ceil(n / r), ceil(k / c)]``; the last block of a row or column may be cut short.
        block: ``(r, c)``; ``(1, g)`` for groups.
        shape: ``(n, k)``.

    Returns:
        ``[n, k]``, float32, contiguous.

    Raises:
        WeightError: a scale of another shape, negative or not finite.
    """
    return repeat_blocks(_scale_of_blocks(scale, block, shape), block, shape)


def repeat_blocks(values: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """``out[n, k] = values[n // r, k // c]`` for any dtype and sign, such as zero points; nothing is checked."""
    rows, columns = (torch.arange(size, device=values.device) // step for size, step in zip(shape, block, strict=True))
    return values.index_select(0, rows).index_select(1, columns)


def dequantize_blockwise(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """``out[n, k] = float32(codes[n, k]) * scale[n // r, k // c]``; see ``expand_block_scale``."""
    _require_codes(codes, what="codes")
    return codes.detach().float() * expand_block_scale(scale, block, codes.shape)


def column_major_scales(scale: Tensor, align: int = 1) -> Tensor:
    """The same values with m as the fastest dimension: shape ``[m, g]``, strides ``(1, m')``.

    ``m'`` is m rounded up to a multiple of ``align`` (TMA wants 4 float32); the memory between is 1. Always a copy.

    Raises:
        WeightError: ``scale`` is not 2-D; ``align`` below 1.
    """
    require(scale.dim() == 2, f"scale must be [m, g], got {list(scale.shape)}")
    _require_multiple(align, "align")
    m, groups = scale.shape
    columns = torch.ones(groups, _ceil_div(m, align) * align, dtype=scale.dtype, device=scale.device)
    columns[:, :m] = scale.detach().t()
    return columns.t()[:m]


def round_scales_to_power_of_two(scale: Tensor) -> Tensor:
    """Scales that fit in ue8m0: ``2 ** ceil(log2(scale))``, exactly; never below ``scale``, so no code overflows.

    0 and everything below become 2**-127, the smallest ue8m0. The codes belong to the old scale: quantize them again.

    Returns:
        The shape of ``scale``, float32.

    Raises:
        WeightError: a scale above 2**127, the largest ue8m0, negative or not finite.
    """
    scale = _checked_scale(scale)
    require(bool((scale <= 2.0**127).all()), "scale must not exceed 2**127, the largest ue8m0")
    fraction, exponent = torch.frexp(scale.double())
    # scale == fraction * 2**exponent with a fraction in [0.5, 1): 0.5 is the power of two itself.
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    exponent = torch.where(scale == 0, -127, exponent).clamp(min=-127)
    return torch.ldexp(torch.ones_like(scale, dtype=torch.float64), exponent).float()


# --- int4 -----------------------------------------------------------------------------------------------------


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes per byte along k, the even k in the low nibble: ``packed[n, j] = u[n, 2j] | u[n, 2j + 1] << 4``.

    Args:
        codes: ``[n, k]``, k even. uint8 codes (``torch.uint4``, 0..15) are stored as they are, ``u = code``; int8 codes
            (``torch.int4``, -8..7) with an offset, ``u = code + 8``.

    Returns:
        ``[n, k / 2]``, uint8.

    Raises:
        WeightError: an odd k; a code that does not fit in four bits.
    """
    _require_codes(codes, INT8_DTYPES, "codes")
    require(codes.shape[1] % 2 == 0, f"codes must have an even k, got {codes.shape[1]}; pad with pad_weight(..., 1, 2)")
    low = -8 if codes.dtype is torch.int8 else 0
    outside = int(((codes < low) | (codes > low + 15)).sum())
    require(not outside, f"4-bit {dtype_name(codes.dtype)} codes must be in {low}..{low + 15}, got {outside} outside")
    nibbles = (codes - low).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_int4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes of ``pack_int4``: ``[n, k / 2]`` uint8 to ``[n, k]``.

    Args:
        dtype: what a code means: ``torch.int4`` gives int8 codes in -8..7, ``torch.uint4`` uint8 codes in 0..15.

    Raises:
        WeightError: ``packed`` is not 2-D uint8, or another dtype.
    """
    _require_codes(packed, (torch.uint8,), "packed")
    require(dtype in INT4_DTYPES, f"dtype must be torch.int4 or torch.uint4, got {dtype_name(dtype)}")
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return codes.to(torch.int8) - 8 if dtype is INT4 else codes
