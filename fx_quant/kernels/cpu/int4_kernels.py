"""int4 weight-only matmuls on CPUs, by ATen's kernel over a weight that is packed once."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.kernels.layouts import Layout, register_layout
from fx_quant.kernels.registry import (
    CPU,
    WEIGHT,
    Kernel,
    Requires,
    register_kernel,
    register_op,
    weight_scales,
)
from fx_quant.ops import dequantize, unpack_nibbles
from fx_quant.scheme import INT4_DTYPES, Granularity, Numerics

_GROUPS = (32, 64, 128, 256)


def _pack(weight: Tensor) -> Tensor:
    """Two codes to a byte along k (code + 8, even k low), ``[n, k / 2]``, in the order of ATen's kernel."""
    nibbles = unpack_nibbles(weight)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.to(torch.int32), 2)


def _scales(scale: Tensor, shift: Tensor) -> Tensor:
    """``scale [n, groups]`` and what is added to ``code * scale``, as ATen reads them: ``[groups, n, 2]``."""
    return torch.stack((scale.t(), shift.t()), -1).contiguous()


register_layout(
    Layout(
        name="aten_int4",
        weights=frozenset({torch.uint8}),
        dtype=torch.uint8,
        shape=lambda n, k: (n, k),
        pack=_pack,
        unpack=None,
        align=16,
    )
)


def _weight_only_int4(
    a, b, a_scale, b_scale, bias, n, out_dtype, *, b_zero_point=None, block=None, b_offset=None, **_
) -> Tensor:
    """``torch.ops.aten._weight_int4pack_mm_for_cpu``, whose scales have the activation's dtype."""
    # Not kept from call to call: a graph may compute the scales, into memory that it uses again.
    shift = torch.zeros_like(b_scale) if b_zero_point is None else -b_scale * b_zero_point
    shift = shift if b_offset is None else shift + b_offset
    scales = _scales(b_scale.to(a.dtype), shift.to(a.dtype))
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(a.contiguous(), b, block[1], scales)
    return dequantize(out, None, None, bias, out_dtype)


register_op("cpu_weight_only_int4", _weight_only_int4)

register_kernel(
    Kernel(
        name="cpu_weight_only_int4",
        provider="cpu",
        linear_kernel="CPUWeightOnlyLinearKernel",
        op="cpu_weight_only_int4",
        requires=Requires(
            platforms=CPU,
            # Others it computes without vector instructions: decoding the weight in each call is faster.
            codes=frozenset((torch.bfloat16, codes) for codes in INT4_DTYPES),
            granularities=weight_scales(*map(Granularity.per_group, _GROUPS)),
            asymmetric=WEIGHT,
            offset=True,
            out_as_activation=True,
            align=16,
            paddable=False,
            whole_groups=True,
            constant_weight=True,
        ),
        numerics=Numerics.REASSOCIATED,
        note="torch.ops.aten._weight_int4pack_mm_for_cpu",
        layout="aten_int4",
    ),
    priority=20,
)
