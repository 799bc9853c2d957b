"""The op library ``fx_quant`` and how an op is added to it."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("fx_quant", "DEF")

# Quantize lowers to pointwise/reduction IR: a stride constraint would realize its producer and stop fusion.
QUANTIZE_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
MATMUL_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
# What looks in each call whether its inputs were written to: a replayed CUDA graph would not look.
KEEPING_TAGS = (*MATMUL_TAGS, torch.Tag.cudagraph_unsafe)


def register(schema: str, body, fake, tags) -> None:
    """Define ``fx_quant::<schema>`` with a body that runs on every device and a fake function."""
    LIBRARY.define(schema, tags=tags)
    name = schema.split("(", maxsplit=1)[0]
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fx_quant::{name}", fake, lib=LIBRARY)
