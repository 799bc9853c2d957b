"""Kernels of PyTorch itself: ``torch._int_mm`` and ``torch._scaled_mm``."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from fx_quant.kernels.operands import BLOCK_SCALES
from fx_quant.kernels.padding import SCALED_MM_ROWS
from fx_quant.kernels.registry import (
    ACTIVATION,
    CPU,
    CUDA,
    E4M3_PAIRS,
    FLOAT8_PAIRS,
    FNUZ_PAIRS,
    INT4_PAIRS,
    INT8_PAIRS,
    ROCM,
    ROW_SCALES,
    ROWS_BY_GROUPS,
    TENSOR_SCALES,
    WEIGHT,
    Kernel,
    Requires,
    register_kernel,
    register_op,
)
from fx_quant.ops import correct, decode, dequantize, dequantize_weight
from fx_quant.ops import scaled_mm as canonical_scaled_mm
from fx_quant.scheme import CODE_DTYPES, FLOAT_DTYPES, HALF_DTYPES, INT4_DTYPES, Granularity, Numerics

_MIXED_E5M2 = frozenset(
    {
        (torch.float8_e5m2, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.float8_e5m2),
    }
)
_NONE: frozenset[tuple[torch.dtype, torch.dtype]] = frozenset()
_ANYWHERE = CPU | CUDA | ROCM
_OCP, _FNUZ_ONLY = frozenset({"float8"}), frozenset({"float8_fnuz"})

CUDA_INT_MM_ROWS = 17  # cuBLASLt's int8 matmul asserts more than 16 rows


def _int_mm(a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, **_) -> Tensor:
    """``torch._int_mm`` and the canonical epilogue; on CUDA short inputs get zero rows that are cut off after it."""
    a, b = _dense(a), _dense(b)
    missing = CUDA_INT_MM_ROWS - a.shape[0] if a.is_cuda else 0
    if missing > 0:
        acc = torch._int_mm(torch.nn.functional.pad(a, (0, 0, 0, missing)), b)[: a.shape[0]]
    else:
        acc = torch._int_mm(a, b)
    return dequantize(correct(acc, a_zero_point, b_sum), a_scale, b_scale, bias, out_dtype).contiguous()


def _dense(x: Tensor) -> Tensor:
    """``x [rows, columns]`` in strides that ``torch._int_mm`` computes with, copied only where it has others.

    On CPUs it takes any strides and returns something else where an operand repeats, or where those of a dimension of
    one element are not what they would be in a matrix of its own.
    """
    (rows, columns), (down, across) = x.shape, x.stride()
    if 1 in (rows, columns):
        return x.contiguous().as_strided(x.shape, (columns, 1))
    if (across == 1 and down >= columns) or (down == 1 and across >= rows):
        return x
    return x.contiguous()


def column_major(b: Tensor) -> Tensor:
    """``b [k, n]`` with each column contiguous, the only layout that ``torch._scaled_mm`` takes on every GPU."""
    return b.t().contiguous().t()


def scale_operands(a_scale: Tensor | None, b_scale: Tensor | None, m, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as ``torch._scaled_mm`` wants them: both ``[]``, or both row-wise ``[m, 1]`` and ``[1, n]``."""
    one = like.new_ones((), dtype=torch.float32)
    a_scale = one if a_scale is None else a_scale.float()
    b_scale = one if b_scale is None else b_scale.float()
    a_single = a_scale.dim() == 0 or a_scale.shape[0] == 1
    if a_single and b_scale.numel() == 1:
        return a_scale.reshape(()), b_scale.reshape(())
    a_rows = a_scale.reshape(-1, 1).expand(m, 1).contiguous()
    return a_rows, b_scale.reshape(1, -1).expand(1, n).contiguous()


