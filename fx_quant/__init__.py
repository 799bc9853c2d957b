"""fx_quant: every quantized matmul of a ``torch.compile`` graph, rewritten to the fastest fused kernel or explained.

Public names load on first use; importing the package loads neither Inductor nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fx_quant.backend import inductor_pass
    from fx_quant.diagnose.check import CheckReport, check
    from fx_quant.diagnose.explain import explain
    from fx_quant.kernels.context import CompileContext, mode
    from fx_quant.kernels.cpu.tuner import TuneReport, tune
    from fx_quant.kernels.machine import detect_target
    from fx_quant.kernels.packed_weights import clear_packed_weights
    from fx_quant.kernels.select import select
    from fx_quant.layers.linear import QuantizedLinear
    from fx_quant.layers.quantize_model import QuantizeReport, quantize_
    from fx_quant.linear_kernels.fp8_linear import Fp8LinearOp
    from fx_quant.loading.checkpoint import load_quantized_
    from fx_quant.loading.prepare import PrepareReport, prepare_
    from fx_quant.report import Report
    from fx_quant.scheme import Granularity, OperandSpec, Scheme
    from fx_quant.target import Target, named_target

# No public name may be that of a submodule: importing the submodule would put the module in its place.
_HOMES = {
    "CheckReport": "diagnose.check",
    "CompileContext": "kernels.context",
    "Fp8LinearOp": "linear_kernels.fp8_linear",
    "Granularity": "scheme",
    "OperandSpec": "scheme",
    "PrepareReport": "loading.prepare",
    "QuantizeReport": "layers.quantize_model",
    "QuantizedLinear": "layers.linear",
    "Report": "report",
    "Scheme": "scheme",
    "Target": "target",
    "TuneReport": "kernels.cpu.tuner",
    "check": "diagnose.check",
    "clear_packed_weights": "kernels.packed_weights",
    "detect_target": "kernels.machine",
    "explain": "diagnose.explain",
    "inductor_pass": "backend",
    "load_quantized_": "loading.checkpoint",
    "mode": "kernels.context",
    "named_target": "target",
    "prepare_": "loading.prepare",
    "quantize_": "layers.quantize_model",
    "select": "kernels.select",
    "tune": "kernels.cpu.tuner",
}

__all__ = [
    "CheckReport",
    "CompileContext",
    "Fp8LinearOp",
    "Granularity",
    "OperandSpec",
    "PrepareReport",
    "QuantizeReport",
    "QuantizedLinear",
    "Report",
    "Scheme",
    "Target",
    "TuneReport",
    "check",
    "clear_packed_weights",
    "detect_target",
    "explain",
    "inductor_pass",
    "load_quantized_",
    "mode",
    "named_target",
    "prepare_",
    "quantize_",
    "select",
    "tune",
]


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'fx_quant' has no attribute {name!r}; it has {', '.join(__all__)}")
        value = getattr(importlib.import_module(f"fx_quant.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
