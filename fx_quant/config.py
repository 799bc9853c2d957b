"""The options of the backend, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fx_quant.errors import FxQuantError, unknown_name
from fx_quant.scheme import Numerics

# What a graph is cut at where ``splitting_ops`` does not say.
ATTENTION = ("scaled_dot_product_attention", "flex_attention")


@dataclass(frozen=True)
class Options:
    """What a user can ask of fx_quant.

    Args:
        numerics: the furthest numerics class that a rewrite may have: ``exact``, ``same_accum``, ``reassociated`` or
            ``approximate``.
        strict: a miss or an exception in a pass is an error instead of a warning.
        force_kernel: the kernel to use everywhere, or raise.
        disabled_kernels: kernels or providers not to use.
        piecewise: compile each graph in the pieces between ``splitting_ops``, those that are the same once.
        splitting_ops: names of the ops to cut at, such as ``mylib::attention``; they run as they are.
    """

    numerics: Numerics = Numerics.REASSOCIATED
    strict: bool = False
    force_kernel: str | None = None
    disabled_kernels: tuple[str, ...] = ()
    piecewise: bool = False
    splitting_ops: tuple[str, ...] = ATTENTION

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        """Options from plain values, such as ``{"numerics": "exact"}``.

        Raises:
            UnknownNameError: an option or numerics class that does not exist.
            FxQuantError: a value of the wrong type.
        """
        names = option_names()
        for name in given:
            if name not in names:
                raise unknown_name("option", name, names)
        values = dict(given)
        if "numerics" in values:
            values["numerics"] = parse_numerics(values["numerics"])
        for name in ("strict", "piecewise"):
            if not isinstance(values.get(name, False), bool):
                raise FxQuantError(f"option {name!r} must be True or False, got {values[name]!r}")
        if "splitting_ops" in values:
            values["splitting_ops"] = _splitting_ops(values["splitting_ops"], piecewise=values.get("piecewise", False))
        disabled = values.get("disabled_kernels", ())
        if isinstance(disabled, str):
            disabled = tuple(filter(None, disabled.split(",")))
        values["disabled_kernels"] = tuple(disabled)
        force = values.get("force_kernel")
        if force is not None and not isinstance(force, str):
            raise FxQuantError(f"option 'force_kernel' must be the name of a kernel, got {force!r}")
        return cls(**values)


def _splitting_ops(names: Any, *, piecewise: bool) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise FxQuantError(f"option 'splitting_ops' must be a list of names of ops, got {names!r}")
    if not piecewise:
        raise FxQuantError("option 'splitting_ops' needs 'piecewise': True beside it, as a whole graph is not split")
    return tuple(names)


def option_names() -> tuple[str, ...]:
    """Names of all options."""
    return tuple(field.name for field in dataclasses.fields(Options))


def parse_numerics(name: str | Numerics) -> Numerics:
    """A numerics class by name.

    Raises:
        UnknownNameError: no such class.
    """
    if isinstance(name, Numerics):
        return name
    classes = {str(numerics): numerics for numerics in Numerics}
    if name not in classes:
        raise unknown_name("numerics class", str(name), classes)
    return classes[name]
