"""Kernels of PyTorch itself: ``torch._int_mm`` and ``torch._scaled_mm``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fx_quant.kernels.base import (
    ACTIVATION,
    INT8_PAIRS,
    KERNEL_SCHEMA,
    ROW_SCALES,
    Kernel,
    Requires,
    fake_kernel,
    register_kernel,
)
from fx_quant.ops import MATMUL_TAGS, correct, dequantize, register
from fx_quant.scheme import Granularity, Numerics

_HALF = frozenset({torch.bfloat16, torch.float16})
_FLOATS = _HALF | {torch.float32}
_E4M3 = frozenset({(torch.float8_e4m3fn, torch.float8_e4m3fn)})
_FNUZ = frozenset({(torch.float8_e4m3fnuz, torch.float8_e4m3fnuz)})
_MIXED_E5M2 = frozenset(
    {
        (torch.float8_e5m2, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.float8_e5m2),
    }
)
_NONE: frozenset[tuple[torch.dtype, torch.dtype]] = frozenset()
_TENSOR = Granularity.PER_TENSOR
_CUDA, _ROCM = frozenset({"cuda"}), frozenset({"rocm"})
_OCP, _FNUZ_ONLY = frozenset({"float8"}), frozenset({"float8_fnuz"})


CUDA_INT_MM_ROWS = 17  # cuBLASLt's int8 matmul asserts more than 16 rows


def _int_mm(a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, **_) -> Tensor:
    """``torch._int_mm`` and the canonical epilogue; on CUDA short inputs get zero rows that are cut off after it."""
    missing = CUDA_INT_MM_ROWS - a.shape[0] if a.is_cuda else 0
    if missing > 0:
        acc = torch._int_mm(torch.nn.functional.pad(a, (0, 0, 0, missing)), b)[: a.shape[0]]
    else:
        acc = torch._int_mm(a, b)
    return dequantize(correct(acc, a_zero_point, b_sum), a_scale, b_scale, bias, out_dtype).contiguous()


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


def _scaled_mm(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``torch._scaled_mm`` with its own scales and bias."""
    scale_a, scale_b = scale_operands(a_scale, b_scale, a.shape[0], n, a)
    a, b = a.contiguous(), column_major(b)
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=out_dtype)


def _channelwise(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """``torch._scaled_mm`` with unit scales to float32, then the canonical epilogue."""
    one = torch.ones((), dtype=torch.float32, device=a.device)
    acc = torch._scaled_mm(a.contiguous(), column_major(b), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return dequantize(acc, a_scale, b_scale, bias, out_dtype)


for _name, _body in (
    ("pytorch_int_mm", _int_mm),
    ("pytorch_scaled_mm", _scaled_mm),
    ("pytorch_channelwise", _channelwise),
):
    register(f"{_name}{KERNEL_SCHEMA}", _body, fake_kernel(_name), MATMUL_TAGS)

register_kernel(
    Kernel(
        name="pytorch_int_mm",
        provider="pytorch",
        op="pytorch_int_mm",
        requires=Requires(
            platforms=frozenset({"cpu"}), codes=INT8_PAIRS, granularities=ROW_SCALES, asymmetric=ACTIVATION
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
        op="pytorch_int_mm",
        # cuBLASLt wants n and k in multiples of 8; the op itself sees to m.
        requires=Requires(
            platforms=frozenset({"cuda"}),
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
for _suffix, _target, _same, _mixed, _library, _row_library in (
    ("", Requires(platforms=_CUDA, min_capability=89, align=16), _E4M3, _MIXED_E5M2, "cuBLASLt", "cuBLASLt or CUTLASS"),
    ("_rocm", Requires(platforms=_ROCM, features=_OCP, align=16), _E4M3, _MIXED_E5M2, "hipBLASLt", "hipBLASLt"),
    ("_rocm_fnuz", Requires(platforms=_ROCM, features=_FNUZ_ONLY, align=16), _FNUZ, _NONE, "hipBLASLt", "hipBLASLt"),
):
    register_kernel(
        Kernel(
            name=f"pytorch_scaled_mm{_suffix}",
            provider="pytorch",
            op="pytorch_scaled_mm",
            requires=replace(
                _target,
                codes=_same | _mixed,
                granularities=frozenset({(_TENSOR, _TENSOR)}),
                out_dtypes=_HALF,
                bias_dtypes=_HALF,
                bias_as_out=True,
            ),
            numerics=Numerics.SAME_ACCUM,
            note=f"torch._scaled_mm, tensor-wise scales, through {_library}",
        ),
        priority=20,
    )
    register_kernel(
        Kernel(
            name=f"pytorch_scaled_mm_rowwise{_suffix}",
            provider="pytorch",
            op="pytorch_scaled_mm",
            requires=replace(
                _target,
                codes=_same,
                granularities=ROW_SCALES - {(_TENSOR, _TENSOR)},
                out_dtypes=frozenset({torch.bfloat16}),
                bias_dtypes=frozenset({torch.bfloat16}),
            ),
            numerics=Numerics.SAME_ACCUM,
            note=f"torch._scaled_mm, row-wise scales, through {_row_library}",
        ),
        priority=20,
    )
    register_kernel(
        Kernel(
            name=f"pytorch_channelwise{_suffix}",
            provider="pytorch",
            op="pytorch_channelwise",
            requires=replace(_target, codes=_same | _mixed, granularities=ROW_SCALES, out_dtypes=_FLOATS),
            numerics=Numerics.SAME_ACCUM,
            note="torch._scaled_mm with unit scales to float32, epilogue fused by Inductor",
        ),
        priority=10,
    )
