"""Kernels for x86 CPUs that leave the weight packed in 8 or 4 bits and decode it panel by panel.

One op for each dtype that is multiplied: the activation is bfloat16 (``vdpbf16ps``, and tiles of AMX for many rows
where the CPU has them) or float32 (fused multiply-add). A weight-only kernel gives it the float activation, a
block-scaled one the activation's codes, which are exact in it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fx_quant.kernels.cpu.decode import INT4_BYTES, decode_of, decoded_matmul, is_int4, scales_in_place
from fx_quant.kernels.layouts import packed_layout
from fx_quant.kernels.registry import (
    BLOCK_SCALES,
    CPU,
    FLOAT8_PAIRS,
    INT8_PAIRS,
    ROW_SCALES,
    WEIGHT,
    Kernel,
    Requires,
    fake_kernel,
    register_kernel,
    register_op,
    weight_scales,
)
from fx_quant.ops import decode, dequantize, dequantize_weight
from fx_quant.scheme import CODE_DTYPES, FLOAT_DTYPES, INT4_DTYPES, Granularity, Numerics

_ANY_SCALES = (Granularity.PER_TENSOR, Granularity.PER_CHANNEL, Granularity.ANY_GROUP, Granularity.ANY_BLOCK)


def _decoded(
    a, b, a_scale, b_scale, bias, n, out_dtype, *, b_zero_point=None, block=None, b_offset=None, fixed=False, **_
) -> Tensor:
    """The native matmul, or float matmuls of the unpacked weight where it cannot run.

    Args:
        fixed: each row is summed in one order, however many there are.
    """
    how = decode_of(a.dtype, b.dtype, is_int4(b), fixed, scales_of(b_scale))
    b_zero_point, b_offset = as_one_shift(b_scale, b_zero_point, b_offset)
    out = decoded_matmul(how, a, b, n, a_scale, b_scale, b_zero_point, bias, out_dtype, block, b_offset=b_offset)
    if out is not None:
        return out
    k = a.shape[1]
    b_scale, b_zero_point, b_offset = (rows_of_panels(each, n) for each in (b_scale, b_zero_point, b_offset))
    if a_scale is not None and block is not None:
        a, a_scale = decode(a, a_scale, block=(1, block[1])), None
    b_scale = torch.ones((), device=a.device) if b_scale is None else b_scale
    weight = dequantize_weight(unpacked(b, n, k), k, b_scale, b_zero_point, block, b_offset)
    a = a.float()
    # A library chooses the order of its sums by the number of rows, and by where they begin in memory.
    sums = torch.cat([row.clone() @ weight for row in a.split(1)]) if fixed else a @ weight
    return dequantize(sums, a_scale, None, bias, out_dtype)


def as_one_shift(
    b_scale: Tensor | None, b_zero_point: Tensor | None, b_offset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``b_zero_point`` and ``b_offset``, of which one is None: beside an offset a zero point is taken off it."""
    if b_zero_point is None or b_offset is None:
        return b_zero_point, b_offset
    return None, b_offset - (b_zero_point.float() if b_scale is None else b_scale * b_zero_point)


def scales_of(b_scale: Tensor | None) -> torch.dtype:
    """What native code is made for, of ``b_scale``."""
    return torch.float32 if b_scale is None else scales_in_place(b_scale.dtype, b_scale.dim())


def rows_of_panels(factor: Tensor | None, n: int) -> Tensor | None:
    """``factor [n, groups]`` of one in panels; any other as it is."""
    if factor is None or factor.dim() < 3:
        return factor
    return factor.transpose(1, 2).flatten(0, 1)[:n]


