"""Values of a checkpoint's JSON, which anybody may have written: of the type that is asked for, or one error."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from fx_quant.errors import FxQuantError
from fx_quant.errors import must as _must

Value = TypeVar("Value")

_MOST_CHARACTERS = 1000
_MOST_SIZE = 2**31 - 1
_CHECK = "check its config.json"
_WORDS = {Mapping: "an object", str: "text", bool: "true or false"}


class CheckpointError(FxQuantError, ValueError):
    """A checkpoint that cannot be loaded: what must hold, what was found, what to do next; one line of some length."""

    def __init__(self, message: str = "") -> None:
        text = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        half = _MOST_CHARACTERS // 2
        super().__init__(text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}")


must = partial(_must, error=CheckpointError)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_repr.maxlevel = _repr.maxdict = 4


def said(value: object) -> str:
    """``value`` as a message shows it: ``repr``, cut where it is long or deep."""
    return _repr.repr(value)


def field(holder: Mapping[str, Any], name: str, kind: type[Value], where: str) -> Value | None:
    """``holder[name]``, which must be of ``kind`` (``Mapping``, ``str`` or ``bool``); None where it is not there.

    Raises:
        CheckpointError: it is of another.
    """
    value = holder.get(name)
    must(
        value is None or isinstance(value, kind),
        f"{name} of {where} must be {_WORDS[kind]}, got {said(value)}; {_CHECK}",
    )
    return value


def texts(holder: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """``holder[name]``, which must be a list of text; empty where it is not there.

    Raises:
        CheckpointError: it is something else.
    """
    value = holder.get(name)
    value = () if value is None else value
    is_list = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
    must(is_list, f"{name} of {where} must be a list of names, got {said(value)}; {_CHECK}")
    return tuple(value)


def is_size(value: object) -> bool:
    """Whether ``value`` is a positive whole number that a dimension of a tensor may be."""
    return type(value) is int and 0 < value <= _MOST_SIZE


def check_depth(value: object, what: str, most: int = 64) -> None:
    """Nothing, where ``value`` nests lists and objects no more than ``most`` deep.

    Raises:
        CheckpointError: it does.
    """
    level = [value]
    for _ in range(most):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise CheckpointError(f"{what} must nest at most {most} deep, got more; download it again")
