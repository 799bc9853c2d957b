"""Marlin for NVIDIA GPUs, from vLLM's op library: int4 and int8 weights beside a half-precision activation.

Written to the signature of vLLM 0.33.0 (``csrc/torch_bindings.cpp``) and to ``csrc/quantization/marlin`` (checks of
``marlin.cu``, arithmetic of ``marlin_template.h``, order of the weight in ``gptq_marlin_repack.cu``, what is compiled
in ``generate_kernels.py``), with scales, zero points and bias ordered as by ``marlin_utils.py``::

    _C::marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales,
                    Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor workspace, int b_type_id,
                    SymInt size_m, SymInt size_n, SymInt size_k, bool use_atomic_add, bool use_fp32_reduce,
                    bool is_zp_float) -> Tensor

``a [m, k]`` has dense rows, ``b_q_weight`` is int32 ``[k / 16, 16 n / codes]`` with ``codes`` to an int32, ``b_scales``
``[groups, n]`` and ``b_bias [n]`` have the dtype of ``a``, and ``b_zeros`` is int32 ``[groups, n / 8]``. ``n`` is a
multiple of 64 and ``k`` of 128: weight and operands are padded to that here. The scales are rounded to the dtype of
``a``, so those below 6e-5 lose bits beside float16. Older versions call the op ``gptq_marlin_gemm`` and give it other
arguments. vLLM is imported when a matmul runs, never before.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.kernels.base import KERNEL_SCHEMA, Kernel, Requires, fake_kernel, register_kernel
from fx_quant.kernels.operands import dense, vllm_op
from fx_quant.kernels.packing import Layout, register_layout
from fx_quant.ops import MATMUL_TAGS, register
from fx_quant.scheme import INT4_DTYPES, Granularity, Numerics

_HALF = frozenset({torch.bfloat16, torch.float16})
_GROUPS = (32, 64, 128)

# A tile of the packed weight is 16 codes along k x 64 columns; the matmul takes whole steps of 128 along k.
_TILE_K, _TILE_N, _STEP_K = 16, 64, 128
# The weight [n, k] as (tile of n, 4, 2, 8) x (tile of k, 2, 4, 2): what the lanes and registers of a warp hold. int4
# and int8 order the tiles alike and the codes of an int32 differently.
_SPLIT_N, _SPLIT_K = (4, 2, 8), (2, 4, 2)
_ORDER = {4: (4, 0, 3, 6, 1, 7, 2, 5), 8: (4, 0, 3, 6, 1, 2, 7, 5)}
_BACK = {bits: tuple(order.index(dim) for dim in range(8)) for bits, order in _ORDER.items()}


def scalar_type(bits: int, bias: int) -> int:
    """vLLM's id of the unsigned integers of ``bits`` that stand for ``code - bias`` (``csrc/core/scalar_type.hpp``).

    Fields from the lowest bit: 8 of exponent, 8 of mantissa, the sign, 32 of bias, "finite only", and 8 of how NaN is
    written, 1 where the type says nothing of it.
    """
    return bits << 8 | bias << 17 | 1 << 50


def _nibbles(pairs: Tensor) -> Tensor:
    """Bytes of two codes each -> ``[..., 2]``, the low nibble first."""
    return torch.stack((pairs & 0xF, pairs >> 4), -1)


def _bytes(nibbles: Tensor) -> Tensor:
    """``[..., 2]`` -> bytes of two codes each, the inverse of ``_nibbles``."""
    return nibbles[..., 0] | nibbles[..., 1] << 4


def _tiled(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes ``[n, k]`` of whole tiles -> contiguous ``[k / 16, n / 64, 8, 4, 4, 2, 2, 2]``."""
    n, k = codes.shape
    split = codes.reshape(n // _TILE_N, *_SPLIT_N, k // _TILE_K, *_SPLIT_K)
    return split.permute(_ORDER[bits]).contiguous()


def _untiled(tiles: Tensor, bits: int) -> Tensor:
    """The codes ``[n, k]`` that ``_tiled`` gave ``tiles``."""
    return tiles.permute(_BACK[bits]).reshape(tiles.shape[1] * _TILE_N, tiles.shape[0] * _TILE_K)


def pack_int4(weight: Tensor) -> Tensor:
    """int4 codes ``[n, k / 2]`` (``code + 8``, even k low) as int32 ``[k' / 16, 2 n']``, padded by codes that are 0."""
    padded = F.pad(weight, (0, -weight.shape[1] % (_STEP_K // 2), 0, -weight.shape[0] % _TILE_N), value=0x88)
    tiles = _tiled(_nibbles(padded).flatten(1), 4)
    return _bytes(tiles).reshape(tiles.shape[0], -1).view(torch.int32)


def unpack_int4(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight ``[n, k]``, of two codes to a byte, that ``pack_int4`` gave ``packed``."""
    rows = packed.shape[0]
    codes = _untiled(_nibbles(packed.view(torch.uint8)).reshape(rows, -1, 8, 4, 4, 2, 2, 2), 4)
    return _bytes(codes.unflatten(1, (-1, 2)))[:n, :k]


def pack_int8(weight: Tensor) -> Tensor:
    """int8 codes ``[n, k]`` as int32 ``[k' / 16, 4 n']`` of bytes ``code + 128``, padded by codes that are 0."""
    padded = F.pad(weight, (0, -weight.shape[1] % _STEP_K, 0, -weight.shape[0] % _TILE_N))
    tiles = _tiled(padded.view(torch.uint8) ^ 0x80, 8)
    return tiles.reshape(tiles.shape[0], -1).view(torch.int32)


def unpack_int8(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight ``[n, k]`` that ``pack_int8`` gave ``packed``."""
    tiles = packed.view(torch.uint8).reshape(packed.shape[0], -1, 8, 4, 4, 2, 2, 2)
    return (_untiled(tiles, 8) ^ 0x80).view(torch.int8)[:n, :k]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _grouped(x: Tensor, n: int, groups: int, grouped: bool) -> Tensor:
    """A scale or zero point as ``[groups, n']``, ``n'`` in whole tiles, whatever stands beyond the weight being 1."""
    whole = n + -n % _TILE_N
    if not grouped:
        return F.pad(x.reshape(1, -1).expand(1, n), (0, whole - n), value=1).expand(groups, whole)
    # One group may be asked for as several that are equal.
    rows = x.t() if x.shape[1] > 1 else x.t().expand(groups, n)
    return F.pad(rows, (0, whole - n, 0, groups - rows.shape[0]), value=1)


def _in_columns(x: Tensor) -> Tensor:
    """``[..., n]`` in the order in which a thread holds the columns of the result."""
    return x.unflatten(-1, (-1, 4, 4, 2)).transpose(-2, -3).flatten(-4).contiguous()


def _in_fragments(x: Tensor) -> Tensor:
    """``[..., n]`` in the order in which a thread holds the columns of the weight."""
    return x.unflatten(-1, (-1, 8, 8)).transpose(-1, -2).flatten(-3).contiguous()


def _zero_points(zero_points: Tensor) -> Tensor:
    """Zero points of int4 codes, ``[groups, n]``, as int32 ``[groups, n / 8]`` of nibbles ``zero point + 8``."""
    shifted = zero_points.to(torch.int32) + 8
    # Asked on the device, so that nothing waits for the answer.
    torch._assert_async(((shifted & ~0xF) == 0).all(), "marlin_int4: a zero point of int4 codes must be in -8..7")
    ordered = _in_fragments(shifted.to(torch.uint8)).unflatten(1, (-1, 4, 2)).transpose(-1, -2)
    return _bytes(ordered.unflatten(-1, (2, 2))).reshape(zero_points.shape[0], -1).view(torch.int32)


def _matmul(bits: int, a, b, b_scale, b_zero_point, bias, n, block) -> Tensor:
    """``marlin_gemm`` on operands padded to whole tiles."""
    m, k = a.shape[0], b.shape[0] * _TILE_K
    groups = 1 if block is None else k // block[1]
    if bits == 4 and groups == 1:
        # With one group it would scale the sum after rounding it to float16, which may overflow; with more it scales
        # the codes.
        groups = k // _STEP_K if k > _STEP_K else 2
    scales = _grouped(b_scale, n, groups, block is not None).to(a.dtype)
    scales = _in_columns(scales) if groups == 1 else _in_fragments(scales)
    zero_points, kind = None, scalar_type(bits, 1 << bits - 1)
    if b_zero_point is not None:
        zero_points, kind = _zero_points(_grouped(b_zero_point, n, groups, block is not None)), scalar_type(bits, 0)
    whole = scales.shape[1]
    if bias is not None:
        bias = _in_columns(F.pad(bias, (0, whole - n)))
    # Locks, which it leaves at zero; others would have to wait for this stream before they could share them. It asks
    # for one to a multiprocessor, vLLM gives it four.
    locks = torch.zeros(4 * multiprocessors(a.device), dtype=torch.int32, device=a.device)
    a = dense(F.pad(a, (0, k - a.shape[1])))
    sizes = (m, whole, k)
    out = vllm_op("_C", "marlin_gemm")(
        a, None, b, bias, scales, None, None, zero_points, locks, kind, *sizes, False, True, False
    )
    return out if whole == n else out[:, :n].contiguous()


def _int4(a, b, a_scale, b_scale, bias, n, out_dtype, *, b_zero_point=None, block=None, **_) -> Tensor:
    """``marlin_gemm`` of a weight in the layout ``marlin_int4``."""
    if not a.shape[0]:
        return a.new_empty((0, n), dtype=out_dtype)
    return _matmul(4, a, b, b_scale, b_zero_point, bias, n, block)


def _int8(a, b, a_scale, b_scale, bias, n, out_dtype, *, block=None, **_) -> Tensor:
    """``marlin_gemm`` of a weight in the layout ``marlin_int8``."""
    if not a.shape[0]:
        return a.new_empty((0, n), dtype=out_dtype)
    return _matmul(8, a, b, b_scale, None, bias, n, block)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile) * tile


register_layout(
    Layout(
        name="marlin_int4",
        weights=frozenset({torch.uint8}),
        dtype=torch.int32,
        shape=lambda n, k: (_tiles(2 * k, _STEP_K) // _TILE_K, 2 * _tiles(n, _TILE_N)),
        pack=pack_int4,
        unpack=unpack_int4,
    )
)
register_layout(
    Layout(
        name="marlin_int8",
        weights=frozenset({torch.int8}),
        dtype=torch.int32,
        shape=lambda n, k: (_tiles(k, _STEP_K) // _TILE_K, 4 * _tiles(n, _TILE_N)),
        pack=pack_int8,
        unpack=unpack_int8,
    )
)

# It has no unsigned 8-bit codes without a zero point, and 8-bit zero points are not compiled.
for _name, _body, _codes, _asymmetric in (
    ("marlin_int4", _int4, INT4_DTYPES, frozenset({"weight"})),
    ("marlin_int8", _int8, frozenset({torch.int8}), frozenset()),
):
    register(f"{_name}{KERNEL_SCHEMA}", _body, fake_kernel(_name), MATMUL_TAGS)
    register_kernel(
        Kernel(
            name=_name,
            provider="marlin",
            op=_name,
            requires=Requires(
                platforms=frozenset({"cuda"}),
                min_capability=80,
                packages={"vllm": "0.33"},
                codes=frozenset(itertools.product(_HALF, _codes)),
                granularities=frozenset(
                    (Granularity.PER_TENSOR, weight)
                    for weight in (
                        Granularity.PER_TENSOR,
                        Granularity.PER_CHANNEL,
                        *map(Granularity.per_group, _GROUPS),
                    )
                ),
                asymmetric=_asymmetric,
                out_as_activation=True,
                bias_as_out=True,
                constant_weight=True,
            ),
            # Scales, scaled codes and the sum before the bias are each rounded to the activation's dtype.
            numerics=Numerics.REASSOCIATED,
            note="vLLM's Marlin matmul over a weight that is reordered once",
            layout=_name,
        ),
        priority=40,
    )
