"""Export and AOTInductor: a quantized model as a package of machine code, loaded and run without its Python.

``python examples/10_aot_inductor.py`` (a minute of C++ compilation). AOTInductor is a set-up of Inductor's own, so
the passes come as ``joint_custom_pre_pass``. Whoever loads the package imports ``fx_quant.ops`` where it calls an op
of ours. Exits with 1 where nothing was rewritten or the result is not that of the eager model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch._inductor.config as inductor_config
from tiny import CLOSE, distance, int8_
from torch import nn
from torch._dynamo.utils import counters

import fx_quant


@torch.no_grad()
def main(width: int = 64) -> int:
    """Quantize, export, package, load, compare; returns the exit status."""
    from torchao.utils import unwrap_tensor_subclass

    torch.manual_seed(0)
    model = int8_(nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)).eval())
    x = torch.randn(8, width)
    print(fx_quant.explain(model, x).summary())
    expected = model(x)
    unwrap_tensor_subclass(model)  # a package holds plain tensors
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    with tempfile.TemporaryDirectory() as folder:
        rewritten = counters["fx_quant"]["rewritten"]
        with inductor_config.patch(joint_custom_pre_pass=fx_quant.inductor_pass()):
            path = torch._inductor.aoti_compile_and_package(exported, package_path=str(Path(folder, "model.pt2")))
        rewritten = counters["fx_quant"]["rewritten"] - rewritten
        loaded = torch._inductor.aoti_load_package(path)
        size = Path(path).stat().st_size
        away = max(distance(loaded(x), expected), distance(loaded(x[:3]), expected[:3]))
    print(f"package of {size / 2**10:.0f} KiB: {rewritten} matmuls rewritten, {away:.6f} from the eager model")
    return int(rewritten != 2 or away > CLOSE)


if __name__ == "__main__":
    sys.exit(main())
