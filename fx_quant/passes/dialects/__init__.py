"""Facts about libraries' opaque ops, by the name of the op; a file is found by listing the folder.

By name, because an op exists only once its library was imported, which this package never does. A file may hold

- ``RULES``: the rule that proves the value of an op;
- ``MATMUL_RULES``: the same, of an op that is a matmul;
- ``OWN_KERNELS``: ops that are a library's own fused kernel, in words.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from fx_quant.passes.values import Rule


def _collected(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for module in pkgutil.iter_modules(__path__):
        facts |= getattr(importlib.import_module(f"{__name__}.{module.name}"), name, {})
    return facts


RULES: dict[str, Rule] = _collected("RULES")
MATMUL_RULES: dict[str, Rule] = _collected("MATMUL_RULES")
OWN_KERNELS: dict[str, str] = _collected("OWN_KERNELS")
