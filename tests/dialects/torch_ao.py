"""torch.ao: eager-mode and FX-graph-mode quantization, whose modules hold packed weights behind opaque ops."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.dialects.registry import flow
from tests.dialects.weights import K, N

# The quantized modules take float32 activations only.
_F32: dict[str, Any] = {
    "dtypes": (torch.float32,),
    "expected": "prepare",
    "why": "weights are packed in script objects that Dynamo cannot trace: the modules must be converted first",
}


def example() -> Tensor:
    """An activation ``[4, 8, k]`` to calibrate with."""
    return torch.randn(4, 8, K, generator=torch.Generator().manual_seed(1))


def net(bias: bool) -> nn.Module:
    """A float linear, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N, bias=bias)).eval()


def fx_graph_mode(dynamic: bool, dtype: torch.dtype, bias: bool) -> nn.Module:
    """``prepare_fx``, calibrate, ``convert_fx`` with oneDNN's configuration."""
    import torch.ao.quantization.quantize_fx as quantize_fx
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig, get_default_qconfig_mapping

    torch.backends.quantized.engine = "onednn"
    mapping = QConfigMapping().set_global(default_dynamic_qconfig) if dynamic else get_default_qconfig_mapping("onednn")
    prepared = quantize_fx.prepare_fx(net(bias), mapping, (example(),))
    prepared(example())
    return quantize_fx.convert_fx(prepared)


flow(
    "fx_static_onednn",
    what="quantize_fx, static",
    **_F32
    | {"expected": "unsupported", "why": "its linears take and return quantized tensors, which are none to swap"},
)(partial(fx_graph_mode, False))
flow("fx_dynamic_onednn", what="quantize_fx, dynamic", **_F32)(partial(fx_graph_mode, True))


@flow("eager_quantize_dynamic", **_F32)
def eager_dynamic(dtype: torch.dtype, bias: bool) -> nn.Module:
    """torch.ao.quantization.quantize_dynamic"""
    torch.backends.quantized.engine = "onednn"
    return torch.ao.quantization.quantize_dynamic(net(bias), {nn.Linear}, dtype=torch.qint8)


@flow(
    "eager_qat_fakequant",
    **_F32 | {"expected": "unsupported", "why": "its codes never leave floating point: convert the model first"},
)
def eager_qat(dtype: torch.dtype, bias: bool) -> nn.Module:
    """a QAT-prepared model in eval mode: FakeQuantize modules"""
    from torch.ao import quantization

    model = quantization.QuantWrapper(net(bias))
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model.train(), inplace=True)
    model(example())
    return model.eval().apply(quantization.disable_observer)
