"""A C++ template around the matmuls that decode a packed weight in registers: it yields the scaled sums of a panel.

``acc[m, n] = sum_j row_scale[m, j] * scale[n, j] * sum_{k in j} a[m, k] * (code[n, k] - zero_point[n, j])`` in float32,
of what is there, with the row's zero point taken off codes ``a``, or beside a float ``a`` with ``offset[n, j]`` added
to the scaled codes; scales that do not vary along k, unless beside an offset, bias, cast and what follows are the
epilogue, fused by the scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._inductor import ir

from fx_quant.kernels.cpu.decode import DECODED_LOOP, Decode, factor_kind
from fx_quant.kernels.cpu.plans import PlanTable
from fx_quant.lowerings.cpu_template import (
    BEGIN,
    N_START,
    SHARE,
    STORE,
    TileTemplate,
    contiguous,
    in_memory,
    with_contiguous_rows,
)

_TEMPLATE = (
    BEGIN
    + r"""    using Dot = {{decode.dot.struct}};
    using Decode = FxqDecode<{{decode.codes}}>;
    const int64_t M = {{kernel.size(acc_node, 0)}};
    const int64_t N = {{size("n", n)}}, K = {{size("k", k)}}, lda = {{size("lda", A.get_stride()[0])}};
    const int64_t panels = (N + FXQ_PANEL - 1) / FXQ_PANEL;
    const auto a = reinterpret_cast<const Dot::A*>(&{{kernel.index(A, [0, 0])}});
    FxqWeight weight{};
    weight.codes = reinterpret_cast<const uint8_t*>(&{{kernel.index(B, [0] * B.get_size()|length)}});
    weight.n = N;
    weight.k = K;
    weight.group = {{size("group", group)}};
{%- for field, node, added, kind, rows, row_stride, group_stride, panel_stride in factors %}
    weight.{{field}} = {
        FxqKind({{kind}}), &{{kernel.index(node, [0] * node.get_size()|length)}},
        {{rows}}, {{size("row_stride", row_stride)}}, {{group_stride}},
        {{size("panel_stride", panel_stride)}}, {{added}}};
{%- endfor %}
{%- if R is defined %}
    weight.row_scale = &{{kernel.index(R, [0, 0])}};
    weight.row_scale_stride = {{kernel.stride(R, 0)}};
    weight.row_scale_group_stride = {{kernel.stride(R, 1)}};
{%- endif %}
{%- if P is defined %}
    weight.row_zero_point = &{{kernel.index(P, [0] * P.get_size()|length)}};
    weight.row_zero_point_stride = {{row_zero_point_stride}};
{%- endif %}
"""
    + SHARE
    + DECODED_LOOP.substitute(
        sums="""{{kernel.define_stack_allocated_buffer("acc", [384, 64], float32)}}
        static_assert(FXQ_CHUNK_ROWS == 384 && FXQ_PANEL == 64);""",
        panel=N_START.rstrip("\n"),
        store=STORE.rstrip("\n"),
    )
    + r"""    }
}
"""
)


class DecodedTemplate(TileTemplate):
    """Renders one matmul of a weight that is decoded in registers, together with its epilogue."""

    text = _TEMPLATE

    def __init__(
        self,
        decode: Decode,
        inputs: Mapping[str, ir.IRNode],
        layout: ir.Layout,
        n: int,
        k: int,
        block: Sequence[int] | None,
    ) -> None:
        super().__init__(decode.dot, inputs, layout, n, k)
        self.name, self.source = f"{decode.dot.name}_decoded", decode.source
        self.decode, self.block = decode, None if block is None else tuple(map(int, block))

    def plans(self) -> PlanTable:
        """What the native code does for each number of rows."""
        return self.decode.plans()

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The weight's factors as ``FxqFactor`` has them."""
        named = (("scale", "S", 0), ("zero_point", "Z", 0), ("zero_point", "O", 1), ("code_sum", "C", 0))
        factors = [
            (field, inputs[name], added, *self._factor(inputs[name])) for field, name, added in named if name in inputs
        ]
        point = inputs.get("P")
        return {
            **super().arguments(inputs),
            "decode": self.decode,
            "group": self.k if self.block is None else self.block[1],
            "factors": factors,
            "row_zero_point_stride": 0 if point is None or _is_single(point) else point.get_stride()[0],
            "float32": torch.float32,
        }

    def _factor(self, node: Any) -> tuple[int | None, int, Any, Any, Any]:
        """``(kind, rows, row_stride, group_stride, panel_stride)``."""
        kind, stride = factor_kind(node.get_dtype()), node.get_stride()
        if len(stride) == 3:
            return kind, 1, *reversed(stride)
        if self.block is not None:
            return kind, self.block[0], *stride, 0
        return kind, 1, 0 if _is_single(node) else stride[-1], 0, 0


def _is_single(node: Any) -> bool:
    return all(size == 1 for size in node.get_size())


def decoded_matmul(
    decode: Decode,
    a: ir.TensorBox,
    b: ir.TensorBox,
    n: int,
    a_scale: ir.TensorBox | None,
    b_scale: ir.TensorBox | None,
    b_zero_point: ir.TensorBox | None,
    block: Sequence[int] | None,
    a_zero_point: ir.TensorBox | None = None,
    b_sum: ir.TensorBox | None = None,
    b_offset: ir.TensorBox | None = None,
) -> ir.TensorBox:
    """``[m, n]`` float32 sums of ``a [m, k]`` and packed ``b``; scaled with ``block``, as scales vary along k then, and
    with ``b_offset``, which is added to what is scaled, and only then.

    Args:
        a_scale: that of groups of ``a``; None where it does not vary along k.
        a_zero_point, b_sum: that of codes ``a``, and the sums of the weight's codes over each group, in panels.
        b_offset: beside a float ``a``, without ``b_zero_point``.
    """
    inputs: dict[str, ir.IRNode] = {"A": with_contiguous_rows(a), "B": contiguous(b)}
    if (block is not None or b_offset is not None) and b_scale is not None:
        inputs["S"] = in_memory(b_scale, torch.float32 if factor_kind(b_scale.get_dtype()) is None else None)
    if b_offset is not None:
        inputs["O"] = in_memory(b_offset, torch.float32 if factor_kind(b_offset.get_dtype()) is None else None)
    if b_zero_point is not None:
        inputs["Z"] = in_memory(b_zero_point, torch.int32 if factor_kind(b_zero_point.get_dtype()) is None else None)
    if block is not None and a_scale is not None:
        inputs["R"] = in_memory(a_scale, torch.float32)
    if a_zero_point is not None and b_sum is not None:
        inputs |= {"P": in_memory(a_zero_point, torch.int32), "C": in_memory(b_sum, None)}
    m, k = inputs["A"].get_size()
    layout = ir.FixedLayout(inputs["A"].get_device_or_error(), torch.float32, [m, n])
    return DecodedTemplate(decode, inputs, layout, int(n), int(k), block).generate().output_node()
