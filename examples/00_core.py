"""The core, with nothing installed but fx_quant and PyTorch: quantize, explain, compile, compare.

``python examples/00_core.py``: what a fresh environment runs to try a wheel (``make wheel``). Exits with 1 where a
linear was missed or the compiled model is not as the eager one.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import fx_quant


@torch.no_grad()
def main(width: int = 256) -> int:
    """Do all of it; returns the exit status."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).eval()
    x = torch.randn(8, width)
    floats = model(x)
    print(fx_quant.quantize_(model, "int8 per_token (dynamic) x int8 per_channel"))
    report = fx_quant.explain(model, x)
    print(report)
    eager, compiled = model(x), torch.compile(model, backend="fx_quant")(x)
    away, from_floats = (((compiled - y).norm() / y.norm()).item() for y in (eager, floats))
    print(f"fx_quant {fx_quant.__version__}, PyTorch {torch.__version__}, {fx_quant.__file__}")
    print(f"{away:.6f} from the eager model, {from_floats:.4f} from the float one")
    return int(len(report.sites) != 2 or away > 1e-3 or from_floats > 0.1)


if __name__ == "__main__":
    sys.exit(main())
