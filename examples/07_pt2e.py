"""PyTorch 2 Export quantization (PT2E): export, calibrate, convert, and compile what comes of it.

``python examples/07_pt2e.py``. The quantizer is X86Inductor's, with static activations. Exits with 1 where a matmul
was missed or the result is not that of the converted model.
"""

from __future__ import annotations

import sys

import torch
from tiny import CLOSE, distance
from torch import nn

import fx_quant


def converted(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """``model`` in int8, calibrated on ``x``, for any number of rows."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(x)
    return convert_pt2e(prepared)


@torch.no_grad()
def main(width: int = 64) -> int:
    """Quantize, explain, compile, compare; returns the exit status."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).eval()
    x = torch.randn(32, width)
    quantized = converted(model, x)
    report = fx_quant.explain(quantized, x)
    print(report.summary())
    compiled = torch.compile(quantized, backend="fx_quant")
    to_eager, to_float = distance(compiled(x[:5]), quantized(x[:5])), distance(compiled(x[:5]), model(x[:5]))
    print(f"5 rows: {to_eager:.6f} from the converted model run eagerly, {to_float:.4f} from the float model")
    return int(bool(report.misses) or to_eager > CLOSE)


if __name__ == "__main__":
    sys.exit(main())
