"""A dialect of one's own: the op of a library that no rule of ours knows, and the fact that makes it readable.

``python examples/11_own_dialect.py``. The library multiplies int8 weights by an op of its own, which a compiler
cannot look into: the matmul is missed, and the report names the op. One rule says what the op computes; that a kernel
here computes the same, over weights packed for this machine, is found by what is there. Exits with 1 where that is
not so.
"""

from __future__ import annotations

import sys

import torch
from tiny import CLOSE, distance
from torch import Tensor, nn
from torch.fx import Node

import fx_quant
from fx_quant.passes.dialects import register_dialect
from fx_quant.passes.rules.scaled_matmuls import scaled_product
from fx_quant.passes.values import Codes, Environment, Unknown, Value


@torch.library.custom_op("acme::int8_mm", mutates_args=())
def int8_mm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x[m, k] @ (weight[n, k] * scale[n]).T``: somebody else's library."""
    return x @ (weight.to(x.dtype) * scale[:, None]).t()


@int8_mm.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class AcmeLinear(nn.Module):
    """A linear of that library, with random weights."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (n, k), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(n) / (127 * k**0.5))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]``."""
        return torch.ops.acme.int8_mm(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)


def _int8_mm(env: Environment, node: Node) -> Value | None:
    """The rule: codes times codes' scale of each row of ``weight``, which are columns of the product."""
    x, weight, scale = node.all_input_nodes
    codes = env.value(weight)
    if not isinstance(codes, Codes):
        return Unknown(node, "int8_mm of a weight that is no codes")
    return scaled_product(node, x, Codes(codes.node, codes.dims[::-1], bounds=codes.bounds), scale)


@torch.no_grad()
def main(width: int = 128) -> int:
    """Explain without the dialect, then with it; compile, compare; returns the exit status."""
    torch.manual_seed(0)
    model = nn.Sequential(AcmeLinear(width, 2 * width), nn.ReLU(), AcmeLinear(2 * width, width))
    x = torch.randn(2, 4, width)
    without = fx_quant.explain(model, x)
    print(f"without: {without.summary()}")
    print(f"         {without.misses[0].reason}" if without.misses else "")
    register_dialect("acme", matmul_rules={"acme.int8_mm.default": _int8_mm})
    report = fx_quant.explain(model, x)
    print(f"with:    {report.summary()}")
    for site in report.sites:
        print(f"         {site.scheme} by {site.kernel}")
    away = distance(torch.compile(model, backend="fx_quant")(x), model(x))
    print(f"{away:.6f} from the eager model")
    return int(bool(without.sites) or len(report.sites) != 2 or away > CLOSE)


if __name__ == "__main__":
    sys.exit(main())