def unpacked(b: Tensor, n: int, k: int) -> Tensor:
    """Codes ``[k, n]`` of ``b`` in layout ``pairs`` or ``columns``, or two int4 codes to a byte of ``int4_words``."""
    unpack = packed_layout({1: "columns", 2: "pairs", INT4_BYTES: "int4_words"}[b.shape[-1]]).unpack
    assert unpack is not None
    return unpack(b, n, k // 2 if is_int4(b) else k).t()


def fake_of_panels(name: str) -> Callable[..., Tensor]:
    """The fake function of an op whose factors may be in panels."""
    fake = fake_kernel(name)

    def of_panels(a, b, a_scale, b_scale, bias, n, out_dtype, **more) -> Tensor:
        return fake(a, b, a_scale, rows_of_panels(b_scale, n), bias, n, out_dtype, **more)

    return of_panels


DECODED_OPS = ("cpu_decoded_bf16", "cpu_decoded_float32")


def fixed_name(op: str) -> str:
    """Name of the op that sums each row in one order."""
    return f"{op}_fixed"


for _name in DECODED_OPS:
    register_op(_name, _decoded, fake_of_panels(_name))
    register_op(fixed_name(_name), functools.partial(_decoded, fixed=True), fake_of_panels(fixed_name(_name)))

_AVX512 = frozenset({"avx512", "cpp_compiler"})
_BF16 = _AVX512 | {"avx512_bf16", "avx512_vbmi"}
_F32, _HALF, _WIDE = torch.float32, torch.bfloat16, frozenset({torch.float32, torch.float16})

for _suffix, _op, _floats, _features, _a_dtype, _by in (
    ("bf16", "cpu_decoded_bf16", frozenset({_HALF}), _BF16, None, "vdpbf16ps"),
    ("float32", "cpu_decoded_float32", _WIDE, _AVX512, _F32, "float32 multiply-add"),
):
    for _bits, _codes, _layout in (
        ("", CODE_DTYPES, "pairs" if _a_dtype is None else "columns"),
        ("_int4", INT4_DTYPES, "int4_words"),
    ):
        register_kernel(
            Kernel(
                name=f"cpu_weight_only{_bits}_{_suffix}",
                provider="cpu",
                linear_kernel="CPUWeightOnlyLinearKernel",
                op=_op,
                fixed_op=fixed_name(_op),
                requires=Requires(
                    platforms=CPU,
                    features=_features,
                    codes=frozenset(itertools.product(_floats, _codes)),
                    granularities=weight_scales(*_ANY_SCALES),
                    asymmetric=WEIGHT,
                    offset=True,
                    out_dtypes=FLOAT_DTYPES,
                    constant_weight=True,
                ),
                numerics=Numerics.REASSOCIATED,
                note=f"packed codes decoded in registers, {_by} tiles, epilogue fused",
                layout=_layout,
                a_dtype=_a_dtype,
                panel_factors=True,
            ),
            priority=30,
        )

register_kernel(
    Kernel(
        name="cpu_float8_decoded_bf16",
        provider="cpu",
        linear_kernel="CPUFP8ScaledMMLinearKernel",
        op="cpu_decoded_bf16",
        fixed_op=fixed_name("cpu_decoded_bf16"),
        requires=Requires(
            platforms=CPU,
            features=_BF16,
            codes=FLOAT8_PAIRS,
            granularities=ROW_SCALES,
            out_dtypes=FLOAT_DTYPES,
            constant_weight=True,
        ),
        numerics=Numerics.SAME_ACCUM,
        note="packed float8 codes widened to bfloat16 in registers, vdpbf16ps tiles, epilogue fused",
        layout="pairs",
        a_dtype=_HALF,
    ),
    priority=31,
)

for _codes, _pairs, _class in (
    ("int8", INT8_PAIRS, "CPUInt8ScaledMMLinearKernel"),
    ("float8", FLOAT8_PAIRS, "CPUFP8ScaledMMLinearKernel"),
):
    for _suffix, _op, _features, _a_dtype, _layout, _priority in (
        ("bf16", "cpu_decoded_bf16", _BF16, _HALF, "pairs", 30),
        ("float32", "cpu_decoded_float32", _AVX512, _F32, "columns", 25),
    ):
        register_kernel(
            Kernel(
                name=f"cpu_{_codes}_blocks_{_suffix}",
                provider="cpu",
                linear_kernel=_class,
                op=_op,
                fixed_op=fixed_name(_op),
                requires=Requires(
                    platforms=CPU,
                    features=_features,
                    codes=_pairs,
                    granularities=BLOCK_SCALES,
                    out_dtypes=FLOAT_DTYPES,
                    constant_weight=True,
                ),
                numerics=Numerics.SAME_ACCUM,
                note=f"sums of each group scaled in registers, {_codes} codes widened to {_suffix} there",
                layout=_layout,
                a_dtype=_a_dtype,
                panel_factors=True,
            ),
            priority=_priority,
        )
