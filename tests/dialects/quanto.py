"""optimum-quanto: weights in tensor subclasses, products behind ``quanto`` ops."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.dialects.hand import NOT_FASTER
from tests.dialects.registry import flow
from tests.dialects.variants import Activation, Variant
from tests.dialects.weights import K, N

NEEDS = ("optimum-quanto",)


def frozen(weights: str, activations: str | None, dtype: torch.dtype, bias: bool) -> nn.Module:
    """A linear quantized, calibrated where activations are quantized too, and frozen."""
    import optimum.quanto as quanto

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype).eval().requires_grad_(False)
    types = {"weights": getattr(quanto, weights)}
    if activations is not None:
        types["activations"] = getattr(quanto, activations)
    quanto.quantize(model, **types)
    if activations is not None:
        ((x,), _) = Activation()(Variant(dtype, 3, dynamic=False, bias=bias))
        with torch.no_grad(), quanto.Calibration():
            model(x)
    quanto.freeze(model)
    return model


for _weights in ("qint8", "qfloat8"):
    flow(
        f"quanto_w_{_weights}",
        needs=NEEDS,
        what=f"optimum-quanto weights={_weights}, frozen",
        expected="recognised",
        why=NOT_FASTER,
    )(partial(frozen, _weights, None))
flow(
    "quanto_w_qint8_a_qint8",
    needs=NEEDS,
    what="optimum-quanto weights=qint8 activations=qint8, calibrated and frozen",
    expected="prepare",
    why="activations are tensor subclasses that break the graph: the modules must be converted first",
)(partial(frozen, "qint8", "qint8"))
