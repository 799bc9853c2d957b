"""AITER's kernels for AMD GPUs.

Written to the signatures of amd-aiter 0.1.9 to 0.1.20 (``aiter/ops/gemm_op_a8w8.py``), to ``aiter/ops/shuffle.py`` and
to ``csrc/ck_gemm_a8w8``, ``csrc/ck_gemm_a8w8_bpreshuffle`` and ``csrc/ck_gemm_a8w8_blockscale``::

    aiter.gemm_a8w8(XQ, WQ, x_scale, w_scale, bias=None, dtype=bfloat16, splitK=None) -> Tensor [m, n]
    aiter.gemm_a8w8_bpreshuffle(XQ, WQ, x_scale, w_scale, bias=None, dtype=bfloat16, check=False) -> Tensor [m, n]
    aiter.gemm_a8w8_blockscale(XQ, WQ, x_scale, w_scale, dtype=bfloat16, isBpreshuffled=False) -> Tensor [m, n]

``XQ`` is ``[m, k]`` and ``WQ`` the weight ``[n, k]``. AITER is imported when a matmul runs, never before. Its
distribution is called ``amd-aiter``: the ``aiter`` of PyPI is another project. Float8 with one scale for each operand
is left to PyTorch, which calls the same hipBLASLt for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_quant.kernels.layouts import Layout, register_layout
from fx_quant.kernels.operands import BLOCK_SCALES, add_bias, dense, one_or_each, whole_blocks
from fx_quant.kernels.registry import (
    INT8_PAIRS,
    ROCM,
    ROCM_FLOAT8,
    ROW_SCALES,
    TENSOR_SCALES,
    Kernel,
    Requires,
    register_kernel,
    register_op,
)
from fx_quant.scheme import HALF_DTYPES, Numerics

_AITER = {"amd-aiter": "0.1.9"}
_FLOAT8_SCALES = ROW_SCALES - TENSOR_SCALES

# A tile of the preshuffled weight: 16 rows x two runs of 16 bytes along k.
_TILE_N, _TILE_K, _RUN = 16, 32, 16


def shuffle(weight: Tensor) -> Tensor:
    """One-byte codes ``[n, k]`` as AITER's ``shuffle_weight`` orders them, with zeros up to ``[16 i, 32 j]``.

    Runs of 16 codes along k stay together; those of 16 rows lie one after the other, and so do the two runs of a tile,
    the tiles along k, and the strips of 16 rows.
    """
    codes = F.pad(weight.view(torch.uint8), (0, -weight.shape[1] % _TILE_K, 0, -weight.shape[0] % _TILE_N))
    n, k = codes.shape
    tiles = codes.reshape(n // _TILE_N, _TILE_N, k // _TILE_K, _TILE_K // _RUN, _RUN).permute(0, 2, 3, 1, 4)
    return tiles.clone(memory_format=torch.contiguous_format).reshape(n, k).view(weight.dtype)


def unshuffle(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight ``[n, k]`` that ``shuffle`` gave ``packed``."""
    rows, columns = packed.shape
    tiles = packed.view(torch.uint8).reshape(rows // _TILE_N, columns // _TILE_K, _TILE_K // _RUN, _TILE_N, _RUN)
    return tiles.permute(0, 3, 1, 2, 4).reshape(rows, columns).view(packed.dtype)[:n, :k]


def _row_scales(a_scale: Tensor | None, b_scale: Tensor | None, a: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Scales as ``[m, 1]`` and ``[1, n]``: the kernels read one for each row and each column."""
    rows, columns = one_or_each(a_scale, (-1, 1), a), one_or_each(b_scale, (1, -1), a)
    return rows.expand(a.shape[0], 1).contiguous(), columns.expand(1, n).contiguous()


def _rows(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``gemm_a8w8``: scales and bias are applied before its only rounding."""
    if not a.shape[0]:
        return a.new_empty((0, n), dtype=out_dtype)
    import aiter  # pyrefly: ignore [missing-import]

    bias = None if bias is None else bias.contiguous()
    return aiter.gemm_a8w8(dense(a), dense(b.t()), *_row_scales(a_scale, b_scale, a, n), bias, out_dtype)


def _preshuffled(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``gemm_a8w8_bpreshuffle`` of a weight in the layout ``aiter_16x16``."""
    if not a.shape[0]:
        return a.new_empty((0, n), dtype=out_dtype)
    import aiter  # pyrefly: ignore [missing-import]

    out = aiter.gemm_a8w8_bpreshuffle(dense(a), b, *_row_scales(a_scale, b_scale, a, n), None, out_dtype)
    return add_bias(out, bias)


def _blocks(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``gemm_a8w8_blockscale``, then the bias."""
    if not a.shape[0]:
        return a.new_empty((0, n), dtype=out_dtype)
    import aiter  # pyrefly: ignore [missing-import]

    a, b = whole_blocks(a, b)
    scale_b = b_scale.float().contiguous()
    if a_scale is None:
        a_scale = a.new_ones((a.shape[0], scale_b.shape[1]), dtype=torch.float32)
    out = aiter.gemm_a8w8_blockscale(dense(a), dense(b.t()), a_scale.float().contiguous(), scale_b, out_dtype)
    return add_bias(out, bias)


for _name, _body in (("aiter_rowwise", _rows), ("aiter_preshuffled", _preshuffled), ("aiter_block", _blocks)):
    register_op(_name, _body)

register_kernel(
    Kernel(
        name="aiter_int8",
        provider="aiter",
        linear_kernel="AiterInt8ScaledMMLinearKernel",
        op="aiter_rowwise",
        requires=Requires(
            platforms=ROCM,
            packages=_AITER,
            codes=INT8_PAIRS,
            granularities=ROW_SCALES,
            out_dtypes=HALF_DTYPES,
            bias_dtypes=HALF_DTYPES,
            bias_as_out=True,
            align=16,
        ),
        numerics=Numerics.SAME_ACCUM,
        note="aiter.gemm_a8w8, scales and bias in its epilogue",
    ),
    priority=50,
)
for _feature, _pairs, _suffix in ROCM_FLOAT8:
    ((_codes, _),) = _pairs
    _target = {
        "platforms": ROCM,
        "features": frozenset({_feature}),
        "packages": _AITER,
        "codes": _pairs,
        "out_dtypes": HALF_DTYPES,
    }
    register_layout(
        Layout(
            name=f"aiter_16x16{_suffix}",
            weights=frozenset({_codes}),
            dtype=_codes,
            shape=lambda n, k: (n + -n % _TILE_N, k + -k % _TILE_K),
            pack=shuffle,
            unpack=unshuffle,
        )
    )
    register_kernel(
        Kernel(
            name=f"aiter_float8_preshuffled{_suffix}",
            provider="aiter",
            linear_kernel="AiterPreshuffledFP8ScaledMMLinearKernel",
            op="aiter_preshuffled",
            # An untuned shape needs k from 192 on and in multiples of the 64 to 512 that a step takes. What does not
            # fit is left to aiter_float8_rowwise, which pads less.
            requires=Requires(
                bias=False, **_target, granularities=_FLOAT8_SCALES, align=256, paddable=False, constant_weight=True
            ),
            numerics=Numerics.SAME_ACCUM,
            note="aiter.gemm_a8w8_bpreshuffle over a weight that is shuffled once",
            layout=f"aiter_16x16{_suffix}",
        ),
        priority=60,
    )
    register_kernel(
        Kernel(
            name=f"aiter_float8_rowwise{_suffix}",
            provider="aiter",
            linear_kernel="AiterFP8ScaledMMLinearKernel",
            op="aiter_rowwise",
            requires=Requires(
                **_target, granularities=_FLOAT8_SCALES, bias_dtypes=HALF_DTYPES, bias_as_out=True, align=16
            ),
            numerics=Numerics.SAME_ACCUM,
            note="aiter.gemm_a8w8, scales and bias in its epilogue",
        ),
        priority=50,
    )
    register_kernel(
        Kernel(
            name=f"aiter_float8_block{_suffix}",
            provider="aiter",
            linear_kernel="AiterFP8BlockScaledMMLinearKernel",
            op="aiter_block",
            requires=Requires(**_target, granularities=BLOCK_SCALES, align=16),
            # It adds no bias, so a bias meets a rounded sum: where the two cancel, that rounding is what is left.
            numerics=Numerics.REASSOCIATED,
            note="aiter.gemm_a8w8_blockscale, scales of 1 x 128 and 128 x 128, a bias added after it",
        ),
        priority=50,
    )
