"""The options of the backend, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Any

from fx_quant.errors import FxQuantError, unknown_name
from fx_quant.problem import SizeRange
from fx_quant.scheme import Numerics

# What a graph is cut at where ``splitting_ops`` does not say.
ATTENTION = ("scaled_dot_product_attention", "flex_attention")


class PaddingPolicy(str, Enum):
    """What may be padded so that a kernel runs, or runs faster."""

    AUTO = "auto"
    """``n`` and ``k`` where a kernel needs it; rows in eager calls only, for kernels that few rows make slow."""
    NEVER = "never"
    """Nothing: kernels that need it are not chosen."""
    CONSTANTS = "constants"
    """``n`` of weights that are constants, once; kernels that need ``k`` padded are not chosen."""
    ALWAYS = "always"
    """As ``auto``, and rows in graphs too."""
    VLLM = "vllm"
    """Rows as vLLM pads them: to 17 for ``torch._scaled_mm`` on CUDA but in its piecewise mode, none on ROCm."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Options:
    """What a user can ask of fx_quant.

    Args:
        numerics: the furthest numerics class that a rewrite may have: ``exact``, ``same_accum``, ``reassociated`` or
            ``approximate``.
        strict: a miss or an exception in a pass is an error instead of a warning.
        force_kernel: the kernel to use everywhere, or raise.
        disabled_kernels: kernels or providers not to use.
        padding: what may be padded: ``auto``, ``never``, ``constants``, ``always`` or ``vllm``.
        deterministic: one kernel and one plan for all numbers of rows, whose bits in a row do not depend on how many
            rows stand beside it; kernels that cannot are not chosen.
        ranges: ranges of m (rows of the activation), as ``(low, high)`` or texts such as ``"..16"`` and ``"17.."``. A
            graph is compiled for the range that holds the m of its call, with the kernels and pads for that, and one
            for each other range that is called; without it one graph is for all m.
        piecewise: compile each graph in the pieces between ``splitting_ops``, those that are the same once.
        splitting_ops: names of the ops to cut at, such as ``mylib::attention``; a library's own run as they are.
        splitting_modules: modules to cut around, by patterns of their paths (``model.layers.*``) or names of their
            classes; where they are given, ops are cut at only where ``splitting_ops`` is too.
        compile_sizes: numbers of rows to compile each piece for by itself, beside all of them.
    """

    numerics: Numerics = Numerics.REASSOCIATED
    strict: bool = False
    force_kernel: str | None = None
    disabled_kernels: tuple[str, ...] = ()
    padding: PaddingPolicy = PaddingPolicy.AUTO
    deterministic: bool = False
    ranges: tuple[SizeRange, ...] = ()
    piecewise: bool = False
    splitting_ops: tuple[str, ...] = ATTENTION
    splitting_modules: tuple[str, ...] = ()
    compile_sizes: tuple[int, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        """Options from plain values, such as ``{"numerics": "exact"}``.

        Raises:
            UnknownNameError: an option, numerics class or padding policy that does not exist.
            FxQuantError: a value of the wrong type.
        """
        names = option_names()
        for name in given:
            if name not in names:
                raise unknown_name("option", name, names)
        values = dict(given)
        if "numerics" in values:
            values["numerics"] = parse_numerics(values["numerics"])
        if "padding" in values:
            values["padding"] = parse_padding(values["padding"])
        if "ranges" in values:
            values["ranges"] = parse_ranges(values["ranges"])
        for name in ("strict", "deterministic", "piecewise"):
            if not isinstance(values.get(name, False), bool):
                raise FxQuantError(f"option {name!r} must be True or False, got {values[name]!r}")
        for name, of in (("splitting_ops", "ops"), ("splitting_modules", "modules")):
            if name in values:
                values[name] = _names(name, of, values[name], piecewise=values.get("piecewise", False))
        if values.get("splitting_modules"):
            values.setdefault("splitting_ops", ())
        if "compile_sizes" in values:
            values["compile_sizes"] = _compile_sizes(values["compile_sizes"], piecewise=values.get("piecewise", False))
        disabled = values.get("disabled_kernels", ())
        if isinstance(disabled, str):
            disabled = tuple(filter(None, disabled.split(",")))
        values["disabled_kernels"] = tuple(disabled)
        force = values.get("force_kernel")
        if force is not None and not isinstance(force, str):
            raise FxQuantError(f"option 'force_kernel' must be the name of a kernel, got {force!r}")
        return cls(**values)


def _names(option: str, of: str, names: Any, *, piecewise: bool) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise FxQuantError(f"option {option!r} must be a list of names of {of}, got {names!r}")
    if not piecewise:
        raise FxQuantError(f"option {option!r} needs 'piecewise': True beside it, as a whole graph is not split")
    return tuple(names)


def _compile_sizes(sizes: Any, *, piecewise: bool) -> tuple[int, ...]:
    if not isinstance(sizes, (list, tuple, set, frozenset, range)) or not all(
        isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0  # NumPy's too
        for size in sizes
    ):
        raise FxQuantError(f"option 'compile_sizes' must be a list of numbers of rows, 1 or more, got {sizes!r}")
    if sizes and not piecewise:
        raise FxQuantError("option 'compile_sizes' needs 'piecewise': True beside it, as sizes are those of pieces")
    return tuple(sorted({int(size) for size in sizes}))


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


def parse_ranges(given: Any) -> tuple[SizeRange, ...]:
    """Ranges of m: each a ``SizeRange``, a pair ``(low, high)`` with None for no bound, or a text such as ``"1..16"``.

    Raises:
        FxQuantError: something else, or a range that holds nothing.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise FxQuantError(f"option 'ranges' must be a list such as ['..16', '17..'], got {given!r}")
    return tuple(map(_range, given))


def _range(given: Any) -> SizeRange:
    bounds = given
    if isinstance(given, SizeRange):
        bounds = given.low, given.high
    elif isinstance(given, str) and ".." in given:
        bounds = [int(bound) if bound.strip().isdecimal() else bound.strip() or None for bound in given.split("..", 1)]
    if isinstance(bounds, Sequence) and len(bounds) == 2 and all(b is None or type(b) is int for b in bounds):
        low, high = bounds[0] or 0, bounds[1]
        if low >= 0 and (high is None or low <= high):
            return SizeRange(low, high)
    raise FxQuantError(f"a range of option 'ranges' must be low..high with 0 <= low <= high, got {given!r}")


# Made once: the Dynamo of PyTorch 2.11 does not trace a loop over an enum.
_POLICIES = {str(policy): policy for policy in PaddingPolicy}


def parse_padding(name: str | PaddingPolicy) -> PaddingPolicy:
    """A padding policy by name.

    Raises:
        UnknownNameError: no such policy.
    """
    if str(name) not in _POLICIES:
        raise unknown_name("padding policy", str(name), _POLICIES)
    return _POLICIES[str(name)]
