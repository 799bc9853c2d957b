"""What a user can do about a miss, by the words of its reason."""

from __future__ import annotations

import re

_ADVICE = (
    (r"a pass failed", "run once with options={'strict': True} for the traceback, and report it"),
    (r"varies along k", "quantize with one scale for each row of the weight, or in groups along k"),
    (r"fake.quantiz", "convert the model first (convert_pt2e, or torchao's convert step), so that there are codes"),
    (r"g_idx", "quantize without act-order (desc_act=False)"),
    (r"lookup table", "quantize to int8, int4 or float8 instead"),
    (r"n and k must be static", "let only the rows of the input be dynamic: torch._dynamo.mark_dynamic(x, 0)"),
    (r"numerics=\w+ does not allow", "allow the class that it names: options={'numerics': ...}"),
    (r"changes from call to call", "make the weight and what scales it parameters or buffers of the module"),
    (r"literal in the code", "register it as a buffer of the module"),
    (r"only the activation is quantized", "quantize the weight too"),
    (r"left operand of the matmul", "multiply from the right: x @ weight.t(), or F.linear"),
    (r"it is inside", "call the linear outside of that op"),
)


def advice(reason: str) -> str:
    """What to do about a miss with this ``reason``; empty where nothing more is known than the reason says."""
    return next((do for words, do in _ADVICE if re.search(words, reason)), "")
