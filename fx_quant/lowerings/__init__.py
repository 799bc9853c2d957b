"""Inductor lowerings of the fx_quant ops; importing this package registers them.

``backend.py`` imports it when a compile starts; ``import fx_quant`` alone does not.
"""

from __future__ import annotations

from fx_quant.lowerings import cpu_attention, packing, quantize, scaled_mm

__all__ = ["cpu_attention", "packing", "quantize", "scaled_mm"]
