"""Machete for NVIDIA Hopper GPUs, from vLLM's op library: int4 and int8 weights beside a half-precision activation.

Written to the signatures of vLLM 0.33.0 (``csrc/torch_bindings.cpp``), to the checks of ``csrc/quantization/machete``
(``machete_prepack_launcher.cuh``, ``machete_mm_kernel.cuh``, ``machete_mainloop.cuh``, what is compiled in
``generate.py``) and to what vLLM asks of a layer (``machete_utils.py``)::

    _C::machete_prepack_B(Tensor B, ScalarType a_type, int b_type, ScalarType? group_scales_type) -> Tensor
    _C::machete_mm(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales, Tensor? group_zeros,
                   int? group_size, Tensor? channel_scales, Tensor? token_scales, str? schedule) -> Tensor

``B`` is int32 ``[k / codes, n]`` with ``codes`` to an int32, the lowest first, and each column contiguous; what the
first op makes of it has the same shape and is what the second reads. ``A [m, k]`` has dense rows, and ``group_scales``
``[groups, n]`` has its dtype, so scales below 6e-5 lose bits beside float16. ``k`` is a multiple of 64 and ``n`` of
128: other sizes are left to Marlin, which pads. Zero points are left to it too: here they are ``-scale * zero_point``
in the activation's dtype, added to a rounded ``scale * code``, and where the two cancel those roundings are what is
left, which is more than ``reassociated`` allows. vLLM is imported when a weight is packed,
never before.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fx_quant.kernels.layouts import Layout, register_layout
from fx_quant.kernels.operands import add_bias, dense, scalar_type, vllm_op
from fx_quant.kernels.registry import (
    CUDA,
    Kernel,
    Requires,
    register_kernel,
    register_op,
    weight_scales,
)
from fx_quant.scheme import HALF_DTYPES, Granularity, Numerics

_GROUPS = (64, 128)
# A block of the packed weight is 128 rows x 64 codes along k.
_BLOCK_N, _BLOCK_K = 128, 64


def _type_of(bits: int) -> int:
    """The id, to vLLM, of codes stored as ``code + 2**(bits - 1)``."""
    return scalar_type(bits, 1 << bits - 1)


def _prepacked(stored: Tensor, bits: int) -> Tensor:
    """Bytes of stored codes ``[n, k * bits / 8]``, contiguous, as ``machete_prepack_B`` orders them."""
    # The order depends on the activation's bits alone, so that of bfloat16 serves float16.
    dtype = torch.bfloat16
    return vllm_op("_C", "machete_prepack_B")(stored.view(torch.int32).t(), dtype, _type_of(bits), dtype)


def pack_int4(weight: Tensor) -> Tensor:
    """int4 codes ``[n, k / 2]`` (``code + 8``, even k low) as int32 ``[k / 8, n]``."""
    return _prepacked(dense(weight), 4)


def pack_int8(weight: Tensor) -> Tensor:
    """int8 codes ``[n, k]`` as int32 ``[k / 4, n]`` of bytes ``code + 128``."""
    return _prepacked(dense(weight.contiguous().view(torch.uint8) ^ 0x80), 8)


def _matmul(bits: int, a, b, b_scale, bias, n, out_dtype, block) -> Tensor:
    """``machete_mm``, then the bias."""
    if not a.shape[0]:
        return a.new_empty((0, n), dtype=out_dtype)
    scales = b_scale.reshape(1, -1).expand(1, n) if block is None else b_scale.t()
    group_size = -1 if block is None else block[1]
    out = vllm_op("_C", "machete_mm")(
        dense(a), b, _type_of(bits), None, dense(scales.to(a.dtype)), None, group_size, None, None, None
    )
    return add_bias(out, bias)


def _int4(a, b, a_scale, b_scale, bias, n, out_dtype, *, block=None, **_) -> Tensor:
    """``machete_mm`` of a weight in the layout ``machete_int4``."""
    return _matmul(4, a, b, b_scale, bias, n, out_dtype, block)


def _int8(a, b, a_scale, b_scale, bias, n, out_dtype, *, block=None, **_) -> Tensor:
    """``machete_mm`` of a weight in the layout ``machete_int8``."""
    return _matmul(8, a, b, b_scale, bias, n, out_dtype, block)


for _name, _body, _pack, _codes, _stored, _per_byte in (
    # pyrefly: ignore [missing-attribute]
    ("machete_int4", _int4, pack_int4, torch.int4, torch.uint8, 2),
    ("machete_int8", _int8, pack_int8, torch.int8, torch.int8, 1),
):
    register_layout(
        Layout(
            name=_name,
            weights=frozenset({_stored}),
            dtype=torch.int32,
            shape=lambda n, columns: (columns // 4, n),
            pack=_pack,
            unpack=None,
            align=_BLOCK_K // _per_byte,
        )
    )
    register_op(_name, _body)
    register_kernel(
        Kernel(
            name=_name,
            provider="machete",
            linear_kernel="MacheteLinearKernel",
            op=_name,
            requires=Requires(
                platforms=CUDA,
                min_capability=90,
                max_capability=90,
                packages={"vllm": "0.33"},
                codes=frozenset(itertools.product(HALF_DTYPES, (_codes,))),
                granularities=weight_scales(
                    Granularity.PER_TENSOR, Granularity.PER_CHANNEL, *map(Granularity.per_group, _GROUPS)
                ),
                out_as_activation=True,
                align=_BLOCK_K,
                align_n=_BLOCK_N,
                paddable=False,
                whole_groups=True,
                constant_weight=True,
            ),
            # Scales, scaled codes and the sum before the bias are each rounded to the activation's dtype.
            numerics=Numerics.REASSOCIATED,
            note="vLLM's Machete matmul over a weight that is reordered once, a bias added after it",
            layout=_name,
        ),
        # Before Marlin, as in vLLM.
        priority=45,
    )
