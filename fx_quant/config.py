"""The options of the backend, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fx_quant.errors import FxQuantError, unknown_name
from fx_quant.scheme import Numerics


@dataclass(frozen=True)
class Options:
    """What a user can ask of fx_quant.

    Args:
        numerics: the furthest numerics class that a rewrite may have: ``exact``, ``same_accum``, ``reassociated`` or
            ``approximate``.
        strict: a miss or an exception in a pass is an error instead of a warning.
        force_kernel: the kernel to use everywhere, or raise.
        disabled_kernels: kernels or providers not to use.
    """

    numerics: Numerics = Numerics.REASSOCIATED
    strict: bool = False
    force_kernel: str | None = None
    disabled_kernels: tuple[str, ...] = ()

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
        if not isinstance(values.get("strict", False), bool):
            raise FxQuantError(f"option 'strict' must be True or False, got {values['strict']!r}")
        disabled = values.get("disabled_kernels", ())
        if isinstance(disabled, str):
            disabled = tuple(filter(None, disabled.split(",")))
        values["disabled_kernels"] = tuple(disabled)
        force = values.get("force_kernel")
        if force is not None and not isinstance(force, str):
            raise FxQuantError(f"option 'force_kernel' must be the name of a kernel, got {force!r}")
        return cls(**values)


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
