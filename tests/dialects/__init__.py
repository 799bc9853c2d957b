"""How people quantize a linear layer, as flows that are built offline: one module for each way or library.

``python -m tests.dialects`` captures every flow in every variant and prints what fx_quant makes of it.
"""

from __future__ import annotations
