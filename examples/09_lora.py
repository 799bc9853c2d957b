"""An adapter (LoRA) in float beside a quantized base: the base is rewritten, and the adapter is left as it is.

``python examples/09_lora.py``. Exits with 1 where a linear of the base was missed, a matmul of the adapter was
rewritten, an adapter that is exchanged is not seen by the compiled model, or the result is not that of the eager
model.
"""

from __future__ import annotations

import sys

import torch
from tiny import CLOSE, distance, int8_, llama
from torch import Tensor, nn

import fx_quant

RANK = 4


class LoRA(nn.Module):
    """``base(x) + (x @ down.T) @ up.T``: ``base`` is quantized, ``down [rank, k]`` and ``up [n, rank]`` are float."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5, requires_grad=False)
        self.up = nn.Parameter(torch.randn(base.out_features, RANK) / 10, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]``."""
        return self.base(x) + x @ self.down.t() @ self.up.t()


def with_adapters(model: nn.Module) -> nn.Module:
    """``model``, its projections of queries and values with an adapter each."""
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj")) and isinstance(module, nn.Linear):
            model.set_submodule(name, LoRA(module))
    return model


@torch.no_grad()
def main(layers: int = 1) -> int:
    """Quantize, add adapters, compile, exchange them; returns the exit status."""
    model = llama(layers)
    int8_(model.model)
    with_adapters(model)
    prompt = torch.randint(2, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    report = fx_quant.explain(model, prompt, use_cache=False)
    print(report.summary())
    compiled = torch.compile(model, backend="fx_quant")

    def apart() -> float:
        return distance(compiled(prompt, use_cache=False).logits, model(prompt, use_cache=False).logits)

    first = apart()
    before = model(prompt, use_cache=False).logits
    for module in model.modules():
        if isinstance(module, LoRA):
            module.up.normal_()  # another adapter, in place
    second, moved = apart(), distance(model(prompt, use_cache=False).logits, before)
    print(f"{first:.6f} from eager; with other adapters {second:.6f}, which move the logits by {moved:.3f}")
    return int(len(report.sites) != 7 * layers or max(first, second) > CLOSE or moved < CLOSE)


if __name__ == "__main__":
    sys.exit(main())
