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
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.kernels.layouts import Layout, register_layout
from fx_quant.kernels.operands import dense, scalar_type, vllm_op
from fx_quant.kernels.registry import (
    CUDA,
    WEIGHT,
    Kernel,
    Requires,
    register_kernel,
    register_op,
    weight_scales,
)
from fx_quant.scheme import HALF_DTYPES, INT4_DTYPES, Granularity, Numerics

_GROUPS = (32, 64, 128)

# A tile of the packed weight is 16 codes along k x 64 columns; the matmul takes whole steps of 128 along k.
_TILE_K, _TILE_N, _STEP_K = 16, 64, 128
# The weight [n, k] as (tile of n, 4, 2, 8) x (tile of k, 2, 4, 2): what the lanes and registers of a warp hold. int4
# and int8 order the tiles alike and the codes of an int32 differently.
_SPLIT_N, _SPLIT_K = (4, 2, 8), (2, 4, 2)
_ORDER = {4: (4, 0, 3, 6, 1, 7, 2, 5), 8: (4, 0, 3, 6, 1, 2, 7, 5)}
_BACK = {bits: tuple(order.index(dim) for dim in range(8)) for bits, order in _ORDER.items()}


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


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


def _padded(x: Tensor, columns: int, rows: int = 0, value: float = 0) -> Tensor:
    """``x`` with more columns and rows of ``value``; itself where none are missing."""
    missing = columns - x.shape[-1], max(rows - x.shape[0], 0)
    if not any(missing):
        return x
    return F.pad(x, (0, missing[0]) if x.dim() == 1 else (0, missing[0], 0, missing[1]), value=value)


def _rows_of_groups(x: Tensor, n: int, whole: int, groups: int, block: Sequence[int] | None) -> Tensor:
    """A scale or zero point as ``[groups, whole]``, of any strides; what stands beyond the weight is 1."""
    rows = x.reshape(1, -1).expand(1, n) if block is None else x.t()
    # One group of the caller's may be several that are equal.
    rows = rows.expand(groups, n) if rows.shape[0] == 1 else rows
    return _padded(rows, whole, groups, 1)


def _in_columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., n]`` in the order in which a thread holds the columns of the result."""
    ordered = x.unflatten(-1, (-1, 4, 4, 2)).transpose(-2, -3)
    return ordered.to(dtype, memory_format=torch.contiguous_format).flatten(-4)


def _in_fragments(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., n]`` in the order in which a thread holds the columns of the weight."""
    ordered = x.unflatten(-1, (-1, 8, 8)).transpose(-1, -2)
    return ordered.to(dtype, memory_format=torch.contiguous_format).flatten(-3)


def _zero_points(zero_points: Tensor) -> Tensor:
    """Zero points of int4 codes, ``[groups, n]``, as int32 ``[groups, n / 8]`` of nibbles ``zero point + 8``."""
    shifted = zero_points.to(torch.int32) + 8
    # Asked on the device, so that nothing waits for the answer.
    torch._assert_async(((shifted & ~0xF) == 0).all(), "marlin_int4: a zero point of int4 codes must be in -8..7")
    ordered = _in_fragments(shifted, torch.uint8).unflatten(1, (-1, 4, 2)).transpose(-1, -2)
    return _bytes(ordered.unflatten(-1, (2, 2))).reshape(shifted.shape[0], -1).view(torch.int32)


def _matmul(bits: int, a, b, b_scale, b_zero_point, bias, n, out_dtype, block) -> Tensor:
    """``marlin_gemm`` on operands padded to whole tiles."""
    m, k, whole = a.shape[0], b.shape[0] * _TILE_K, _up(n, _TILE_N)
    if not m:
        return a.new_empty((0, n), dtype=out_dtype)
    groups = 1 if block is None else k // block[1]
    if bits == 4 and groups == 1:
        # With one group it would scale the sum after rounding it to float16, which may overflow; with more it scales
        # the codes.
        groups = max(k // _STEP_K, 2)
    scales = _rows_of_groups(b_scale, n, whole, groups, block)
    scales = _in_columns(scales, a.dtype) if groups == 1 else _in_fragments(scales, a.dtype)
    zero_points, kind = None, scalar_type(bits, 1 << bits - 1)
    if b_zero_point is not None:
        zero_points = _zero_points(_rows_of_groups(b_zero_point, n, whole, groups, block))
        kind = scalar_type(bits, 0)
    bias = None if bias is None else _in_columns(_padded(bias, whole), a.dtype)
    # Locks, which it finds and leaves at zero; kept for the next call, another stream could meet them in between. It
    # asks for one to a multiprocessor, vLLM gives it four.
    locks = torch.zeros(4 * multiprocessors(a.device), dtype=torch.int32, device=a.device)
    a, sizes = dense(_padded(a, k)), (m, whole, k)
    out = vllm_op("_C", "marlin_gemm")(
        a, None, b, bias, scales, None, None, zero_points, locks, kind, *sizes, False, True, False
    )
    return out if whole == n else out[:, :n].contiguous()


def _int4(a, b, a_scale, b_scale, bias, n, out_dtype, *, b_zero_point=None, block=None, **_) -> Tensor:
    """``marlin_gemm`` of a weight in the layout ``marlin_int4``."""
    return _matmul(4, a, b, b_scale, b_zero_point, bias, n, out_dtype, block)


def _int8(a, b, a_scale, b_scale, bias, n, out_dtype, *, block=None, **_) -> Tensor:
    """``marlin_gemm`` of a weight in the layout ``marlin_int8``."""
    return _matmul(8, a, b, b_scale, None, bias, n, out_dtype, block)


register_layout(
    Layout(
        name="marlin_int4",
        weights=frozenset({torch.uint8}),
        dtype=torch.int32,
        shape=lambda n, k: (_up(2 * k, _STEP_K) // _TILE_K, 2 * _up(n, _TILE_N)),
        pack=pack_int4,
        unpack=unpack_int4,
    )
)
register_layout(
    Layout(
        name="marlin_int8",
        weights=frozenset({torch.int8}),
        dtype=torch.int32,
        shape=lambda n, k: (_up(k, _STEP_K) // _TILE_K, 4 * _up(n, _TILE_N)),
        pack=pack_int8,
        unpack=unpack_int8,
    )
)

# It has no unsigned 8-bit codes without a zero point, and 8-bit zero points are not compiled.
for _name, _body, _codes, _asymmetric in (
    ("marlin_int4", _int4, INT4_DTYPES, WEIGHT),
    ("marlin_int8", _int8, frozenset({torch.int8}), frozenset()),
):
    register_op(_name, _body)
    register_kernel(
        Kernel(
            name=_name,
            provider="marlin",
            linear_kernel="MarlinLinearKernel",
            op=_name,
            requires=Requires(
                platforms=CUDA,
                min_capability=80,
                packages={"vllm": "0.33"},
                codes=frozenset(itertools.product(HALF_DTYPES, _codes)),
                granularities=weight_scales(
                    Granularity.PER_TENSOR, Granularity.PER_CHANNEL, *map(Granularity.per_group, _GROUPS)
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
