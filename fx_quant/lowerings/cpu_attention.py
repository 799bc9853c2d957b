"""A C++ template around the attention of one query (``kernels/cpu/source/attention.h``): it yields a row for each head.

Threads share the heads that keys and values are of; where these are fewer, the heads of the queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering, to_dtype
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import fx_quant.ops.attention  # noqa: F401  (the op)
from fx_quant.compat import templates_take_unbacked_sizes
from fx_quant.kernels.cpu.native import source
from fx_quant.lowerings.cpu_template import BEGIN, EpilogueTemplate, in_memory, is_number, with_contiguous_rows

aten = torch.ops.aten
fxq = torch.ops.fx_quant

_TEMPLATE = (
    BEGIN
    + r"""    constexpr int HEAD = {{n}};
    const int64_t batch = {{kernel.size(Q, 0)}}, heads = {{kernel.size(Q, 1)}}, shared = {{kernel.size(K, 1)}};
    const int64_t count = {{kernel.size(K, 2)}}, group = heads / std::max<int64_t>(shared, 1);
    const auto q = reinterpret_cast<const {{codes}}*>(&{{kernel.index(Q, [0, 0, 0, 0])}});
    const auto k = reinterpret_cast<const {{codes}}*>(&{{kernel.index(K, [0, 0, 0, 0])}});
    const auto v = reinterpret_cast<const {{codes}}*>(&{{kernel.index(V, [0, 0, 0, 0])}});
{%- if M is defined %}
    const auto mask = reinterpret_cast<const {{mask_type}}*>(&{{kernel.index(M, [0, 0, 0, 0])}});
{%- endif %}
{%- if num_threads > 1 %}
{%- set all_threads = "omp_get_max_threads()" if dynamic_threads else num_threads %}
    const bool apart = batch * shared < {{all_threads}};
    const int64_t together = apart ? 1 : group, tasks = batch * heads / std::max<int64_t>(together, 1);
    #pragma omp parallel for num_threads({{all_threads}})
{%- else %}
    const int64_t together = group, tasks = batch * shared;
{%- endif %}
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t i = task * together / heads, first = task * together % heads, from = first / group;
        std::vector<FxqAttention<{{codes}}, {{mask_type}}, HEAD>> queries;
        queries.reserve(together);
        for (int64_t head = first; head < first + together; head++) {
            queries.emplace_back(
                q + i * {{kernel.stride(Q, 0)}} + head * {{kernel.stride(Q, 1)}},
{%- if M is defined %}
                FxqMask<{{mask_type}}>{
                    mask
{%- for dim, at in ((0, "i"), (1, "head")) if dim in mask_dims %} + {{at}} * {{kernel.stride(M, dim)}}{% endfor -%}
                    , {{kernel.stride(M, 3) if 3 in mask_dims else 0}}},
{%- else %}
                FxqMask<{{mask_type}}>{nullptr, 0},
{%- endif %}
                {{scale}}f);
        }
        fxq_attend(
            queries,
{%- for past, data in (("K", "k"), ("V", "v")) %}
{%- set x = inputs[past] %}
            FxqPast<{{codes}}>{
                {{data}} + i * {{kernel.stride(x, 0)}} + from * {{kernel.stride(x, 1)}}, {{kernel.stride(x, 2)}}},
{%- endfor %}
            count);
        for (int64_t head = first; head < first + together; head++) {
            {{kernel.define_stack_allocated_buffer("acc", [1, n], float32)}}
            queries[head - first].store(acc);
            const int64_t m_start = i * heads + head, n_start = 0;
{%- set tile_Y = kernel.slice_nd(Y_2d, [("m_start", "m_start + 1"), ("0", n)]) %}
            {{kernel.store_output(
                tile_Y, kernel.local_buffers["acc"], acc_node, epilogue_nodes,
                offsets=("m_start", "n_start"), reindexers=reindexers
            )|indent(12)}}
        }
    }
}
"""
)
_TYPES: Mapping[torch.dtype, str] = {torch.float32: "float", torch.bfloat16: "uint16_t"}


class AttentionTemplate(EpilogueTemplate):
    """Renders the attention of one query for each of ``[b * h, d]`` rows, together with its epilogue."""

    text = _TEMPLATE

    def __init__(self, inputs: Mapping[str, ir.IRNode], layout: ir.Layout, head: int, scale: float) -> None:
        super().__init__("fxq_attention", inputs, layout, head)
        self.scale = scale

    def native(self) -> str:
        """One query at a time, in vectors of any machine."""
        return source("values.h", "attention.h")

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Types, the dims in which a mask is not repeated, and the scale."""
        mask = inputs.get("M")
        return {
            "codes": _TYPES[inputs["Q"].get_dtype()],
            "mask_dims": [] if mask is None else [dim for dim, size in enumerate(mask.get_size()) if size != 1],
            "mask_type": _TYPES[torch.float32 if mask is None else mask.get_dtype()],
            "scale": float(self.scale).hex(),
            "float32": torch.float32,
        }


def _can_render(q: ir.TensorBox, k: ir.TensorBox, mask: ir.TensorBox | None) -> bool:
    head = q.get_size()[3]
    dtypes = {q.get_dtype()} if mask is None else {q.get_dtype(), mask.get_dtype()}
    if not templates_take_unbacked_sizes() and any(map(free_unbacked_symbols, (*q.get_size(), *k.get_size()))):
        return False
    return is_number(head) and head > 0 and head % 16 == 0 and dtypes <= set(_TYPES)


@register_lowering(fxq.single_query_attention.default, type_promotion_kind=None)
def single_query_attention(q, k, v, mask, *, scale=None) -> ir.TensorBox:
    """Our kernel, what follows it fused; PyTorch's op where the kernel does not know the dtype or the head's size."""
    if not _can_render(q, k, mask):
        return fallback_handler(fxq.single_query_attention.default, add_to_fallback_set=False)(
            q, k, v, mask, scale=scale
        )
    batch, heads, _, head = q.get_size()
    inputs = {"Q": with_contiguous_rows(q), "K": with_contiguous_rows(k), "V": with_contiguous_rows(v)}
    if mask is not None:
        ones = [1] * (4 - len(mask.get_size()))
        inputs["M"] = in_memory(lowerings[aten.reshape.default](mask, [*ones, *mask.get_size()]))
    layout = ir.FixedLayout(q.get_device_or_error(), torch.float32, [batch * heads, head])
    scale = 1 / math.sqrt(head) if scale is None else scale
    rows = AttentionTemplate(inputs, layout, int(head), scale).generate().output_node()
    return lowerings[aten.reshape.default](to_dtype(rows, q.get_dtype()), [batch, heads, 1, head])
