"""Inside an Inductor set-up of one's own: our passes behind others, with Inductor's own options and backend.

``python examples/12_own_inductor.py``. Exits with 1 where the pass that was there did not run, a matmul was missed or
the result is not that of the eager model.
"""

from __future__ import annotations

import sys

import torch
from tiny import CLOSE, distance, int8_
from torch import nn
from torch._dynamo.utils import counters
from torch.fx import Graph

import fx_quant

seen: list[int] = []


def count_nodes(graph: Graph) -> None:
    """A pass that was there already."""
    seen.append(len(graph.nodes))


@torch.no_grad()
def main(width: int = 64) -> int:
    """Quantize, compile by Inductor with two passes, compare; returns the exit status."""
    torch.manual_seed(0)
    model = int8_(nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)).eval())
    x = torch.randn(8, width)
    print(fx_quant.explain(model, x).summary())
    seen.clear()
    before = counters["fx_quant"]["rewritten"]
    chained = fx_quant.inductor_pass(chain=count_nodes, numerics="exact")
    compiled = torch.compile(model, options={"joint_custom_pre_pass": chained, "epilogue_fusion": True})
    away, rewritten = distance(compiled(x), model(x)), counters["fx_quant"]["rewritten"] - before
    print(f"graphs of {seen} nodes were counted first; {rewritten} rewritten; {away:.6f} from the eager model")
    return int(not seen or rewritten != 2 or away > CLOSE)


if __name__ == "__main__":
    sys.exit(main())
