"""Facts about libraries' opaque ops, by the name of the op; a file is found by listing the folder.

By name, because an op exists only once its library was imported, which this package never does. A file may hold

- ``RULES``: the rule that proves the value of an op;
- ``MATMUL_RULES``: the same, of an op that is a matmul;
- ``OWN_KERNELS``: ops that are a library's own fused kernel, in words.

A dialect outside of this repository calls ``register_dialect``, in a module that an entry point of the group
``fx_quant.dialects`` names, or anywhere before the model is compiled.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from typing import Any

from fx_quant.errors import FxQuantError
from fx_quant.passes.values import Rule

ENTRY_POINT_GROUP = "fx_quant.dialects"


def _collected(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for module in pkgutil.iter_modules(__path__):
        facts |= getattr(importlib.import_module(f"{__name__}.{module.name}"), name, {})
    return facts


RULES: dict[str, Rule] = _collected("RULES")
MATMUL_RULES: dict[str, Rule] = _collected("MATMUL_RULES")
OWN_KERNELS: dict[str, str] = _collected("OWN_KERNELS")
_REGISTERED: dict[str, frozenset[str]] = {}


def register_dialect(
    library: str,
    *,
    rules: Mapping[str, Rule] | None = None,
    matmul_rules: Mapping[str, Rule] | None = None,
    own_kernels: Mapping[str, str] | None = None,
) -> None:
    """Add the facts about a library's opaque ops; a library's new facts take the place of its former ones.

    Args:
        library: whose ops they are.
        rules, matmul_rules, own_kernels: as a file of this folder holds them, by the op as ``str(node.target)`` names
            it: ``"acme.unpack.default"``.

    Raises:
        FxQuantError: another dialect has a fact about one of the ops.
    """
    given = (rules or {}, matmul_rules or {}, own_kernels or {})
    tables: tuple[dict[str, Any], ...] = (RULES, MATMUL_RULES, OWN_KERNELS)
    former, ops = _REGISTERED.get(library, frozenset()), frozenset().union(*given)
    taken = sorted(ops & frozenset().union(*tables) - former)
    if taken:
        raise FxQuantError(f"an op must have one dialect, {taken[0]} has one already; leave it out of {library!r}")
    for table, facts in zip(tables, given, strict=True):
        for op in former & table.keys():
            del table[op]
        table.update(facts)
    _REGISTERED[library] = ops
    if not ops:
        del _REGISTERED[library]


def registered() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The dialects from outside, each with its ops: part of the key of what is cached."""
    load_dialects()
    return tuple((library, tuple(sorted(ops))) for library, ops in sorted(_REGISTERED.items()))


@functools.cache
def load_dialects() -> None:
    """Import what the entry points name, once."""
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()
