"""A Hugging Face decoder quantized by torchao, compiled, and asked for tokens by ``generate()``.

``python examples/04_generate.py``. A static cache and a dynamic batch keep every token in the graphs of the first two
calls. Exits with 1 where a linear was missed or a token differs from the eager model's.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tiny import int8_, llama
from torch import Tensor
from torch._dynamo.utils import counters

import fx_quant

NEW_TOKENS = 6


def generate(model: Any, ids: Tensor) -> Tensor:
    """The tokens after ``ids``, ``[batch, NEW_TOKENS]``, greedily."""
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        cache_implementation="static",
        disable_compile=True,  # it would compile with its own backend
    )
    return tokens[:, ids.shape[1] :]


@torch.inference_mode()
def main(layers: int = 2, hidden: int = 64) -> int:
    """Quantize, explain, compile, generate; returns the exit status."""
    model = llama(layers, hidden)
    int8_(model.model)  # not lm_head, as quantized decoders are published
    prompt = torch.randint(2, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    eager = generate(model, prompt)

    report = fx_quant.explain(model, prompt, use_cache=False)
    print(report.summary())
    model.forward = torch.compile(model.forward, backend="fx_quant", dynamic=True)
    compiled = generate(model, prompt)
    graphs = counters["stats"]["unique_graphs"]
    generate(model, prompt.flip(1))
    more = counters["stats"]["unique_graphs"] - graphs
    same = (eager == compiled).all().item()
    print(f"prompt {list(prompt.shape)}, {NEW_TOKENS} new tokens each; the same as eager: {same}")
    print(f"{graphs} graphs of the first call, {more} of the second")
    return int(not same or bool(report.misses) or more > 0)


if __name__ == "__main__":
    sys.exit(main())
