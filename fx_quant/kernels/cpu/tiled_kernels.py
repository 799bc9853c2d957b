"""Kernels for CPUs, over weights that are packed once.

The op bodies run the native code for the sum, and plain PyTorch where it cannot be; ``lowerings/`` turns the ops into
native code with a fused epilogue.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fx_quant.kernels.cpu.native import BFLOAT16, Dot, matmul
from fx_quant.kernels.layouts import packed_layout
from fx_quant.kernels.operands import dense
from fx_quant.kernels.pytorch import weight_only
from fx_quant.kernels.registry import (
    CPU,
    FLOAT8_PAIRS,
    ROW_SCALES,
    Kernel,
    Requires,
    register_kernel,
    register_op,
    weight_scales,
)
from fx_quant.ops import correct, dequantize
from fx_quant.scheme import FLOAT_DTYPES, HALF_DTYPES, Granularity, Numerics


def matmul_body(layout: str | None, dot: Dot | None, sum_of_products: Callable[[Tensor, Tensor], Tensor]):
    """The body of an op that sums the products natively, or in plain PyTorch where that cannot be.

    Args:
        layout: of ``b``; None where that is ``[k, n]``.
        dot: the native code, or None.
        sum_of_products: ``(a [m, k], b [k, n]) -> [m, n]`` in plain PyTorch.
    """

    def body(a, b, a_scale, b_scale, bias, n, out_dtype, *, a_zero_point=None, b_sum=None, **_) -> Tensor:
        acc = None if dot is None else matmul(dot, a, b, n)
        if acc is None:
            acc = sum_of_products(a, b if layout is None else _unpacked(layout, b, n, a.shape[1]).t())
        acc = correct(acc, a_zero_point, b_sum)
        return dequantize(acc, a_scale, b_scale, bias, out_dtype).contiguous()

    return body


def _unpacked(layout: str, b: Tensor, n: int, k: int) -> Tensor:
    unpack = packed_layout(layout).unpack
    assert unpack is not None
    return unpack(b, n, k)


def _float32_mm(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float()


# Rows of bfloat16 from which decoding the weight and a float matmul is faster than ATen's, which takes longer for each
# row. `make bench-eager ARGS="--quick --threads 1"` shows both sides of the limit.
MANY_ROWS = 96


def _weight_only_int8(a, b, a_scale, b_scale, bias, n, out_dtype, **_) -> Tensor:
    """ATen's matmul of a float activation and int8 codes, which scales by the column in the activation's dtype.

    Of ``MANY_ROWS`` rows or more the weight is decoded, and a float matmul run. So it is for float16, which holds few
    scales: a weight's may be as small as 1e-7, and ATen computes it without vector instructions.
    """
    if a.dtype is torch.float16 or a.shape[0] >= MANY_ROWS:
        return weight_only(a, b, a_scale, b_scale, bias, n, out_dtype)
    scale = b_scale.reshape(-1).expand(n).to(a.dtype)
    # It reads the strides of dims of one element too.
    out = torch._weight_int8pack_mm(dense(a), dense(b.t()), scale.contiguous())
    return dequantize(out, None, None, bias, out_dtype)


register_op("cpu_weight_only_int8", _weight_only_int8)

for _name, _layout, _dot, _sum in (
    ("cpu_float8_bf16", "bf16_pairs", BFLOAT16, _float32_mm),
    ("cpu_float8_float32", "float32", None, _float32_mm),
):
    register_op(_name, matmul_body(_layout, _dot, _sum))

# Without VBMI only (Intel's Cooper Lake): `cpu_float8_decoded_bf16` comes before it.
register_kernel(
    Kernel(
        name="cpu_float8_bf16",
        provider="cpu",
        linear_kernel="CPUFP8ScaledMMLinearKernel",
        op="cpu_float8_bf16",
        requires=Requires(
            platforms=CPU,
            features=frozenset({"avx512", "avx512_bf16", "cpp_compiler"}),
            codes=FLOAT8_PAIRS,
            granularities=ROW_SCALES,
            out_dtypes=FLOAT_DTYPES,
            constant_weight=True,
        ),
        numerics=Numerics.SAME_ACCUM,
        note="float8 codes widened to bfloat16, our vdpbf16ps tiles over packed panels, epilogue fused",
        layout="bf16_pairs",
        a_dtype=torch.bfloat16,
    ),
    priority=30,
)
register_kernel(
    Kernel(
        name="cpu_float8_float32",
        provider="cpu",
        linear_kernel="CPUFP8ScaledMMLinearKernel",
        op="cpu_float8_float32",
        requires=Requires(
            platforms=CPU, codes=FLOAT8_PAIRS, granularities=ROW_SCALES, out_dtypes=FLOAT_DTYPES, constant_weight=True
        ),
        numerics=Numerics.SAME_ACCUM,
        note="float8 codes widened to float32, float matmul, epilogue fused by Inductor",
        layout="float32",
        a_dtype=torch.float32,
    ),
    priority=20,
)
register_kernel(
    Kernel(
        name="cpu_weight_only_int8",
        provider="cpu",
        linear_kernel="CPUWeightOnlyLinearKernel",
        op="cpu_weight_only_int8",
        requires=Requires(
            platforms=CPU,
            codes=frozenset((dtype, torch.int8) for dtype in HALF_DTYPES),
            granularities=weight_scales(Granularity.PER_TENSOR, Granularity.PER_CHANNEL),
            out_as_activation=True,
            # ATen reads past the end of a row whose k is no multiple of 16 (torch 2.13).
            align=16,
        ),
        numerics=Numerics.REASSOCIATED,
        note="torch._weight_int8pack_mm for few rows of bfloat16, the weight decoded and a float matmul else",
    ),
    priority=20,
)
