"""A block of a diffusion transformer: attention and an MLP, shifted, scaled and gated by the step's embedding.

``python examples/08_diffusion.py``. Its activation is ``[batch, tokens, width]`` beside a conditioning of ``[batch,
width]``; the linears of both, and those behind ``chunk`` and the gates, are found all the same. Exits with 1 where
one was missed or the result is not that of the eager block.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from tiny import CLOSE, distance, int8_
from torch import Tensor, nn

import fx_quant


class Block(nn.Module):
    """A DiT block with adaLN-zero. Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", figure 3."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        """Attention of all tokens of an image to one another, ``[b, t, width] -> [b, t, width]``."""
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """``x[b, t, width], step[b, width] -> [b, t, width]``."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(F.silu(step))[:, None].chunk(6, dim=-1)
        x = x + gate * self.attend(self.norm(x) * (1 + scale) + shift)
        hidden = self.norm(x) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.down(F.gelu(self.up(hidden), approximate="tanh"))


@torch.no_grad()
def main(width: int = 64) -> int:
    """Quantize, explain, compile, compare; returns the exit status."""
    torch.manual_seed(0)
    block = int8_(Block(width, heads=4).eval().requires_grad_(False))
    x, step = torch.randn(2, 16, width), torch.randn(2, width)
    report = fx_quant.explain(block, x, step)
    print(report.summary())
    compiled = torch.compile(block, backend="fx_quant")
    to_eager = distance(compiled(x, step), block(x, step))
    print(f"{list(x.shape)}: {to_eager:.6f} from the eager block")
    return int(len(report.sites) < 5 or to_eager > CLOSE)


if __name__ == "__main__":
    sys.exit(main())
