"""The rules of the value algebra, by the op whose value they prove."""

from __future__ import annotations

from fx_quant.passes.rules import arithmetic, matmuls, views
from fx_quant.passes.values import Rule

RULES: dict[object, Rule] = {**views.RULES, **arithmetic.RULES, **matmuls.RULES}
