"""``single_query_attention``: attention of one query over keys and values that lie in memory, as a token decodes."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_quant.ops.library import MATMUL_TAGS, register

aten = torch.ops.aten


def single_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None = None
) -> Tensor:
    """Attention of one query for each head, on a CPU: PyTorch's own op, of which compiled graphs have a kernel.

    ``out[b, h, 0] = sum_l softmax_l(scale * q[b, h, 0] . k[b, h', l] + mask[b, h, 0, l]) * v[b, h', l]``,
    where ``h' = h // (heads of q / heads of k)``. A query that the mask leaves no key has zeros. The kernel does not
    read keys and values that the mask leaves out in blocks of 32, so what is there, NaN too, does not matter.

    Args:
        q: ``[b, h, 1, d]``, float32 or bfloat16.
        k, v: ``[b, h', l, d]`` of the same dtype.
        mask: what is added to the scores, ``[b, h, 1, l]``, where any of the first two may be 1 or absent; float32 or
            of q's dtype; None adds nothing.
        scale: ``1 / sqrt(d)`` unless given.
    """
    _check(q, k, v)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)[0]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    torch._check(
        q.dim() == k.dim() == v.dim() == 4 and q.shape[2] == 1 and k.shape == v.shape and q.shape[3] == k.shape[3],
        lambda: (
            "single_query_attention: q must be [b, h, 1, d] and k, v [b, h', l, d], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        ),
    )


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None = None) -> Tensor:
    _check(q, k, v)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


register(
    "single_query_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, *, float? scale=None) -> Tensor",
    single_query_attention,
    _fake,
    MATMUL_TAGS,
)