def scaled_mm(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``torch._scaled_mm`` with its own scales and bias."""
    scale_a, scale_b = scale_operands(a_scale, b_scale, a.shape[0], n, a)
    a, b = a.contiguous(), column_major(b)
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=out_dtype)


def _channelwise(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``torch._scaled_mm`` with unit scales to float32, then the canonical epilogue."""
    one = torch.ones((), dtype=torch.float32, device=a.device)
    acc = torch._scaled_mm(a.contiguous(), column_major(b), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return dequantize(acc, a_scale, b_scale, bias, out_dtype)


def _scaled_mm_blocks(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``torch._scaled_mm`` with scales of 1 x 128 and 128 x 128, in the strides that cuBLASLt wants."""
    # The activation's scales are read column by column, the weight's as [k / 128, n / 128] column by column.
    scale_a = a_scale.t().contiguous().t()
    out = torch._scaled_mm(a.contiguous(), column_major(b), scale_a, b_scale.contiguous().t(), out_dtype=torch.bfloat16)
    return out if bias is None else (out.float() + bias).to(out_dtype)


def _dequantized_blocks(a, b, a_scale, b_scale, bias, n, out_dtype, *, block=None, **_) -> Tensor:
    """Both operands dequantized in float32, and a float matmul."""
    wide = a.float() if a_scale is None else decode(a, a_scale, block=block and (1, block[1]))
    return dequantize(wide @ dequantize_weight(b, a.shape[1], b_scale, None, block), None, None, bias, out_dtype)


def _dequantized_groups(
    a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, b_zero_point=None, block=None
) -> Tensor:
    """The canonical op: exact sums of each group, then scaled."""
    if b_scale is None and block is None and b_zero_point is not None:
        b_scale = torch.ones_like(b_zero_point, dtype=torch.float32)
    points = {"a_zero_point": a_zero_point, "b_zero_point": b_zero_point}
    return canonical_scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, **points, block=block)


def weight_only(
    a, b, a_scale, b_scale, bias, n, out_dtype, *, b_zero_point=None, block=None, b_offset=None, **_
) -> Tensor:
    """The weight dequantized to the activation's dtype, or the result's where that is wider, and a float matmul.

    On a CPU it is float32 instead of float16, which takes as long and holds what the source scales after the sum.
    """
    dtype = torch.promote_types(a.dtype, out_dtype)
    dtype = torch.float32 if dtype is torch.float16 and a.device.type == "cpu" else dtype
    weight = dequantize_weight(b, a.shape[1], b_scale, b_zero_point, block, b_offset).to(dtype)
    return dequantize(a.to(dtype) @ weight, None, None, bias, out_dtype)


for _name, _body in (
    ("pytorch_int_mm", _int_mm),
    ("pytorch_scaled_mm", scaled_mm),
    ("pytorch_scaled_mm_block", _scaled_mm_blocks),
    ("pytorch_channelwise", _channelwise),
    ("pytorch_dequantized_block", _dequantized_blocks),
    ("pytorch_dequantized_groups", _dequantized_groups),
    ("pytorch_weight_only", weight_only),
):
    register_op(_name, _body)

register_kernel(
    Kernel(
        name="pytorch_int_mm",
        provider="pytorch",
        linear_kernel="TorchInt8ScaledMMLinearKernel",
        op="pytorch_int_mm",
        requires=Requires(
            platforms=CPU,
            features=frozenset({"exact_int_mm"}),
            codes=INT8_PAIRS,
            granularities=ROW_SCALES,
            asymmetric=ACTIVATION,
        ),
        numerics=Numerics.EXACT,
        note="torch._int_mm, epilogue fused by Inductor",
    ),
    priority=10,
)
register_kernel(
    Kernel(
        name="pytorch_int_mm_cuda",
        provider="pytorch",
        linear_kernel="TorchInt8ScaledMMLinearKernel",
        op="pytorch_int_mm",
        # cuBLASLt wants n and k in multiples of 8; the op itself sees to m.
        requires=Requires(
            platforms=CUDA,
            min_capability=80,
            codes=INT8_PAIRS,
            granularities=ROW_SCALES,
            asymmetric=ACTIVATION,
            align=8,
        ),
        numerics=Numerics.EXACT,
        note="torch._int_mm through cuBLASLt, epilogue fused by Inductor",
    ),
    priority=10,
)
# gfx94x has codes of its own, later GPUs those of OCP. PyTorch brings a CUTLASS kernel where cuBLASLt scales no rows.
for _suffix, _rows, _target, _same, _mixed, _library, _row_library in (
    (
        "",
        SCALED_MM_ROWS,
        Requires(platforms=CUDA, min_capability=89, align=16),
        E4M3_PAIRS,
        _MIXED_E5M2,
        "cuBLASLt",
        "cuBLASLt or CUTLASS",
    ),
    ("_rocm", 0, Requires(platforms=ROCM, features=_OCP, align=16), E4M3_PAIRS, _MIXED_E5M2, "hipBLASLt", "hipBLASLt"),
    (
        "_rocm_fnuz",
        0,
        Requires(platforms=ROCM, features=_FNUZ_ONLY, align=16),
        FNUZ_PAIRS,
        _NONE,
        "hipBLASLt",
        "hipBLASLt",
    ),
):
    register_kernel(
        Kernel(
            name=f"pytorch_scaled_mm{_suffix}",
            provider="pytorch",
            linear_kernel="PerTensorTorchFP8ScaledMMLinearKernel",
            op="pytorch_scaled_mm",
            requires=replace(
                _target,
                codes=_same | _mixed,
                granularities=TENSOR_SCALES,
                out_dtypes=HALF_DTYPES,
                bias_dtypes=HALF_DTYPES,
                bias_as_out=True,
            ),
            numerics=Numerics.SAME_ACCUM,
            note=f"torch._scaled_mm, tensor-wise scales, through {_library}",
            least_rows=_rows,
        ),
        priority=20,
    )
    register_kernel(
        Kernel(
            name=f"pytorch_scaled_mm_rowwise{_suffix}",
            provider="pytorch",
            linear_kernel="RowWiseTorchFP8ScaledMMLinearKernel",
            op="pytorch_scaled_mm",
            requires=replace(
                _target,
                codes=_same,
                granularities=ROW_SCALES - TENSOR_SCALES,
                out_dtypes=frozenset({torch.bfloat16}),
                bias_dtypes=frozenset({torch.bfloat16}),
            ),
            numerics=Numerics.SAME_ACCUM,
            note=f"torch._scaled_mm, row-wise scales, through {_row_library}",
            least_rows=_rows,
        ),
        priority=20,
    )
    register_kernel(
        Kernel(
            name=f"pytorch_channelwise{_suffix}",
            provider="pytorch",
            linear_kernel="ChannelWiseTorchFP8ScaledMMLinearKernel",
            op="pytorch_channelwise",
            requires=replace(_target, codes=_same | _mixed, granularities=ROW_SCALES, out_dtypes=FLOAT_DTYPES),
            numerics=Numerics.SAME_ACCUM,
            note="torch._scaled_mm with unit scales to float32, epilogue fused by Inductor",
            least_rows=_rows,
        ),
        priority=10,
    )
register_kernel(
    Kernel(
        name="pytorch_scaled_mm_block",
        provider="pytorch",
        linear_kernel="BlockWiseTorchFP8ScaledMMLinearKernel",
        op="pytorch_scaled_mm_block",
        # Of NVIDIA's, PyTorch has these scales for sm90 alone.
        requires=Requires(
            platforms=CUDA,
            min_capability=90,
            max_capability=90,
            codes=E4M3_PAIRS,
            granularities=BLOCK_SCALES,
            out_dtypes=frozenset({torch.bfloat16}),
            align=128,
            paddable=False,
        ),
        # It adds no bias, so a bias meets a rounded sum: where the two cancel, that rounding is what is left.
        numerics=Numerics.REASSOCIATED,
        note="torch._scaled_mm, scales of 1 x 128 and 128 x 128, through cuBLASLt",
    ),
    priority=20,
)
register_kernel(
    Kernel(
        name="pytorch_dequantized_block",
        provider="pytorch",
        linear_kernel="BlockWiseTorchFP8ScaledMMLinearKernel",
        op="pytorch_dequantized_block",
        dequantizes=True,
        requires=Requires(
            platforms=_ANYWHERE,
            codes=FLOAT8_PAIRS,
            granularities=frozenset({(Granularity.ANY_GROUP, Granularity.ANY_BLOCK)}),
            out_dtypes=FLOAT_DTYPES,
        ),
        numerics=Numerics.REASSOCIATED,
        note="both operands dequantized to float32, then a float matmul",
    ),
    priority=1,
)
for _name, _pairs, _granularities in (
    ("pytorch_dequantized_groups", INT8_PAIRS, ROWS_BY_GROUPS),
    ("pytorch_dequantized_int4_groups", INT4_PAIRS, ROWS_BY_GROUPS | ROW_SCALES),
):
    register_kernel(
        Kernel(
            name=_name,
            provider="pytorch",
            linear_kernel="TorchInt8ScaledMMLinearKernel",
            op="pytorch_dequantized_groups",
            dequantizes=True,
            requires=Requires(
                platforms=_ANYWHERE,
                codes=_pairs,
                granularities=_granularities,
                out_dtypes=FLOAT_DTYPES,
                asymmetric=ACTIVATION | WEIGHT,
                paddable=False,  # beside both zero points what is padded along k would count
            ),
            numerics=Numerics.SAME_ACCUM,
            note="exact sums of each group by float64 matmuls, then scaled",
        ),
        priority=1,
    )
register_kernel(
    Kernel(
        name="pytorch_weight_only",
        provider="pytorch",
        linear_kernel="TorchMPLinearKernel",
        op="pytorch_weight_only",
        dequantizes=True,
        requires=Requires(
            platforms=_ANYWHERE,
            codes=frozenset(itertools.product(FLOAT_DTYPES, CODE_DTYPES | INT4_DTYPES)),
            out_dtypes=FLOAT_DTYPES,
            asymmetric=WEIGHT,
            offset=True,
        ),
        numerics=Numerics.REASSOCIATED,
        note="the weight dequantized to the activation's dtype, then a float matmul",
    ),
    priority=1,
)
