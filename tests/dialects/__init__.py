"""How people quantize a linear layer, as flows that are built offline: one module for each way or library.

``python -m tests.dialects`` captures every flow in every variant and prints what fx_quant makes of it. To add a flow,
decorate a builder ``(dtype, bias) -> module``, or a module class, with ``registry.flow``; a library that it imports
goes into ``needs``, and where it is not installed the flow is unavailable instead of wrong.
"""

from __future__ import annotations
